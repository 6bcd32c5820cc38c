"""Recipes refuse what cannot be meant; changes of presets and of stored recipes."""

import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
from nnturbo.training.recipe import PRESETS, Recipe, changed_recipe


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

    def test_those_that_put_the_segmentation_first_keep_nnunets_augmentation(self):
        assert [name for name in PRESETS if not PRESETS[name].left_out] == ["conservative", "segmentation_focused"]

    def test_each_knows_its_name(self):
        assert {name: recipe.preset for name, recipe in PRESETS.items()} == {name: name for name in PRESETS}

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
            ({"cpu_precision": "fp16"}, "cpu_precision must be one of fp32, bf16"),
            ({"average_decay": 1.0}, "average_decay must lie in 0 to 1, without 1"),
            ({"seed": -2}, "seed must lie in 0 to 4294967295, or be -1"),
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

    def test_what_an_earlier_version_trained_otherwise(self):
        recipe = Recipe(epochs=60)
        assert Recipe.parse(recipe.describe() | {"batches_per_step": 1}) == recipe
        message = (
            "^recipe: batches_per_step must be 1 or left out, got 2: the gradients of several batches are no longer"
        )
        with pytest.raises(ValueError, match=message):
            Recipe.parse(recipe.describe() | {"batches_per_step": 2})

    def test_no_entries_at_all(self):
        with pytest.raises(ValueError, match="recipe: must be entries by name, got 'balanced'"):
            Recipe.parse("balanced")


class TestChanges:
    """What `--preset` and `--set` mean, for a new training and for one that goes on."""

    stored = replace(PRESETS["aggressive"], epochs=60, head="gap_mlp")

    def test_a_new_training_begins_with_balanced(self):
        assert changed_recipe(None, []) == PRESETS["balanced"]
        assert changed_recipe(None, ["epochs=60"]) == replace(PRESETS["balanced"], epochs=60)

    @pytest.mark.parametrize(
        ("preset", "changes"),
        [(None, []), ("aggressive", []), (None, ["epochs=60"]), ("aggressive", ["head=gap_mlp", "epochs=60"])],
    )
    def test_forgotten_flags_are_the_stored_ones(self, preset, changes):
        assert changed_recipe(preset, changes, self.stored) == self.stored

    @pytest.mark.parametrize(
        ("preset", "changes", "wanted"),
        [
            (None, ["epochs=70"], replace(stored, epochs=70)),
            ("balanced", [], PRESETS["balanced"]),
            ("conservative", ["epochs=60"], replace(PRESETS["conservative"], epochs=60)),
        ],
    )
    def test_other_flags_are_taken_as_they_are(self, preset, changes, wanted):
        assert changed_recipe(preset, changes, self.stored) == wanted

    def test_lists_may_become_empty(self):
        assert changed_recipe("balanced", ["left_out="]).left_out == ()
        assert changed_recipe("conservative", ["left_out=GammaTransform"]).left_out == ("GammaTransform",)
        with pytest.raises(ValueError, match="a change must be NAME=VALUE .*, got 'epochs='"):
            changed_recipe("balanced", ["epochs="])

    def test_the_preset_has_a_flag_of_its_own(self):
        with pytest.raises(ValueError, match="a change must be NAME=VALUE .*, got 'preset=aggressive'"):
            changed_recipe("balanced", ["preset=aggressive"])
