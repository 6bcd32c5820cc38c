"""The demonstration, with a model that has learned nothing: what matters is that its figures are those of the files."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine.errors import ModelError
from nnturbo.engine.files import sha256
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.demo import demo_table, demonstrate, held_out_table

from tests.paths import DEMO_MODEL, ROOT


@pytest.fixture(scope="module")
def shown(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "results"
    return demonstrate(trained, folder, cases=2, device="cpu"), folder


def test_every_case_is_predicted_and_compared(shown):
    demo, folder = shown
    assert len(demo.evaluation.cases) == 2
    for case in demo.evaluation.cases:
        truth, ours = (
            read_volume(folder / part / f"{case.name}.nii.gz", channels=1).array[0] > 0
            for part in ("test_answers", "predictions")
        )
        assert case.structures["whole"].dsc == pytest.approx(2 * (truth & ours).sum() / (truth.sum() + ours.sum()))
    with (folder / "test_answers" / "subtype_results.csv").open() as file:
        answers = {row["Names"]: row["Subtype"] for row in csv.DictReader(file)}
    assert {f"{case.name}.nii.gz": case.subtype for case in demo.evaluation.cases} == answers


def test_table_says_what_the_records_say(shown):
    demo, folder = shown
    table = demo_table(demo)
    records = json.loads((folder / "predictions" / "predictions.json").read_text())["cases"]
    for record, case in zip(records, demo.evaluation.cases, strict=True):
        answer = record["classification"]
        line = next(line for line in table.splitlines() if line.startswith(case.name))
        assert line.split()[1:5] == [
            *(f"{part.dsc:.3f}" for part in case.structures.values()), case.subtype, str(answer["label"])
        ]  # fmt: skip
    network = np.mean([record["timings_ms"]["network"] for record in records]) / 1000
    stages = dict(line.split() for line in table.partition("seconds by stage")[2].splitlines()[1:])
    assert float(stages["network"]) == pytest.approx(network, abs=0.005)


def test_picture_is_one_of_the_cases_and_not_empty(shown):
    demo, _ = shown
    assert demo.picture.stem in {case.name for case in demo.evaluation.cases}
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(demo.picture)))
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_again_into_the_same_folder(shown, trained):
    demo, folder = shown
    again = demonstrate(trained, folder, cases=2, device="cpu")
    assert [case.structures["whole"].dsc for case in again.evaluation.cases] == [
        case.structures["whole"].dsc for case in demo.evaluation.cases
    ]


class TestHeldOut:
    def results(self, model, **changes):
        checkpoint = "fold_0/checkpoint_final.pth"
        measures = {"lesion DSC": {"value": 0.9, "low": 0.8, "high": 0.95}}
        return {
            "cases": 300,
            "seed": 5,
            "checkpoint": checkpoint,
            "sha256": sha256(model / checkpoint),
            "measures": measures,
            **changes,
        }

    def test_it_is_shown_below_the_cases(self, trained, tmp_path):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(self.results(trained)))
        lines = held_out_table(path, trained).splitlines()
        assert lines[0] == "the same model over 300 phantoms of seed 5, with 95 % intervals"
        assert [line.split() for line in lines[1:]] == [["lesion", "DSC", "0.900", "(0.800", "to", "0.950)"]]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"sha256": "0"}, "is of another model than"),
            ({"checkpoint": "fold_9/x.pth"}, "is of another model than"),
            ({"measures": 3}, "must be a result of python -m nnturbo.benchmarks.demo_model: TypeError"),
        ],
    )
    def test_anything_else_is_refused(self, trained, tmp_path, changes, said):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(self.results(trained, **changes)))
        with pytest.raises(ModelError, match=said):
            held_out_table(path, trained)

    def test_what_is_kept_is_of_the_demo_model(self):
        assert "phantoms of seed" in held_out_table(ROOT / "benchmarks" / "results" / "demo_model.json", DEMO_MODEL)
