"""The demonstration, with a model that has learned nothing: what matters is that its figures are those of the files."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.demo import demo_table, demonstrate


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
