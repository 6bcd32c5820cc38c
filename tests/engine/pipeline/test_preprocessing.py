import numpy as np
import pytest
import torch
from nnturbo.engine import Volume, VolumeError
from nnturbo.engine.model.plans import NormalizationScheme, parse_plan
from nnturbo.engine.pipeline.normalization import choose_normalization, normalize_within
from nnturbo.engine.pipeline.preprocessing import filled_mask, nonzero_box, preprocess
from nnturbo.kernels import normalize
from scipy.ndimage import binary_fill_holes

from tests.engine.factory import dataset_json, plans_json, smooth_scan

CPU = torch.device("cpu")


def test_the_box_is_that_of_the_non_zero_voxels():
    image = np.zeros((2, 7, 8, 9), np.int16)
    image[0, 2, 3, 4] = 1
    image[1, 5, 3, 1] = -1
    assert nonzero_box(image) == ((2, 6), (3, 4), (1, 5))
    assert nonzero_box(image * 0) == ((0, 7), (0, 8), (0, 9))
    assert nonzero_box(image * 0 + 1) == ((0, 7), (0, 8), (0, 9))


@pytest.mark.parametrize("seed", range(5))
def test_holes_are_filled_as_scipy_does(seed):
    rng = np.random.default_rng(seed)
    image = (rng.random((2, 12, 13, 14)) > 0.7).astype(np.float32)
    assert np.array_equal(filled_mask(image), binary_fill_holes(image.any(0)))


@pytest.mark.parametrize("length", [5, 16, 40])
def test_z_score_uses_the_region_it_is_told(length):
    image = smooth_scan((length, 9, 10)).astype(np.float32)
    image[:, :4] = 0
    mask = image != 0
    whole = choose_normalization(NormalizationScheme(scheme="ZScoreNormalization", use_mask=False), image, mask, "")
    inside = choose_normalization(NormalizationScheme(scheme="ZScoreNormalization", use_mask=True), image, mask, "")
    assert (whole.shift, whole.scale) == pytest.approx((image.mean(), image.std()), rel=1e-5)
    assert (inside.shift, inside.scale) == pytest.approx((image[mask].mean(), image[mask].std()), rel=1e-5)
    result = normalize_within(torch.from_numpy(image)[None], [inside.numbers], [True], torch.from_numpy(mask))[
        0
    ].numpy()
    assert (result[~mask] == 0).all()
    assert result[mask].std() == pytest.approx(1, rel=1e-4)


def test_ct_numbers_are_clipped_shifted_and_scaled():
    channel = NormalizationScheme(scheme="CTNormalization", use_mask=False, low=-10, high=20, mean=5, std=2)
    numbers = choose_normalization(channel, np.zeros((1, 1, 1)), None, "").numbers
    assert normalize(torch.tensor([[-99, 5, 99]], dtype=torch.int16), [numbers]).tolist() == [[-7.5, 0, 7.5]]


def test_a_constant_scan_does_not_divide_by_zero():
    for scheme in ("ZScoreNormalization", "RescaleTo01Normalization"):
        image = np.full((4, 5, 6), 7, np.int16)
        numbers = choose_normalization(NormalizationScheme(scheme=scheme, use_mask=False), image, None, "").numbers
        assert normalize(torch.full((1, 4, 5, 6), 7.0), [numbers]).abs().max() == 0


def test_rgb_values_must_be_bytes():
    channel = NormalizationScheme(scheme="RGBTo01Normalization", use_mask=False)
    for value in (-1, 256):
        with pytest.raises(VolumeError, match="scan-a: an RGB channel must hold values from 0 to 255"):
            choose_normalization(channel, np.full((1, 1, 1), value), None, "scan-a")


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.5), (3.0, 1.0, 1.2), (7.0, 1.0, 1.0), (1.0, 6.0, 1.0)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.uint16, np.int32])
def test_planes_made_in_ranges_are_those_made_at_once(spacing, dtype):
    scan = Volume.from_array((smooth_scan((13, 20, 18)) + 400).astype(dtype), spacing)
    plan = parse_plan(plans_json(), dataset_json(), "3d_fullres")
    case = preprocess(scan, plan, CPU)
    depth = case.shape[0]
    (whole,) = case.planes([(0, depth)])
    ranges = [(0, 2), (2, 3), (3, depth - 1), (depth - 1, depth)]
    parts = torch.cat(list(case.planes(ranges)), dim=1)
    assert whole.shape == (1, *case.shape)
    assert torch.allclose(parts, whole, atol=1e-6)
    assert case.logits_grid.shape == scan.array.shape[1:]


def test_a_readers_memory_is_never_written_to():
    array = smooth_scan((10, 12, 14)).astype(np.float32)
    before = array.copy()
    array.flags.writeable = False
    case = preprocess(
        Volume.from_array(array, (2, 1.5, 1.5)), parse_plan(plans_json(), dataset_json(), "3d_fullres"), CPU
    )
    list(case.planes([(0, 10)]))
    assert np.array_equal(array, before)


def test_a_spacing_that_makes_a_scan_grow_without_end_is_refused():
    plan = parse_plan(plans_json(), dataset_json(), "3d_fullres")
    scan = Volume.from_array(np.ones((10, 16, 20), np.int16), (1e5, 1.5, 1.5), name="long")
    with pytest.raises(VolumeError, match="long: .* must grow at most 1000 times"):
        preprocess(scan, plan, CPU)


def test_a_scan_thinner_than_half_a_voxel_is_refused():
    plan = parse_plan(plans_json(spacing=[20.0, 1.5, 1.5]), dataset_json(), "3d_fullres")
    scan = Volume.from_array(np.ones((3, 20, 20), np.int16), (1, 1, 1), name="thin")
    with pytest.raises(VolumeError, match="thin: at the model's spacing"):
        preprocess(scan, plan, CPU)
