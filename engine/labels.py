"""Finished planes of logits become labels, or probabilities, on the scan's own grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..kernels import argmax_labels, region_labels, resample_axis
from .plans import LabelScheme
from .preprocessing import Case
from .resampling import GridMap, plane_groups, resample
from .timing import Timings


def segment(
    planes: Iterable[Tensor], case: Case, labels: LabelScheme, *, timings: Timings, save_probabilities: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Turn logits into a segmentation, plane by plane (nnU-Net: convert_predicted_logits_to_segmentation...).

    Args:
        planes: Finished logits in ascending z, (K, planes, Y, X) on the network's grid.
        case: Where they come from.
        labels: What they mean.
        timings: Receives "labels".
        save_probabilities: Keep probabilities too; they take 4 K bytes per voxel of the scan.

    Returns:
        Segmentation (Z, Y, X) on the scan's grid and axes, and probabilities (K, Z, Y, X) float32 or None.
    """
    scan_axes = tuple(case.transpose_forward.index(axis) for axis in range(3))
    scan_shape = tuple(case.full_shape[axis] for axis in scan_axes)
    crop = tuple(slice(start, stop) for start, stop in case.box)
    # Written through views with the network's axis order, so that the results are contiguous in the scan's.
    segmentation = np.zeros(scan_shape, dtype=labels.dtype)
    target = segmentation.transpose(case.transpose_forward)[crop]
    probabilities = cropped_probabilities = None
    if save_probabilities:
        probabilities = np.zeros((labels.num_outputs, *scan_shape), dtype=np.float32)
        if labels.regions_class_order is None:
            probabilities[0] = 1  # what was cropped away is background
        axes = (0, *(axis + 1 for axis in case.transpose_forward))
        cropped_probabilities = probabilities.transpose(axes)[(slice(None), *crop)]

    for index, logits in enumerate(resampled_planes(planes, case.logits_grid, timings)):
        with timings("labels"):
            target[index] = (
                (
                    argmax_labels(logits)
                    if labels.regions_class_order is None
                    else region_labels(logits, labels.regions_class_order)
                )
                .cpu()
                .numpy()
            )
            if cropped_probabilities is not None:
                nonlinearity = torch.sigmoid(logits) if labels.regions_class_order else torch.softmax(logits, 0)
                cropped_probabilities[:, index] = nonlinearity.cpu().numpy()
    return segmentation, probabilities


def segment_probabilities(probabilities: np.ndarray, labels: LabelScheme) -> np.ndarray:
    """Turn probabilities into a segmentation (nnU-Net: convert_probabilities_to_segmentation).

    Args:
        probabilities: (K, Z, Y, X) float32 of classes, or of regions.
        labels: What they mean.

    Returns:
        (Z, Y, X): the most probable class, or each region painted where it is more probable than not.
    """
    segmentation = np.empty(probabilities.shape[1:], dtype=labels.dtype)
    for z, plane in enumerate(torch.from_numpy(probabilities).unbind(1)):
        segmentation[z] = (
            argmax_labels(plane)
            if labels.regions_class_order is None
            else region_labels(plane - 0.5, labels.regions_class_order)
        ).numpy()
    return segmentation


def resampled_planes(slabs: Iterable[Tensor], grid: GridMap, timings: Timings) -> Iterator[Tensor]:
    """Resample logits, yielding each plane of the new grid as soon as the planes it needs are there.

    Args:
        slabs: (K, planes, Y, X) in ascending z.
        grid: The map; one that clips needs all logits at once, and then they are kept.
        timings: Receives "labels".

    Yields:
        (K, Y, X) float32, z of the new grid ascending.
    """
    if grid.clip != "none":
        whole = torch.cat([slab.clone() for slab in slabs], dim=1)
        with timings("labels"):
            resampled = resample(whole, grid)
        yield from resampled.unbind(1)
        return
    z = grid.operators[0]
    first = z.first.tolist()
    held: dict[int, Tensor] = {}
    made = 0
    for index, plane in enumerate(_in_plane(slabs, grid, timings)):
        held[index] = plane
        while made < z.n_out and first[made] + z.taps <= index + 1:
            with timings("labels"):
                for old in [old for old in held if old < first[made]]:
                    del held[old]
                result = _combine([held[first[made] + tap] for tap in range(z.taps)], z.weights[made].tolist())
            yield result
            made += 1


def _combine(planes: list[Tensor], weights: list[float]) -> Tensor:
    """Weighted sum of neighbouring planes."""
    if weights[0] == 1 or len(planes) == 1:
        return planes[0]
    result = planes[0] * weights[0]
    for plane, weight in zip(planes[1:], weights[1:], strict=True):
        result.add_(plane, alpha=weight)
    return result


def _in_plane(slabs: Iterable[Tensor], grid: GridMap, timings: Timings) -> Iterator[Tensor]:
    """Resample along y and x, a few planes at a time, and yield the planes (K, Y, X), each its own memory."""
    _, y, x = grid.operators
    for slab in slabs:
        for part in plane_groups(slab.shape, y.n_out * x.n_out):
            with timings("labels"):
                # Planes that stay as they are still have to leave the buffer that the next slab overwrites.
                planes = resample_axis(resample_axis(slab[:, part], y, -2), x, -1)
                planes = planes.movedim(1, 0).clone() if y.is_identity and x.is_identity else planes.movedim(1, 0)
            yield from planes
