"""The DALI loader, on the CPU: the same pipeline as on a GPU, but for where its operators run."""

import copy
import importlib.util
import sys

import numpy as np
import pytest
import torch
from nnturbo.engine import (
    BackendUnavailable,
    Engine,
    EngineError,
    EngineOptions,
    PredictionError,
    Request,
    Volume,
    VolumeError,
)
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.pipeline.dali import DaliLoader
from nnturbo.engine.pipeline.preprocessing import preprocess

from tests.engine.factory import dataset_json, plans_json, smooth_scan, write_model

CPU = torch.device("cpu")

# DALI leaves a socket of its processes to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed: pip install 'nnturbo[dali]'"
)


def plan_of(order=1, scheme="CTNormalization", transpose=(0, 1, 2), separate=None, channels=1):
    plans, dataset = copy.deepcopy(plans_json()), copy.deepcopy(dataset_json())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["resampling_fn_data_kwargs"] |= {"order": order, "force_separate_z": separate}
    configuration["normalization_schemes"] = [scheme] * channels
    configuration["use_mask_for_norm"] = [False] * channels
    plans["transpose_forward"] = list(transpose)
    plans["transpose_backward"] = [transpose.index(axis) for axis in range(3)]
    plans["foreground_intensity_properties_per_channel"] = {
        str(channel): plans["foreground_intensity_properties_per_channel"]["0"] for channel in range(channels)
    }
    dataset["channel_names"] = {str(channel): f"c{channel}" for channel in range(channels)}
    return parse_plan(plans, dataset, "3d_fullres")


def scan_of(dtype=np.int16, channels=1, spacing=(3.0, 1.2, 1.2)):
    array = np.stack([smooth_scan((11, 24, 26)) + 10 * channel for channel in range(channels)])
    array[:, :2] = 0  # cropped away
    array = np.clip(array, 0, 255) if dtype == np.uint8 else array
    return Volume.from_array(array.astype(dtype), spacing, name="scan")


def planes(case):
    return torch.cat(list(case.planes([(0, case.shape[0])])), dim=1)


def loaded(plan, images, **options):
    """Copies: what a loader gives is overwritten by what comes next."""
    return [
        answer if isinstance(answer, EngineError) else (answer, planes(answer.case).clone())
        for answer in DaliLoader(plan, CPU, **options)(map(Request, images))
    ]


@needs_dali
class TestPlanes:
    @pytest.mark.parametrize(
        ("of_plan", "of_scan"),
        [
            ({}, {}),
            pytest.param(
                {"scheme": "ZScoreNormalization", "channels": 2},
                {"dtype": np.float32, "channels": 2},
                marks=pytest.mark.thorough,
            ),
            pytest.param({"transpose": (2, 0, 1)}, {"dtype": np.uint8}, marks=pytest.mark.thorough),
            pytest.param(
                {"scheme": "NoNormalization"},
                {"dtype": np.float64, "spacing": (1.0, 2.0, 0.7)},
                marks=pytest.mark.thorough,
            ),
        ],
        ids=["int16", "float32-channels", "uint8-transposed", "float64"],
    )
    def test_linear_ones_are_those_of_the_exact_loader(self, of_plan, of_scan):
        plan, scan = plan_of(**of_plan), scan_of(**of_scan)
        exact = preprocess(scan, plan, CPU)
        ((prepared, found),) = loaded(plan, [scan], interpolation="linear")
        assert prepared.case.box == exact.box
        assert prepared.case.logits_grid.shape == exact.logits_grid.shape
        expected = planes(exact)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))

    @pytest.mark.thorough
    def test_cubic_ones_are_near_the_spline_and_nearer_than_linear_ones(self):
        plan, scan = plan_of(order=3), scan_of()
        expected = planes(preprocess(scan, plan, CPU))
        errors = {
            interpolation: float((loaded(plan, [scan], interpolation=interpolation)[0][1] - expected).abs().mean())
            for interpolation in ("cubic", "linear")
        }
        assert 0 < errors["cubic"] < errors["linear"] < 0.1 * float(expected.std())

    @pytest.mark.thorough
    def test_a_coarse_axis_keeps_its_slices(self):
        plan, scan = plan_of(order=3, separate=True), scan_of(spacing=(6.0, 1.2, 1.2))
        ((_, found),) = loaded(plan, [scan])
        expected = planes(preprocess(scan, plan, CPU))
        assert found.shape == expected.shape
        same = [torch.equal(one, other) for one, other in zip(found[0], found[0, 1:], strict=False)]
        assert same == [torch.equal(one, other) for one, other in zip(expected[0], expected[0, 1:], strict=False)]
        assert any(same)

    def test_scans_come_in_order_and_a_bad_one_leaves_the_others_alone(self):
        plan, scans = plan_of(), [scan_of(), scan_of(spacing=(2.0, 1.0, 1.0))]
        first, bad, last = loaded(plan, [scans[0], "nowhere.nii.gz", scans[1]], interpolation="linear")
        assert isinstance(bad, VolumeError)
        assert "nowhere.nii.gz" in str(bad)
        for (_, found), scan in ((first, scans[0]), (last, scans[1])):
            assert found.shape == planes(preprocess(scan, plan, CPU)).shape

    @pytest.mark.thorough
    def test_nothing_is_copied_on_its_way_from_dali(self):
        (prepared,) = (answer for answer in DaliLoader(plan_of(), CPU)([Request(scan_of())]))
        assert prepared.case.image.dtype == torch.float32
        assert prepared.case.image.is_contiguous()


@pytest.mark.thorough
@needs_dali
def test_an_engine_predicts_with_it(tmp_path):
    plans = plans_json()
    plans["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"]["order"] = 1
    model, scans = write_model(tmp_path / "m", plans=plans), [scan_of(), scan_of(spacing=(2.0, 1.0, 1.0))]
    exact = Engine.load(model, device="cpu", mirror=False)
    engine = Engine.load(model, device="cpu", mirror=False, options=EngineOptions(loader="dali-linear"))
    for scan, prediction in zip(scans, engine.predict_many(scans), strict=True):
        expected = exact.predict(scan).segmentation
        assert (prediction.segmentation != expected).mean() < 1e-3
        assert prediction.provenance[0].loader == "dali-linear"
        assert {"read", "network", "labels"} <= set(prediction.timings)
    assert (engine.predict(scans[0]).segmentation != exact.predict(scans[0]).segmentation).mean() < 1e-3
    assert list(engine.predict_many([])) == []


class TestWhatItCannotDo:
    def test_without_dali_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
        with pytest.raises(BackendUnavailable, match=r"DALI is not installed .* pip install 'nnturbo\[dali\]'"):
            DaliLoader(plan_of(), CPU)

    def test_masks_and_unknown_kernels(self):
        with pytest.raises(ValueError, match="interpolation must be one of cubic, linear, got 'spline'"):
            DaliLoader(plan_of(), CPU, interpolation="spline")
        plans = plans_json()
        plans["configurations"]["3d_fullres"] |= {
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [True],
        }
        with pytest.raises(ValueError, match="nor for models that are normalised within a mask: use the exact loader"):
            DaliLoader(parse_plan(plans, dataset_json(), "3d_fullres"), CPU)

    def test_loaders_are_known_by_name(self):
        with pytest.raises(ValueError, match="loader must be one of exact, dali, dali-linear, got 'nvidia'"):
            EngineOptions(loader="nvidia")


@needs_dali
def test_a_pipeline_that_breaks_is_an_error_for_its_scan_as_elsewhere(tmp_path, monkeypatch):
    engine = Engine.load(write_model(tmp_path / "model"), device="cpu", options=EngineOptions(loader="dali"))

    class Broken:
        def run(self):
            raise RuntimeError("an operator is broken")

    monkeypatch.setattr(engine.loader, "_pipeline", lambda *_: Broken())
    with pytest.raises(PredictionError, match="an operator is broken"):
        engine.predict(scan_of())
    yielded = list(engine.predict_many([scan_of(), scan_of()]))
    assert [str(error) for error in yielded] == ["an operator is broken"] * 2
