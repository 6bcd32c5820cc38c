"""TorchScript: one file that Python and C++ load without the Python code of the network."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..model.folder import Model
from ..model.folds import inference_network
from ..model.runner import NetworkOutput
from .rewrites import with_low_convolutions, with_shuffles
from .torch import DTYPES, exact_float32, refuse_half_on_cpu

FILE = "network.ts"


class ScriptRunner:
    """Runs a traced network."""

    def __init__(self, script: torch.jit.ScriptModule, device: torch.device) -> None:
        self._script = script
        self._device = device

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32; the logits come back on the runner's device."""
        with torch.inference_mode(), exact_float32():
            return NetworkOutput(*self._script(tiles.to(self._device)))


class TorchScriptBackend:
    """Networks traced by torch.jit."""

    name = "torchscript"
    compiles = True
    bound_to: tuple[str, ...] = ("device",)  # constants stay where they were traced

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why it cannot run in this precision on this device, or None."""
        return refuse_half_on_cpu(device, precision)

    def cannot_build(self) -> str | None:
        """Return None: what runs it compiles it too."""
        return None

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Trace to `network.ts`, for any number of tiles."""
        save_script(trace(model, tiles, precision), folder / FILE)

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> ScriptRunner:
        """Load it onto a device."""
        assert folder is not None  # it compiles
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.jit is deprecated
            return ScriptRunner(torch.jit.load(str(folder / FILE), map_location=device), device)


def trace(model: Model, tiles: Tensor, precision: str) -> torch.jit.ScriptModule:
    """Turn a model's network into TorchScript, for any number of tiles.

    Args:
        model: Model with weights.
        tiles: (N, C, *patch), N at least 2, on the device to run on.
        precision: "fp32"; with "bf16" and "fp16", only convolutions run in lower precision.
    """
    network = with_shuffles(inference_network(model))
    if precision != "fp32":
        network = with_low_convolutions(network, DTYPES[precision])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated, and that shapes become constants
        return torch.jit.trace(network.to(tiles.device), (tiles,), check_trace=False)  # type: ignore[return-value]


def save_script(script: torch.jit.ScriptModule, path: Path) -> None:
    """Write TorchScript to a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated
        torch.jit.save(script, str(path))
