"""Where tiles lie, what they weigh, and which planes a row of them needs and ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.engine.pipeline.tiling import (
    added_planes,
    axis_weights,
    cover,
    finished_planes,
    planes_ended,
    planes_in_row,
    shift_planes,
    without_padding,
)
from nnturbo.engine.pipeline.window import tile_positions


@pytest.mark.parametrize(
    ("length", "patch", "step", "positions"),
    [(110, 64, 0.5, [0, 23, 46]), (64, 64, 0.5, [0]), (65, 64, 0.5, [0, 1]), (10, 4, 1.0, [0, 3, 6])],
)
def test_tile_positions_are_nnunets(length, patch, step, positions):
    assert tile_positions(length, patch, step) == positions


def test_axis_weights_of_all_tiles_add_up_to_one():
    positions = tile_positions(37, 11, 0.5)
    total = torch.zeros(37)
    for start, weight in zip(positions, axis_weights(37, 11, positions), strict=True):
        total[start : start + 11] += weight
    assert torch.allclose(total, torch.ones(37), atol=1e-6)


def test_a_grid_is_padded_on_both_sides_to_one_tile():
    tiling = cover([3, 12, 8], [8, 8, 8], 0.5, False, True, 2, torch.device("cpu"))
    assert tiling.padded == [8, 12, 8]
    assert tiling.before == [2, 0, 0]
    assert tiling.starts == [[0], [0, 4], [0]]
    assert without_padding(tiling, 0, 8) == (0, 3)
    buffer = torch.arange(8.0)[None, :, None, None]
    assert planes_in_row(tiling, buffer, 0, 0, 3).flatten().tolist() == [2, 3, 4]
    assert finished_planes(tiling, buffer, 0).flatten().tolist() == [2, 3, 4]
    assert torch.allclose(tiling.weights[0], torch.full((1, 8), 0.5))  # of two views


def test_every_plane_of_a_slicewise_grid_is_a_row():
    tiling = cover([5, 9, 9], [1, 6, 6], 0.5, True, True, 1, torch.device("cpu"))
    assert tiling.starts[0] == [0, 1, 2, 3, 4]
    assert [planes_ended(tiling, row) for row in range(5)] == [1] * 5
    assert [added_planes(tiling, row, row - 1) for row in range(5)] == [(row, row + 1) for row in range(5)]


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.05, 1))
def test_rows_need_and_end_every_plane_once(planes, patch, step):
    """Buffers of inputs and of sums, moved from row to row, hold and give the planes of the grid in order."""
    tiling = cover([planes, 1, 1], [patch, 1, 1], step, False, True, 1, torch.device("cpu"))
    inputs, sums = torch.zeros(1, patch, 1, 1), torch.zeros(1, patch, 1, 1)
    finished = []
    for row, top in enumerate(tiling.starts[0]):
        start, stop = added_planes(tiling, row, row - 1)
        shift_planes(inputs, stop - start)
        first, last = without_padding(tiling, start, stop)
        planes_in_row(tiling, inputs, row, first, last)[0, :, 0, 0] = 1 + torch.arange(float(first), float(last))
        held = torch.arange(top, top + patch) - tiling.before[0]
        assert torch.equal(inputs[0, :, 0, 0], torch.where((held >= 0) & (held < planes), held + 1, 0).float())
        sums += inputs * tiling.weights[0][row][None, :, None, None]
        finished += finished_planes(tiling, sums, row).flatten().tolist()
        shift_planes(sums, planes_ended(tiling, row))
    assert finished == pytest.approx(range(1, planes + 1), rel=1e-5)
    assert added_planes(tiling, len(tiling.starts[0]) - 1, -1) == (tiling.padded[0] - patch, tiling.padded[0])
