"""A training that stops at any moment and goes on, with flags or without, ends as if it had never stopped."""

import contextlib
import random
import shutil
from dataclasses import replace

import pytest
import torch
from nnturbo.engine.cli import main
from nnturbo.training import train as training
from nnturbo.training.recipe import PRESETS
from nnturbo.training.train import train

from tests.training.tiny import TINY, assert_same, import_nnunet, seed_everything

SIZES = ("head_stages", "head_hidden", "head_queries", "iterations", "validation_iterations")
SHORT = {name: TINY.describe()[name] for name in SIZES} | {
    "epochs": 3,
    "segmentation_epochs": 1,
    "detached_epochs": 1,
    "validate_every": 2,
    "validation_cases": 1,
    "save_every": 2,
    "seed": 11,
}


class Stopped(BaseException):
    """Like a kill, in that nothing catches it."""


def settings(recipe):
    return [f"{name}={','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in recipe.items()]


def command(tiny, results, *arguments):
    """Run `nnturbo train`."""
    given = ["-d", "7", "-p", tiny.plans_name, "-device", "cpu", "--raw", tiny.raw, "--preprocessed", tiny.preprocessed]
    return main(list(map(str, ["train", *given, "--results", results, *arguments])))


def kept_checkpoint(results, name="checkpoint_final.pth"):
    (path,) = results.rglob(name)
    content = torch.load(path, weights_only=False)
    del content["init_args"]  # plans, which other tests compare
    return content


@contextlib.contextmanager
def stopping(moment):
    """Stop at the n-th of the moments at which a training can be stopped: batches, validations, written files."""
    trainer, counted = import_nnunet().nnUNetTrainerMultiTask, [0]

    def counting(function):
        def count(*arguments, **named):
            counted[0] += 1
            if counted[0] == moment:
                raise Stopped
            return function(*arguments, **named)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_step", "validation_step", "on_epoch_end", "on_train_end"):
            patch.setattr(trainer, name, counting(getattr(trainer, name)))
        patch.setattr(torch, "save", counting(torch.save))
        yield counted


@pytest.fixture
def one_process(monkeypatch, without_curves):
    """No processes for augmentation."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


@pytest.mark.parametrize(
    ("preset", "kept"),
    [
        ("balanced", []),
        pytest.param("aggressive", ["--preset", "aggressive"], marks=pytest.mark.thorough),
        pytest.param("conservative", ["--set", "epochs=3"], marks=pytest.mark.thorough),
        pytest.param("segmentation_focused", [], marks=pytest.mark.thorough),
    ],
)
def test_stopped_at_random_moments(tiny, one_process, tmp_path, preset, kept):
    flags = ["--preset", preset, "--set", *settings(SHORT)]
    seed_everything(1)
    with stopping(0) as moments:
        assert command(tiny, tmp_path / "whole", *flags) == 0
    wanted = kept_checkpoint(tmp_path / "whole")
    assert wanted["current_epoch"] == 3
    assert wanted["multi_task"]["recipe"]["preset"] == preset
    rng = random.Random(preset)
    seed_everything(2)
    stops = 0
    for moment in rng.sample(range(2, moments[0] // 2), 3):
        resumed = flags if stops == 0 else [*kept, "--continue"]
        with stopping(moment), contextlib.suppress(Stopped):
            command(tiny, tmp_path / "stopped", *resumed)
            break
        stops += 1
    assert stops >= 2
    if not list((tmp_path / "stopped").rglob("checkpoint_final.pth")):
        assert command(tiny, tmp_path / "stopped", *kept, "--continue") == 0
    assert_same(kept_checkpoint(tmp_path / "stopped"), wanted)
    histories = [next((tmp_path / name).rglob("history.csv")).read_text() for name in ("whole", "stopped")]
    assert histories[0] == histories[1]


def test_a_training_that_stops_before_its_first_epoch_keeps_its_recipe(tiny, one_process, tmp_path):
    recipe = replace(TINY, seed=3)
    with stopping(2), pytest.raises(Stopped):  # the first thing that happens is that the beginning is saved
        train(**tiny.arguments(tmp_path, recipe=recipe))
    stored = training.recipe_to_go_on_with(
        tiny.name, "3d_fullres", 0, plans_name=tiny.plans_name, preprocessed=tiny.preprocessed, results=tmp_path
    )
    assert stored == recipe


@pytest.fixture
def results(trained, tmp_path):
    """The results folder of a finished training of two epochs."""
    dataset = trained.parent
    shutil.copytree(dataset, tmp_path / dataset.name)
    return tmp_path


class TestFinished:
    """What a finished training does when it is continued."""

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--preset", "conservative"], "the checkpoint is of another head: stages [1, 2] is now [1, 2, 3]; "),
            (
                ["--set", "epochs=9"],
                "another is asked for: epochs 2 is now 9; leave",
            ),
            (
                ["--seed", "4", "--lda", "1"],
                "another is asked for: seed -1 is now 4; leave out",
            ),
        ],
    )
    def test_other_flags_are_refused(self, tiny, results, one_process, capsys, flags, said):
        (path,) = results.rglob("checkpoint_final.pth")
        before = path.read_bytes()
        assert command(tiny, results, "--continue", *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
        assert path.read_bytes() == before

    def test_weights_to_begin_with_are_said_to_be_left_out(self, tiny, results, one_process, caplog):
        (path,) = results.rglob("checkpoint_final.pth")
        assert command(tiny, results, "--continue", "--pretrained", path) == 0
        assert f"{path} is gone on from, so that {path} is not begun with" in caplog.text

    def test_a_classifier_is_fitted_without_training_further(self, tiny, results, one_process, capsys):
        (path,) = results.rglob("checkpoint_final.pth")
        before = torch.load(path, weights_only=False)
        assert command(tiny, results, "--continue", "--lda", "1") == 0
        after = torch.load(path, weights_only=False)
        assert set(after) - set(before) == {"pooled_classifier"}
        del after["pooled_classifier"]
        assert_same(after, before)

    def test_a_changed_recipe_goes_on_when_that_is_allowed(self, tiny, results, one_process):
        assert command(tiny, results, "--continue", "--set", "epochs=3", "validate_every=0", "--change-recipe") == 0
        assert kept_checkpoint(results)["current_epoch"] == 3

    @pytest.mark.parametrize(
        ("moment", "epoch"),
        [(2, 2), pytest.param(9, 3, marks=pytest.mark.thorough)],
        ids=["before its first epoch", "in its second epoch"],
    )
    def test_a_changed_recipe_outlives_a_kill(self, tiny, results, one_process, moment, epoch):
        changed = ["--set", "epochs=4", "validate_every=0", "--change-recipe"]
        with stopping(moment), pytest.raises(Stopped):
            command(tiny, results, "--continue", *changed)
        assert kept_checkpoint(results, "checkpoint_latest.pth")["current_epoch"] == epoch
        assert command(tiny, results, "--continue") == 0
        final = kept_checkpoint(results)
        assert (final["current_epoch"], final["multi_task"]["recipe"]["epochs"]) == (4, 4)
        assert [line["epoch"] for line in final["multi_task"]["history"]] == [0, 1, 2, 3]

    def test_a_recipe_without_more_epochs_is_said_to_change_nothing(self, tiny, results, one_process, caplog):
        (path,) = results.rglob("checkpoint_final.pth")
        before = path.read_bytes()
        assert command(tiny, results, "--continue", "--set", "patience=7", "--change-recipe") == 0
        assert "the training is finished, and the other recipe leaves no epoch to train" in caplog.text
        assert path.read_bytes() == before
        assert not list(results.rglob("checkpoint_latest.pth"))


def test_continuing_what_never_began_is_said(tiny, one_process, tmp_path, caplog):
    entries = {**SHORT, "epochs": 2, "validate_every": 0}
    assert command(tiny, tmp_path, "--continue", "--set", *settings(entries)) == 0
    assert "fold_0 has no checkpoint to go on from: the training begins" in caplog.text
    recipe = kept_checkpoint(tmp_path)["multi_task"]["recipe"]
    assert recipe == PRESETS["balanced"].describe() | entries
