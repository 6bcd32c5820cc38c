"""What made a prediction: model, settings, backend, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .agreement import Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSettings:
    """What decides the labels that a model gives; another backend or device changes single voxels.

    Args:
        source: SHA-256 of the model's files, by name.
        configuration: Such as "3d_fullres".
        precision: Such as "fp32".
        classifier: "head" or "lda"; None for models without a classification head.
        aggregation: How answers for tiles become one for the case; None likewise.
        loader: What reads, normalises and resamples.
        tile_step_size: Distance of tiles as a fraction of the patch.
        mirror_views: Mirrored views that are averaged, the plain one included.
        use_gaussian: Whether voxels in the middle of a tile count more.
        network: Class or function of a network that was given in place of the plan's; None for the plan's.
    """

    source: Mapping[str, str]
    configuration: str
    precision: str
    classifier: str | None
    aggregation: str | None
    loader: str
    tile_step_size: float
    mirror_views: int
    use_gaussian: bool = True
    network: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give all of it, by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LabelSettings:
        """Read what `to_json` gave.

        Raises:
            TypeError: For anything else.
        """
        return cls(**content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance(LabelSettings):
    """What made a prediction: what decides its labels, and all else about one model and where it ran.

    Args:
        model: Folder, zip or bundle.
        dataset: nnU-Net's name of the data set.
        trainer: nnU-Net's name of the trainer.
        folds: Folds that are averaged.
        checkpoint: File name in each fold; None for a bundle, whose `source` names it.
        backend: Such as "openvino".
        agreement: Of a bundle with fp32, where it was measured.
        plan_remarks: Where nnturbo takes a plan otherwise than it reads.
        device: Where the network ran.
        torch: Version.
        python: Version.
        views_per_call: Mirrored views, of one tile or of several, that went through the network at once.
        sums_device: Where planes and sums of tiles were.
    """

    model: str
    dataset: str
    trainer: str
    folds: tuple[str, ...]
    checkpoint: str | None
    backend: str
    agreement: Agreement | None
    plan_remarks: tuple[str, ...]
    device: str
    torch: str
    python: str
    views_per_call: int
    sums_device: str

    @property
    def settings(self) -> LabelSettings:
        """What decides the labels."""
        return LabelSettings(**{each.name: getattr(self, each.name) for each in fields(LabelSettings)})

    def to_json(self) -> dict[str, Any]:
        """Give what is known, by name; tuples as lists."""
        content = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in content.items() if value not in (None, [])}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Provenance:
        """Read what `to_json` gave.

        Raises:
            ValueError, TypeError: For anything else.
        """
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in dict(content).items()}
        if "agreement" in given:
            given["agreement"] = Agreement.from_json(given["agreement"])
        return cls(**{**_LEFT_OUT, **given})


_LEFT_OUT: dict[str, Any] = {
    "classifier": None,
    "aggregation": None,
    "folds": (),
    "checkpoint": None,
    "agreement": None,
    "plan_remarks": (),
}
"""Values that `Provenance.to_json` leaves out."""


def provenance_json(models: Sequence[Provenance]) -> dict[str, Any]:
    """Describe what made a prediction: one model by itself, several as a list under "models"."""
    if len(models) == 1:
        return models[0].to_json()
    return {"models": [each.to_json() for each in models]}


def read_provenance(content: Mapping[str, Any]) -> tuple[Provenance, ...]:
    """Read what `provenance_json` gave.

    Raises:
        ValueError, TypeError: For anything else.
    """
    models = content["models"] if set(content) == {"models"} else [content]
    return tuple(Provenance.from_json(each) for each in models)
