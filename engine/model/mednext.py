"""MedNeXt, version 1: large depthwise kernels, expanded pointwise, named as in its authors' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 4
"""Of the encoder and the decoder, around the bottleneck."""

BLOCKS = (
    *(f"enc_block_{level}" for level in range(LEVELS)),
    "bottleneck",
    *(f"dec_block_{level}" for level in reversed(range(LEVELS))),
)
RESAMPLING = (*(f"down_{level}" for level in range(LEVELS)), *(f"up_{level}" for level in reversed(range(LEVELS))))
"""Names of the parts, from the finest level of the encoder to that of the decoder."""


class MedNeXtBlock(nn.Module):
    """Depthwise convolution, norm of each channel, and two pointwise convolutions, around which the input goes.

    Args:
        inputs, outputs: Channels.
        expansion: Channels between the pointwise convolutions, as a multiple of the inputs.
        kernel: Taps of the depthwise convolution along each axis.
        dimensions: 2 or 3.
        resample: None, or "down" or "up" to halve or double the grid; the input then goes through `res_conv`.
    """

    def __init__(
        self, inputs: int, outputs: int, expansion: int, kernel: int, dimensions: int, resample: str | None = None
    ) -> None:
        super().__init__()
        convolution: Any = nn.Conv3d if dimensions == 3 else nn.Conv2d
        transposed: Any = nn.ConvTranspose3d if dimensions == 3 else nn.ConvTranspose2d
        sampling = transposed if resample == "up" else convolution
        stride = 1 if resample is None else 2
        self.conv1 = sampling(inputs, inputs, kernel, stride=stride, padding=kernel // 2, groups=inputs)
        self.norm = nn.GroupNorm(inputs, inputs)
        self.conv2 = convolution(inputs, inputs * expansion, 1)
        self.act = nn.GELU()
        self.conv3 = convolution(inputs * expansion, outputs, 1)
        self.res_conv = None if resample is None else sampling(inputs, outputs, 1, stride=2)
        self.pads = resample == "up"

    def forward(self, values: Tensor) -> Tensor:
        """From (N, in, *grid) to (N, out, *grid), or to half or twice the grid."""
        inner = self.conv3(self.act(self.conv2(self.norm(self.conv1(values)))))
        around = values if self.res_conv is None else self.res_conv(values)
        if self.pads:  # a transposed convolution gives one voxel less than twice as many
            before = [1, 0] * (values.ndim - 2)
            return F.pad(inner, before) + F.pad(around, before)
        return inner + around


class LogitsBlock(nn.Module):
    """The last layer."""

    def __init__(self, inputs: int, num_outputs: int, dimensions: int) -> None:
        super().__init__()
        transposed: Any = nn.ConvTranspose3d if dimensions == 3 else nn.ConvTranspose2d
        self.conv_out = transposed(inputs, num_outputs, 1)

    def forward(self, values: Tensor) -> Tensor:
        """From (N, in, *grid) to (N, K, *grid)."""
        return self.conv_out(values)


class MedNeXt(nn.Module):
    """MedNeXt for inference: without the outputs for deep supervision.

    Args:
        channels: Of the input.
        num_outputs: K.
        width: Channels at the finest resolution; they double at each level.
        kernel: Taps of depthwise convolutions along each axis.
        counts: Blocks that keep the resolution, by the names of parts in `BLOCKS`.
        expansions: Channels between pointwise convolutions, as a multiple, by the names in `BLOCKS` and `RESAMPLING`.
        dimensions: 2 or 3.

    Note:
        Roy et al., MedNeXt: Transformer-driven Scaling of ConvNets for Medical Image Segmentation, MICCAI 2023. All
        published sizes have 32 channels, kernels of 3 or 5, and residual connections everywhere.
    """

    def __init__(
        self,
        channels: int,
        num_outputs: int,
        *,
        width: int,
        kernel: int,
        counts: Mapping[str, int],
        expansions: Mapping[str, int],
        dimensions: int,
    ) -> None:
        super().__init__()
        convolution: Any = nn.Conv3d if dimensions == 3 else nn.Conv2d

        def blocks(part: str, level: int) -> nn.Sequential:
            wide, expansion = width * 2**level, expansions[part]
            return nn.Sequential(
                *(MedNeXtBlock(wide, wide, expansion, kernel, dimensions) for _ in range(counts[part]))
            )

        self.stem = convolution(channels, width, 1)
        for level in range(LEVELS):
            wide, down = width * 2**level, f"down_{level}"
            self.add_module(f"enc_block_{level}", blocks(f"enc_block_{level}", level))
            self.add_module(down, MedNeXtBlock(wide, 2 * wide, expansions[down], kernel, dimensions, "down"))
        self.bottleneck = blocks("bottleneck", LEVELS)
        for level in reversed(range(LEVELS)):
            wide, up = width * 2**level, f"up_{level}"
            self.add_module(up, MedNeXtBlock(2 * wide, wide, expansions[up], kernel, dimensions, "up"))
            self.add_module(f"dec_block_{level}", blocks(f"dec_block_{level}", level))
        self.out_0 = LogitsBlock(width, num_outputs, dimensions)

    @property
    def logit_layers(self) -> list[nn.Module]:
        """The layer that computes the logits."""
        return [self.out_0.conv_out]

    def forward(self, tiles: Tensor) -> Tensor:
        """From (N, C, *patch) to logits (N, K, *patch)."""
        values, skips = self.stem(tiles), []
        for level in range(LEVELS):
            values = self.get_submodule(f"enc_block_{level}")(values)
            skips.append(values)
            values = self.get_submodule(f"down_{level}")(values)
        values = self.bottleneck(values)
        for level in reversed(range(LEVELS)):
            values = skips.pop() + self.get_submodule(f"up_{level}")(values)
            values = self.get_submodule(f"dec_block_{level}")(values)
        return self.out_0(values)


def make_mednext(channels: int, num_outputs: int, weights: Mapping[str, Tensor]) -> MedNeXt:
    """Build a MedNeXt of the sizes that its weights have.

    Raises:
        LookupError: Where a part has no weights.
    """
    first = weights["enc_block_0.0.conv1.weight"]
    return MedNeXt(
        channels,
        num_outputs,
        width=len(first),
        kernel=first.shape[-1],
        counts={part: _count(weights, part) for part in BLOCKS},
        expansions={
            **{part: _expansion(weights[f"{part}.0.conv2.weight"]) for part in BLOCKS},
            **{part: _expansion(weights[f"{part}.conv2.weight"]) for part in RESAMPLING},
        },
        dimensions=first.ndim - 2,
    )


def _count(weights: Mapping[str, Tensor], part: str) -> int:
    return sum(name.startswith(f"{part}.") and name.endswith(".conv1.weight") for name in weights)


def _expansion(weight: Tensor) -> int:
    outputs, inputs = weight.shape[:2]
    return outputs // inputs
