"""Read masks, and compare their grid with that of their image."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from ...engine.scans.volume import Volume, read_volume
from .tables import DatasetError, in_words
from .task import Task

_FARTHEST_FROM_INTEGER = 0.01  # labels that were scaled as 16-bit numbers are 1.0000153
_SAME_SPACING = 1e-4  # relative
_SAME_DIRECTION = 1e-3  # per cosine
_SAME_ORIGIN = 0.05  # part of the smallest spacing


def read_mask(path: str | os.PathLike[str], task: Task) -> tuple[Volume, bool]:
    """Read labels and round them.

    Args:
        path: Mask with labels of the task, each at most 0.01 off.
        task: Has the labels.

    Returns:
        The labels, (1, Z, Y, X) uint8 or uint16, and whether a value was rounded.

    Raises:
        VolumeError: If the file cannot be read.
        DatasetError: If a value is not one of the labels.
    """
    stored = read_volume(path, channels=1)
    labels = np.rint(stored.array)
    known = (np.abs(stored.array - labels) <= _FARTHEST_FROM_INTEGER) & np.isin(labels, task.mask_values)
    if not known.all():
        wrong = ", ".join(f"{value:g}" for value in np.unique(stored.array[~known])[:5])
        wanted = in_words([str(value) for value in task.mask_values])
        raise DatasetError(f"{path}: labels must be {wanted} (within {_FARTHEST_FROM_INTEGER}), got {wrong}")
    return replace(stored, array=labels.astype(task.scheme.dtype)), bool((labels != stored.array).any())


def grid_difference(mask: Volume, image: Volume) -> str | None:
    """Say how the grid of a mask differs from that of its image; `None` if it is the same."""
    mine, its = mask.geometry, image.geometry
    for what, found, expected, relative, absolute in (
        ("shape (z, y, x)", mask.array.shape[1:], image.array.shape[1:], 0, 0),
        ("spacing (z, y, x) in mm", mine.spacing, its.spacing, _SAME_SPACING, 0),
        ("origin in mm", mine.origin, its.origin, 0, _SAME_ORIGIN * min(its.spacing)),
        ("direction", mine.direction, its.direction, 0, _SAME_DIRECTION),
    ):
        if not np.allclose(found, expected, rtol=relative, atol=absolute):
            return f"{what} is {found}, but {expected} in {image.name}: both must have the same"
    return None
