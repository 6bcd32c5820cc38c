"""A training that is killed and resumed ends as if nothing had happened; other recipes; foreign checkpoints."""

import csv
import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nnturbo.engine import Engine, EngineError
from nnturbo.engine.errors import CheckpointError
from nnturbo.engine.model.checkpoint import read_checkpoint
from nnturbo.training.train import train

from tests.training.tiny import CONFIGURATION, TINY, assert_same, import_nnunet, make_trainer, seed_everything

SCRIPT = """
import pickle, sys
import torch
from tests.training.tiny import import_nnunet, seed_everything
from nnturbo.training.train import train

import_nnunet()  # before the seed: some of what it imports draws random numbers
with open(sys.argv[1], "rb") as file:
    arguments, threads = pickle.load(file)
torch.set_num_threads(threads)
seed_everything(0)
train(**arguments)
"""


def load(folder, name="checkpoint_final.pth"):
    return torch.load(folder / "fold_0" / name, weights_only=False)


def kill_after_first_epoch(arguments, folder):
    """Start a training of its own, and kill it while its second epoch is under way."""
    job = arguments["results"].parent / "job.pkl"
    job.write_bytes(pickle.dumps((arguments, torch.get_num_threads())))
    command = [sys.executable, "-c", SCRIPT, str(job)]
    log = arguments["results"].parent / "log.txt"
    with log.open("w") as output:
        same_modules = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=same_modules)
        try:
            wanted = folder / "fold_0" / "checkpoint_best.pth"  # of the first epoch
            until = time.monotonic() + 120
            while not wanted.is_file() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            assert wanted.is_file(), log.read_text()
        finally:
            process.kill()
            process.wait()
    assert process.returncode not in (0, None), log.read_text()


@pytest.fixture(scope="module")
def resumed(tiny, trained, tmp_path_factory):
    """The training of `trained` once more, killed and resumed."""
    results = tmp_path_factory.mktemp("resumed") / "results"
    folder = results / trained.relative_to(trained.parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        kill_after_first_epoch(tiny.arguments(results), folder)
        assert not (folder / "fold_0" / "checkpoint_final.pth").exists()
        for path in (folder / "fold_0").glob("checkpoint_*.pth"):
            assert load(folder, path.name)["current_epoch"] in (0, 1, 2), path
        with pytest.raises(EngineError, match=r"checkpoint_\w+\.pth is there: resume that training with --continue"):
            train(**tiny.arguments(results))
        seed_everything(99)  # what was drawn before must not matter
        assert train(**tiny.arguments(results), resume=True) == folder
    return folder


class TestKilled:
    @pytest.mark.thorough
    def test_the_end_is_the_same_bit_by_bit(self, trained, resumed):
        got, wanted = load(resumed), load(trained)
        assert wanted["current_epoch"] == 2
        assert [line["epoch"] for line in wanted["multi_task"]["history"]] == [0, 1]
        assert len(wanted["multi_task"]["head_optimizer_state"]["state"]) > 5
        for checkpoint in (got, wanted):
            del checkpoint["init_args"]  # plans, which the next test compares
        assert_same(got, wanted)

    @pytest.mark.thorough
    def test_files_are_the_same_and_whole(self, trained, resumed):
        for name in ("plans.json", "dataset.json", "fold_0/history.csv"):
            assert (resumed / name).read_text() == (trained / name).read_text()
        names = {path.name for path in (resumed / "fold_0").iterdir() if not path.name.startswith("training_log")}
        records = {"history.csv", "curves.png", "progress.png", "debug.json"}
        records |= {"tensorboard"} if importlib.util.find_spec("tensorboard") else set()
        whole = {"checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_best_score.pth", *records}
        # Killed while it wrote, it may leave a file, though under no final name.
        assert {name for name in names if not name.startswith(".writing-")} == whole
        for name in ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_best_score.pth"):
            read_checkpoint(resumed / "fold_0" / name)

    def test_history_is_a_table_of_all_epochs(self, trained):
        with (trained / "fold_0" / "history.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        history = load(trained)["multi_task"]["history"]
        assert [{name: float(cell) for name, cell in row.items()} for row in rows] == history
        assert all(0 < line["train_loss"] < 10 and line["class_loss"] > 0 for line in history)
        assert [line["learning_rate"] for line in history] == pytest.approx([1e-3, 1e-3 * 0.5**0.9])

    @pytest.mark.thorough
    def test_the_engine_runs_it(self, tiny, resumed):
        engine = Engine.load(resumed, device="cpu")
        assert engine.model.mirror_axes == (0, 1, 2)
        prediction = Engine.load(resumed, device="cpu", mirror=False).predict(tiny.image(tiny.validation_cases[0]))
        assert prediction.classification.class_names == ("0", "1", "2")
        assert math.fsum(prediction.classification.probabilities) == pytest.approx(1)


def test_a_finished_training_stays_as_it_is(tiny, trained):
    results, final = trained.parents[1], trained / "fold_0" / "checkpoint_final.pth"
    before = (final.read_bytes(), final.stat().st_mtime_ns)
    with pytest.raises(EngineError, match=r"checkpoint_final\.pth is there: resume that training with --continue, or"):
        train(**tiny.arguments(results))
    half_written = final.with_name(".writing-file-of-a-kill")
    half_written.mkdir()
    (half_written / "new.pth").write_bytes(b"half")
    for path in (half_written / "new.pth", half_written):
        os.utime(path, (0, 0))
    assert train(**tiny.arguments(results), resume=True) == trained
    assert not half_written.exists()
    assert (final.read_bytes(), final.stat().st_mtime_ns) == before


def test_what_was_fitted_stays_with_the_weights_that_it_was_fitted_to(tiny, trained, environment, tmp_path):
    content = torch.load(trained / "fold_0" / "checkpoint_final.pth", weights_only=False)
    fitted = {"pooled_classifier": {"kind": "lda", "stages": [1]}, "class_temperature": 1.5}
    trainer = make_trainer(tiny, TINY)
    trainer.load_checkpoint({**content, **fitted})
    # nnU-Net's own command writes the final checkpoint of a finished training again.
    trainer.save_checkpoint(str(tmp_path / "again.pth"))
    again = torch.load(tmp_path / "again.pth", weights_only=False)
    assert {name: again[name] for name in fitted} == fitted
    loader, _ = trainer.get_dataloaders()
    trainer.network.train()
    trainer.train_step(next(loader))
    trainer.save_checkpoint(str(tmp_path / "trained.pth"))
    assert not set(fitted) & set(torch.load(tmp_path / "trained.pth", weights_only=False))


class TestOtherCheckpoints:
    def resume(self, tiny, trained, allowed=False, **changes):
        trainer = make_trainer(tiny, replace(TINY, **changes))
        trainer.load_checkpoint(str(trained / "fold_0" / "checkpoint_final.pth"), change_recipe=allowed)
        return trainer

    @pytest.mark.parametrize(
        ("changes", "difference"),
        [
            ({"head": "gap_linear"}, "kind attention is now gap_linear"),
            ({"head_stages": (2,)}, r"stages \[1, 2\] is now \[2\]"),
            ({"head_queries": 3, "head_hidden": 4}, "hidden 8 is now 4; queries 2 is now 3"),
            # The same shapes, and yet another question.
            ({"focus_labels": ("pancreas",)}, r"focus_channels \[2\] is now \[1\]"),
        ],
    )
    def test_of_another_head(self, tiny, trained, environment, changes, difference):
        message = f"^the checkpoint is of another head: {difference}; resume with the same recipe$"
        with pytest.raises(EngineError, match=message):
            self.resume(tiny, trained, **changes)

    def test_of_another_optimizer(self, tiny, trained, environment):
        with pytest.raises(EngineError, match="is of optimizer adamw, the recipe asks for sgd; resume with the same"):
            self.resume(tiny, trained, optimizer="sgd")

    def test_of_another_recipe(self, tiny, trained, environment):
        changes = {"epochs": 5, "weight_decay": 0.5, "head_weight_decay": 0.25}
        said = "weight_decay 0.01 is now 0.5; head_weight_decay 0.01 is now 0.25; epochs 2 is now 5"
        message = f"with the recipe of its checkpoint, another is asked for: {said}; leave out .* with --change-recipe$"
        with pytest.raises(EngineError, match=message) as caught:
            self.resume(tiny, trained, **changes)
        assert "\n" not in str(caught.value)
        trainer = self.resume(tiny, trained, allowed=True, **changes)
        assert (trainer.current_epoch, trainer.schedule.last_epoch) == (2, 5)
        assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
        assert trainer.head_optimizer.param_groups[0]["weight_decay"] == 0.25
        assert f"Going on with another recipe: {said}" in Path(trainer.log_file).read_text()

    def test_of_other_plans(self, tiny, trained, environment):
        configurations = json.loads(json.dumps(tiny.plans["configurations"]))
        configurations[CONFIGURATION]["spacing"] = [9.0, 9.0, 9.0]
        configurations[CONFIGURATION]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 4, 8, 8]
        trainer = make_trainer(tiny, TINY, configurations=configurations)
        with pytest.raises(
            EngineError, match="is of other plans, spacing, architecture differ: plan as before, or start"
        ):
            trainer.load_checkpoint(str(trained / "fold_0" / "checkpoint_final.pth"))

    @pytest.mark.parametrize("had", [["case_of_before"], None])
    def test_of_other_cases(self, tiny, trained, environment, had):
        checkpoint = load(trained)
        assert checkpoint["multi_task"]["training_cases"] == sorted(tiny.training_cases)
        checkpoint["multi_task"]["training_cases"] = had
        trainer = make_trainer(tiny, TINY)
        if had is None:  # of a version that did not write them
            trainer.load_checkpoint(checkpoint)
            return
        with pytest.raises(
            EngineError, match="on other cases than fold 0 now has, 8 differ, such as case_of_before: go"
        ):
            trainer.load_checkpoint(checkpoint)

    def test_nnunets_own_command_takes_the_recipe_of_the_checkpoint(self, tiny, trained, environment):
        """It cannot name a recipe: the plans that it reads have none."""
        plans = json.loads(json.dumps(tiny.plans)) | {"continue_training": True}
        trainer_class = import_nnunet().nnUNetTrainerMultiTask
        trainer = trainer_class(plans, CONFIGURATION, 0, tiny.dataset, torch.device("cpu"))
        trainer.load_checkpoint(str(trained / "fold_0" / "checkpoint_final.pth"))
        assert trainer.recipe == TINY
        assert trainer.network.head.queries.shape == (2, TINY.head_queries, TINY.head_hidden)
        assert (trainer.current_epoch, trainer.schedule.last_epoch, trainer.num_iterations_per_epoch) == (2, 2, 2)

    def test_of_nnunets_own_trainer(self, tiny, trained, environment, tmp_path):
        checkpoint = load(trained) | {"trainer_name": "nnUNetTrainer"}
        del checkpoint["multi_task"]
        torch.save(checkpoint, tmp_path / "foreign.pth")
        with pytest.raises(EngineError, match="from a checkpoint of its own, this one is of nnUNetTrainer: start"):
            make_trainer(tiny, TINY).load_checkpoint(str(tmp_path / "foreign.pth"))

    def test_that_would_run_code(self, tiny, trained, environment, tmp_path):
        torch.save(load(trained) | {"hook": os.system}, tmp_path / "hostile.pth")
        with pytest.raises(CheckpointError, match="must hold weights and plain values only; it names posix.system"):
            make_trainer(tiny, TINY).load_checkpoint(str(tmp_path / "hostile.pth"))

    def test_that_is_damaged(self, tiny, trained, environment, tmp_path):
        whole = (trained / "fold_0" / "checkpoint_final.pth").read_bytes()
        (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=r"half\.pth must be a torch checkpoint; it cannot be read"):
            make_trainer(tiny, TINY).load_checkpoint(str(tmp_path / "half.pth"))
