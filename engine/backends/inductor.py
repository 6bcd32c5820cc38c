"""AOTInductor: the network compiled for this machine, in one file that Python and C++ load."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..model.folder import Model
from ..model.folds import inference_network
from ..model.runner import NetworkOutput
from .rewrites import with_low_convolutions
from .torch import DTYPES, exact_float32, on_device, refuse_half_on_cpu

FILE = "network.pt2"


class InductorRunner:
    """Runs a compiled network one tile at a time: it was compiled for one tile."""

    def __init__(self, compiled: Callable[[Tensor], Any], device: torch.device) -> None:
        self._compiled = compiled
        self._device = device

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32; the logits come back on the runner's device."""
        with torch.inference_mode(), exact_float32(), on_device(self._device):
            outputs = [self._compiled(tile[None].contiguous()) for tile in tiles.to(self._device)]
        return NetworkOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


class InductorBackend:
    """Networks compiled ahead of time by torch's inductor."""

    name = "inductor"
    compiles = True
    bound_to: tuple[str, ...] = ("architecture", "system", "device", "cpu", "compute_capability", "torch")

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why it cannot run in this precision on this device, or None."""
        if device.type not in ("cpu", "cuda"):
            return f"it runs on CPUs and CUDA devices, not on {device.type}"
        return refuse_half_on_cpu(device, precision)

    def cannot_build(self) -> str | None:
        """Return why nothing can be compiled here, or None."""
        return None if shutil.which("g++") else "inductor compiles with g++, and there is none: install a C++ compiler"

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Compile to `network.pt2`, for this machine's instructions and one tile."""
        if reason := self.cannot_build():
            raise BackendUnavailable(reason)
        from torch._inductor import aoti_compile_and_package

        network = inference_network(model)
        if precision != "fp32":
            network = with_low_convolutions(network, DTYPES[precision])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(network.to(tiles.device), (tiles[:1],), strict=False)
            aoti_compile_and_package(exported, package_path=str(folder / FILE), inductor_configs={"freezing": True})

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> InductorRunner:
        """Load the compiled code."""
        from torch._inductor import aoti_load_package

        assert folder is not None  # it compiles
        # torch 2.6 knows no such argument.
        index: dict[str, Any] = {} if device.index is None else {"device_index": device.index}
        with warnings.catch_warnings(), on_device(device):
            warnings.simplefilter("ignore")
            return InductorRunner(aoti_load_package(str(folder / FILE), **index), device)
