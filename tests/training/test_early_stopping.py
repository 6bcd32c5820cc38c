"""Validation on whole cases decides which epoch is the best, and when the learning rate goes to zero."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.training.schedule import Schedule
from nnturbo.training.whole_cases import ValidationResult

from tests.training.tiny import TINY, assert_same, import_nnunet, make_trainer, seed_everything

STOPPING = replace(
    TINY, epochs=12, iterations=1, detached_epochs=0, validate_every=1, patience=2, annealing_epochs=3, save_every=1
)


@pytest.fixture
def scored(tiny, environment, monkeypatch):
    """Makes trainers whose validation gives the scores one asks for, by epoch; the last one goes on for ever."""

    def make(scores, recipe=STOPPING):
        trainer = make_trainer(tiny, recipe)

        def validate(engine, cases, focus_labels):
            score = scores[min(trainer.current_epoch, len(scores) - 1)]
            return ValidationResult(foreground_dsc=score, focus_dsc=score, label_dsc={1: score}, macro_f1=math.nan)

        import_nnunet()
        monkeypatch.setattr("nnturbo.training.whole_case_validation.validate", validate)
        monkeypatch.setattr(trainer.logger, "plot_progress_png", lambda folder: None)
        return trainer

    return make


@pytest.mark.parametrize(
    ("macro_f1", "score"), [(0.6, pytest.approx((0.9 + 0.3 + 0.6) / 3)), (math.nan, pytest.approx((0.9 + 0.3) / 2))]
)
def test_the_score_is_the_mean_of_foreground_focus_and_class(macro_f1, score):
    result = ValidationResult(foreground_dsc=0.9, focus_dsc=0.3, label_dsc={1: 0.8, 2: 0.3}, macro_f1=macro_f1)
    assert result.score == score


class TestEarlyStopping:
    scores = (0.1, 0.2, 0.3, 0.3, 0.3)

    @pytest.mark.thorough
    def test_the_rate_goes_to_zero_and_training_ends(self, scored):
        trainer = scored(self.scores)
        trainer.run_training()
        # The best score is that of epoch 2; two epochs later patience is at its end.
        assert trainer.schedule == Schedule(epochs=12, annealing_epochs=3, anneal_from=5)
        assert trainer.current_epoch == len(trainer.history) == 8
        there = (1 - 5 / 12) ** 0.9
        rates = [(1 - e / 12) ** 0.9 for e in range(5)] + [there * part for part in (0.75, 0.5, 0.25)]
        assert [line["learning_rate"] for line in trainer.history] == pytest.approx([1e-3 * rate for rate in rates])
        assert trainer.head_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * there * 0.25)
        folder = Path(trainer.output_folder)
        assert torch.load(folder / "checkpoint_final.pth", weights_only=False)["current_epoch"] == 8
        assert not (folder / "checkpoint_latest.pth").exists()
        best = torch.load(folder / "checkpoint_best_score.pth", weights_only=False)
        assert (best["current_epoch"], best["multi_task"]["best"]) == (3, (0.3, 2))

    def test_while_scores_rise_nothing_stops(self, scored):
        trainer = scored([epoch / 20 for epoch in range(12)])
        trainer.initialize()
        assert self.patience_ends(trainer) is None

    @pytest.mark.thorough  # three trainings; the state that they need is in checkpoints, which TestKilled compares
    @pytest.mark.thorough
    def test_it_survives_an_interruption(self, scored, tiny):
        seed_everything(5)
        whole = scored(self.scores)
        whole.run_training()
        wanted = torch.load(Path(whole.output_folder) / "checkpoint_final.pth", weights_only=False)
        seed_everything(5)
        first = scored(self.scores)
        step = first.train_step

        def interrupted(batch):
            if first.current_epoch == 6:  # while it anneals
                raise KeyboardInterrupt
            return step(batch)

        first.train_step = interrupted
        with pytest.raises(KeyboardInterrupt):
            first.run_training()
        second = scored(self.scores)
        second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
        assert second.schedule == Schedule(epochs=12, annealing_epochs=3, anneal_from=5)
        second.run_training()
        got = torch.load(Path(second.output_folder) / "checkpoint_final.pth", weights_only=False)
        assert_same(got, wanted)

    def patience_ends(self, trainer, validate_every=1):
        """The epoch from which the rate anneals."""
        for epoch in range(trainer.recipe.epochs):
            trainer.current_epoch = epoch
            if (epoch + 1) % validate_every == 0:
                trainer.whole_cases.validate({})
        return trainer.schedule.anneal_from

    @pytest.mark.thorough
    def test_patience_begins_after_the_warm_up(self, scored):
        trainer = scored([0.5], replace(STOPPING, segmentation_epochs=3, detached_epochs=2))
        trainer.initialize()
        assert self.patience_ends(trainer) == 5 + 2 + 1

    def test_patience_counts_epochs_not_validations(self, scored):
        trainer = scored([0.5], replace(STOPPING, epochs=30, patience=7))
        trainer.initialize()
        # The first score is that of epoch 3, and 7 epochs without a better one are over at the validation of 11.
        assert self.patience_ends(trainer, validate_every=4) == 12

    def test_the_last_epoch_stops_nothing(self, scored):
        trainer = scored([0.5], replace(STOPPING, epochs=3))
        trainer.initialize()
        assert self.patience_ends(trainer) is None

    def test_epochs_before_the_head_is_trained_have_no_score(self, scored):
        """The head answers then as its first weights make it."""
        trainer = scored([0.9, 0.9, 0.2, 0.3], replace(STOPPING, segmentation_epochs=2))
        trainer.initialize()
        lines = []
        for epoch in range(4):
            trainer.current_epoch = epoch
            lines.append({})
            trainer.whole_cases.validate(lines[-1])
        assert [line.get("score") for line in lines] == [None, None, 0.2, 0.3]
        assert all(("macro_f1" in line) == ("score" in line) for line in lines)
        assert [line["focus_dsc"] for line in lines] == [0.9, 0.9, 0.2, 0.3]
        assert trainer.whole_cases.best == (0.3, 3)

    @pytest.mark.thorough
    def test_undefined_scores_are_never_the_best(self, scored):
        trainer = scored([0.1, np.nan, np.nan, np.nan])
        trainer.initialize()
        assert self.patience_ends(trainer) == 3
        assert trainer.whole_cases.best == (0.1, 0)
