"""Resampling as TorchScript: what `resampling` and `kernels` do, in the part of Python that torch.jit.script compiles.

`tests/engine/test_whole_path.py` holds every function here to its twin there.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.operators import BLOCK_ROWS
from ....kernels.reference import LINE_VOXELS, WORKING_BYTES
from ...model.resampling_function import Resampling
from ...pipeline.resampling import SPLINE_PADDING, SPLINE_POLES, prefilter, spline_entries

# Compiled functions see no globals: constants reach them as default values of their arguments.


class ScriptOperator(NamedTuple):
    """A banded linear map along one axis (`kernels.AxisOperator`).

    Args:
        reads: (n_out, 2) int64 on the CPU: half-open range of inputs that each output reads; both ends ascend.
        matrix: (n_out, n_in) float32 on the scan's device; empty where the axis stays as it is.
    """

    reads: Tensor
    matrix: Tensor


class ScriptGrid(NamedTuple):
    """How one grid becomes another (`resampling.GridMap`): operators along z, y, x, and where values are clipped."""

    operators: list[ScriptOperator]
    last_axis: int
    clip: str


def identity_operator(n: int) -> ScriptOperator:
    """Return the operator that changes nothing on an axis of length n."""
    index = torch.arange(n)
    return ScriptOperator(torch.stack([index, index + 1], 1), torch.empty(0, 0))


def selection_operator(n_in: int, index: Tensor) -> ScriptOperator:
    """Return the operator whose outputs are the inputs at these places, (n_out,) int64."""
    matrix = torch.zeros(index.shape[0], n_in).scatter_(1, index[:, None], 1.0)
    return ScriptOperator(torch.stack([index, index + 1], 1), matrix)


def banded_operator(n_in: int, columns: Tensor, weights: Tensor, drop_below: float) -> ScriptOperator:
    """Build the narrowest band that holds the given entries (`AxisOperator.from_entries`).

    Args:
        n_in: Length of the axis before.
        columns: (n_out, m) int64, input index of each entry; may repeat within a row, and is clamped to the axis.
        weights: (n_out, m) float64.
        drop_below: Entries smaller than this, after adding up repeats, are left out of the band.
    """
    columns = columns.clamp(0, n_in - 1)
    dense = torch.zeros(columns.shape[0], n_in, dtype=torch.float64).scatter_add_(1, columns, weights)
    kept = dense.abs() > drop_below
    first = kept.to(torch.uint8).argmax(1)
    first = first.flip(0).cummin(0)[0].flip(0)  # ascending, also where rounding dropped a tap more
    last = n_in - 1 - kept.flip(1).to(torch.uint8).argmax(1)
    taps = int((last - first).max()) + 1
    first = first.clamp(max=int(columns.max()) + 1 - taps)
    reads = torch.stack([first, first + taps], 1)
    index = torch.arange(n_in)
    inside = (index >= reads[:, :1]) & (index < reads[:, 1:])
    return ScriptOperator(reads, torch.where(inside, dense, 0.0).to(torch.float32))


def spline_operator(
    n_in: int,
    n_out: int,
    order: int,
    poles: list[float],
    gains: list[float],
    reach: int,
    padding: int = SPLINE_PADDING,
) -> ScriptOperator:
    """Build what scipy.ndimage does along an axis (`resampling.spline_operator`).

    `poles`, `gains` and `reach` are those of `resampling.prefilter`, and not read for orders below 2.
    """
    if n_in == n_out:
        return identity_operator(n_in)
    x = (torch.arange(n_out, dtype=torch.float64) + 0.5) * (n_in / n_out) - 0.5
    if order == 0:
        return selection_operator(n_in, torch.floor(x + 0.5).long().clamp(0, n_in - 1))
    if order == 1:
        x = x.clamp(0, n_in - 1)
        left = x.floor().long().clamp(max=max(n_in - 2, 0))
        right = (x - left)[:, None]
        return banded_operator(n_in, left[:, None] + torch.arange(2), torch.cat([1 - right, right], dim=1), 0.0)
    columns, weights = spline_entries(n_in, x, order, poles, gains, reach, padding)
    return banded_operator(n_in, columns, weights, 1e-8)


def torch_operator(n_in: int, n_out: int, mode: str) -> ScriptOperator:
    """Build what torch.nn.functional.interpolate does along an axis; `mode` as there."""
    if n_in == n_out:
        return identity_operator(n_in)
    if mode != "linear":
        index = F.interpolate(torch.arange(n_in, dtype=torch.float32)[None, None], size=[n_out], mode=mode)[0, 0]
        return selection_operator(n_in, index.long())
    response = F.interpolate(torch.eye(n_in)[None], size=[n_out], mode="linear", align_corners=False)[0].t()
    return banded_operator(n_in, torch.arange(n_in).expand(n_out, n_in), response.double(), 0.0)


class ScriptResampling(nn.Module):
    """One of nnU-Net's resampling functions with the arguments a plan gives it (`resampling.Resampling`)."""

    separate: bool | None

    def __init__(self, resampling: Resampling) -> None:
        super().__init__()
        self.function = resampling.function
        self.order, self.order_coarse = resampling.order, resampling.order_coarse
        filters = {order: prefilter(order) for order in SPLINE_POLES}
        self.poles = {order: by.poles for order, by in filters.items()}
        self.gains = {order: by.gains for order, by in filters.items()}
        self.reach = {order: by.reach for order, by in filters.items()}
        self.mode, self.mode_coarse = resampling.mode, resampling.mode_coarse
        self.separate = resampling.separate
        self.threshold = float(resampling.threshold)

    def grid_map(
        self,
        old_shape: list[int],
        new_shape: list[int],
        old_spacing: list[float],
        new_spacing: list[float],
        device: torch.device,
    ) -> ScriptGrid:
        """Work out the operators between two grids; shapes in voxels and spacings in mm, (z, y, x)."""
        if self.function == "none" or old_shape == new_shape:
            return ScriptGrid([identity_operator(n) for n in old_shape], 0, "none")
        coarse = -1 if self.function == "torch_simple" else self._coarse_axis(old_spacing, new_spacing)
        # resample_torch_fornnunet hands its mode on only where it separates an axis.
        in_plane = "linear" if coarse < 0 and self.function == "torch" else self.mode
        operators: list[ScriptOperator] = []
        for axis in range(3):
            if self.function == "spline":
                order = self.order_coarse if axis == coarse else self.order
                filtered = max(order, 2)
                operator = spline_operator(
                    old_shape[axis],
                    new_shape[axis],
                    order,
                    self.poles[filtered],
                    self.gains[filtered],
                    self.reach[filtered],
                )
            else:
                mode = self.mode_coarse if axis == coarse else in_plane
                operator = torch_operator(old_shape[axis], new_shape[axis], mode)
            operators.append(ScriptOperator(operator.reads, operator.matrix.to(device)))
        clip = "none"
        if self.function == "spline" and self.order > 1:
            clip = "volume" if coarse < 0 else "slice"
        return ScriptGrid(operators, max(coarse, 0), clip)

    def _coarse_axis(self, old_spacing: list[float], new_spacing: list[float]) -> int:
        """Find the axis to resample on its own (nnU-Net: determine_do_sep_z_and_axis), -1 for none."""
        separate = self.separate
        if separate is not None and not separate:
            return -1
        for spacing in (old_spacing, new_spacing):
            if separate is not None or max(spacing) / min(spacing) > self.threshold:
                # Where two or three axes share the coarse spacing, nnU-Net does not separate.
                coarsest = -1
                for axis in range(3):
                    if max(spacing) / spacing[axis] == 1:
                        coarsest = axis if coarsest < 0 else 3
                return coarsest if coarsest < 3 else -1
        return -1


def store_grid(state: dict[str, Tensor], name: str, grid: ScriptGrid) -> None:
    """Keep a grid map among a state's tensors."""
    for axis in range(3):
        state[f"{name}.{axis}.reads"] = grid.operators[axis].reads
        state[f"{name}.{axis}.matrix"] = grid.operators[axis].matrix
    state[f"{name}.clip"] = torch.tensor([grid.last_axis, int(grid.clip == "volume"), int(grid.clip == "slice")])


def stored_grid(state: dict[str, Tensor], name: str) -> ScriptGrid:
    """Take a grid map out of a state again."""
    operators = [ScriptOperator(state[f"{name}.{axis}.reads"], state[f"{name}.{axis}.matrix"]) for axis in range(3)]
    clip = state[f"{name}.clip"]
    return ScriptGrid(operators, int(clip[0]), "volume" if int(clip[1]) else "slice" if int(clip[2]) else "none")


def resample_axis(
    data: Tensor,
    operator: ScriptOperator,
    axis: int,
    start: int,
    stop: int,
    offset: int,
    block_rows: int = BLOCK_ROWS,
    line_voxels: int = LINE_VOXELS,
) -> Tensor:
    """Compute the outputs [start, stop) along an axis, -3, -2 or -1 (`kernels.resample_axis`).

    `data` begins at the input `offset` of that axis.
    """
    if operator.matrix.numel() == 0:
        return data.narrow(axis, start - offset, stop - start)
    shape = list(data.shape)
    shape[axis] = stop - start
    out = torch.empty(shape, dtype=data.dtype, device=data.device)
    # A z step is a y step on planes flattened to lines, a stretch of line at a time.
    source, target = data, out
    if axis == -3:
        source, target = data.flatten(-2), out.flatten(-2)
    for first in range(start, stop, block_rows):
        last = min(first + block_rows, stop)
        low, high = int(operator.reads[first, 0]), int(operator.reads[last - 1, 1])
        matrix = operator.matrix[first:last, low:high].contiguous()
        if axis == -1:
            target[..., first - start : last - start] = source[..., low - offset : high - offset] @ matrix.t()
        else:
            for column in range(0, source.shape[-1], line_voxels):
                stretch = source[..., low - offset : high - offset, column : column + line_voxels]
                target[..., first - start : last - start, column : column + line_voxels] = matrix @ stretch
    return out


def resample_planes(data: Tensor, grid: ScriptGrid) -> Tensor:
    """Resample (C, Z, Y, X) along y and x in one piece."""
    y, x = grid.operators[1], grid.operators[2]
    data = resample_axis(data, y, -2, 0, y.reads.shape[0], 0)
    return resample_axis(data, x, -1, 0, x.reads.shape[0], 0)


def planes_at_once(data: Tensor, grid: ScriptGrid, working_bytes: int = WORKING_BYTES) -> int:
    """How many planes of (C, Z, Y, X) to resample in one piece (`resampling.plane_groups`)."""
    voxels_out = grid.operators[1].reads.shape[0] * grid.operators[2].reads.shape[0]
    return max(1, working_bytes // (4 * data.shape[0] * max(data.shape[2] * data.shape[3], voxels_out)))


def resample_in_plane(data: Tensor, grid: ScriptGrid) -> Tensor:
    """Resample (C, Z, Y, X) along y and x, a few planes at a time."""
    step = planes_at_once(data, grid)
    return torch.cat([resample_planes(data[:, at : at + step], grid) for at in range(0, data.shape[1], step)], dim=1)


def value_range(data: Tensor, grid: ScriptGrid) -> tuple[Tensor, Tensor]:
    """Least and greatest values of (C, Z, Y, X) that a grid map clips to, shaped to broadcast."""
    axes = [1, 2, 3]
    if grid.clip == "slice":
        axes.pop(grid.last_axis)
    return data.amin(axes, keepdim=True), data.amax(axes, keepdim=True)


def resample_rows(
    data: Tensor, grid: ScriptGrid, start: int, stop: int, offset: int, low: Tensor, high: Tensor
) -> Tensor:
    """Resample to the planes [start, stop) of the new grid (`resampling.resample_rows`).

    Args:
        data: (C, z, Y, X) float32: the input planes from `offset` on that these rows need.
        grid: The map from the whole input grid to the new one.
        start: First plane of the new grid.
        stop: The one after the last.
        offset: Index of the first plane in `data`.
        low: Least values, which `value_range` gives for the whole input; read where the map clips.
        high: Greatest values.
    """
    z = grid.operators[0]
    last = grid.operators[grid.last_axis]
    z_first = grid.clip == "volume" or grid.last_axis != 0
    if z_first:
        data = resample_axis(data.contiguous(), z, -3, start, stop, offset)
    if grid.clip == "volume" or grid.last_axis == 0:
        data = resample_in_plane(data, grid)
    else:
        other = grid.operators[3 - grid.last_axis]
        data = resample_axis(data, other, -grid.last_axis, 0, other.reads.shape[0], 0)
    if grid.clip == "slice" and grid.last_axis == 0:
        low, high = low[:, offset : offset + data.shape[1]], high[:, offset : offset + data.shape[1]]
    if grid.clip != "none":
        data = torch.clamp(data, low, high)
    if not z_first:
        return resample_axis(data, z, -3, start, stop, offset)
    return data if grid.clip == "volume" else resample_axis(data, last, grid.last_axis - 3, 0, last.reads.shape[0], 0)
