"""STU-Net: residual convolutions with nearest upsampling, named as in its authors' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = 6


class StuBlock(nn.Module):
    """Two convolutions with instance norms, around which the input goes through a pointwise convolution or as it is.

    Args:
        inputs, outputs: Channels.
        kernel: Taps by axis.
        stride: Of the first convolution, and of the pointwise one.
        pointwise: Whether there is one.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int] = (1, 1, 1), *, pointwise: bool
    ) -> None:
        super().__init__()
        taps: Any = tuple(kernel)
        padding: Any = [count // 2 for count in kernel]
        steps: Any = tuple(stride)
        self.conv1 = nn.Conv3d(inputs, outputs, taps, steps, padding)
        self.norm1 = nn.InstanceNorm3d(outputs, affine=True)
        self.act1 = nn.LeakyReLU(inplace=True)
        self.conv2 = nn.Conv3d(outputs, outputs, taps, padding=padding)
        self.norm2 = nn.InstanceNorm3d(outputs, affine=True)
        self.act2 = nn.LeakyReLU(inplace=True)
        self.conv3: nn.Conv3d | None = nn.Conv3d(inputs, outputs, 1, steps) if pointwise else None

    def forward(self, *inputs: Tensor) -> Tensor:
        """From (N, in, Z, Y, X), in one tensor or two that are concatenated, to (N, out, ...)."""
        values = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
        inner = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(values)))))
        return self.act2(inner + (values if self.conv3 is None else self.conv3(values)))


class StuStage(nn.Sequential):
    """Blocks at one resolution; the first may get two tensors."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run one block after the other."""
        first, *others = self
        values = first(*inputs)
        for block in others:
            values = block(values)
        return values


class StuUpsampling(nn.Module):
    """Nearest upsampling and a pointwise convolution.

    The convolution comes first: each voxel gives the same products wherever it is repeated, and there are fewer.
    """

    def __init__(self, inputs: int, outputs: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 1)
        self.stride = [float(factor) for factor in stride]

    def forward(self, values: Tensor) -> Tensor:
        """From (N, in, Z, Y, X) to (N, out, ...), finer by the stride."""
        return F.interpolate(self.conv(values), scale_factor=self.stride, mode="nearest")


class StuNet(nn.Module):
    """STU-Net for inference: without the outputs for deep supervision.

    Args:
        channels: Of the input.
        num_outputs: K.
        widths, depths: Channels and blocks of the six stages, the finest first.
        kernels: Taps by stage.
        strides: Between stages.

    Note:
        Huang et al., STU-Net: Scalable and Transferable Medical Image Segmentation Models Empowered by Large-Scale
        Supervised Pre-training, 2023. Its sizes are widths of 16, 32, 64 or 96 times (1, 2, 4, 8, 16, 16), with 1, 1,
        2 or 3 blocks a stage, named small, base, large and huge.
    """

    def __init__(
        self,
        channels: int,
        num_outputs: int,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.conv_blocks_context = nn.ModuleList()
        for stage, (width, depth, kernel) in enumerate(zip(widths, depths, kernels, strict=True)):
            before, stride = (widths[stage - 1], strides[stage - 1]) if stage else (channels, (1, 1, 1))
            first = StuBlock(before, width, kernel, stride, pointwise=True)
            more = (StuBlock(width, width, kernel, pointwise=False) for _ in range(depth - 1))
            self.conv_blocks_context.append(StuStage(first, *more))
        self.upsample_layers, self.conv_blocks_localization = nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(len(widths) - 1)):
            width, kernel = widths[stage], kernels[stage]
            self.upsample_layers.append(StuUpsampling(widths[stage + 1], width, strides[stage]))
            first = StuBlock(2 * width, width, kernel, pointwise=True)
            more = (StuBlock(width, width, kernel, pointwise=False) for _ in range(depths[stage] - 1))
            self.conv_blocks_localization.append(StuStage(first, *more))
        # Of the outputs for each resolution only the last, the finest, is needed; it keeps its number.
        last = str(len(widths) - 2)
        self.seg_outputs = nn.ModuleDict({last: nn.Conv3d(widths[0], num_outputs, 1)})

    @property
    def logit_layers(self) -> list[nn.Module]:
        """The layer that computes the logits."""
        return list(self.seg_outputs.values())

    def forward(self, tiles: Tensor) -> Tensor:
        """From (N, C, Z, Y, X) to logits (N, K, Z, Y, X)."""
        skips, values = [], tiles
        for stage in self.conv_blocks_context:
            values = stage(values)
            skips.append(values)
        skips.pop()
        for upward, stage in zip(self.upsample_layers, self.conv_blocks_localization, strict=True):
            values = stage(upward(values), skips.pop())
        return self.logit_layers[0](values)


def make_stu_net(
    channels: int, num_outputs: int, weights: Mapping[str, Tensor], plan_strides: Sequence[Sequence[int]]
) -> StuNet:
    """Build a STU-Net of the sizes that its weights have.

    Args:
        channels: Of the input.
        num_outputs: K.
        weights: By name; those of each first convolution tell widths, depths and kernels.
        plan_strides: Of the plan's stages, the first one included. STU-Net's trainers take five: of more the first, of
            fewer with ones added.

    Raises:
        LookupError: Where a stage has no weights.
    """
    firsts = [weights[f"conv_blocks_context.{stage}.0.conv1.weight"] for stage in range(STAGES)]
    strides: list[Any] = [*plan_strides[1:STAGES], *[(1, 1, 1)] * STAGES][: STAGES - 1]
    return StuNet(
        channels,
        num_outputs,
        widths=[len(first) for first in firsts],
        depths=[_count(weights, f"conv_blocks_context.{stage}.", ".conv1.weight") for stage in range(STAGES)],
        kernels=[tuple(first.shape[2:]) for first in firsts],
        strides=strides,
    )


def _count(weights: Mapping[str, Tensor], before: str, after: str) -> int:
    return sum(name.startswith(before) and name.endswith(after) for name in weights)
