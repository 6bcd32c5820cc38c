"""How far the labels of a model in lower precision agree with those in fp32."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any

from .json_values import check_object


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

    def to_json(self) -> dict[str, Any]:
        """Give all of it, by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Agreement:
        """Read what `to_json` gave.

        Raises:
            ValueError: For anything else.
        """
        check_object(content, _KINDS, "an agreement")
        if not all(dice is None or isinstance(dice, (int, float)) for dice in content["dice"].values()):
            raise ValueError(f"an agreement: dice must be numbers by label, got {content['dice']!r:.80}")
        return cls(**content)

    def __str__(self) -> str:
        """Describe it in one line."""
        classes = "" if self.same_class is None else f", {self.same_class} of {self.scans} with the same class"
        dice = ", ".join(f"{name} {'not seen' if dice is None else f'{dice:.4f}'}" for name, dice in self.dice.items())
        return (
            f"{self.different} of {self.voxels} voxels differ from fp32 on {self.scans} {self.what}; Dice {dice}"
            f"{classes}"
        )


_KINDS: dict[str, type | tuple[type, ...]] = {
    "scans": int,
    "voxels": int,
    "different": int,
    "dice": dict,
    "same_class": (int, NoneType),
    "what": str,
}
