"""The reference backend: the network as torch runs it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.loader import has_cupy
from ..errors import BackendUnavailable
from ..model.checkpoint import read_checkpoint
from ..model.folder import Model
from ..model.folds import InferenceNetwork, inference_network
from ..model.runner import NetworkOutput
from .channels_last import with_channels_last, without_lost_biases
from .cuda_graph import GraphedNetwork
from .own_thread import OwnThread
from .rewrites import with_shuffles

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let cuDNN's convolutions in float32 use all bits: TF32, torch's default, keeps 10 of 23."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def searched_algorithms() -> Iterator[None]:
    """Let cuDNN try its algorithms once for each shape, as nnU-Net does, whatever the process has set before."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make a GPU the current one, for libraries that use the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TorchRunner:
    """Runs a network in eager torch.

    Args:
        network: Network in evaluation mode, on the device.
        device: Device of the network.
        precision: "fp32"; "bf16" and "fp16" run under autocast, as nnU-Net does with fp16 on CUDA.
        graphs: Whether a GPU may launch the network as a CUDA graph, whose memory stays as long as the runner.

    Attributes:
        tiles_dtype: Number type that it takes without a copy: that which autocast casts to on a GPU.
    """

    def __init__(self, network: InferenceNetwork, device: torch.device, precision: str, *, graphs: bool = True) -> None:
        self._network = network
        self._device = device
        self._precision = precision
        on_gpu = device.type == "cuda"
        # What a given network does may depend on its input, and its code may not know other number types.
        known = on_gpu and not network.given
        self.tiles_dtype = DTYPES[precision] if known else torch.float32
        self._run = GraphedNetwork(self._launched) if known and graphs else self._launched
        self._in_thread = OwnThread(device) if on_gpu else lambda run: run()

    def _launched(self, tiles: Tensor) -> tuple[Tensor, ...]:
        # A CUDA graph contains the casts of weights only if torch does not cache them between calls.
        with torch.autocast(
            self._device.type, DTYPES[self._precision], enabled=self._precision != "fp32", cache_enabled=False
        ):
            return self._network(tiles)

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32 or `tiles_dtype`; the logits come back on the device."""
        return self._in_thread(lambda: self._computed(tiles))

    def _computed(self, tiles: Tensor) -> NetworkOutput:
        with torch.inference_mode(), exact_float32(), searched_algorithms():
            return NetworkOutput(*self._run(tiles.to(self._device)))


def refuse_half_on_cpu(device: torch.device, precision: str) -> str | None:
    """Return why torch cannot run in this precision on this device, or None."""
    if precision not in DTYPES:
        return f"it runs in {', '.join(DTYPES)}, not in {precision}"
    if device.type == "cpu" and precision == "fp16":
        return "fp16 needs a GPU; use fp32 or bf16 on a CPU"
    return None


OWN_CONVOLUTIONS = (8, 0)
"""CUDA's compute capability from which on `kernels.convolve` and `kernels.upsample` run."""


def network_for_gpu(network: InferenceNetwork, device: torch.device, precision: str) -> InferenceNetwork:
    """Choose how a network computes on a CUDA device; changes it in place, but for a given one."""
    if network.given:
        return network
    if precision != "fp32" and has_cupy():
        try:
            own = torch.cuda.get_device_capability(device) >= OWN_CONVOLUTIONS
            return with_channels_last(network, DTYPES[precision], own=own)
        except BackendUnavailable as error:
            logger.info("%s; it runs as torch runs it", error)
    return with_shuffles(without_lost_biases(network))


class TorchBackend:
    """Eager torch; nothing is compiled."""

    name = "torch"
    compiles = False
    bound_to: tuple[str, ...] = ()

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why torch cannot run in this precision on this device, or None."""
        return refuse_half_on_cpu(device, precision)

    def cannot_build(self) -> str | None:
        """Return None: what runs it compiles it too."""
        return None

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Write each fold as a checkpoint that holds only what inference needs."""
        fitted = model.pooled_classifiers or [None] * len(model.weights)
        for fold, weights, classifier in zip(model.folds, model.weights, fitted, strict=True):
            content = {
                "network_weights": dict(weights),
                "init_args": {"configuration": model.plan.configuration},
                "inference_allowed_mirroring_axes": model.mirror_axes,
                "trainer_name": model.trainer,
                "pooled_classifier": None if classifier is None else asdict(classifier),
            }
            torch.save(content, folder / f"fold_{fold}.pth")

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> TorchRunner:
        """Build the network once per fold."""
        network = inference_network(self.whole(model, folder))
        network = network_for_gpu(network, device, precision) if device.type == "cuda" else with_shuffles(network)
        return TorchRunner(network.to(device), device, precision)

    def whole(self, model: Model, folder: Path | None) -> Model:
        """Give a model its weights, from the files that `build` wrote."""
        if folder is not None:
            checkpoints = [read_checkpoint(folder / f"fold_{fold}.pth") for fold in model.folds]
            fitted = tuple(checkpoint.pooled_classifier for checkpoint in checkpoints)
            model = replace(
                model,
                weights=tuple(checkpoint.weights for checkpoint in checkpoints),
                pooled_classifiers=fitted if any(fitted) else (),
            )
        return model
