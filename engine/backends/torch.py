"""The reference backend: the network as torch runs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model import Model
from ..network import build_network
from . import NetworkOutput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRunner:
    """Runs the networks of all folds and averages their logits.

    Args:
        networks: One per fold, on the device.
        device: Where they are.
        precision: "fp32"; "bf16" and "fp16" run under autocast, as nnU-Net does with fp16 on CUDA.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device, precision: str) -> None:
        self._networks = tuple(networks)
        self._device = device
        self._precision = precision

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32; the logits come back on the runner's device."""
        tiles = tiles.to(self._device)
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, DTYPES[self._precision], enabled=self._precision != "fp32"),
        ):
            logits = self._networks[0](tiles)
            for network in self._networks[1:]:
                logits = logits + network(tiles)
        return NetworkOutput(logits / len(self._networks) if len(self._networks) > 1 else logits)


class TorchBackend:
    """Eager torch."""

    name = "torch"

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why torch cannot run in this precision on this device, or None."""
        if device.type == "cpu" and precision == "fp16":
            return "fp16 needs a GPU; use fp32 or bf16 on a CPU"
        return None

    def load(self, model: Model, device: torch.device, precision: str) -> TorchRunner:
        """Build the network once per fold."""
        networks = [build_network(model.plan, weights).to(device).eval() for weights in model.weights]
        return TorchRunner(networks, device, precision)
