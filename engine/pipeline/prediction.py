"""What comes out of a prediction."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..model.classification import Classification
from ..model.labels import LabelScheme
from ..model.plans import READERS, Plan
from ..model.provenance import Provenance
from ..scans.geometry import Geometry
from ..scans.volume import Volume, restore_orientation, write_segmentation
from .steps import Segmented


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """The result for one scan.

    Args:
        segmentation: (Z, Y, X) uint8 or uint16 on the scan's own grid; (1, Y, X) for a 2D image.
        probabilities: (K, Z, Y, X) float32 if asked for, else None; K classes, or regions.
        geometry: Of the scan.
        labels: What the values mean.
        timings: Milliseconds by stage.
        warnings: What was odd about the scan.
        provenance: Model, backend, precision and versions that made it; one entry for each model.
        properties: What nnU-Net keeps beside probabilities (`.pkl`), for its own ensembling.
        classification: The case's class, for models with a classification head.
        reader: nnU-Net's class that reads this model's scans and writes their labels.
    """

    segmentation: np.ndarray
    probabilities: np.ndarray | None
    geometry: Geometry
    labels: LabelScheme
    timings: Mapping[str, float]
    warnings: tuple[str, ...]
    provenance: tuple[Provenance, ...]
    properties: Mapping[str, Any]
    classification: Classification | None = None
    reader: str = "SimpleITKIO"

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Millilitres of every label but background; of a region, all its labels together; none for a 2D image."""
        if self.geometry.is_2d:
            return {}
        # Counting takes eight bytes a voxel, and most voxels are background.
        foreground = self.segmentation[self.segmentation != 0]
        counts = np.bincount(foreground, minlength=np.iinfo(self.labels.dtype).max + 1)
        voxel_ml = self.geometry.voxel_mm3 / 1000
        return {name: float(counts[list(values)].sum()) * voxel_ml for name, values in self.labels.written.items()}

    @property
    def reader_probabilities(self) -> np.ndarray | None:
        """Probabilities on the axes of nnU-Net's reader, as `properties` describe them: what its `.npz` holds."""
        if self.probabilities is None or not READERS[self.reader]:
            return self.probabilities
        return Volume(array=self.probabilities, geometry=self.geometry).reoriented().array

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the segmentation in the scan's geometry, as `write_segmentation` does; the format follows the ending.

        Raises:
            OutputError: Where it cannot be written; nothing is left under the name then.
        """
        write_segmentation(path, self.segmentation, self.geometry, reader=self.reader)


def answer(segmented: Segmented, plan: Plan, provenance: Sequence[Provenance]) -> Prediction:
    """Fetch the labels of a scan, put them on its axes, and say how they came about.

    Args:
        segmented: What the network's step gave.
        plan: The model's.
        provenance: What the engine says about itself.
    """
    prepared, placement = segmented.prepared, segmented.placement
    with prepared.timings("labels", on_gpu=False):
        segmentation = segmented.segmentation()
    probabilities, geometry = segmented.probabilities, prepared.geometry
    if plan.reorient:
        segmentation = np.ascontiguousarray(restore_orientation(segmentation, geometry))
        if probabilities is not None:
            probabilities = np.ascontiguousarray(restore_orientation(probabilities, geometry))
    return Prediction(
        segmentation=segmentation,
        probabilities=probabilities,
        geometry=geometry,
        labels=plan.labels,
        timings=prepared.timings.as_dict(),
        warnings=prepared.warnings,
        provenance=tuple(
            replace(each, views_per_call=placement.views_per_call, sums_device=str(placement.sums_device))
            for each in provenance
        ),
        properties=prepared.properties,
        reader=plan.reader,
        classification=None if segmented.votes is None else segmented.votes.count(),
    )
