"""A linear map along one axis of a volume, stored as a band: the form every resampling takes here."""

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
        n_in: Length of the axis before.
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
        """Length of the axis after."""
        return len(self.first)

    @property
    def taps(self) -> int:
        """Inputs per output."""
        return self.weights.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether the axis stays as it is."""
        return self.is_selection and self.n_in == self.n_out and torch.equal(self.first, torch.arange(self.n_out))

    @property
    def is_selection(self) -> bool:
        """Whether each output is one of the inputs, unchanged."""
        return self.taps == 1 and bool((self.weights == 1).all())

    def inputs_of(self, start: int, stop: int) -> tuple[int, int]:
        """Half-open range of inputs that the outputs [start, stop) read."""
        return int(self.first[start]), int(self.first[stop - 1]) + self.taps

    def require_inputs(self, rows: tuple[int, int], offset: int, held: int) -> None:
        """Refuse data that lack inputs of the outputs [rows[0], rows[1]).

        Args:
            rows: Half-open range of outputs.
            offset: Index of the first input that the data hold.
            held: How many they hold.

        Raises:
            ValueError: Where they do not reach.
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

    @classmethod
    def from_entries(cls, n_in: int, columns: Tensor, weights: Tensor, *, drop_below: float = 0.0) -> AxisOperator:
        """Build the narrowest band that holds the given entries.

        Args:
            n_in: Length of the axis before.
            columns: (n_out, m) int64, input index of each entry; may repeat within a row, and is clamped to the axis.
            weights: (n_out, m) float64.
            drop_below: Entries smaller than this, after adding up repeats, are left out of the band.
        """
        n_out = len(columns)
        rows = torch.arange(n_out)[:, None].expand_as(columns)
        low, high = int(columns.min().clamp(0, n_in - 1)), int(columns.max().clamp(0, n_in - 1))
        dense = torch.zeros(n_out, high - low + 1, dtype=torch.float64)
        dense.index_put_((rows, columns.clamp(0, n_in - 1) - low), weights, accumulate=True)
        kept = dense.abs() > drop_below
        first = kept.to(torch.uint8).argmax(1)
        first = first.flip(0).cummin(0).values.flip(0)  # ascending, also where rounding dropped a tap more
        last = dense.shape[1] - 1 - kept.flip(1).to(torch.uint8).argmax(1)
        taps = int((last - first).max()) + 1
        first = first.clamp(max=dense.shape[1] - taps)
        band = dense.gather(1, first[:, None] + torch.arange(taps)).to(torch.float32)
        return cls(n_in, first + low, band)


@lru_cache(maxsize=512)
def matrix_blocks(
    operator: AxisOperator, start: int, stop: int, device: torch.device
) -> tuple[tuple[int, int, int, int, Tensor], ...]:
    """Cut the outputs [start, stop) into blocks of rows, each a small dense matrix.

    Returns:
        Blocks (first output, last output + 1, first input, last input + 1, matrix (outputs, inputs)).
    """
    blocks = []
    for first_out in range(start, stop, BLOCK_ROWS):
        last_out = min(first_out + BLOCK_ROWS, stop)
        low, high = operator.inputs_of(first_out, last_out)
        matrix = torch.zeros(last_out - first_out, high - low)
        columns = operator.first[first_out:last_out, None] - low + torch.arange(operator.taps)
        matrix.scatter_(1, columns, operator.weights[first_out:last_out])
        blocks.append((first_out, last_out, low, high, matrix.to(device)))
    return tuple(blocks)
