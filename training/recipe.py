"""Recipes of multi-task trainings: all settings, and four presets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

OPTIMIZERS = ("sgd", "adamw")
CPU_PRECISIONS = ("fp32", "bf16")
AUGMENTATIONS = (
    "GaussianNoiseTransform",
    "GaussianBlurTransform",
    "MultiplicativeBrightnessTransform",
    "ContrastTransform",
    "SimulateLowResolutionTransform",
    "GammaTransform",
)
"""nnU-Net's augmentations that may be left out; the others also change the size or form of patches."""


_KINDS = {
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    "str": ("a text", lambda value: isinstance(value, str)),
    "tuple[int, ...]": ("whole numbers", lambda value: _all_are(value, int)),
    "tuple[str, ...]": ("texts", lambda value: _all_are(value, str)),
}
"""For each declared type: what its values must be, in words, and a test of it."""


def _all_are(values: Any, kind: type) -> bool:
    return isinstance(values, tuple) and all(type(value) is kind for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All settings of a training.

    Attributes:
        head: Kind of classification head, see `engine.classification.ClassificationScheme`.
        head_stages: Encoder stages that the head reads; shallow ones separate subtypes better.
        head_hidden, head_queries, head_dropout: Settings of the head.
        focus_labels: Names of the focus labels, such as the lesion.
        optimizer: Optimizer of encoder and decoder: "sgd" with nnU-Net's Nesterov momentum of 0.99, or "adamw".
        learning_rate, weight_decay: Settings of that optimizer.
        gradient_clip: Greatest norm of the gradients of encoder and decoder.
        head_learning_rate, head_weight_decay, head_gradient_clip: Settings of the head's own AdamW. With nnU-Net's SGD
            the head's cross-entropy stays at ln 3.
        epochs: Greatest number of epochs.
        iterations, validation_iterations: Batches per epoch.
        segmentation_epochs: Epochs at the beginning that train the segmentation alone.
        detached_epochs: Epochs after those in which the head learns without changing the encoder.
        class_loss_weight: Weight of the classification loss in the sum, when it may change the encoder; with 0 it never
            does.
        label_smoothing: Label smoothing of the classification loss.
        pancreas_weight: Weight of a patch with foreground but without focus; with focus it is 1, without foreground 0.
        oversample_foreground: Share of the patches that are centred on foreground.
        left_out: Augmentations of nnU-Net's that are not applied, some of `AUGMENTATIONS`.
        validate_every: Epochs between validations on whole cases; 0 for none, and then training does not stop early.
        validation_cases: Greatest number of cases of such a validation, spread evenly over the split; 0 for all.
        patience: Epochs without a better score before the learning rate anneals. The score is the mean of the DSC of
            foreground and focus, and the macro-F1.
        annealing_epochs: Epochs in which the learning rate then goes to zero.
        save_every: Epochs between checkpoints.
        average_decay: Decay, per step of the optimizer, of an exponential moving average of the weights, which is then
            validated and kept as the model; 0 for none.
        cpu_precision: Precision of the network's products on a CPU: "fp32", or "bf16" where the processor multiplies it
            (AVX512-BF16, AMX). Weights, losses and optimizers stay in fp32. A GPU computes as nnU-Net's trainer does.
        seed: Seed of weights, batches and augmentation; -1 leaves the random number generators as they are.
        preset: Name of the preset that it began with.
    """

    head: str = "attention"
    head_stages: tuple[int, ...] = (1, 2, 3)
    head_hidden: int = 64
    head_queries: int = 4
    head_dropout: float = 0.2
    focus_labels: tuple[str, ...] = ("lesion",)
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    gradient_clip: float = 12.0
    head_learning_rate: float = 1e-3
    head_weight_decay: float = 1e-2
    head_gradient_clip: float = 1.0
    epochs: int = 120
    iterations: int = 250
    validation_iterations: int = 50
    segmentation_epochs: int = 20
    detached_epochs: int = 10
    class_loss_weight: float = 0.3
    label_smoothing: float = 0.1
    pancreas_weight: float = 0.3
    oversample_foreground: float = 0.5
    left_out: tuple[str, ...] = ("GaussianBlurTransform", "SimulateLowResolutionTransform", "GammaTransform")
    validate_every: int = 5
    validation_cases: int = 0
    patience: int = 30
    annealing_epochs: int = 10
    save_every: int = 5
    average_decay: float = 0.0
    cpu_precision: str = "fp32"
    seed: int = -1
    preset: str = "balanced"

    def __post_init__(self) -> None:
        """Check all values, because people may have typed them."""
        if wrong := [
            f"{field.name} must be {_KINDS[str(field.type)][0]}, got {getattr(self, field.name)!r:.80}"
            for field in fields(self)
            if not _KINDS[str(field.type)][1](getattr(self, field.name))
        ]:
            raise ValueError(f"recipe: {'; '.join(wrong)}")
        rules = {
            f"optimizer must be one of {', '.join(OPTIMIZERS)}": self.optimizer in OPTIMIZERS,
            f"cpu_precision must be one of {', '.join(CPU_PRECISIONS)}": self.cpu_precision in CPU_PRECISIONS,
            f"left_out must be among {', '.join(AUGMENTATIONS)}": set(self.left_out) <= set(AUGMENTATIONS),
            "learning rates and gradient clips must be positive": min(
                self.learning_rate, self.head_learning_rate, self.gradient_clip, self.head_gradient_clip
            )
            > 0,
            "weight decays and class_loss_weight must not be negative": min(
                self.weight_decay, self.head_weight_decay, self.class_loss_weight
            )
            >= 0,
            "epochs, iterations, validation_iterations, annealing_epochs and save_every must be at least 1": min(
                self.epochs, self.iterations, self.validation_iterations, self.annealing_epochs, self.save_every
            )
            >= 1,
            "segmentation_epochs, detached_epochs, validate_every, validation_cases and patience must not be "
            "negative": min(
                self.segmentation_epochs,
                self.detached_epochs,
                self.validate_every,
                self.validation_cases,
                self.patience,
            )
            >= 0,
            "label_smoothing, pancreas_weight and oversample_foreground must lie in 0 to 1": all(
                0 <= share <= 1 for share in (self.label_smoothing, self.pancreas_weight, self.oversample_foreground)
            ),
            "average_decay must lie in 0 to 1, without 1": 0 <= self.average_decay < 1,
            "seed must lie in 0 to 4294967295, or be -1": -1 <= self.seed < 2**32,
            "focus_labels must name at least one label": len(self.focus_labels) > 0,
            "epochs must be more than segmentation_epochs, or the head never learns": self.epochs
            > self.segmentation_epochs,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError(f"recipe: {'; '.join(broken)}; got {self}")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Recipe:
        """Read the output of `describe`.

        Raises:
            ValueError: For unknown entries, values out of range, or what only an earlier version could do.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe: must be entries by name, got {values!r:.80}")
        batches = values.get("batches_per_step", 1)  # recipes of an earlier version have it
        if batches != 1:
            raise ValueError(
                f"recipe: batches_per_step must be 1 or left out, got {batches!r:.80}: the gradients of several "
                f"batches are no longer averaged"
            )
        values = {name: value for name, value in values.items() if name != "batches_per_step"}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"recipe: unknown entries {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**arguments)

    def describe(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


PRESETS: Mapping[str, Recipe] = {
    # nnU-Net's own optimizer and augmentation, and a head that hardly changes the encoder.
    "conservative": Recipe(
        preset="conservative",
        optimizer="sgd",
        learning_rate=1e-2,
        weight_decay=3e-5,
        class_loss_weight=0.1,
        detached_epochs=30,
        left_out=(),
    ),
    "balanced": Recipe(),
    # Both tasks from an early epoch on, with equal weight.
    "aggressive": Recipe(
        preset="aggressive", segmentation_epochs=5, detached_epochs=5, class_loss_weight=1.0, learning_rate=2e-3
    ),
    # A long schedule, from which the segmentation gains most; the head never changes the encoder.
    "segmentation_focused": Recipe(
        preset="segmentation_focused",
        optimizer="sgd",
        learning_rate=1e-2,
        weight_decay=3e-5,
        class_loss_weight=0.0,
        epochs=700,
        segmentation_epochs=300,
        validate_every=25,
        patience=150,
        annealing_epochs=50,
        left_out=(),
    ),
}


def changed_recipe(preset: str | None, changes: Sequence[str], stored: Recipe | None = None) -> Recipe:
    """Take a preset, and change some of its entries.

    Args:
        preset: One of `PRESETS`; "balanced" if it is `None`.
        changes: `name=value` each; values of lists are separated by commas.
        stored: Recipe of a training that goes on. Without a preset, or with its own, its entries are the ones that are
            changed.

    Raises:
        ValueError: For an unknown name, or a value of the wrong kind.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    begin = stored if stored is not None and preset in (None, stored.preset) else PRESETS[preset or "balanced"]
    values = begin.describe()
    known = [name for name in values if name != "preset"]
    for change in changes:
        name, equals, text = change.partition("=")
        if name not in known or not equals or (not text and not isinstance(values[name], list)):
            raise ValueError(f"a change must be NAME=VALUE with a name of {', '.join(known)}, got {change!r}")
        try:
            values[name] = _like(getattr(Recipe(), name), text)
        except ValueError as error:
            raise ValueError(f"{name} must be like {values[name]!r}, got {text!r}") from error
    return Recipe.parse(values)


def _like(example: Any, text: str) -> Any:
    """Read a text as a value of the same kind as another."""
    if isinstance(example, tuple):
        kind = type(example[0]) if example else str
        return [kind(part) for part in text.split(",") if part]
    return type(example)(text)
