"""The reference backend: the network as torch runs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model import Model
from ..network import MultiTaskUNet, build_network
from . import NetworkOutput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRunner:
    """Runs the networks of all folds and averages their logits, those of classes too for multi-task networks.

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
            seg_logits, class_logits = _run(self._networks[0], tiles)
            for network in self._networks[1:]:
                more_seg, more_class = _run(network, tiles)
                seg_logits = seg_logits + more_seg
                class_logits = None if class_logits is None or more_class is None else class_logits + more_class
        if (folds := len(self._networks)) > 1:
            seg_logits = seg_logits / folds
            class_logits = None if class_logits is None else class_logits / folds
        return NetworkOutput(seg_logits, class_logits)


def _run(network: nn.Module, tiles: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits of one fold; class logits are float32 whatever the network runs in."""
    if isinstance(network, MultiTaskUNet):
        return network.forward_multitask(tiles)  # type: ignore[return-value]  # no deep supervision in inference
    return network(tiles), None


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
        fitted = model.pooled_classifiers or [None] * len(model.weights)
        networks = [
            build_network(model.plan, weights, classifier).to(device).eval()
            for weights, classifier in zip(model.weights, fitted, strict=True)
        ]
        return TorchRunner(networks, device, precision)
