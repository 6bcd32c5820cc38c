"""Recipes refuse what cannot be meant; the learning rate over the epochs."""

import json
import math
import types
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from nnturbo.training.recipe import PRESETS, EpochScheduler, Recipe, Schedule


class TestPresets:
    def test_there_are_four_and_balanced_is_the_default(self):
        assert set(PRESETS) == {"conservative", "balanced", "aggressive", "segmentation_focused"}
        assert PRESETS["balanced"] == Recipe()
        assert len(set(PRESETS.values())) == 4

    def test_the_default_has_at_most_120_epochs_segmentation_first_and_early_stopping(self):
        recipe = Recipe()
        assert recipe.epochs == 120
        assert recipe.segmentation_epochs > 0
        assert recipe.validate_every > 0
        assert recipe.patience + recipe.annealing_epochs + recipe.segmentation_epochs < recipe.epochs
        assert {"GaussianBlurTransform", "SimulateLowResolutionTransform"} <= set(recipe.left_out)

    def test_what_they_are_named_after(self):
        conservative, focused = PRESETS["conservative"], PRESETS["segmentation_focused"]
        assert conservative.optimizer == focused.optimizer == "sgd"
        assert focused.class_loss_weight == 0
        weights = [PRESETS[name].class_loss_weight for name in ("conservative", "balanced", "aggressive")]
        assert weights == sorted(set(weights))

    @pytest.mark.parametrize("name", PRESETS)
    def test_they_are_frozen_and_survive_json(self, name):
        recipe = PRESETS[name]
        assert Recipe.parse(json.loads(json.dumps(recipe.describe()))) == recipe
        with pytest.raises(FrozenInstanceError):
            recipe.epochs = 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw"),
            ({"learning_rate": 0.0}, "learning rates and gradient clips must be positive"),
            ({"head_learning_rate": -1e-3}, "learning rates and gradient clips must be positive"),
            ({"gradient_clip": 0}, "learning rates and gradient clips must be positive"),
            ({"head_gradient_clip": 0.0}, "learning rates and gradient clips must be positive"),
            ({"weight_decay": -0.1}, "weight decays and class_loss_weight must not be negative"),
            ({"head_weight_decay": -0.1}, "weight decays and class_loss_weight must not be negative"),
            ({"class_loss_weight": -0.1}, "weight decays and class_loss_weight must not be negative"),
            ({"epochs": 0}, "must be at least 1"),
            ({"iterations": 0}, "must be at least 1"),
            ({"validation_iterations": 0}, "must be at least 1"),
            ({"annealing_epochs": 0}, "must be at least 1"),
            ({"save_every": 0}, "must be at least 1"),
            ({"segmentation_epochs": -1}, "must not be negative"),
            ({"detached_epochs": -1}, "must not be negative"),
            ({"validate_every": -1}, "must not be negative"),
            ({"validation_cases": -1}, "must not be negative"),
            ({"patience": -1}, "must not be negative"),
            ({"label_smoothing": 1.1}, "must lie in 0 to 1"),
            ({"pancreas_weight": -0.1}, "must lie in 0 to 1"),
            ({"oversample_foreground": 2}, "must lie in 0 to 1"),
            ({"focus_labels": ()}, "focus_labels must name at least one label"),
            ({"epochs": 20}, "epochs must be more than segmentation_epochs, or the head never learns"),
            ({"left_out": ("GaussianBlur",)}, "left_out must be among GaussianNoiseTransform, "),
            # The one that cuts patches to their size.
            ({"left_out": ("SpatialTransform",)}, "left_out must be among GaussianNoiseTransform, "),
            ({"learning_rate": math.nan}, "learning_rate must be a finite number, got nan"),
            ({"weight_decay": math.inf}, "weight_decay must be a finite number, got inf"),
            ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
            ({"epochs": True}, "epochs must be a whole number, got True"),
            ({"head_stages": (1.0,)}, "head_stages must be whole numbers, got (1.0,)"),
            ({"focus_labels": "lesion"}, "focus_labels must be texts, got 'lesion'"),
            ({"head": None}, "head must be a text, got None"),
        ],
    )
    def test_values_out_of_range(self, changes, message):
        with pytest.raises(ValueError, match="^recipe: ") as caught:
            Recipe(**changes)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_unknown_entries(self):
        with pytest.raises(ValueError, match="recipe: unknown entries dropout, epoch; known are annealing_epochs, "):
            Recipe.parse({"epoch": 3, "dropout": 0.1, "epochs": 3})

    def test_no_entries_at_all(self):
        with pytest.raises(ValueError, match="recipe: must be entries by name, got 'balanced'"):
            Recipe.parse("balanced")


class TestSchedule:
    def test_without_stopping_it_is_nnunets(self):
        polylr = pytest.importorskip("nnunetv2.training.lr_scheduler.polylr")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
        scheduler = polylr.PolyLRScheduler(optimizer, 0.01, 50)
        schedule = Schedule(epochs=50, annealing_epochs=10)
        assert schedule.last_epoch == 50
        for epoch in range(50):
            scheduler.step(epoch)
            assert 0.01 * schedule.factor(epoch) == optimizer.param_groups[0]["lr"]

    def test_annealing_by_hand(self):
        schedule = Schedule(epochs=100, annealing_epochs=4, anneal_from=50)
        there = 0.5358867312681466  # 0.5 ** 0.9
        assert schedule.last_epoch == 54
        assert schedule.factor(0) == 1
        assert schedule.factor(49) == pytest.approx(0.51**0.9)
        factors = [schedule.factor(epoch) for epoch in range(50, 56)]
        assert factors == pytest.approx([there * part for part in (0.8, 0.6, 0.4, 0.2, 0, 0)])

    def test_annealing_does_not_go_beyond_the_last_epoch(self):
        schedule = Schedule(epochs=100, annealing_epochs=10, anneal_from=97)
        assert schedule.last_epoch == 100
        assert [schedule.factor(e) / 0.03**0.9 for e in (97, 98, 99, 100)] == pytest.approx([0.75, 0.5, 0.25, 0])

    def test_it_never_rises(self):
        for start in range(1, 40):
            schedule = replace(Schedule(epochs=40, annealing_epochs=5), anneal_from=start)
            factors = [schedule.factor(epoch) for epoch in range(schedule.last_epoch + 1)]
            assert factors == sorted(factors, reverse=True)
            assert factors[-1] == 0
            assert factors[-2] > 0


def test_both_optimizers_follow_the_schedule():
    first, second = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1.0) for _ in range(2))
    recipe = Recipe(learning_rate=1e-2, head_learning_rate=3e-3)
    schedule = Schedule(epochs=10, annealing_epochs=2, anneal_from=5)
    owner = types.SimpleNamespace(recipe=recipe, schedule=schedule, head_optimizer=second)
    scheduler = EpochScheduler(owner, first)
    for epoch in (0, 3, 5, 6):
        scheduler.step(epoch)
        assert first.param_groups[0]["lr"] == 1e-2 * schedule.factor(epoch)
        assert second.param_groups[0]["lr"] == 3e-3 * schedule.factor(epoch)
