"""nnU-Net's networks for a GPU: channels last throughout, norm and activation in one step, and nothing concatenated.

cuDNN's convolutions in half precision want the channels last; torch's instance norm wants them first, and changing from
one to the other and back takes longer than what it gains. So here `kernels.instance_norm` does the norm, the activation
and the sum with a residual. It also writes an encoder's features to where the decoder reads them, beside the place of
what comes from the coarser stage.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import instance_norm
from ..errors import BackendUnavailable
from ..model.folds import InferenceNetwork
from .rewrites import ACTIVATIONS, last_activation, negative_slope, only_spreads

NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)

PACK_BYTES = 16
"""Channels come in multiples of as many as these hold."""


def without_lost_biases(network: InferenceNetwork) -> InferenceNetwork:
    """Drop the biases of convolutions that an instance norm follows, which takes away any constant; in place."""
    for block in _convolution_blocks(network):
        steps = _steps(block)
        if len(steps) > 1 and _is_norm(steps[1]):
            steps[0].bias = None
    return network


def with_channels_last(network: InferenceNetwork, dtype: torch.dtype) -> InferenceNetwork:
    """Turn each fold into one that computes with the channels last; changes a network in place.

    Args:
        network: Of nnU-Net's classes, on any device.
        dtype: Number type of features and of the convolutions' weights; norms stay in float32.

    Raises:
        BackendUnavailable: Where it has parts that this is not for; the network is then as it was.
    """
    for fold in network.networks:
        _require_suitable(fold, PACK_BYTES // dtype.itemsize)
    for fold in network.networks:
        unet: Any = fold
        unet.decoder = JoinedDecoder(unet.decoder, dtype)
        unet.encoder = JoiningEncoder(unet.encoder, dtype)
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
    """What an encoder gives: features by stage, the finest first.

    Attributes:
        joined: For each stage but the last (N, 2 C, *grid), whose second half holds the features; the first is free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[Tensor] = []


class FusedBlock(nn.Module):
    """Convolution, then instance norm, sum with a residual and activation in one step."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        convolution, norm, *activation = _steps(block)
        convolution.bias = None  # the norm takes it away
        self.convolution = convolution.to(dtype=dtype, memory_format=_memory_format(convolution.weight.ndim))
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps
        self.slope = negative_slope(activation[0]) if activation else 1.0

    def forward(self, values: Tensor, residual: Tensor | None = None, joined: list[Tensor] | None = None) -> Tensor:
        """From (N, in, *grid) to (N, out, *grid); appends to `joined`, where it is given, as in `Features`."""
        values = channels_last(self.convolution(values))
        copy = None
        if joined is not None:
            images, channels, *grid = values.shape
            joined.append(values.new_empty(images, *grid, 2 * channels).movedim(-1, 1))
            copy = joined[-1][:, channels:]
        return instance_norm(values, self.weight, self.bias, self.epsilon, self.slope, residual, copy)


class FusedResidual(nn.Module):
    """Convolutions around which the input goes too."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        names = ("conv1", "conv2", "conv3") if hasattr(block, "conv3") else ("conv1", "conv2")
        *first, last = (FusedBlock(getattr(block, name), dtype) for name in names)
        self.first, self.last = nn.Sequential(*first), last
        self.last.slope = negative_slope(last_activation(block))
        skip = list(block.skip) if isinstance(block.skip, nn.Sequential) else []
        self.skip = nn.Sequential(
            *(
                MeanPool(step) if isinstance(step, nn.AvgPool2d | nn.AvgPool3d) else FusedBlock(step, dtype)
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
    """An encoder that puts the features of each stage but the last into the decoder's place for them too."""

    def __init__(self, encoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        stem = getattr(encoder, "stem", None)
        self.stem = nn.Sequential(*_fused(stem, dtype)) if stem is not None else nn.Identity()
        self.stages = nn.ModuleList(nn.Sequential(*_fused(stage, dtype)) for stage in encoder.stages)

    def forward(self, tiles: Tensor) -> Features:
        """From (N, C, *patch)."""
        features = Features()
        values = self.stem(channels_last(tiles.to(self.dtype)))
        for index, stage in enumerate(self.stages):
            *steps, last = stage.children()
            for step in steps:
                values = step(values)
            values = last(values, joined=features.joined if index + 1 < len(self.stages) else None)
            features.append(values)
        return features


class JoinedDecoder(nn.Module):
    """A decoder that finds an encoder's features beside the place of what it makes of the coarser stage."""

    def __init__(self, decoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*_fused(stage, dtype)) for stage in decoder.stages)
        self.upward = nn.ModuleList(_upsampling(convolution, dtype) for convolution in decoder.transpconvs)
        last = decoder.seg_layers[-1]
        self.logits = last.to(memory_format=_memory_format(last.weight.ndim))

    def forward(self, features: Features) -> Tensor:
        """From an encoder's features to logits (N, K, *patch)."""
        values = features[-1]
        for stage, upward in zip(self.stages, self.upward, strict=True):
            joined = features.joined.pop()
            upward(values, joined[:, : joined.shape[1] // 2])
            values = stage(joined)
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
        fine = F.linear(coarse.movedim(1, -1), self.weight, self.bias)  # type: ignore[arg-type]
        fine = fine.unflatten(-1, (*self.stride, -1))
        # (N, z, y, x, sz, sy, sx, out) to (N, out, z, sz, y, sy, x, sx), which is what the place is cut into.
        count = len(self.stride)
        pairs = [axis for position in range(1, 1 + count) for axis in (position, position + count)]
        for axis in range(1 + count, 1, -1):
            place = place.unflatten(axis, (-1, self.stride[axis - 2]))
        place.copy_(fine.permute(0, -1, *pairs))


def _upsampling(convolution: Any, dtype: torch.dtype) -> nn.Module:
    return (ProductUpsampling if only_spreads(convolution) else Upsampling)(convolution, dtype)


def _fused(module: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """Take a stage apart into its steps, in order."""
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
    from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU

    if isinstance(module, ConvDropoutNormReLU):
        return [FusedBlock(module, dtype)]
    if isinstance(module, BasicBlockD | BottleneckD):
        return [FusedResidual(module, dtype)]
    children = list(module.children())
    return [step for child in children for step in _fused(child, dtype)] if children else [module]


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
