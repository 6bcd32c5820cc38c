"""Layers of `channels_last`: convolutions with the norm and the activation after them in one step, and upsamplings.

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

from ...kernels import (
    Norm,
    convolve,
    factors_of,
    factors_of_upsampling,
    instance_norm,
    norm_apply,
    norm_scales,
    spread_blocks,
    upsample,
)
from .rewrites import last_activation, negative_slope, only_spreads

DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)

FEW_OUTPUTS, FEW_INPUTS, FIRST_INPUTS = 32, 96, 4
"""Channels of what `kernels.convolve` does sooner than cuDNN: at most as many outputs, and inputs, also of a scan."""

FEW_UPSAMPLED = 128
"""Most inputs of an upsampling that `kernels.upsample` does sooner than a product and `kernels.spread_blocks`."""


def channels_last(values: Tensor) -> Tensor:
    """Lay (N, C, *grid) out with the channels last, in a way that cuDNN sees where there is a single one too."""
    last = values.contiguous(memory_format=_memory_format(values.ndim))
    if last.shape[1] > 1:
        return last
    # The memory of a single channel is the same either way.
    images, *grid = last[:, 0].contiguous().stride()
    return last.as_strided(last.shape, (images, 1, *grid))


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
        convolution, norm, *activation = steps_of(block)
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

    def forward(self, values: Tensor | Unfinished) -> Tensor | Unfinished:
        """From (N, in, *grid) to (N, out, *grid)."""
        result, sums = self.convolved(values)
        if self.leaves_unfinished:
            return Unfinished(result, self._norm(sums))
        return self.finished(result, sums)

    def convolved(self, values: Tensor | Unfinished) -> tuple[Tensor, Tensor | None]:
        """Convolve alone; after it nothing needs the values any more.

        Returns:
            (N, out, *grid) before the norm, and what `norm_scales` makes the norm of, if that is known already.
        """
        if isinstance(self.convolution, FewChannels):
            return self.convolution(values)
        return channels_last(self.convolution(values)), None

    def finished(
        self,
        result: Tensor,
        sums: Tensor | None,
        residual: Tensor | None = None,
        joined: list[Tensor] | None = None,
    ) -> Tensor:
        """Do the rest to what `convolved` gave, in place; appends to `joined`, where it is given, as in `Features`."""
        copy = _place_for(result, joined)
        if sums is None:
            return instance_norm(result, self.weight, self.bias, self.epsilon, self.slope, residual, copy)
        return norm_apply(result, self._norm(sums), residual, copy)

    def _norm(self, sums: Tensor | None) -> Norm:
        assert sums is not None  # `kernels.convolve` gives them where a norm follows
        return Norm(norm_scales(sums, self.weight, self.epsilon), self.bias, self.slope)


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


def link(steps: Sequence[nn.Module]) -> None:
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
        link([*first, last])
        self.first, self.last = nn.Sequential(*first), last
        self.last.slope = negative_slope(last_activation(block))
        skip = list(block.skip) if isinstance(block.skip, nn.Sequential) else []
        self.skip = nn.Sequential(
            *(
                MeanPool(step) if isinstance(step, nn.AvgPool2d | nn.AvgPool3d) else FusedBlock(step, dtype, own)
                for step in skip
            )
        )

    def forward(self, values: Tensor) -> Tensor:
        """From (N, in, *grid) to (N, out, *grid)."""
        return self.finished(*self.convolved(values))

    def convolved(self, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Do what needs the values: all convolutions, and the skip, which is the residual."""
        return (*self.last.convolved(self.first(values)), self.skip(values))

    def finished(
        self, result: Tensor, sums: Tensor | None, residual: Tensor, joined: list[Tensor] | None = None
    ) -> Tensor:
        """See `FusedBlock.finished`."""
        return self.last.finished(result, sums, residual, joined)


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


class FewChannelsUpsampling(nn.Module):
    """The same for few channels, whose results go straight to their place: by `kernels.upsample`."""

    weight: Tensor
    factors: Tensor

    def __init__(self, convolution: nn.ConvTranspose2d | nn.ConvTranspose3d, dtype: torch.dtype) -> None:
        super().__init__()
        weight = convolution.weight.detach().to(dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("factors", factors_of_upsampling(weight))
        self.bias = convolution.bias

    def forward(self, coarse: Tensor, place: Tensor) -> None:
        """From (N, in, *grid) to (N, out, *finer grid)."""
        upsample(coarse, self.weight, self.factors, self.bias, place)


def upsampling(convolution: Any, dtype: torch.dtype, own: bool) -> nn.Module:
    """Choose how a transposed convolution computes."""
    if not only_spreads(convolution):
        return Upsampling(convolution, dtype)
    inputs, outputs = convolution.in_channels, convolution.out_channels
    few = inputs <= FEW_UPSAMPLED and inputs % FEW_OUTPUTS == outputs % FEW_OUTPUTS == 0
    return (FewChannelsUpsampling if own and few else ProductUpsampling)(convolution, dtype)


def steps_of(block: Any) -> list[Any]:
    """Convolution, and what follows it, in order; dropout does nothing in inference."""
    return [step for step in block.all_modules if not isinstance(step, DROPOUTS)]


def _memory_format(ndim: int) -> torch.memory_format:
    return torch.channels_last if ndim == 4 else torch.channels_last_3d
