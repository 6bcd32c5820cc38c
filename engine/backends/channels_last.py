"""nnU-Net's networks for a GPU: channels last throughout, norm and activation in one step, and nothing concatenated.

cuDNN's convolutions in half precision want the channels last; torch's instance norm wants them first, and changing from
one to the other and back takes longer than what it gains. So here `kernels.instance_norm` does the norm, the activation
and the sum with a residual. It also writes an encoder's features to where the decoder reads them, beside the place of
what comes from the coarser stage.

At full resolution, where channels are few, cuDNN's convolutions reach a fifth of what the device can, and norms take as
long as they. There `kernels.convolve` convolves: it applies the norm of its input as it reads, and measures what the
norm of its output needs as it writes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import Norm, convolve, factors_of, instance_norm, norm_apply, norm_scales, spread_blocks
from ..errors import BackendUnavailable
from ..model.folds import InferenceNetwork
from .rewrites import ACTIVATIONS, last_activation, negative_slope, only_spreads

NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)

PACK_BYTES = 16
"""Channels come in multiples of as many as these hold."""

FEW_OUTPUTS, FEW_INPUTS, FIRST_INPUTS = 32, 96, 4
"""Channels of what `kernels.convolve` does sooner than cuDNN: at most as many outputs, and inputs, also of a scan."""


def without_lost_biases(network: InferenceNetwork) -> InferenceNetwork:
    """Drop the biases of convolutions that an instance norm follows, which takes away any constant; in place."""
    for block in _convolution_blocks(network):
        steps = _steps(block)
        if len(steps) > 1 and _is_norm(steps[1]):
            steps[0].bias = None
    return network


def with_channels_last(network: InferenceNetwork, dtype: torch.dtype, *, own: bool = False) -> InferenceNetwork:
    """Turn each fold into one that computes with the channels last; changes a network in place.

    Args:
        network: Of nnU-Net's classes, on any device.
        dtype: Number type of features and of the convolutions' weights; norms stay in float32.
        own: Whether `kernels.convolve` may be used: on GPUs from sm_80 on.

    Raises:
        BackendUnavailable: Where it has parts that this is not for; the network is then as it was.
    """
    for fold in network.networks:
        _require_suitable(fold, PACK_BYTES // dtype.itemsize)
    for fold in network.networks:
        unet: Any = fold
        unet.decoder = JoinedDecoder(unet.decoder, dtype, own)
        unet.encoder = JoiningEncoder(unet.encoder, dtype, own, unet.head.stages if network.multi_task else ())
    return network


def channels_last(values: Tensor) -> Tensor:
    """Lay (N, C, *grid) out with the channels last, in a way that cuDNN sees where there is a single one too."""
    last = values.contiguous(memory_format=_memory_format(values.ndim))
    if last.shape[1] > 1:
        return last
    # The memory of a single channel is the same either way.
    images, *grid = last[:, 0].contiguous().stride()
    return last.as_strided(last.shape, (images, 1, *grid))


class Features(list[Tensor]):
    """What an encoder gives: features by stage, the finest first; those that nothing reads any more are empty.

    Attributes:
        joined: For each stage but the last (N, 2 C, *grid), whose second half holds the features; the first is free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[Tensor] = []


class Unfinished(NamedTuple):
    """Features before their norm, which the next convolution applies as it reads them.

    Attributes:
        values: (N, C, *grid), overwritten by none.
        norm: What is still to be done.
    """

    values: Tensor
    norm: Norm


class FusedBlock(nn.Module):
    """Convolution, then instance norm, sum with a residual and activation in one step.

    Attributes:
        takes_unfinished: Whether its input may come before its norm.
        leaves_unfinished: Whether the next step takes its result before the norm.
    """

    leaves_unfinished = False

    def __init__(self, block: Any, dtype: torch.dtype, own: bool) -> None:
        super().__init__()
        convolution, norm, *activation = _steps(block)
        convolution.bias = None  # the norm takes it away
        self.slope = negative_slope(activation[0]) if activation else 1.0
        few = own and convolution.out_channels == FEW_OUTPUTS and _is_few(convolution) and 0 <= self.slope <= 1
        self.takes_unfinished = few and convolution.in_channels % FEW_OUTPUTS == 0
        self.convolution = (
            FewChannels(convolution, dtype)
            if few
            else convolution.to(dtype=dtype, memory_format=_memory_format(convolution.weight.ndim))
        )
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps

    def forward(
        self, values: Tensor | Unfinished, residual: Tensor | None = None, joined: list[Tensor] | None = None
    ) -> Tensor | Unfinished:
        """From (N, in, *grid) to (N, out, *grid); appends to `joined`, where it is given, as in `Features`."""
        if isinstance(self.convolution, FewChannels):
            result, sums = self.convolution(values)
            norm = Norm(norm_scales(sums, self.weight, self.epsilon), self.bias, self.slope)
            if self.leaves_unfinished:
                return Unfinished(result, norm)
            return norm_apply(result, norm, residual, _place_for(result, joined))
        result = channels_last(self.convolution(values))
        copy = _place_for(result, joined)
        return instance_norm(result, self.weight, self.bias, self.epsilon, self.slope, residual, copy)


def _place_for(features: Tensor, joined: list[Tensor] | None) -> Tensor | None:
    """Append the decoder's place to a list, and return the half of it that is for these features."""
    if joined is None:
        return None
    images, channels, *grid = features.shape
    joined.append(features.new_empty(images, *grid, 2 * channels).movedim(-1, 1))
    return joined[-1][:, channels:]


class FewChannels(nn.Module):
    """A convolution of few channels by `kernels.convolve`.

    Args:
        convolution: As `_is_few` wants it.
        dtype: Number type of values.
    """

    weight: Tensor
    factors: Tensor

    def __init__(self, convolution: Any, dtype: torch.dtype) -> None:
        super().__init__()
        weight = convolution.weight.detach().to(dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("factors", factors_of(weight))
        self.bias = convolution.bias

    def forward(self, values: Tensor | Unfinished) -> tuple[Tensor, Tensor | None]:
        """See `kernels.convolve`."""
        values, norm = values if isinstance(values, Unfinished) else (values, None)
        return convolve(values, self.weight, self.factors, norm, self.bias)


def _is_few(convolution: Any) -> bool:
    """Whether `kernels.convolve` can do a convolution, and sooner than cuDNN."""
    kernel, inputs = convolution.kernel_size, convolution.in_channels
    return (
        set(kernel) <= {1, 3}
        and tuple(convolution.padding) == tuple(size // 2 for size in kernel)
        and set(convolution.stride) == set(convolution.dilation) == {convolution.groups} == {1}
        and convolution.padding_mode == "zeros"
        and convolution.out_channels <= FEW_OUTPUTS
        and (inputs <= FIRST_INPUTS or (inputs % FEW_OUTPUTS == 0 and inputs <= FEW_INPUTS))
    )


class Logits(nn.Module):
    """The last convolution, of one voxel."""

    def __init__(self, convolution: Any, dtype: torch.dtype, own: bool) -> None:
        super().__init__()
        self.takes_unfinished = own and convolution.in_channels % FEW_OUTPUTS == 0 and _is_few(convolution)
        self.convolution = (
            FewChannels(convolution, dtype)
            if self.takes_unfinished
            else convolution.to(memory_format=_memory_format(convolution.weight.ndim))
        )

    def forward(self, values: Tensor | Unfinished) -> Tensor:
        """From (N, C, *patch) to (N, K, *patch)."""
        return self.convolution(values)[0] if self.takes_unfinished else self.convolution(values)


def _link(steps: Sequence[nn.Module]) -> None:
    """Let each of some steps leave its norm to the one after it, if that takes it."""
    for step, after in itertools.pairwise(steps):
        if isinstance(step, FusedBlock) and isinstance(step.convolution, FewChannels):
            step.leaves_unfinished = getattr(after, "takes_unfinished", False)


class FusedResidual(nn.Module):
    """Convolutions around which the input goes too."""

    def __init__(self, block: Any, dtype: torch.dtype, own: bool) -> None:
        super().__init__()
        names = ("conv1", "conv2", "conv3") if hasattr(block, "conv3") else ("conv1", "conv2")
        *first, last = (FusedBlock(getattr(block, name), dtype, own) for name in names)
        _link([*first, last])
        self.first, self.last = nn.Sequential(*first), last
        self.last.slope = negative_slope(last_activation(block))
        skip = list(block.skip) if isinstance(block.skip, nn.Sequential) else []
        self.skip = nn.Sequential(
            *(
                MeanPool(step) if isinstance(step, nn.AvgPool2d | nn.AvgPool3d) else FusedBlock(step, dtype, own)
                for step in skip
            )
        )

    def forward(self, values: Tensor, joined: list[Tensor] | None = None) -> Tensor:
        """From (N, in, *grid) to (N, out, *grid)."""
        return self.last(self.first(values), residual=self.skip(values), joined=joined)


class MeanPool(nn.Module):
    """Average pooling of blocks that do not overlap; torch's own puts the channels first."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.block = tuple(pool.kernel_size)

    def forward(self, values: Tensor) -> Tensor:
        """From (N, C, *grid) to (N, C, *coarser grid)."""
        last = values.movedim(1, -1)
        for axis, size in enumerate(self.block, start=1):
            last = last.narrow(axis, 0, last.shape[axis] // size * size)
        for axis, size in reversed(list(enumerate(self.block, start=1))):
            last = last.unflatten(axis, (-1, size))
        return last.mean(tuple(range(2, 2 * len(self.block) + 1, 2))).movedim(-1, 1)


class JoiningEncoder(nn.Module):
    """An encoder that puts the features of each stage but the last into the decoder's place for them too.

    Args:
        encoder: Of nnU-Net's classes.
        dtype: See `with_channels_last`.
        own: See `with_channels_last`.
        read: Stages whose features a head reads; the others' are not kept.
    """

    def __init__(self, encoder: Any, dtype: torch.dtype, own: bool, read: Sequence[int]) -> None:
        super().__init__()
        self.dtype, self.read = dtype, frozenset(read)
        stem = getattr(encoder, "stem", None)
        self.stem = nn.Sequential(*_fused(stem, dtype, own)) if stem is not None else nn.Identity()
        self.stages = nn.ModuleList(nn.Sequential(*_fused(stage, dtype, own)) for stage in encoder.stages)

    def forward(self, tiles: Tensor) -> Features:
        """From (N, C, *patch)."""
        features = Features()
        values = self.stem(channels_last(tiles.to(self.dtype)))
        for index, stage in enumerate(self.stages):
            *steps, last = stage.children()
            for step in steps:
                values = step(values)
            is_last = index + 1 == len(self.stages)
            values = last(values, joined=None if is_last else features.joined)
            features.append(values if is_last or index in self.read else values.new_empty(0))
        return features


class JoinedDecoder(nn.Module):
    """A decoder that finds an encoder's features beside the place of what it makes of the coarser stage."""

    def __init__(self, decoder: Any, dtype: torch.dtype, own: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*_fused(stage, dtype, own)) for stage in decoder.stages)
        self.upward = nn.ModuleList(_upsampling(convolution, dtype) for convolution in decoder.transpconvs)
        self.logits = Logits(decoder.seg_layers[-1], dtype, own)
        _link([*self.stages[-1].children(), self.logits])

    def forward(self, features: Features) -> Tensor:
        """From an encoder's features to logits (N, K, *patch)."""
        values = features[-1]
        for stage, upward in zip(self.stages, self.upward, strict=True):
            joined = features.joined.pop()
            upward(values, joined[:, : joined.shape[1] // 2])
            values = joined
            del joined  # with each step, what the one before it made is free
            for step in stage.children():
                values = step(values)
        return self.logits(values)


class Upsampling(nn.Module):
    """A transposed convolution, whose result is copied into its place."""

    def __init__(self, convolution: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolution = convolution.to(dtype=dtype, memory_format=_memory_format(convolution.weight.ndim))

    def forward(self, coarse: Tensor, place: Tensor) -> None:
        """From (N, in, *grid) to (N, out, *finer grid)."""
        place.copy_(self.convolution(coarse))


class ProductUpsampling(nn.Module):
    """A transposed convolution whose kernel equals its stride, as one product of matrices."""

    def __init__(self, convolution: nn.ConvTranspose2d | nn.ConvTranspose3d, dtype: torch.dtype) -> None:
        super().__init__()
        self.stride = tuple(convolution.stride)
        # (in, out, *stride) to (*stride, out, in)
        weight = convolution.weight.detach().movedim(0, -1).movedim(0, -2)
        self.register_buffer("weight", weight.flatten(0, -2).to(dtype).contiguous())
        bias = convolution.bias
        repeated = None if bias is None else bias.detach().repeat(math.prod(self.stride)).to(dtype)
        self.register_buffer("bias", repeated)

    def forward(self, coarse: Tensor, place: Tensor) -> None:
        """From (N, in, *grid) to (N, out, *finer grid)."""
        blocks = F.linear(coarse.movedim(1, -1), self.weight, self.bias)  # type: ignore[arg-type]
        spread_blocks(blocks.unflatten(-1, (*self.stride, -1)), place)


def _upsampling(convolution: Any, dtype: torch.dtype) -> nn.Module:
    return (ProductUpsampling if only_spreads(convolution) else Upsampling)(convolution, dtype)


def _fused(module: nn.Module, dtype: torch.dtype, own: bool) -> list[nn.Module]:
    """Take a stage apart into its steps, in order."""
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
    from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU

    if isinstance(module, ConvDropoutNormReLU):
        return [FusedBlock(module, dtype, own)]
    if isinstance(module, BasicBlockD | BottleneckD):
        return [FusedResidual(module, dtype, own)]
    children = list(module.children())
    steps = [step for child in children for step in _fused(child, dtype, own)] if children else [module]
    _link(steps)
    return steps


def _require_suitable(fold: Any, width: int) -> None:
    """Refuse what is not made of nnU-Net's usual parts, with channels in multiples of `width`."""
    from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
    from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
    from dynamic_network_architectures.building_blocks.unet_residual_decoder import UNetResDecoder

    encoder, decoder = (getattr(fold, part, None) for part in ("encoder", "decoder"))
    known = type(encoder) in (PlainConvEncoder, ResidualEncoder) and type(decoder) in (UNetDecoder, UNetResDecoder)
    known = known and not getattr(fold, "taps_decoder", False)  # the features of its stages are not kept
    for module in fold.modules():
        if isinstance(module, BasicBlockD | BottleneckD):
            known = known and not module.apply_se and isinstance(last_activation(module), ACTIVATIONS)
    if not known or not all(_is_suitable(block, width) for block in _convolution_blocks(fold)):
        raise BackendUnavailable(
            f"the network must be one of nnU-Net's U-Nets with instance norms, (leaky) ReLU and channels in multiples "
            f"of {width} to run with the channels last"
        )


def _is_suitable(block: Any, width: int) -> bool:
    convolution, *others = _steps(block)
    return (
        isinstance(convolution, CONVOLUTIONS)
        and convolution.out_channels % width == 0
        and 1 <= len(others) <= 2
        and _is_norm(others[0])
        and all(isinstance(activation, ACTIVATIONS) for activation in others[1:])
    )


def _convolution_blocks(network: nn.Module) -> list[Any]:
    from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU

    return [module for module in network.modules() if isinstance(module, ConvDropoutNormReLU)]


def _steps(block: Any) -> list[Any]:
    """Convolution, and what follows it, in order; dropout does nothing in inference."""
    return [step for step in block.all_modules if not isinstance(step, DROPOUTS)]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) and not module.track_running_stats


def _memory_format(ndim: int) -> torch.memory_format:
    return torch.channels_last if ndim == 4 else torch.channels_last_3d
