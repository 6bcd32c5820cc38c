"""Measures how far the labels of two engines agree."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..engine import Engine
from ..model.agreement import Agreement
from ..pipeline.steps import Image


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
