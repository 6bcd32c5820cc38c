import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.engine.errors import ModelError
from nnturbo.engine.model.resampling_function import Resampling, parse_resampling
from nnturbo.engine.pipeline.resampling import (
    grid_map,
    resample,
    resample_rows,
    spline_operator,
    torch_operator,
    value_range,
)
from scipy.ndimage import map_coordinates
from skimage.transform import resize


def dense(operator):
    matrix = np.zeros((operator.n_out, operator.n_in))
    for row, first in enumerate(operator.first.tolist()):
        matrix[row, first : first + operator.taps] = operator.weights[row].numpy()
    return matrix


lengths = st.one_of(st.integers(1, 30), st.integers(31, 200))


@settings(deadline=None, max_examples=60)
@given(lengths, lengths, st.integers(0, 5))
def test_spline_operator_is_what_skimage_does_to_impulses(n_in, n_out, order):
    impulses = np.eye(n_in)
    response = np.stack(
        [resize(row, (n_out,), order, mode="edge", anti_aliasing=False, clip=False) for row in impulses], axis=1
    )
    # skimage's own spline at unchanged length is the identity to 1e-7; ours is the identity.
    assert np.abs(dense(spline_operator(n_in, n_out, order)) - response).max() < 1e-6


@settings(deadline=None, max_examples=60)
@given(lengths, lengths, st.integers(2, 5))
def test_spline_operator_is_what_map_coordinates_does_to_impulses(n_in, n_out, order):
    at = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    response = np.stack([map_coordinates(row, [at], order=order, mode="nearest") for row in np.eye(n_in)], axis=1)
    assert np.abs(dense(spline_operator(n_in, n_out, order)) - response).max() < 1e-6


@pytest.mark.parametrize(("order", "taps"), [(1, 2), (2, 24), (3, 30), (4, 38), (5, 44)])
def test_a_spline_reads_few_inputs(order, taps):
    assert spline_operator(512, 546, order).taps <= taps


@settings(deadline=None, max_examples=60)
@given(lengths, lengths, st.sampled_from(["linear", "nearest", "nearest-exact"]))
def test_torch_operator_is_what_interpolate_does(n_in, n_out, mode):
    signal = torch.randn(1, 1, n_in, generator=torch.Generator().manual_seed(n_in * 1000 + n_out))
    options = {"align_corners": False} if mode == "linear" else {}
    expected = F.interpolate(signal, size=n_out, mode=mode, **options)[0, 0].numpy()
    assert np.abs(dense(torch_operator(n_in, n_out, mode)) @ signal[0, 0].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4, 5])
def test_resample_clips_to_each_channels_range_as_skimage_does(order):
    image = np.random.default_rng(0).integers(0, 2, (2, 9, 14, 11)).astype(np.float32) * [[[[1]]], [[[40]]]]
    grid = grid_map(
        Resampling(function="spline", order=order, separate=False), (9, 14, 11), (15, 10, 13), (1,) * 3, (1,) * 3
    )
    expected = np.stack([resize(c, (15, 10, 13), order, mode="edge", anti_aliasing=False) for c in image])
    result = resample(torch.from_numpy(image.astype(np.float32)), grid).numpy()
    assert np.abs(result - expected).max() < 1e-4
    assert result.min() >= 0
    assert result[0].max() <= 1


@pytest.mark.parametrize(
    ("old", "new", "separate", "coarse"),
    [
        ((3.1, 1, 1), (1, 1, 1), None, 0),
        ((3.0, 1, 1), (1, 1, 1), None, None),
        ((1, 1, 1), (1, 1, 4), None, 2),
        ((1, 4, 1), (4, 1, 1), None, 1),
        ((4, 4, 1), (1, 1, 1), None, None),
        ((1, 4, 1), (1, 1, 1), False, None),
        ((1, 1.5, 1), (1, 1, 1), True, 1),
        ((1, 1, 1), (1, 1, 9), True, None),
    ],
)
def test_the_coarse_axis_is_nnunets(old, new, separate, coarse):
    grid = grid_map(Resampling(function="spline", order=3, separate=separate), (8, 8, 8), (9, 10, 11), old, new)
    assert grid.clip == ("volume" if coarse is None else "slice")
    assert grid.last_axis == (coarse or 0)
    selections = [operator.is_selection for operator in grid.operators]
    assert selections == [axis == coarse for axis in range(3)]


@pytest.mark.parametrize("old", [(1, 1, 1), (5, 1, 1), (1, 5, 1), (1, 1, 5)])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_rows_made_in_parts_are_the_rows_of_the_whole(old, order):
    data = torch.randn(2, 11, 9, 10, generator=torch.Generator().manual_seed(1))
    grid = grid_map(Resampling(function="spline", order=order, separate=None), (11, 9, 10), (17, 7, 12), old, (1, 1, 1))
    limits = value_range(data, grid)
    parts = []
    for start, stop in ((0, 5), (5, 6), (6, 17)):
        low, high = grid.operators[0].inputs_of(start, stop)
        parts.append(resample_rows(data[:, low:high], grid, rows=(start, stop), offset=low, limits=limits))
    assert torch.allclose(torch.cat(parts, dim=1), resample(data, grid), atol=1e-6)


def test_equal_shapes_are_left_alone_and_unclipped():
    grid = grid_map(Resampling(function="spline", order=3), (4, 5, 6), (4, 5, 6), (1, 1, 1), (1, 1, 1.0001))
    data = torch.randn(1, 4, 5, 6)
    assert grid.clip == "none"
    assert torch.equal(resample(data, grid), data)


def test_no_resampling_keeps_the_old_shape():
    grid = grid_map(parse_resampling("no_resampling_hack", {}), (4, 5, 6), (7, 8, 9), (1, 1, 1), (2, 2, 2))
    assert grid.shape == (4, 5, 6)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("resample_magic", {}, "must be one of"),
        ("no_resampling_hack", {"order": 3}, "no arguments"),
        ("resample_data_or_seg_to_shape", {"order": 6}, "an integer from 0 to 5"),
        ("resample_data_or_seg_to_shape", {"order": True}, "an integer from 0 to 5"),
        ("resample_data_or_seg_to_shape", {"order_z": "3"}, "an integer from 0 to 5"),
        ("resample_data_or_seg_to_shape", {"force_separate_z": "yes"}, "force_separate_z"),
        ("resample_data_or_seg_to_shape", {"separate_z_anisotropy_threshold": None}, "must be a number"),
        ("resample_torch_fornnunet", {"mode": "bicubic"}, "interpolation mode"),
        ("resample_torch_fornnunet", {"memefficient_seg_resampling": 1}, "must be true or false"),
        ("resample_torch_fornnunet", {"separate_z_anisotropy_threshold": float("nan")}, "must be a number"),
        ("resample_torch_fornnunet", {"force_separate_z": 1}, "force_separate_z"),
    ],
)
def test_functions_nnunet_does_not_have_are_refused(function, arguments, message):
    with pytest.raises(ModelError, match=message):
        parse_resampling(function, arguments)


def test_the_torch_function_separates_by_itself_and_the_spline_function_on_request():
    assert parse_resampling("resample_torch_fornnunet", {}).separate is None
    assert parse_resampling("resample_data_or_seg_to_shape", {}).separate is False
