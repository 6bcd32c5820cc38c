"""Measures how far the labels of two engines agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np

from ..engine import Engine
from ..errors import BundleError
from ..pipeline.steps import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Comparison of the labels of several scans.

    Args:
        scans: Number of scans.
        voxels: Number of voxels of all scans.
        different: Number of voxels whose label differs.
        dice: By name of the label, over the voxels of all scans; None for a label that neither engine gives.
        same_class: Number of scans with the same class; None for models without classes.
        what: Description of the scans.
    """

    scans: int
    voxels: int
    different: int
    dice: dict[str, float | None]
    same_class: int | None
    what: str

    @property
    def lowest_dice(self) -> float | None:
        """Dice of the label that agrees least; None if neither engine gives any label."""
        return min((dice for dice in self.dice.values() if dice is not None), default=None)

    def reaches(self, floor: float) -> bool:
        """Whether the Dice of every label is at least `floor`; true if neither engine gives any label."""
        return self.lowest_dice is None or self.lowest_dice >= floor

    @classmethod
    def parse(cls, content: Any) -> Agreement:
        """Read the agreement in a bundle's manifest.

        Raises:
            BundleError: Where it is anything else.
        """
        kinds = {
            "scans": int,
            "voxels": int,
            "different": int,
            "dice": dict,
            "same_class": (int, NoneType),
            "what": str,
        }
        if not isinstance(content, dict) or set(content) != set(kinds):
            raise BundleError(f"a bundle's agreement must have {', '.join(kinds)}; build the bundle again")
        for key, kind in kinds.items():
            if not isinstance(content[key], kind):
                raise BundleError(f"a bundle's agreement: {key} cannot be {content[key]!r:.80}; build the bundle again")
        if not all(dice is None or isinstance(dice, (int, float)) for dice in content["dice"].values()):
            raise BundleError("a bundle's agreement: dice must be numbers by label; build the bundle again")
        return cls(**content)

    def __str__(self) -> str:
        """Describe it in one line."""
        classes = "" if self.same_class is None else f", {self.same_class} of {self.scans} with the same class"
        dice = ", ".join(f"{name} {'not seen' if dice is None else f'{dice:.4f}'}" for name, dice in self.dice.items())
        return (
            f"{self.different} of {self.voxels} voxels differ from fp32 on {self.scans} {self.what}; Dice {dice}"
            f"{classes}"
        )


def measure_agreement(reference: Engine, engine: Engine, scans: Iterable[Image], what: str) -> Agreement:
    """Predict scans with two engines and compare.

    Args:
        reference: Engine whose labels are taken as right.
        engine: Another engine of the same model.
        scans: One or more scans.
        what: Description of the scans.

    Raises:
        EngineError: Where a scan cannot be read or predicted.
    """
    written = reference.model.plan.labels.written
    names = {values[0]: name for name, values in written.items() if len(values) == 1}
    sizes = dict.fromkeys(sorted({value for values in written.values() for value in values}), 0)
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
            names.get(label, str(label)): 2 * common[label] / sizes[label] if sizes[label] else None for label in sizes
        },
        same_class=same_class,
        what=what,
    )
