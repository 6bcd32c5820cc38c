"""Plans where the values of a program lie: which share a buffer, and which operations write over their input."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...kernels.program import Operation, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A value that has no buffer yet.

    Args:
        channels: How many.
        size: (z, y, x) in voxels.
    """

    channels: int
    size: tuple[int, int, int]

    @property
    def numbers(self) -> int:
        """How many."""
        return self.channels * math.prod(self.size)


def plan_buffers(
    shapes: Sequence[Shape], operations: Sequence[Operation], logits: int, kept: Collection[int]
) -> tuple[Value, ...]:
    """Give each value a buffer.

    A convolution by fewer products, but not one along z alone, writes over its last input if nothing reads that later.
    Any other output takes the smallest buffer that is free and large enough; else the largest free one grows, and
    without one there is a new one.

    Args:
        shapes: Of the values; the first is the tile.
        operations: In the order in which they run.
        logits: Value that is in no buffer.
        kept: Values that are read when all operations are done.
    """
    last_read = {value: index for index, operation in enumerate(operations) for value in reads(operation)}
    last_read |= dict.fromkeys(kept, len(operations))
    numbers = [shapes[0].numbers]
    place, free = {0: 0, logits: -1}, set[int]()
    for index, operation in enumerate(operations):
        output = operation.output
        over = overwritten(operation, shapes)
        if over is not None and last_read[over] == index:
            place[output] = place[over]
        elif output != logits:
            place[output] = _take(shapes[output].numbers, numbers, free)
        free |= {
            place[value] for value in reads(operation) if last_read[value] == index and place[value] != place[output]
        }
    return tuple(
        Value(buffer=place[value], channels=shape.channels, size=shape.size) for value, shape in enumerate(shapes)
    )


def reads(operation: Operation) -> tuple[int, ...]:
    """All values that an operation reads."""
    residual = None if operation.norm is None else operation.norm.residual
    return operation.inputs if residual is None else (*operation.inputs, residual)


def overwritten(operation: Operation, shapes: Sequence[Shape]) -> int | None:
    """The input in whose place an operation can put its output, if there is one."""
    last = operation.inputs[-1]
    is_made = operation.upsampling is not None and len(operation.inputs) == 1
    fits = operation.transformed and not operation.along_z and not is_made and shapes[last] == shapes[operation.output]
    # It goes plane by plane, with a copy of each, which takes longer than memory of planes is worth.
    is_flat = shapes[last].size[0] == 1
    return last if fits and not is_flat and reads(operation).count(last) == 1 else None


def _take(count: int, numbers: list[int], free: set[int]) -> int:
    """Take a buffer for as many numbers."""
    enough = [buffer for buffer in free if numbers[buffer] >= count]
    if enough:
        taken = min(enough, key=lambda buffer: numbers[buffer])
    elif free:
        taken = max(free, key=lambda buffer: numbers[buffer])
        numbers[taken] = count
    else:
        numbers.append(count)
        return len(numbers) - 1
    free.remove(taken)
    return taken
