"""Collects the operations of a program for the kernels, and their weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...kernels.program import Norm, Operation, Upsampling
from .buffers import Shape

LEAST_VOXELS = 2048
"""Least output size of a transformed convolution: below it, transforming weights takes longer than the voxels."""

LEAST_VOXELS_OF_PLANES = 256
"""The same of a 2D network, in which several tiles are computed at once and the kernel has no taps along z."""

LEAST_PLANES = 3
"""Least output planes of a convolution that is transformed along z alone, so that it needs fewer products."""

IN_INT16 = ("convolution", "transposed_convolution")
"""Kinds of operations that can multiply in int16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finer:
    """A value that is to be upsampled; a convolution by fewer products, but not along z alone, does it while it runs.

    Args:
        coarse: The value.
        name: Of the module.
        upsampling: Stride and weights.
        shape: Of the result.
    """

    coarse: int
    name: str
    upsampling: Upsampling
    shape: Shape


@dataclass(frozen=True, slots=True)
class Builder:
    """Collects operations, one after the other.

    Args:
        shapes: Of the values, those without buffers yet; at first of the tile alone.
        operations: Those so far.
        weights: By name.
        in_int16: Whether convolutions multiply in int16, but those of the tile.
    """

    shapes: list[Shape]
    operations: list[Operation] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    in_int16: bool = False

    def shape(self, value: int | Finer) -> Shape:
        """Of a value, or of what it is upsampled to."""
        return value.shape if isinstance(value, Finer) else self.shapes[value]

    def weight(self, name: str, tensor: Tensor | None) -> str | None:
        """Keep a weight under a name."""
        if tensor is None:
            return None
        self.weights[name] = tensor.detach()
        return name

    def add(self, kind: str, name: str, inputs: Sequence[int], shape: Shape, **options: Any) -> int:
        """Add an operation; gives the value of its output."""
        self.shapes.append(shape)
        output = len(self.shapes) - 1
        in_int16 = self.in_int16 and kind in IN_INT16 and 0 not in inputs
        options = {"inputs": tuple(inputs), "output": output, "in_int16": in_int16, **options}
        self.operations.append(Operation(kind=kind, name=name, **options))
        return output

    def there(self, value: int | Finer) -> int:
        """Upsample a value as a whole, if it is to be."""
        if not isinstance(value, Finer):
            return value
        options = {"stride": value.upsampling.stride, "weight": value.upsampling.weight, "bias": value.upsampling.bias}
        return self.add("transposed_convolution", value.name, [value.coarse], value.shape, **options)

    def together(self, name: str, values: Sequence[int | Finer]) -> int:
        """Make one value of one or two."""
        inputs = [self.there(value) for value in values]
        if len(inputs) == 1:
            return inputs[0]
        shapes = [self.shape(value) for value in inputs]
        return self.add(
            "concatenation", name, inputs, replace(shapes[0], channels=sum(shape.channels for shape in shapes))
        )

    def convolution(self, name: str, module: Any, values: Sequence[int | Finer], norm: Norm | None) -> int:
        """Convolve one value, or two as if they were concatenated."""
        taps, stride, grid = of_axes(module.kernel_size), of_axes(module.stride), self.shape(values[0]).size
        size = of_axes((n - 1) // s + 1 for n, s in zip(grid, stride, strict=True))
        is_large = math.prod(size) >= (LEAST_VOXELS if size[0] > 1 else LEAST_VOXELS_OF_PLANES) and 0 not in values
        along_all = is_large and taps in ((3, 3, 3), (1, 3, 3)) and stride == (1, 1, 1)
        suits_z = taps[0] == 3 and stride[0] == 1 and stride[1] <= taps[1] and stride[2] <= taps[2]
        along_z = is_large and suits_z and size[0] >= LEAST_PLANES and not self.in_int16
        if not along_all:
            values = [self.together(name, values)]
        first, *others = values
        return self.add(
            "convolution",
            name,
            [first.coarse if isinstance(first, Finer) else first, *map(self.there, others)],
            Shape(channels=module.out_channels, size=size),
            taps=taps,
            stride=stride,
            transformed=along_all or along_z,
            weight=self.weight(f"{name}.weight", module.weight),
            bias=self.weight(f"{name}.bias", module.bias),
            norm=norm,
            upsampling=first.upsampling if isinstance(first, Finer) else None,
        )

    def norm(self, name: str, module: Any, slope: float, residual: int | None) -> Norm:
        """Describe what follows a convolution."""
        scale, shift = self.weight(f"{name}.weight", module.weight), self.weight(f"{name}.bias", module.bias)
        assert scale is not None
        assert shift is not None
        return Norm(scale=scale, shift=shift, epsilon=module.eps, slope=slope, residual=residual)

    def upsampling(self, name: str, coarse: int, weight: Tensor, bias: Tensor | None) -> Finer:
        """Upsample a value by a transposed convolution, (in, out, *stride), later."""
        shape, stride = self.shapes[coarse], of_axes(weight.shape[2:])
        kept = self.weight(f"{name}.weight", weight)
        assert kept is not None
        return Finer(
            coarse=coarse,
            name=name,
            upsampling=Upsampling(stride=stride, weight=kept, bias=self.weight(f"{name}.bias", bias)),
            shape=Shape(channels=weight.shape[1], size=of_axes(n * s for n, s in zip(shape.size, stride, strict=True))),
        )

    def pooling(self, name: str, value: int, stride: tuple[int, int, int]) -> int:
        """Average over blocks."""
        shape = self.shapes[value]
        size = of_axes(n // s for n, s in zip(shape.size, stride, strict=True))
        return self.add("average_pooling", name, [value], replace(shape, size=size), stride=stride)

    def projection(self, name: str, value: int, weight: Tensor, bias: Tensor | None) -> int:
        """Make the logits."""
        shape = replace(self.shapes[value], channels=len(weight))
        weights = {"weight": self.weight(f"{name}.weight", weight), "bias": self.weight(f"{name}.bias", bias)}
        return self.add("projection", name, [value], shape, **weights)


def of_axes(numbers: Iterable[int]) -> tuple[int, int, int]:
    """Give numbers along (z, y, x); those of a 2D network, along (y, x), get one plane."""
    z, y, x = (1, 1, *numbers)[-3:]
    return z, y, x
