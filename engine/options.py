"""What can be chosen. It imports nothing, so that commands start at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp16", "int16", "int8")
LOADERS = ("exact", "dali", "dali-linear")
CLASSIFIERS = ("auto", "head", "lda")
AGGREGATIONS = ("foreground", "mean")
DEFAULT_CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of an engine, with defaults that suit most.

    Args:
        views_per_call: Mirror views, of one tile or of several, that go through the network at once; by default one on
            a CPU, where more take memory and no less time; on a GPU as many as have two million voxels, one to eight.
        use_gaussian: Let voxels in the middle of a tile count more than those at its rim, as nnU-Net does by default.
        sums_on_device: Keep planes and sums on the network's device (nnU-Net: perform_everything_on_device).
        classifier: What answers for the case in a multi-task model: the network's "head", the classifier "lda" that was
            fitted afterwards, or "auto": the fitted one where every fold has one that is preferred. Means nothing to
            other models.
        loader: What reads, normalises and resamples: "exact", as nnU-Net does to rounding, or NVIDIA's "dali", with
            a cubic kernel that is no spline, or "dali-linear".
        aggregation: How its answers for tiles become one: weighted by what the class is about ("foreground"), or all
            alike ("mean"). Means nothing to other models.
    """

    views_per_call: int | None = None
    use_gaussian: bool = True
    sums_on_device: bool = True
    classifier: str = "auto"
    aggregation: str = "foreground"
    loader: str = "exact"

    def __post_init__(self) -> None:
        """Check ranges."""
        choices = {"classifier": CLASSIFIERS, "aggregation": AGGREGATIONS, "loader": LOADERS}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.views_per_call is not None and self.views_per_call < 1:
            raise ValueError(f"views_per_call must be at least 1, got {self.views_per_call}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """What of a model is taken, and how it runs: the arguments of `Engine.load`, without model, network and device."""

    folds: Sequence[int | str] | None = None
    checkpoint: str | None = None
    configuration: str | None = None
    backend: str = "auto"
    precision: str = "auto"
    tile_step_size: float = 0.5
    mirror: bool = True
    options: EngineOptions = EngineOptions()

    @property
    def checkpoint_file(self) -> str:
        """File name of the checkpoint in each fold."""
        return self.checkpoint or DEFAULT_CHECKPOINT

    def arguments(self) -> dict[str, Any]:
        """Give the arguments of `Engine.load`."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
