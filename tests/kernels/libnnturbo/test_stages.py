"""Each stage of libnnturbo against the Python function that it stands for, on random cases."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.model.heads import focus_of_channels
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.model.resampling_function import parse_resampling
from nnturbo.engine.pipeline.preprocessing import filled_mask, preprocess
from nnturbo.engine.pipeline.resampling import grid_map, resample, spline_operator, torch_operator
from nnturbo.engine.pipeline.tiling import axis_weights
from nnturbo.engine.pipeline.window import tile_positions
from nnturbo.engine.scans.volume import Volume
from nnturbo.kernels.operators import band_matrix
from nnturbo.kernels.reference import accumulate_views, gather_tiles

from tests.engine.factory import SPLINE, dataset_json, plans_json
from tests.kernels.libnnturbo.library import NO_MEMORY
from tests.kernels.libnnturbo.stages import TYPES, StageError, text_of

pytestmark = pytest.mark.thorough  # the library is built for half a minute
random_cases = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(*[st.integers(1, 17)] * 3)
STEPS = st.tuples(*[st.sampled_from([0.5, 0.9, 1.0, 2.0, 3.5, 7.0])] * 3)


def luck_of(*numbers):
    return np.random.default_rng([int(100 * number) for number in numbers])


@random_cases
@given(n_in=st.integers(1, 70), n_out=st.integers(1, 90), order=st.integers(0, 5))
def test_spline_operators(stages, n_in, n_out, order):
    expected = spline_operator(n_in, n_out, order)
    expected = band_matrix(n_in, expected.first, expected.weights).numpy()
    np.testing.assert_allclose(stages.operator(n_in, n_out, order), expected, rtol=0, atol=1e-7)


@random_cases
@given(
    n_in=st.integers(1, 300), n_out=st.integers(1, 300), mode=st.sampled_from(["linear", "nearest", "nearest-exact"])
)
def test_torch_operators(stages, n_in, n_out, mode):
    expected = torch_operator(n_in, n_out, mode)
    assert np.array_equal(stages.operator(n_in, n_out, 0, mode), band_matrix(n_in, expected.first, expected.weights))


RESAMPLINGS = {
    "resample_data_or_seg_to_shape": st.fixed_dictionaries(
        {
            "order": st.integers(0, 5),
            "order_z": st.integers(0, 3),
            "force_separate_z": st.sampled_from([None, True, False]),
        }
    ),
    "resample_torch_fornnunet": st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["linear", "nearest"]),
            "aniso_axis_mode": st.sampled_from(["linear", "nearest-exact"]),
            "force_separate_z": st.sampled_from([None, True, False]),
        }
    ),
    "resample_torch_simple": st.fixed_dictionaries({"mode": st.sampled_from(["linear", "nearest"])}),
    "no_resampling_hack": st.just({}),
}


@settings(random_cases, max_examples=150)
@given(st.data(), SHAPES, SHAPES, STEPS, STEPS, st.sampled_from(sorted(RESAMPLINGS)))
def test_resampling_of_whole_scans_and_of_parts(stages, data, shape, new_shape, old_spacing, new_spacing, function):
    arguments = data.draw(RESAMPLINGS[function])
    changes = {"resampling_fn_data": function, "resampling_fn_data_kwargs": arguments}
    plan = text_of(plans_json(**changes))
    grid = grid_map(parse_resampling(function, arguments), shape, new_shape, old_spacing, new_spacing)
    values = luck_of(*shape, *new_shape).normal(size=(2, *shape)).astype(np.float32)
    start = data.draw(st.integers(0, grid.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, grid.shape[0]))
    whole = torch.from_numpy(values)
    expected = resample(whole, grid).numpy()
    got = stages.resample(
        plan, values, grid.shape if function == "no_resampling_hack" else new_shape, old_spacing, new_spacing
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    part = stages.resample(plan, values, grid.shape, old_spacing, new_spacing, (start, stop))
    np.testing.assert_allclose(part, expected[:, start:stop], rtol=0, atol=2e-6)


SCHEMES = st.tuples(
    st.sampled_from(["CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization"]),
    st.booleans(),
)


@settings(random_cases, max_examples=150)
@given(
    shape=SHAPES,
    spacing=STEPS,
    schemes=st.lists(SCHEMES, min_size=1, max_size=3),
    order=st.permutations([0, 1, 2]),
    dtype=st.sampled_from(TYPES),
    separate=st.sampled_from([None, True, False]),
    empty=st.booleans(),
)
def test_preprocessing(stages, shape, spacing, schemes, order, dtype, separate, empty):
    """Crop, masks with holes, every normalisation and type of voxels, any order of axes, both ways to resample."""
    kwargs = {**SPLINE, "force_separate_z": separate}
    plans = plans_json(
        normalization_schemes=[scheme for scheme, _ in schemes],
        use_mask_for_norm=[mask for _, mask in schemes],
        resampling_fn_data_kwargs=kwargs,
    )
    plans["transpose_forward"] = plans["transpose_backward"] = list(order)
    of_ct = plans["foreground_intensity_properties_per_channel"]["0"]
    plans["foreground_intensity_properties_per_channel"] = {str(index): of_ct for index in range(len(schemes))}
    dataset = dataset_json(channel_names={str(index): f"channel {index}" for index in range(len(schemes))})
    luck = luck_of(*shape, *spacing)
    array = luck.integers(0, 100, (len(schemes), *shape)) * luck.integers(0, 2, shape)
    array = (array * (0 if empty else 1) - (40 if np.dtype(dtype).kind != "u" and not empty else 0)).astype(dtype)
    plan = parse_plan(plans, dataset, "3d_fullres")
    try:
        case = preprocess(Volume.from_array(array, spacing), plan, torch.device("cpu"))
    except VolumeError:
        with pytest.raises(StageError, match="at least one voxel|at most 1000 times"):
            stages.preprocess(text_of(plans, dataset), array, spacing)
        return
    expected = torch.cat(list(case.planes([(0, case.shape[0])]))).numpy()
    box, numbers, planes = stages.preprocess(text_of(plans, dataset), array, spacing)
    assert box == [list(bounds) for bounds in case.box]
    wanted = np.array([channel.numbers for channel in case.normalizations], np.float32)
    np.testing.assert_allclose(numbers, wanted, rtol=2e-7)
    np.testing.assert_allclose(planes, expected, rtol=2e-6, atol=1e-5)


@random_cases
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), density=st.floats(0.3, 0.9))
def test_masks_with_holes(stages, shape, density):
    array = (luck_of(*shape).random((1, *shape)) < density).astype(np.uint8)
    assert np.array_equal(stages.filled_mask(array), filled_mask(array))


@random_cases
@given(patch=st.integers(1, 40), more=st.integers(0, 200), step=st.floats(0.05, 1))
def test_tiles_and_their_weights(stages, patch, more, step):
    positions = tile_positions(patch + more, patch, step)
    assume(len(positions) < 2000)
    assert stages.tile_positions(patch + more, patch, step) == positions
    expected = torch.stack(axis_weights(patch + more, patch, positions)).numpy()
    np.testing.assert_allclose(stages.axis_weights(patch + more, patch, positions), expected, rtol=2e-7, atol=0)


def test_steps_too_small_are_refused(stages):
    with pytest.raises(StageError, match="at most 10\\^7 tiles along an axis"):
        stages.tile_positions(1000, 10, 1e-12)


def test_operators_and_weights_that_no_memory_holds_are_refused(stages):
    for mode in ("", "linear"):
        with pytest.raises(StageError) as raised:
            stages._call("operator", 10, 10**11, 3, mode, None)
        assert raised.value.status == NO_MEMORY
    with pytest.raises(StageError) as raised:
        stages._call("axis_weights", 10**7, 10**7, np.zeros(10**6, np.int64), 10**6, None)
    assert raised.value.status == NO_MEMORY


@random_cases
@given(st.data(), st.sets(st.integers(0, 2)))
def test_mirrored_tiles_and_their_sums(stages, data, flips):
    size = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    shape = data.draw(st.tuples(*[st.integers(1, 12)] * 3))
    corner = tuple(data.draw(st.integers(1 - n, m - 1)) for n, m in zip(size, shape, strict=True))
    margin = data.draw(st.tuples(*[st.integers(0, 3)] * 3))
    luck = luck_of(*size, *shape)
    volume = luck.normal(size=(2, *shape)).astype(np.float32)
    sums = luck.normal(size=(2, *(n + 2 * m for n, m in zip(size, margin, strict=True)))).astype(np.float32)
    weights = [luck.random(n).astype(np.float32) for n in size]
    tile, got = stages.gather_and_add(volume, corner, size, flips, weights, margin, sums)
    views = [sorted(flips)]
    expected = gather_tiles(torch.from_numpy(volume), list(corner), list(size), views, torch.empty(1, 2, *size))
    assert np.array_equal(tile, expected[0])
    target = torch.from_numpy(sums)
    place = target[(slice(None), *(slice(m, m + n) for m, n in zip(margin, size, strict=True)))]
    accumulate_views(expected, views, tuple(map(torch.from_numpy, weights)), place)
    np.testing.assert_allclose(got, target, rtol=1e-6, atol=1e-6)


@random_cases
@given(
    outputs=st.integers(1, 6),
    regions=st.booleans(),
    channels=st.sets(st.integers(0, 5), min_size=1),
    seed=st.integers(0, 99),
)
def test_focus_of_tiles(stages, outputs, regions, channels, seed):
    chosen = sorted(channel for channel in channels if channel < outputs) or [0]
    logits = luck_of(seed).normal(size=(outputs, 3, 5, 7)).astype(np.float32) * 4
    expected = focus_of_channels(torch.from_numpy(logits)[None], chosen, regions).mean()
    assert stages.mean_focus(logits, chosen, regions=regions) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing": (0, 1, 1)}, "spacing must be finite and above 0 mm"),
        ({"spacing": (1, 1, np.nan)}, "spacing must be finite and above 0 mm"),
        ({"spacing": (1e5, 1e5, 1e5)}, "grow at most 1000 times"),
        ({"spacing": (1e-3, 1e-3, 1e-3)}, "at least one voxel along each axis"),
        ({"array": np.full((1, 4, 4, 4), np.inf)}, "voxels must be finite"),
        ({"array": np.zeros((2, 4, 4, 4))}, r"takes 1 channel\(s\), got 2"),
    ],
)
def test_scans_that_do_not_fit(stages, change, message):
    given = {"array": np.ones((1, 4, 4, 4)), "spacing": (1, 1, 1), **change}
    with pytest.raises(StageError, match=message):
        stages.preprocess(text_of(plans_json()), given["array"], given["spacing"])


def test_colours_out_of_range(stages):
    plan = text_of(plans_json(normalization_schemes=["RGBTo01Normalization"]))
    with pytest.raises(StageError, match="RGB channel must hold values from 0 to 255"):
        stages.preprocess(plan, np.full((1, 4, 4, 4), 300.0), (2, 1.5, 1.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema must be 1, it is 2"),
        ({"patch_size": [8, 12]}, "spacing must have as many numbers as patch_size"),
        ({"patch_size": [2**20, 2**20, 2**20]}, "at most 2.31 voxels"),
        ({"transpose_forward": [0, 0, 1]}, "an order of the axes"),
        ({"views": [[0]]}, "the unflipped one first"),
        ({"channels": []}, "channels must be 1 to 1024"),
        ({"reader": 3}, "the form that nnturbo writes"),
        ({"spacing": [1, 1, 0]}, "spacing must be above 0"),
    ],
)
def test_descriptions_that_are_damaged(stages, changes, message):
    plan = json.dumps({**json.loads(text_of(plans_json())), **changes})
    with pytest.raises(StageError, match=message):
        stages.preprocess(plan, np.ones((1, 4, 4, 4)), (1, 1, 1))
