"""How far the labels of one engine agree with those of another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .engine import Engine, Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Labels of several scans, compared.

    Args:
        scans: How many.
        voxels: Of all scans.
        different: Voxels whose label differs.
        dice: By name of the label, over the voxels of all scans; 1 for a label that neither engine gives.
        same_class: Scans with the same classification; None for models without.
        what: Says what the scans were.
    """

    scans: int
    voxels: int
    different: int
    dice: dict[str, float]
    same_class: int | None
    what: str

    @property
    def lowest_dice(self) -> float:
        """Of the label that agrees least."""
        return min(self.dice.values())

    def __str__(self) -> str:
        """Say it in one line."""
        classes = "" if self.same_class is None else f", {self.same_class} of {self.scans} with the same class"
        dice = ", ".join(f"{name} {value:.4f}" for name, value in self.dice.items())
        return (
            f"{self.different} of {self.voxels} voxels differ from fp32 on {self.scans} {self.what}; Dice {dice}"
            f"{classes}"
        )


def measure_agreement(reference: Engine, engine: Engine, scans: Iterable[Image], what: str) -> Agreement:
    """Predict scans with two engines and compare.

    Args:
        reference: What is right.
        engine: Of the same model.
        scans: One or more.
        what: Says what they are.

    Raises:
        EngineError: Where a scan cannot be read or predicted.
    """
    names = {value: name for name, value in reference.model.plan.labels.labels.items() if isinstance(value, int)}
    sizes = dict.fromkeys(reference.model.plan.labels.foreground, 0)
    common = dict(sizes)
    count = voxels = different = 0
    same_class = 0 if reference.class_names is not None else None
    for scan in scans:
        right, other = reference.predict(scan), engine.predict(scan)
        count += 1
        voxels += right.segmentation.size
        different += int(np.count_nonzero(right.segmentation != other.segmentation))
        for label in sizes:
            in_right, in_other = right.segmentation == label, other.segmentation == label
            sizes[label] += int(np.count_nonzero(in_right)) + int(np.count_nonzero(in_other))
            common[label] += int(np.count_nonzero(in_right & in_other))
        if right.classification is not None and other.classification is not None and same_class is not None:
            same_class += right.classification.label == other.classification.label
    return Agreement(
        scans=count,
        voxels=voxels,
        different=different,
        dice={
            names.get(label, str(label)): 2 * common[label] / sizes[label] if sizes[label] else 1.0 for label in sizes
        },
        same_class=same_class,
        what=what,
    )
