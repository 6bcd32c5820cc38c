"""How far a bundle in lower precision agrees with fp32: measured, kept with it, and held to a floor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nnturbo.engine import BundleError, Engine, Prediction, Volume, VolumeError, build
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.bundles.manifest import read_manifest
from nnturbo.engine.export import build as compilation
from nnturbo.engine.export.agreement import measure_agreement
from nnturbo.engine.model.agreement import Agreement
from nnturbo.engine.model.folder import read_model

from tests.engine.factory import write_model


class TestAgreement:
    def test_it_is_measured_and_kept(self, multi_task_model, one_tile, tmp_path):
        out = build(
            multi_task_model,
            tmp_path / "b",
            backend="torchscript",
            device="cpu",
            precision="bf16",
            calibration=[one_tile, one_tile],
            calibration_name="smooth fields",
            floor=0.5,
        )
        agreement = read_manifest(out).agreement
        exact = Engine.load(multi_task_model, device="cpu", mirror=False).predict(one_tile).segmentation
        low = Engine.load(out, mirror=False).predict(one_tile)
        assert (agreement.scans, agreement.what) == (2, "smooth fields")
        assert agreement.voxels == 2 * exact.size
        assert agreement.different == 2 * np.count_nonzero(low.segmentation != exact) > 0
        for name, label in (("pancreas", 1), ("lesion", 2)):
            one, other = exact == label, low.segmentation == label
            dice = 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))
            assert agreement.dice[name] == pytest.approx(dice)
        assert agreement.same_class in (0, 1, 2)
        assert low.provenance[0].agreement == agreement

    def test_below_the_floor_there_is_no_bundle(self, multi_task_model, one_tile, tmp_path):
        with pytest.raises(
            BundleError, match=r"bf16 must agree with fp32 to a Dice of 1 for every label, it does to 0\."
        ):
            build(
                multi_task_model,
                tmp_path / "b",
                backend="torchscript",
                device="cpu",
                precision="bf16",
                calibration=[one_tile],
                floor=1.0,
            )
        assert list(tmp_path.iterdir()) == []

    def test_fp32_is_measured_where_scans_are_given(self, multi_task_model, several_tiles, tmp_path):
        out = build(multi_task_model, tmp_path / "b", backend="torch", device="cpu", calibration=[several_tiles])
        agreement = read_manifest(out).agreement
        assert agreement.different == 0
        assert set(agreement.dice.values()) == {1.0}
        assert agreement.same_class == 1

    def test_labels_that_no_scan_shows_are_not_called_equal(self, built_bundle, tmp_path):
        def scan_of(*labels):
            return Prediction(
                segmentation=np.array([[labels]], np.uint8),
                probabilities=None,
                geometry=None,
                labels=None,
                timings={},
                warnings=(),
                provenance=(),
                properties={},
                classification=None,
            )

        class Fixed:
            model = read_model(write_model(tmp_path / "plain"))
            class_names = None

            def __init__(self, answer):
                self.answer = answer

            def predict(self, image):
                return self.answer

        seen = measure_agreement(Fixed(scan_of(0, 1, 1)), Fixed(scan_of(0, 1, 0)), ["scan"], "scans")
        assert seen.dice == {"pancreas": pytest.approx(2 / 3), "lesion": None}
        assert seen.lowest_dice == pytest.approx(2 / 3)
        assert "pancreas 0.6667, lesion not seen" in str(seen)
        nothing = measure_agreement(Fixed(scan_of(0, 0)), Fixed(scan_of(0, 0)), ["scan"], "scans")
        assert nothing.lowest_dice is None
        manifest = replace(read_manifest(built_bundle), precision="bf16", agreement=nothing)
        with pytest.raises(BundleError, match="the scans must show what the model segments"):
            compilation._judge(manifest, 0.0)

    @pytest.mark.parametrize("content", [{}, [], {"scans": 1}, None])
    def test_what_is_no_agreement(self, built_bundle, content):
        with pytest.raises(ValueError, match="an agreement must (have scans, voxels|be a JSON object)"):
            Agreement.from_json(content)

    @pytest.mark.parametrize("change_of", [{"voxels": "1"}, {"dice": {"a": "1"}}, {"same_class": 0.5}])
    def test_values_that_no_agreement_has(self, change_of):
        good = {"scans": 1, "voxels": 1, "different": 0, "dice": {"a": None}, "same_class": None, "what": "scans"}
        assert Agreement.from_json(good).to_json() == good
        with pytest.raises(ValueError, match="an agreement: "):
            Agreement.from_json({**good, **change_of})

    @pytest.mark.thorough
    def test_int8_is_measured_on_scans_that_did_not_calibrate_it(self, multi_task_model, tmp_path, monkeypatch):
        calibrated, measured = [], []
        monkeypatch.setattr(compilation, "usable_backends", lambda *_: ([backends()["torch"]], {}))
        monkeypatch.setattr(
            compilation,
            "calibration_tiles",
            lambda _, scans, __: calibrated.extend(scans) or torch.zeros(2, 1, 8, 12, 16),
        )
        monkeypatch.setattr(compilation, "measure_agreement", lambda _, __, scans, ___: measured.extend(scans) or 1 / 0)
        monkeypatch.setattr(Engine, "load", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError):
            build(
                multi_task_model, tmp_path / "b", precision="int8", device="cpu", calibration=["a", "b", "c", "d", "e"]
            )
        assert (calibrated, measured) == (["a", "c", "e"], ["b", "d"])

    def test_a_floor_needs_scans(self, multi_task_model, tmp_path):
        with pytest.raises(ValueError, match="a floor needs scans"):
            build(multi_task_model, tmp_path / "b", device="cpu", floor=0.9)

    def test_scans_that_do_not_fit_are_named(self, multi_task_model, tmp_path):
        two = Volume.from_array(np.zeros((2, 9, 9, 9), np.int16), (3.0, 1.2, 1.2), name="two channels")
        with pytest.raises(VolumeError, match="two channels"):
            build(multi_task_model, tmp_path / "b", backend="torch", device="cpu", calibration=[two])
        assert list(tmp_path.iterdir()) == []
