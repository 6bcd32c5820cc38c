"""nnturbo's own kernels for 3D networks on CPUs: Winograd convolutions, which need fewer multiplications."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.convolution import Kernels, PendingUpsampling, channels_last, lacking, load_library
from ..errors import BackendUnavailable
from ..files import cache_root
from ..model.folder import Model
from ..model.folds import InferenceNetwork, inference_network
from ..model.runner import NetworkOutput
from ..model.stu_net import StuBlock, StuNet
from .rewrites import ACTIVATIONS, negative_slope, only_spreads, replace_modules
from .torch import TorchBackend

logger = logging.getLogger(__name__)

LEAST_VOXELS = 2048
"""Least output size of a transformed convolution: below it, transforming weights takes longer than the voxels."""


class Convolve(nn.Module):
    """A convolution by nnturbo's kernels; its input is one tensor, or two that are concatenated."""

    def __init__(self, kernels: Kernels, convolution: nn.Conv3d) -> None:
        super().__init__()
        self._kernels = kernels
        self._weight: Tensor | None = convolution.weight.detach()
        self._taps, self._stride = tuple(convolution.kernel_size), tuple(convolution.stride)
        self._bias = _bias(convolution)
        self._may_transform = self._taps in ((3, 3, 3), (1, 3, 3)) and set(self._stride) == {1}
        self._transforms = False
        self._prepared: Tensor | None = None
        self.may_overwrite = False  # see `plan_overwriting`

    def forward(self, *inputs: Tensor | PendingUpsampling) -> Tensor:
        """From (1, in, Z, Y, X), in one tensor or two, to (1, out, ...)."""
        given = [channels_last(values) if isinstance(values, Tensor) else values for values in inputs]
        if self._prepared is None:
            self._prepared = self._prepare(given)
        kernels = self._kernels
        if self._transforms:
            overwrite = self.may_overwrite and given[-1].shape[1] == len(self._bias)
            return kernels.convolve(given, self._taps[0], self._prepared, self._bias, overwrite=overwrite)
        tensors = [values if isinstance(values, Tensor) else kernels.spread(values) for values in given]
        values = channels_last(torch.cat(tensors, 1)) if len(tensors) > 1 else tensors[0]
        return kernels.convolve_directly(values, self._taps, self._stride, self._prepared, self._bias)

    def _prepare(self, given: Sequence[Tensor | PendingUpsampling]) -> Tensor:
        """Choose the form of the weights by the first tile, whose size all tiles have, and keep only that form."""
        assert self._weight is not None  # it is the first tile
        whole = all(values.shape[1] % self._kernels.lanes == 0 for values in given)
        self._transforms = self._may_transform and whole and math.prod(given[0].shape[2:]) >= LEAST_VOXELS
        prepare = self._kernels.transform_weights if self._transforms else self._kernels.pack_weights
        prepared, self._weight = prepare(self._weight), None
        self._kernels.give_back()
        return prepared


class Spread(nn.Module):
    """A transposed convolution whose kernel equals its stride; the next convolution computes it."""

    def __init__(self, kernels: Kernels, convolution: nn.ConvTranspose3d) -> None:
        super().__init__()
        self._stride = tuple(convolution.stride)
        self._bias, self._packed = _bias(convolution), kernels.pack_spread(convolution.weight)

    def forward(self, coarse: Tensor) -> PendingUpsampling:
        """From (1, in, *grid) to (1, out, *finer grid)."""
        return PendingUpsampling(channels_last(coarse), self._stride, self._packed, self._bias)


class Project(nn.Module):
    """The last convolution, with kernel size 1, which gives the logits."""

    def __init__(self, kernels: Kernels, convolution: nn.Conv3d) -> None:
        super().__init__()
        self._kernels, self._outputs = kernels, convolution.out_channels
        self._packed = kernels.pack_weights(convolution.weight)
        self._bias = F.pad(_bias(convolution), (0, -self._outputs % kernels.columns))

    def forward(self, values: Tensor) -> Tensor:
        """From (1, in, Z, Y, X) to (1, out, Z, Y, X)."""
        return self._kernels.project(channels_last(values), self._outputs, self._packed, self._bias)


class Block(nn.Module):
    """Convolution, instance norm, activation."""

    def __init__(self, convolve: Convolve, norm: nn.InstanceNorm3d, slope: float) -> None:
        super().__init__()
        self.convolve, self.norm, self.slope = convolve, norm, slope

    def forward(self, *inputs: Tensor | PendingUpsampling, residual: Tensor | None = None) -> Tensor:
        """From (1, in, Z, Y, X), in one tensor or two, to (1, out, ...); a residual is added before the activation."""
        norm, kernels = self.norm, self.convolve._kernels
        return kernels.normalise(self.convolve(*inputs), norm.weight, norm.bias, norm.eps, self.slope, residual)


class Residual(nn.Module):
    """Two convolutions, and a skip connection around them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.skip, self.first, self.second = block.skip, block.conv1, block.conv2
        self.second.slope = negative_slope(block.nonlin2)

    def forward(self, values: Tensor) -> Tensor:
        """From (1, in, Z, Y, X) to (1, out, ...)."""
        return self.second(self.first(values), residual=channels_last(self.skip(values)))


class StuResidual(nn.Module):
    """STU-Net's block: two convolutions around which the input goes too, through a pointwise one or as it is."""

    def __init__(self, kernels: Kernels, block: StuBlock) -> None:
        super().__init__()
        self.skip = None if block.conv3 is None else Convolve(kernels, block.conv3)
        self.first = Block(Convolve(kernels, block.conv1), block.norm1, block.act1.negative_slope)
        self.second = Block(Convolve(kernels, block.conv2), block.norm2, block.act2.negative_slope)

    def forward(self, *inputs: Tensor) -> Tensor:
        """From (1, in, Z, Y, X), in one tensor or two, to (1, out, ...)."""
        skip = channels_last(inputs[0]) if self.skip is None else self.skip(*inputs)
        return self.second(self.first(*inputs), residual=skip)


class Decoder(nn.Module):
    """nnU-Net's decoder, without copies of the encoder's features.

    Args:
        kernels: Compiled kernels.
        decoder: nnU-Net's decoder, whose convolutions are `Block` already.
        keep: Do not overwrite the encoder's features, because a head reads them afterwards.
    """

    def __init__(self, kernels: Kernels, decoder: Any, keep: bool) -> None:
        super().__init__()
        self.stages = decoder.stages
        self.finer = nn.ModuleList(
            Spread(kernels, upward) if _may_spread(kernels, upward) else upward for upward in decoder.transpconvs
        )
        self.project = Project(kernels, decoder.seg_layers[-1])
        self.keep = keep

    def forward(self, skips: list[Tensor]) -> Tensor:
        """From the encoder's features, the finest first, to logits; without `keep`, the list is empty afterwards."""
        left = list(skips) if self.keep else skips
        values = left.pop()
        for stage, finer in zip(self.stages, self.finer, strict=True):
            first, *others = stage.convs
            values = first(finer(values), left.pop())
            for block in others:
                values = block(values)
        return self.project(values)


def with_native_kernels(network: InferenceNetwork, kernels: Kernels) -> InferenceNetwork:
    """Replace a network's convolutions and norms by nnturbo's kernels, in place.

    Raises:
        BackendUnavailable: Where the kernels cannot replace all of them.
    """
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD
    from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
    from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder

    def block(module: nn.Module) -> nn.Module | None:
        return _block(kernels, module) if isinstance(module, ConvDropoutNormReLU) else None

    def residual(module: nn.Module) -> nn.Module | None:
        suits = isinstance(module, BasicBlockD) and not module.apply_se and isinstance(module.nonlin2, ACTIVATIONS)
        return Residual(module) if suits else None

    def stu(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, StuBlock):
            return None
        convolutions = [each for each in (module.conv1, module.conv2, module.conv3) if each is not None]
        return StuResidual(kernels, module) if all(_suits(kernels, each) for each in convolutions) else None

    def decoder(module: nn.Module) -> nn.Module | None:
        # Heads read the encoder's features too.
        return Decoder(kernels, module, keep=network.multi_task) if type(module) is UNetDecoder else None

    if any(getattr(fold, "taps_decoder", False) for fold in network.networks):
        raise BackendUnavailable("the native backend keeps no features of the decoder; use openvino or torch")
    if network.given:
        raise BackendUnavailable("the native backend is for networks of classes that it knows; use openvino or torch")
    replace_modules(network, block)
    replace_modules(network, stu)
    left = [module for module in network.modules() if isinstance(module, (ConvDropoutNormReLU, StuBlock))]
    if left or not any(isinstance(module, Block) for module in network.modules()):
        raise BackendUnavailable(
            f"the native backend is for 3D networks whose channels are multiples of {kernels.lanes}, with instance "
            "norms and (leaky) ReLU; use openvino or torch"
        )
    replace_modules(network, residual)
    replace_modules(network, decoder)
    for fold in network.networks:
        if isinstance(fold, StuNet):
            replace_modules(
                fold.seg_outputs, lambda layer: Project(kernels, layer) if isinstance(layer, nn.Conv3d) else None
            )
    for overwriting in plan_overwriting(network):
        overwriting.convolve.may_overwrite = True
    return network


def plan_overwriting(network: nn.Module) -> list[Block]:
    """Find the blocks that may write into the memory of their last input, because they are the last to read it.

    The input of a stage is read again: the encoder's features by the decoder and the heads, the input of a residual
    block by its skip connection. So all blocks of a chain except the first may overwrite their input. The first block
    of each decoder stage may too, because it is the last to read the encoder's features, unless these are kept.
    """
    from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks

    found: list[Any] = []
    for module in network.modules():
        if isinstance(module, StackedConvBlocks):
            found += list(module.convs.children())[1:]
        elif isinstance(module, (Residual, StuResidual)):
            found.append(module.second)
        elif isinstance(module, Decoder) and not module.keep:
            found += [stage.convs[0] for stage in module.stages]
    return [block for block in found if isinstance(block, Block)]


def _suits(kernels: Kernels, convolution: nn.Conv3d) -> bool:
    return (
        convolution.out_channels % kernels.lanes == 0
        and convolution.groups == 1
        and set(convolution.dilation) == {1}
        and all(taps % 2 for taps in convolution.kernel_size)
        and convolution.padding == tuple(taps // 2 for taps in convolution.kernel_size)
        and convolution.padding_mode == "zeros"
    )


def _may_spread(kernels: Kernels, module: nn.Module) -> bool:
    return isinstance(module, nn.ConvTranspose3d) and only_spreads(module) and not module.out_channels % kernels.lanes


def _block(kernels: Kernels, block: Any) -> Block | None:
    """Make one block of convolution, norm and activation; None if the layers are not nnU-Net's usual ones."""
    convolution, *others = [step for step in block.all_modules if not isinstance(step, nn.Dropout3d)]
    if not (isinstance(convolution, nn.Conv3d) and _suits(kernels, convolution) and 1 <= len(others) <= 2):
        return None
    norm, activation = others[0], others[1] if len(others) > 1 else nn.LeakyReLU(1.0)
    if not (isinstance(norm, nn.InstanceNorm3d) and norm.affine and not norm.track_running_stats):
        return None
    if not isinstance(activation, ACTIVATIONS):
        return None
    return Block(Convolve(kernels, convolution), norm, negative_slope(activation))


def _bias(convolution: nn.Conv3d | nn.ConvTranspose3d) -> Tensor:
    if convolution.bias is not None:
        return convolution.bias.detach()
    return torch.zeros(convolution.out_channels)


class NativeRunner:
    """Runs a network with nnturbo's kernels, one tile at a time."""

    def __init__(self, network: InferenceNetwork, kernels: Kernels) -> None:
        self._network, self._kernels = network, kernels
        self._one_at_a_time = threading.Lock()  # all runners share the kernels' threads

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32."""
        with self._one_at_a_time, torch.inference_mode():
            self._kernels.set_threads(torch.get_num_threads())
            outputs = [self._run(tile[None]) for tile in tiles.cpu()]
        return NetworkOutput(*(torch.cat(parts).contiguous() for parts in zip(*outputs, strict=True)))

    def _run(self, tile: Tensor) -> tuple[Tensor, ...]:
        outputs = self._network(tile)
        self._kernels.give_back()
        return outputs


@lru_cache(maxsize=1)
def compiled_kernels() -> Kernels:
    """Load the kernels; where none came with nnturbo, compile them, or load those that were compiled before.

    Raises:
        BackendUnavailable: Where compiling fails.
    """
    try:
        with _kept() as folder:
            return Kernels(load_library(folder))
    except OSError as error:
        logger.warning("nnturbo's kernels cannot be compiled here: %s", error)
        raise BackendUnavailable(f"the native backend cannot be compiled here: {error}") from error


@contextlib.contextmanager
def _kept() -> Iterator[Path]:
    """Give the folder where kernels are kept that are compiled here; one for a while, for a user without home."""
    root = cache_root()
    if root is not None:
        yield root / "kernels"
        return
    # Windows removes no library that is loaded.
    with tempfile.TemporaryDirectory(prefix="nnturbo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class NativeBackend(TorchBackend):
    """nnturbo's kernels, which come with its wheels and are compiled on first use elsewhere."""

    name = "native"

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why the kernels cannot run in this precision on this device, or None."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if precision != "fp32":
            return f"it runs in fp32, not in {precision}"
        with _kept() as folder:
            return lacking(folder)

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Write each fold as a checkpoint, if the kernels can run the network."""
        with_native_kernels(inference_network(model), compiled_kernels())
        super().build(model, tiles, precision, folder)

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> Any:
        """Prepare the network's weights, and compile the kernels if they are not there yet."""
        kernels = compiled_kernels()
        return NativeRunner(with_native_kernels(inference_network(self.whole(model, folder)), kernels), kernels)
