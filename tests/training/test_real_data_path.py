"""From prepared data to a submission by the commands of docs/real_data.md, on phantoms in the same layout."""

import csv
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from nnturbo.engine.cli import main
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.recipe import PRESETS, changed_recipe

from tests.training.tiny import TINY, seed_everything

CHANGES = [
    f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
    for name, value in TINY.describe().items()
    if value != PRESETS["balanced"].describe()[name]
]


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """nnU-Net's folders as options, and the model that `nnturbo train` makes, with a fitted classifier."""
    results = tmp_path_factory.mktemp("results")
    given = ["--raw", tiny.raw, "--preprocessed", tiny.preprocessed, "--results", results]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        seed_everything(0)
        arguments = ["train", "-d", "7", "-p", tiny.plans_name, "-f", "0", "--set", *CHANGES, "--lda", "1", "2", *given]
        assert main(list(map(str, arguments))) == 0
    return results


def predict(scans, output, results, plans):
    """Predict as the page says, by the number of the data set."""
    arguments = ["predict", "-i", scans, "-o", output, "-d", "7", "-c", "3d_fullres", "-tr", "nnUNetTrainerMultiTask",
                 "-p", plans, "-f", "0", "--disable_tta", "-device", "cpu"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(results))
        return main(list(map(str, arguments)))


@pytest.mark.thorough
def test_from_training_to_submission(folders, tiny, tmp_path, capsys):
    assert predict(tiny.raw / tiny.name / "imagesVal", tmp_path / "validation", folders, tiny.plans_name) == 0
    assert main(["evaluate", "-p", str(tmp_path / "validation"), "-r", str(tiny.source)]) == 0
    evaluation = json.loads((tmp_path / "validation" / "evaluation" / "evaluation.json").read_text())
    assert [case["name"] for case in evaluation["cases"]] == sorted(tiny.validation_cases)
    assert evaluation["missing_masks"] == evaluation["missing_subtypes"] == []

    assert predict(tiny.source / "test", tmp_path / "test", folders, tiny.plans_name) == 0
    target = tmp_path / "submission.zip"
    assert main(["submit", "-p", str(tmp_path / "test"), "-o", str(target), "--images", str(tiny.source / "test")]) == 0
    with zipfile.ZipFile(target) as archive:
        rows = list(csv.reader(archive.read("subtype_results.csv").decode().splitlines()))
        masks = sorted(name for name in archive.namelist() if name.endswith(".nii.gz"))
        archive.extractall(tmp_path / "submission")
    assert rows[0] == ["Names", "Subtype"]
    assert sorted(name for name, _ in rows[1:]) == masks
    for name in masks:
        mask = read_volume(tmp_path / "submission" / name, channels=1)
        image = read_volume(tiny.source / "test" / name.replace(".nii.gz", "_0000.nii.gz"), channels=1)
        assert mask.geometry.matches(image.geometry)
        assert set(np.unique(mask.array)) <= {0, 1, 2}
    capsys.readouterr()
    assert main(["evaluate", "-p", str(tmp_path / "test"), "-r", str(tiny.source / "test_answers")]) == 0
    assert "over 2 cases" in capsys.readouterr().out


@pytest.mark.thorough
def test_training_again_is_refused_and_continuing_keeps_the_classifier(folders, tiny, capsys):
    given = ["-d", "7", "-p", tiny.plans_name, "--set", *CHANGES, "--raw", str(tiny.raw),
             "--preprocessed", str(tiny.preprocessed), "--results", str(folders)]  # fmt: skip
    assert main(["train", *given]) == 2
    assert "resume that training with --continue" in capsys.readouterr().err
    checkpoint = next(folders.rglob("checkpoint_final.pth"))
    before = checkpoint.read_bytes()
    assert main(["train", *given, "--continue"]) == 0
    assert checkpoint.read_bytes() == before
    assert torch.load(checkpoint, weights_only=False)["pooled_classifier"]["stages"] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-d", "8"], "-d 8 must name one data set in .*, found none: run nnturbo prepare"),
        (["-d", "7", "--set", "speed=9"], "a change must be NAME=VALUE with a name of head, .*, got 'speed=9'"),
        (["-d", "7", "--set", "epochs=many"], "epochs must be like 120, got 'many'"),
        (["-d", "7", "--set", "epochs=0"], "recipe: .*epochs"),
        (["-d", "7", "-p", "otherPlans"], "otherPlans.json is missing: run nnturbo prepare first"),
        (["-d", "7", "--change-recipe"], "--change-recipe is for a training that goes on: give --continue too"),
        (["-d", "7", "-f", "4"], "fold must be 'all' or below 1"),
    ],
)
def test_bad_arguments(tiny, tmp_path, capsys, arguments, said):
    plans = [] if "-p" in arguments else ["-p", tiny.plans_name]
    folders = ["--raw", tiny.raw, "--preprocessed", tiny.preprocessed, "--results", tmp_path]
    assert main(["train", *arguments, *plans, *map(str, folders)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(said, error)


def test_recipe_changes_are_read_as_what_they_replace():
    recipe = changed_recipe("conservative", ["head=gap_mlp", "head_stages=0,3", "epochs=70", "class_loss_weight=0.5"])
    assert (recipe.head, recipe.head_stages, recipe.epochs, recipe.class_loss_weight) == ("gap_mlp", (0, 3), 70, 0.5)
    assert recipe.optimizer == "sgd"
    assert changed_recipe("balanced", CHANGES) == TINY
