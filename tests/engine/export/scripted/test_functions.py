"""The functions that the engine and its path of TorchScript share give the same compiled."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.engine.export.scripted.preprocessing import filled, occupied_box
from nnturbo.engine.export.scripted.resampling import ScriptResampling, inputs_of, resample_rows
from nnturbo.engine.export.scripted.resampling import value_range as script_value_range
from nnturbo.engine.model.resampling_function import Resampling
from nnturbo.engine.pipeline.interpolation import PREFILTERS, spline_band, torch_band
from nnturbo.engine.pipeline.preprocessing import filled_mask, nonzero_box, shape_at_spacing
from nnturbo.engine.pipeline.resampling import GridMap, grid_map, resample, spline_operator, torch_operator, value_range
from nnturbo.engine.pipeline.tiling import axis_weights
from nnturbo.engine.pipeline.window import tile_positions
from nnturbo.kernels import argmax_labels, region_labels


def script(function):
    """Compile one of the functions that the engine and the path share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
        return torch.jit.script(function)


LENGTHS = [(n_in, n_out) for n_in in (1, 2, 5, 24, 61) for n_out in (1, 2, 7, 24, 90)]


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, "linear", "nearest", "nearest-exact"])
def test_compiled_operators_are_the_engines(kind):
    is_spline = isinstance(kind, int)
    compiled_band, operator_of = (
        (script(spline_band), spline_operator) if is_spline else (script(torch_band), torch_operator)
    )
    for n_in, n_out in LENGTHS:
        first, weights = compiled_band(n_in, n_out, kind, *([PREFILTERS] if is_spline else []))
        operator = operator_of(n_in, n_out, kind)
        assert torch.equal(first, operator.first)
        assert torch.equal(weights, operator.weights)


@pytest.mark.parametrize("old", [(1, 1, 1), (5, 1, 1), (1, 5, 1), (1, 1, 5), (5, 5, 1)])
@pytest.mark.parametrize("separate", [None, True, False])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4, 5])
def test_resampled_planes_are_the_engines(old, separate, order):
    data = torch.randn(2, 11, 9, 8, generator=torch.Generator().manual_seed(0))
    resampling = Resampling(function="spline", order=order, order_coarse=1, separate=separate)
    for shape in ((11, 9, 8), (20, 7, 12), (5, 9, 70)):
        expected: GridMap = grid_map(resampling, (11, 9, 8), shape, old, (1, 1, 1))
        grid = ScriptResampling(resampling).grid_map([11, 9, 8], list(shape), list(old), [1, 1, 1], data.device)
        assert (grid.last_axis, grid.clip) == (expected.last_axis, expected.clip)
        low, high = script_value_range(data, grid)
        if grid.clip != "none":
            for limit, wanted in zip((low, high), value_range(data, expected), strict=True):
                assert torch.equal(limit, wanted)
        start, stop = 1, shape[0] - 1
        first, last = inputs_of(grid.operators[0], start, stop)
        rows = resample_rows(data[:, first:last], grid, start, stop, first, low, high)
        assert torch.allclose(rows, resample(data, expected)[:, start:stop], atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), share=st.floats(0.3, 0.9), seed=st.integers(0, 999))
def test_masks_and_boxes_are_the_engines(shape, share, seed):
    image = (np.random.default_rng(seed).random((1, *shape)) < share).astype(np.int16)
    occupied = torch.from_numpy(image[0] != 0)
    assert np.array_equal(filled(occupied).numpy(), filled_mask(image))
    assert occupied_box(occupied) == [list(bounds) for bounds in nonzero_box(image)]


def test_a_winding_way_out_is_no_hole():
    """A corridor that turns at every wall: the outside comes in step by step, as far as it goes."""
    solid = torch.ones(3, 15, 9, dtype=torch.bool)
    for wall in range(1, 14):
        if wall % 2:
            solid[1, wall, 1:8] = False
        else:
            solid[1, wall, 1 if wall % 4 else 7] = False
    assert filled(solid).all()
    solid[1, 13, 8] = False  # the door
    assert torch.equal(filled(solid), solid)


@pytest.fixture(scope="module")
def shared_functions():
    """What rounds, or has loops that Python and TorchScript could run differently, compiled."""
    functions = (tile_positions, axis_weights, shape_at_spacing, argmax_labels, region_labels)
    return {function: script(function) for function in functions}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(0, 300), st.floats(0.05, 1))
def test_compiled_tiles_are_the_engines(shared_functions, patch, more, step):
    positions = tile_positions(patch + more, patch, step)
    assert shared_functions[tile_positions](patch + more, patch, step) == positions
    weights = shared_functions[axis_weights](patch + more, patch, positions)
    expected = axis_weights(patch + more, patch, positions)
    assert all(torch.equal(*pair) for pair in zip(weights, expected, strict=True))


@pytest.mark.parametrize("voxels", [1, 3, 5, 25, 27, 30, 99])
def test_compiled_shapes_are_rounded_half_to_even(shared_functions, voxels):
    shape, spacing = [voxels] * 3, [1.5, 2.5, 0.7]
    expected = [round(voxels * each) for each in spacing]
    assert shape_at_spacing(shape, spacing, [1.0] * 3) == expected
    assert shared_functions[shape_at_spacing](shape, spacing, [1.0] * 3) == expected


@pytest.mark.parametrize("classes", [1, 2, 5, 256, 257])
def test_compiled_labels_are_the_engines(shared_functions, classes):
    logits = torch.randn(classes, 6, 7, generator=torch.Generator().manual_seed(0))
    logits[-1] = logits[0]  # equal logits: the first wins
    labels = shared_functions[argmax_labels](logits)
    assert labels.dtype == argmax_labels(logits).dtype
    assert torch.equal(labels.int(), logits.argmax(0).int())
    values = list(range(classes, 0, -1))
    assert torch.equal(shared_functions[region_labels](logits, values), region_labels(logits, values))
