"""A linear map along one axis of a volume, stored as a band; every resampling function has this form here.

`band_of_entries`, `band_matrix` and `cut_blocks` are in the part of Python that torch.jit.script compiles. Compiled
functions cannot read globals, so constants are default values of arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK_ROWS = 32
"""Output rows per matrix product. Measured on 512 -> 546, 26 taps: 32 rows is fastest, 182 rows 2.5 times slower."""


@dataclass(frozen=True, slots=True, eq=False)
class AxisOperator:
    """`out[i] = sum over t of weights[i, t] * data[first[i] + t]`.

    Args:
        n_in: Old length of the axis.
        first: (n_out,) int64, ascending; index of the first input of each output.
        weights: (n_out, taps) float32.
    """

    n_in: int
    first: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        """Check that the taps ascend and lie inside the input."""
        if self.first.ndim != 1 or self.weights.ndim != 2 or len(self.first) != len(self.weights):
            raise ValueError(
                f"first must be (n_out,) and weights (n_out, taps), got {tuple(self.first.shape)} and "
                f"{tuple(self.weights.shape)}"
            )
        if len(self.first) == 0 or self.first[0] < 0 or self.first[-1] + self.taps > self.n_in:
            raise ValueError(f"the {self.taps} taps of every output must lie in [0, {self.n_in})")
        if (self.first.diff() < 0).any():
            raise ValueError("first taps must ascend")

    @property
    def n_out(self) -> int:
        """New length of the axis."""
        return len(self.first)

    @property
    def taps(self) -> int:
        """Inputs per output."""
        return self.weights.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether the operator changes nothing."""
        return self.is_selection and self.n_in == self.n_out and torch.equal(self.first, torch.arange(self.n_out))

    @property
    def is_selection(self) -> bool:
        """Whether each output is one of the inputs, unchanged."""
        return self.taps == 1 and bool((self.weights == 1).all())

    def inputs_of(self, start: int, stop: int) -> tuple[int, int]:
        """Half-open range of inputs of the outputs [start, stop)."""
        return int(self.first[start]), int(self.first[stop - 1]) + self.taps

    def require_inputs(self, rows: tuple[int, int], offset: int, held: int) -> None:
        """Refuse data that do not hold all inputs of the outputs [rows[0], rows[1]).

        Args:
            rows: Half-open range of outputs.
            offset: Index of the first input that the data hold.
            held: Number of inputs that the data hold.

        Raises:
            ValueError: Where inputs are missing.
        """
        low, high = self.inputs_of(*rows)
        if low < offset or high > offset + held:
            raise ValueError(
                f"outputs [{rows[0]}, {rows[1]}) read inputs [{low}, {high}), data holds [{offset}, {offset + held})"
            )

    @classmethod
    def identity(cls, n: int) -> AxisOperator:
        """Return the operator that changes nothing on an axis of length n."""
        return cls(n, torch.arange(n), torch.ones(n, 1))


def band_of_entries(n_in: int, columns: Tensor, weights: Tensor, drop_below: float = 0.0) -> tuple[Tensor, Tensor]:
    """Find the narrowest band that holds the given entries.

    Args:
        n_in: Old length of the axis.
        columns: (n_out, m) int64, input index of each entry; may repeat within a row, and is clamped to the axis.
        weights: (n_out, m) float64.
        drop_below: Entries below this, after repeats are summed, are left out of the band.

    Returns:
        `first` and `weights` of an `AxisOperator`.
    """
    columns = columns.clamp(0, n_in - 1)
    low, high = int(columns.min()), int(columns.max())
    dense = torch.zeros(columns.shape[0], high - low + 1, dtype=torch.float64)
    dense.scatter_add_(1, columns - low, weights)
    kept = dense.abs() > drop_below
    first = kept.to(torch.uint8).argmax(1)
    first = first.flip(0).cummin(0)[0].flip(0)  # ascending, also if rounding has dropped another tap
    last = dense.shape[1] - 1 - kept.flip(1).to(torch.uint8).argmax(1)
    taps = int((last - first).max()) + 1
    first = first.clamp(max=dense.shape[1] - taps)
    return first + low, dense.gather(1, first[:, None] + torch.arange(taps)).to(torch.float32)


def band_matrix(n_in: int, first: Tensor, weights: Tensor) -> Tensor:
    """Write a band, (n_out,) and (n_out, taps), as a dense matrix, (n_out, n_in)."""
    columns = first[:, None] + torch.arange(weights.shape[1])
    return torch.zeros(first.shape[0], n_in).scatter_(1, columns, weights)


def cut_blocks(
    matrix: Tensor, first: Tensor, taps: int, start: int, stop: int, block_rows: int = BLOCK_ROWS
) -> list[tuple[int, int, int, int, Tensor]]:
    """Cut the outputs [start, stop) of a band's matrix into blocks of rows, each a small dense matrix.

    Args:
        matrix: (n_out, n_in), of any device.
        first: (n_out,) int64, the first input of each output.
        taps: Inputs per output.
        start: First output.
        stop: Output after the last one.
        block_rows: Outputs of a block.

    Returns:
        Blocks (first output, last output + 1, first input, last input + 1, matrix (outputs, inputs)).
    """
    blocks: list[tuple[int, int, int, int, Tensor]] = []
    for first_out in range(start, stop, block_rows):
        last_out = min(first_out + block_rows, stop)
        low, high = int(first[first_out]), int(first[last_out - 1]) + taps
        blocks.append((first_out, last_out, low, high, matrix[first_out:last_out, low:high].contiguous()))
    return blocks


@lru_cache(maxsize=512)
def matrix_blocks(
    operator: AxisOperator, start: int, stop: int, device: torch.device
) -> list[tuple[int, int, int, int, Tensor]]:
    """Cut the outputs [start, stop) of an operator into blocks on a device: see `cut_blocks`."""
    matrix = band_matrix(operator.n_in, operator.first, operator.weights).to(device)
    return cut_blocks(matrix, operator.first, operator.taps, start, stop)
