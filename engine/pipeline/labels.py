"""Turns finished planes of logits into labels, or probabilities, on the scan's own grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ...kernels import argmax_labels, plane_groups, region_labels, resample_axis, resample_labels, weighted_sum
from ..model.labels import LabelScheme
from .preprocessing import Case
from .probabilities import ProbabilityPlanes, planes_at_once
from .resampling import GridMap, resample
from .timing import Timings
from .transfers import Transfers


def segment(
    planes: Iterable[Tensor],
    case: Case,
    labels: LabelScheme,
    *,
    timings: Timings,
    transfers: Transfers,
    save_probabilities: bool = False,
) -> tuple[Tensor, np.ndarray | None]:
    """Turn logits into a segmentation, plane by plane (nnU-Net: convert_predicted_logits_to_segmentation...).

    Args:
        planes: Finished logits in ascending z, (K, planes, Y, X) on the network's grid.
        case: Case of the logits.
        labels: Meaning of the logits' channels.
        timings: Gets the time of "labels".
        transfers: Copies from the case's device.
        save_probabilities: Whether to keep probabilities too; they take 4 K bytes per voxel of the scan.

    Returns:
        Segmentation (Z, Y, X) on the scan's grid and axes, on the case's device, and probabilities (K, Z, Y, X) float32
        in main memory, or None.
    """
    scan_axes = tuple(case.transpose_forward.index(axis) for axis in range(3))
    scan_shape = tuple(case.full_shape[axis] for axis in scan_axes)
    crop = tuple(slice(start, stop) for start, stop in case.box)
    # Results are contiguous in the scan's axis order, and written through views with the network's axis order.
    dtype = torch.uint8 if labels.dtype == np.uint8 else torch.uint16
    segmentation = torch.zeros(scan_shape, dtype=dtype, device=case.device)
    target = segmentation.permute(case.transpose_forward)[crop]
    if not save_probabilities and can_fuse(case.logits_grid):
        write_labels(planes, case.logits_grid, labels.regions_class_order, target, timings)
        return segmentation, None

    probabilities = saved = None
    if save_probabilities:
        probabilities = np.zeros((labels.num_outputs, *scan_shape), dtype=np.float32)
        if labels.regions_class_order is None:
            probabilities[0] = 1  # voxels outside the crop are background
        axes = (0, *(axis + 1 for axis in case.transpose_forward))
        cropped = probabilities.transpose(axes)[(slice(None), *crop)]
        saved = ProbabilityPlanes(cropped, transfers, planes_at_once(case.device, cropped[:, :1].nbytes))
    for index, logits in enumerate(resampled_planes(planes, case.logits_grid, timings)):
        with timings("labels"):
            target[index] = (
                argmax_labels(logits)
                if labels.regions_class_order is None
                else region_labels(logits, list(labels.regions_class_order))
            )
            if saved is not None:
                saved.add(torch.sigmoid(logits) if labels.regions_class_order else torch.softmax(logits, 0))
    if saved is not None:
        with timings("labels"):
            saved.finish()
    return segmentation, probabilities


def can_fuse(grid: GridMap) -> bool:
    """Whether resampling and labelling can be one operation: one or two taps along each axis, and no clipping."""
    return grid.clip == "none" and all(operator.taps <= 2 for operator in grid.operators)


def write_labels(
    slabs: Iterable[Tensor], grid: GridMap, values: tuple[int, ...] | None, target: Tensor, timings: Timings
) -> None:
    """Resample logits and write labels, each plane as soon as its input planes have come.

    Args:
        slabs: (K, planes, Y, X) in ascending z.
        grid: Map from the logits' grid to the target's, for which `can_fuse` is true.
        values: Labels of regions in painting order, or None for classes.
        target: (Z, Y, X) of the new grid, uint8 or uint16, which gets the labels.
        timings: Gets the time of "labels".
    """
    z = grid.operators[0]
    last_read = z.first + z.taps  # ascending
    seen = made = 0
    held: Tensor | None = None  # last plane of the previous slab: a plane may need it and the first plane of this slab
    for slab in slabs:
        with timings("labels"):
            if held is not None and made < z.n_out and z.first[made] < seen:
                between = int(torch.searchsorted(last_read, seen + 1, right=True))
                both = torch.cat([held, slab[:, :1]], dim=1)
                resample_labels(
                    both, grid.operators, target[made:between], rows=(made, between), offset=seen - 1, values=values
                )
                made = between
            ready = int(torch.searchsorted(last_read, seen + slab.shape[1], right=True))
            if made < ready:
                resample_labels(
                    slab, grid.operators, target[made:ready], rows=(made, ready), offset=seen, values=values
                )
                made = ready
            seen += slab.shape[1]
            held = slab[:, -1:].clone()


def segment_probabilities(probabilities: np.ndarray, labels: LabelScheme) -> np.ndarray:
    """Turn probabilities into a segmentation (nnU-Net: convert_probabilities_to_segmentation).

    Args:
        probabilities: (K, Z, Y, X) float32 of classes, or of regions.
        labels: Meaning of the channels.

    Returns:
        (Z, Y, X): the most probable class, or regions painted where their probability is above one half.
    """
    segmentation = np.empty(probabilities.shape[1:], dtype=labels.dtype)
    for z, plane in enumerate(torch.from_numpy(probabilities).unbind(1)):
        segmentation[z] = (
            argmax_labels(plane)
            if labels.regions_class_order is None
            else region_labels(plane - 0.5, list(labels.regions_class_order))
        ).numpy()
    return segmentation


def resampled_planes(slabs: Iterable[Tensor], grid: GridMap, timings: Timings) -> Iterator[Tensor]:
    """Resample logits, and yield each plane of the new grid as soon as its input planes have come.

    Args:
        slabs: (K, planes, Y, X) in ascending z.
        grid: Map from the logits' grid. A map that clips needs all logits at once, so they are kept.
        timings: Gets the time of "labels".

    Yields:
        (K, Y, X) float32, in ascending z of the new grid.
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
                result = weighted_sum([held[first[made] + tap] for tap in range(z.taps)], z.weights[made].tolist())
            yield result
            made += 1


def _in_plane(slabs: Iterable[Tensor], grid: GridMap, timings: Timings) -> Iterator[Tensor]:
    """Resample along y and x, a few planes at a time, and yield planes (K, Y, X) that no buffer shares."""
    _, y, x = grid.operators
    for slab in slabs:
        for part in plane_groups(slab.shape, y.n_out * x.n_out):
            with timings("labels"):
                # Unchanged planes are copied too, because the next slab overwrites their buffer.
                planes = resample_axis(resample_axis(slab[:, part], y, -2), x, -1)
                planes = planes.movedim(1, 0).clone() if y.is_identity and x.is_identity else planes.movedim(1, 0)
            yield from planes
