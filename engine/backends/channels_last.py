"""nnU-Net's networks for a GPU: channels last throughout, norm and activation in one step, and nothing concatenated.

cuDNN's convolutions in half precision want the channels last; torch's instance norm wants them first, and changing from
one to the other and back takes longer than what it gains. So here a step (`fused_layers`) does the convolution, the
norm, the activation and the sum with a residual. It also writes an encoder's features to where the decoder reads them,
beside the place of what comes from the coarser stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendUnavailable
from ..model.folds import InferenceNetwork
from .fused_layers import FusedBlock, FusedResidual, Logits, channels_last, link, steps_of, upsampling
from .rewrites import ACTIVATIONS, last_activation

NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)

PACK_BYTES = 16
"""Channels come in multiples of as many as these hold."""


def without_lost_biases(network: InferenceNetwork) -> InferenceNetwork:
    """Drop the biases of convolutions that an instance norm follows, which takes away any constant; in place."""
    for block in _convolution_blocks(network):
        steps = steps_of(block)
        if len(steps) > 1 and _is_norm(steps[1]):
            steps[0].bias = None
    return network


def with_channels_last(network: InferenceNetwork, dtype: torch.dtype, *, own: bool = False) -> InferenceNetwork:
    """Turn each fold into one that computes with the channels last; changes a network in place.

    Args:
        network: Of nnU-Net's classes, on any device.
        dtype: Number type of features and of the convolutions' weights; norms stay in float32.
        own: Whether `kernels.convolve` and `kernels.upsample` may be used: on GPUs from sm_80 on.

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


class Features(list[Tensor]):
    """What an encoder gives: features by stage, the finest first; those that nothing reads any more are empty.

    Attributes:
        joined: For each stage but the last (N, 2 C, *grid), whose second half holds the features; the first is free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[Tensor] = []


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
            *steps, last = list[Any](stage.children())
            for step in steps:
                values = step(values)
            is_last = index + 1 == len(self.stages)
            made = last.convolved(values)
            del values  # the decoder's place is larger, and comes next
            values = last.finished(*made, joined=None if is_last else features.joined)
            del made
            features.append(values if is_last or index in self.read else values.new_empty(0))
        return features


class JoinedDecoder(nn.Module):
    """A decoder that finds an encoder's features beside the place of what it makes of the coarser stage."""

    def __init__(self, decoder: Any, dtype: torch.dtype, own: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*_fused(stage, dtype, own)) for stage in decoder.stages)
        self.upward = nn.ModuleList(upsampling(convolution, dtype, own) for convolution in decoder.transpconvs)
        self.logits = Logits(decoder.seg_layers[-1], dtype, own)
        link([*self.stages[-1].children(), self.logits])

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
    link(steps)
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
    convolution, *others = steps_of(block)
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


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) and not module.track_running_stats
