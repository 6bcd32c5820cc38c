"""Predictions against the truth, from files to tables."""

import builtins
import csv
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK
from nnturbo.engine.errors import EngineError, OutputError
from nnturbo.training.evaluation.evaluate import DatasetError, comparison_table, evaluate, write_evaluation
from nnturbo.training.evaluation.metrics import Interval, normalised_surface_dice
from nnturbo.training.phantoms.phantom import SCALED_ONE, SMALL_SETTINGS, write_dataset

from tests.training.evaluation.masks import SPACING, labels, write_mask, write_results

NAMES = ("quiz_0_001", "quiz_1_002", "quiz_2_003")


@pytest.fixture
def reference(tmp_path):
    for name in NAMES:
        write_mask(tmp_path / "reference" / f"{name}.nii.gz", labels())
    return tmp_path / "reference"


@pytest.fixture
def predictions(tmp_path):
    """Perfect predictions; tests spoil them."""
    for name in NAMES:
        write_mask(tmp_path / "predictions" / f"{name}.nii.gz", labels())
    write_results(tmp_path / "predictions", [f"{name}.nii.gz,{name[5]}" for name in NAMES])
    return tmp_path / "predictions"


class TestMeasures:
    def test_perfect_predictions(self, predictions, reference):
        found = evaluate(predictions, reference)
        for structure in found.structures.values():
            assert (structure.dsc, structure.nsd_1mm, structure.nsd_2mm) == (1, 1, 1)
            assert structure.predicted_ml == structure.reference_ml
        assert (found.structures["whole"].reference_ml, found.structures["lesion"].reference_ml) == (
            pytest.approx(0.24),
            pytest.approx(0.04),
        )
        assert set(found.dsc_intervals.values()) == {Interval(low=1.0, high=1.0)}
        assert found.subtypes.metrics.macro_f1 == found.subtypes.metrics.balanced_accuracy == 1
        assert (found.missing_masks, found.missing_subtypes, found.additional) == ((), (), ())

    def test_by_hand(self, predictions, reference):
        mask = np.zeros((4, 6, 6), np.uint8)
        mask[1, 1:4, 1:5] = 1  # half of the pancreas
        mask[1, 1, 1:5] = 2  # 2 voxels of the lesion, and 2 more
        write_mask(predictions / f"{NAMES[0]}.nii.gz", mask)
        first, *others = evaluate(predictions, reference).cases
        assert first.structures["whole"].dsc == pytest.approx(2 * 12 / 36)
        assert first.structures["lesion"].dsc == pytest.approx(2 * 2 / 8)
        assert (first.structures["whole"].predicted_ml, first.structures["lesion"].predicted_ml) == (
            pytest.approx(0.12),
            pytest.approx(0.04),
        )
        nsd = normalised_surface_dice(mask == 2, labels() == 2, SPACING)
        assert (first.structures["lesion"].nsd_1mm, first.structures["lesion"].nsd_2mm) == nsd
        assert all(case.structures["whole"].dsc == 1 for case in others)
        found = evaluate(predictions, reference)
        assert found.structures["whole"].dsc == pytest.approx((2 * 12 / 36 + 2) / 3)
        assert found.dsc_intervals["whole"].low <= found.structures["whole"].dsc <= found.dsc_intervals["whole"].high

    def test_empty_predictions(self, predictions, reference):
        for name in NAMES:
            write_mask(predictions / f"{name}.nii.gz", np.zeros((4, 6, 6), np.uint8))
        found = evaluate(predictions, reference)
        assert (
            found.structures["whole"].dsc,
            found.structures["lesion"].dsc,
            found.structures["lesion"].nsd_2mm,
            found.structures["whole"].predicted_ml,
        ) == (0, 0, 0, 0)

    def test_no_lesion_in_both_is_right(self, predictions, reference):
        for folder in (predictions, reference):
            write_mask(folder / f"{NAMES[0]}.nii.gz", labels(lesion=False))
        assert evaluate(predictions, reference).structures["lesion"].dsc == 1

    def test_scaled_masks_are_rounded(self, predictions, reference):
        write_mask(reference / f"{NAMES[0]}.nii.gz", labels() * SCALED_ONE)
        assert evaluate(predictions, reference).structures["whole"].dsc == 1

    def test_takes_the_folders_of_the_data_set(self, tmp_path):
        write_dataset(tmp_path / "phantoms", counts={"validation": 2}, settings=SMALL_SETTINGS)
        masks = [path for path in (tmp_path / "phantoms").rglob("*.nii.gz") if "_0000" not in path.name]
        (tmp_path / "out").mkdir()
        for path in masks:
            (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
        write_results(tmp_path / "out", [f"{path.name},0" for path in masks])
        found = evaluate(tmp_path / "out", tmp_path / "phantoms" / "validation")
        assert found.structures["whole"].dsc == found.structures["lesion"].dsc == 1
        assert [case.subtype for case in found.cases] == [case.name[5] for case in found.cases]


class TestMissing:
    def test_masks_count_as_zero(self, predictions, reference, caplog):
        (predictions / f"{NAMES[1]}.nii.gz").unlink()
        write_mask(reference / f"{NAMES[1]}.nii.gz", labels(lesion=False))
        with caplog.at_level(logging.WARNING):
            found = evaluate(predictions, reference)
        assert found.missing_masks == (NAMES[1],)
        assert found.cases[1].is_missing
        # Not even a lesion that is not there was found.
        assert (found.structures["whole"].dsc, found.structures["lesion"].dsc) == (
            pytest.approx(2 / 3),
            pytest.approx(2 / 3),
        )
        assert found.cases[1].structures["whole"].reference_ml == pytest.approx(0.24)
        assert "1 masks are missing and count as 0: quiz_1_002" in caplog.text

    def test_subtypes_count_as_wrong(self, predictions, reference):
        write_results(predictions, [f"{NAMES[0]}.nii.gz,0", f"{NAMES[2]}.nii.gz,2"])
        found = evaluate(predictions, reference)
        assert found.missing_subtypes == (NAMES[1],)
        assert found.subtypes.metrics.macro_f1 == pytest.approx(2 / 3)
        assert found.subtypes.metrics.confusion[1] == (0, 0, 0, 1)

    def test_additional_ones_are_named(self, predictions, reference):
        write_mask(predictions / "quiz_0_008.nii.gz", labels())
        write_results(predictions, [*(f"{name}.nii.gz,{name[5]}" for name in NAMES), "quiz_0_009.nii.gz,0"])
        found = evaluate(predictions, reference)
        assert found.additional == ("quiz_0_008", "quiz_0_009")
        assert len(found.cases) == 3
        assert found.subtypes.metrics.macro_f1 == 1

    def test_without_subtypes_there_is_no_classification(self, predictions, reference):
        (predictions / "subtype_results.csv").unlink()
        found = evaluate(predictions, reference)
        assert found.subtypes is None
        assert found.missing_subtypes == ()
        assert "| subtype macro-F1 | not evaluated |  | 0.70 |  | 0.7445 |" in comparison_table(found)


class TestSubtypes:
    def test_from_mappings(self, predictions, reference):
        truth = dict.fromkeys(NAMES, 1)
        found = evaluate(predictions, reference, subtypes=truth, predicted_subtypes={NAMES[0]: 1, NAMES[1]: 2})
        assert found.subtypes.metrics.confusion == ((0, 0, 0, 0), (0, 1, 1, 1), (0, 0, 0, 0))

    def test_from_the_labels_file_and_one_split(self, predictions, reference, tmp_path):
        rows = ["case,subtype,split", f"{NAMES[0]},2,train", f"{NAMES[1]},1,validation", f"{NAMES[2]},0,validation"]
        (tmp_path / "labels.csv").write_text("\n".join(rows))
        found = evaluate(predictions, reference, subtypes=tmp_path / "labels.csv", split="validation")
        assert [(case.name, case.subtype) for case in found.cases] == [(NAMES[1], "1"), (NAMES[2], "0")]
        assert found.additional == (NAMES[0],)
        assert len(evaluate(predictions, reference, subtypes=tmp_path / "labels.csv").cases) == 3

    def test_a_split_needs_all_its_references(self, predictions, reference, tmp_path):
        (tmp_path / "labels.csv").write_text("case,subtype,split\nquiz_0_077,0,validation\n")
        with pytest.raises(DatasetError, match=r"labels\.csv: cases of validation must have a reference.*quiz_0_077"):
            evaluate(predictions, reference, subtypes=tmp_path / "labels.csv", split="validation")

    def test_a_split_needs_a_file(self, predictions, reference):
        with pytest.raises(ValueError, match="split='validation' needs subtypes to be a file"):
            evaluate(predictions, reference, split="validation")

    @pytest.mark.parametrize("subtypes", [{NAMES[0]: 0}, {**dict.fromkeys(NAMES, 0), NAMES[1]: 3}])
    def test_truth_must_be_known(self, predictions, reference, subtypes):
        with pytest.raises(DatasetError, match="subtypes must be known for all cases, .*quiz_1_002"):
            evaluate(predictions, reference, subtypes=subtypes)

    def test_predictions_of_a_mapping_must_be_classes(self, predictions, reference):
        with pytest.raises(DatasetError, match="predicted subtypes must be 0, 1 or 2, got {'quiz_0_001': 5}"):
            evaluate(predictions, reference, predicted_subtypes={NAMES[0]: 5})

    @pytest.mark.parametrize(
        ("header", "row", "text"),
        [
            ("names,subtype", "quiz_0_001.nii.gz,0", r"the header must be exactly Names,Subtype, got names,subtype"),
            ("Names,Subtype,p", "quiz_0_001.nii.gz,0,1", "the header must be exactly Names,Subtype"),
            ("Names,Subtype", "quiz_0_001,0", r"line 2: names must end with \.nii\.gz, got 'quiz_0_001'"),
            (
                "Names,Subtype",
                "quiz_0_001.nii.gz,3",
                "line 2: the subtype of quiz_0_001.nii.gz must be 0, 1 or 2, got '3'",
            ),
            ("Names,Subtype", "a.nii.gz,1\na.nii.gz,1", r"line 3: a\.nii\.gz must occur once"),
        ],
    )
    def test_refuses_a_results_file(self, predictions, reference, header, row, text):
        write_results(predictions, [row], header)
        with pytest.raises(DatasetError, match=r"subtype_results\.csv.*") as caught:
            evaluate(predictions, reference)
        caught.match(text)


class TestRefused:
    @pytest.mark.parametrize(
        ("spoil", "text"),
        [
            ({"spacing": (5.0, 2.0, 1.1)}, "quiz_0_001: prediction and reference lie on different grids: spacing"),
            ({"origin": (9.0, 0.0, 0.0)}, "quiz_0_001: prediction and reference lie on different grids: origin"),
            ({"mask": labels()[:3]}, "quiz_0_001: prediction and reference lie on different grids: shape"),
            ({"mask": labels() + 1}, "quiz_0_001: .*labels must be 0, 1 or 2"),
        ],
    )
    def test_a_mask(self, predictions, reference, spoil, text):
        write_mask(predictions / f"{NAMES[0]}.nii.gz", **{"mask": labels(), **spoil})
        (predictions / f"{NAMES[2]}.nii.gz").write_bytes(b"?")
        with pytest.raises(DatasetError, match=text) as caught:
            evaluate(predictions, reference)
        caught.match("2 problem.*\n.*\n  quiz_2_003: ")

    def test_folders(self, predictions, reference, tmp_path):
        with pytest.raises(DatasetError, match="nowhere: there is no such folder with masks"):
            evaluate(tmp_path / "nowhere", reference)
        (tmp_path / "empty").mkdir()
        with pytest.raises(DatasetError, match="empty: there must be masks"):
            evaluate(predictions, tmp_path / "empty")
        write_mask(reference / "more" / f"{NAMES[0]}.nii.gz", labels())
        with pytest.raises(
            DatasetError, match=r"quiz_0_001\.nii\.gz: a case must occur once, .*quiz_0_001\.nii\.gz has"
        ):
            evaluate(predictions, reference)

    def test_resamples(self, predictions, reference):
        with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
            evaluate(predictions, reference, resamples=0)


class TestOutputs:
    @pytest.fixture
    def evaluation(self, predictions, reference):
        """One mask and one subtype are missing, one prediction is additional."""
        (predictions / f"{NAMES[1]}.nii.gz").unlink()
        write_results(predictions, ["quiz_0_001.nii.gz,0", "quiz_2_003.nii.gz,1", "quiz_0_009.nii.gz,0"])
        return evaluate(predictions, reference, resamples=200, seed=4)

    def test_files(self, evaluation, predictions, reference, tmp_path):
        found = evaluate(predictions, reference, resamples=200, seed=4, out=tmp_path / "new" / "out")
        assert found == evaluation
        assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {
            "evaluation.json",
            "evaluation_cases.csv",
            "evaluation.png",
        }

    def test_json_is_complete(self, evaluation, tmp_path):
        path, _, _ = write_evaluation(evaluation, tmp_path)
        content = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
        assert content["missing_masks"] == content["missing_subtypes"] == ["quiz_1_002"]
        assert content["additional"] == ["quiz_0_009"]
        assert content["structures"]["whole"]["dsc"] == pytest.approx(2 / 3)
        assert content["subtypes"]["metrics"]["confusion"] == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
        assert [row["target"] for row in content["comparison"]] == [0.91, 0.31, 0.70]
        assert [row["best_published"] for row in content["comparison"]] == [0.939, 0.667, 0.7445]
        assert content["cases"][1]["is_missing"] is True
        assert (content["resamples"], content["seed"]) == (200, 4)

    def test_csv_has_a_row_a_case(self, evaluation, tmp_path):
        _, path, _ = write_evaluation(evaluation, tmp_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["case"] for row in rows] == list(NAMES)
        assert [row["is_missing"] for row in rows] == ["0", "1", "0"]
        assert [row["predicted_subtype"] for row in rows] == ["0", "", "1"]
        assert [float(row["lesion_dsc"]) for row in rows] == [1, 0, 1]
        assert [float(row["whole_reference_ml"]) for row in rows] == [0.24] * 3

    @pytest.mark.parametrize("with_subtypes", [True, False])
    def test_figure_is_a_picture(self, evaluation, tmp_path, with_subtypes):
        chosen = evaluation if with_subtypes else replace(evaluation, subtypes=None)
        _, _, path = write_evaluation(chosen, tmp_path)
        pixels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        assert pixels.shape[:2] == (504, 1080)
        assert pixels.std() > 10

    def test_table(self, evaluation):
        lines = comparison_table(evaluation).splitlines()
        interval = evaluation.dsc_intervals["whole"]
        assert lines[0] == "| over 3 cases | measured | 95 % interval | target | reached | best published |"
        assert lines[2] == (
            f"| whole-pancreas DSC | 0.667 | {interval.low:.3f} to {interval.high:.3f} | 0.91 | no | 0.939 |"
        )
        assert lines[3].startswith("| lesion DSC | 0.667 |")
        assert "| 0.31 | yes | 0.667 |" in lines[3]
        assert lines[4].startswith("| subtype macro-F1 | 0.333 |")
        assert "1 masks missing, counted as 0: quiz_1_002" in lines
        assert "1 subtypes missing, counted as wrong: quiz_1_002" in lines
        assert "1 predictions not in the reference, not counted: quiz_0_009" in lines

    def test_refuses_a_file_as_folder(self, evaluation, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="file cannot be made"):
            write_evaluation(evaluation, tmp_path / "file")

    def test_says_how_to_install_matplotlib(self, evaluation, tmp_path, monkeypatch):
        importing = builtins.__import__

        def without_matplotlib(name, *arguments, **more):
            if name.startswith("matplotlib"):
                raise ImportError(f"No module named {name}")
            return importing(name, *arguments, **more)

        monkeypatch.setattr(builtins, "__import__", without_matplotlib)
        with pytest.raises(EngineError, match=r"the figure needs matplotlib .*pip install 'nnturbo\[training\]'"):
            write_evaluation(evaluation, tmp_path / "out")
        assert not (tmp_path / "out").exists()
