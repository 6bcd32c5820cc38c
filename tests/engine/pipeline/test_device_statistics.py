"""Scans measured where they lie on a GPU, by the same code on a CPU, against what is measured on a CPU."""

import numpy as np
import pytest
import torch
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.pipeline import preprocessing
from nnturbo.engine.pipeline.device_statistics import STATISTICS_PLANES, extremes, mean_and_deviation
from nnturbo.engine.pipeline.preprocessing import preprocess
from nnturbo.engine.scans.volume import Volume

from tests.engine.factory import dataset_json, plans_json, smooth_scan

CPU = torch.device("cpu")


def scan(dtype, seed=0):
    """More planes than are looked at in one step, with zeros around and within."""
    values = np.random.default_rng(seed).normal(300, 80, (STATISTICS_PLANES + 9, 11, 12))
    values[:, :2] = values[3, 4:6] = 0
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_mean_and_deviation_are_numpys_in_float64(dtype, masked):
    image = scan(dtype)
    region = image != 0 if masked else np.ones(image.shape, bool)
    mean, deviation = mean_and_deviation(torch.from_numpy(image), torch.from_numpy(region) if masked else None)
    values = image[region].astype(np.float64)
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert deviation == pytest.approx(values.std(), rel=1e-6)


def test_an_empty_region_has_a_mean_of_zero():
    image = torch.ones(3, 4, 5)
    assert mean_and_deviation(image, torch.zeros(3, 4, 5, dtype=torch.bool)) == (0.0, 0.0)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2), (0, 2)])
def test_extremes_are_numpys(axes):
    image = scan(np.int16)
    low, high, outside = extremes(torch.from_numpy(image), None, axes)
    assert np.array_equal(low, image.min(axes, keepdims=True))
    assert np.array_equal(high, image.max(axes, keepdims=True))
    assert outside is None
    region = image > 320
    region[5] = True
    region[:, 7] = region[:, :, 7] = True
    low, high, outside = extremes(torch.from_numpy(image), torch.from_numpy(region), axes)
    assert np.array_equal(low, np.where(region, image, np.inf).min(axes, keepdims=True))
    assert np.array_equal(high, np.where(region, image, -np.inf).max(axes, keepdims=True))
    assert np.array_equal(outside, ~region.all(axes, keepdims=True))


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.5), (8.0, 1.2, 1.2)])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_schemes": ["ZScoreNormalization"]},
        {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [True]},
        {"normalization_schemes": ["RescaleTo01Normalization"]},
    ],
)
def test_a_case_measured_on_its_device_has_the_planes_of_one_measured_on_a_cpu(monkeypatch, spacing, dtype, changes):
    array = np.abs(smooth_scan((14, 24, 22))).clip(0, 255).astype(dtype)
    array[:, :3] = array[6, 9:12] = 0
    volume = Volume.from_array(array, spacing)
    plan = parse_plan(plans_json(**changes), dataset_json(), "3d_fullres")
    expected = preprocess(volume, plan, CPU)
    monkeypatch.setattr(preprocessing, "_measures_on", lambda device: True)
    found = preprocess(volume, plan, CPU)
    for one, other in zip(expected.normalizations, found.normalizations, strict=True):
        assert other.numbers == pytest.approx(one.numbers, rel=1e-6)
    rows = [(0, expected.shape[0])]
    (one,), (other,) = expected.planes(rows), found.planes(rows)
    assert torch.allclose(one, other, atol=1e-5)
