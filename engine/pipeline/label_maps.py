"""Resamples the labels of a cascade's previous stage, by nnU-Net's rules for segmentations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...kernels import AxisOperator
from ..model.resampling_function import Resampling, coarse_axis
from .resampling import GridMap, grid_map, resample, spline_operator

NEAR_TIE = 1e-5
"""Scores whose float32 values differ by less than this may be equal in float64."""


def resample_label_map(
    labels: np.ndarray,
    resampling: Resampling,
    new_shape: Sequence[int],
    old_spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> Tensor:
    """Resample labels: each label's mask is resampled to scores, and a rule chooses a label for each voxel.

    Args:
        labels: (Z, Y, X) integers.
        resampling: The plan's function for segmentations.
        new_shape: Size of the new grid (z, y, x).
        old_spacing: Spacing of the labels' grid in mm.
        new_spacing: Spacing of the new grid in mm.

    Returns:
        (Z, Y, X) int32.

    Note:
        nnU-Net: resample_data_or_seg and resample_torch_simple with is_seg. If the coarse axis is resampled separately,
        it starts from the labels of the other axes, and the spline function takes the majority along it.
    """
    grid = grid_map(resampling, labels.shape, new_shape, old_spacing, new_spacing)
    values = torch.from_numpy(labels.astype(np.float32))
    coarse = coarse_axis(resampling, list(old_spacing), list(new_spacing))
    if coarse < 0:
        return _resampled(values, grid, resampling, (0, 1, 2)).to(torch.int32)
    others = tuple(axis for axis in range(3) if axis != coarse)
    in_plane, along = list(grid.operators), list(GridMap.identity(grid.shape).operators)
    in_plane[coarse] = AxisOperator.identity(labels.shape[coarse])
    along[coarse] = grid.operators[coarse]
    values = _resampled(values, _with_operators(grid, in_plane), resampling, others)
    rule = resampling._replace(majority=resampling.majority or resampling.function == "spline")
    return _resampled(values, _with_operators(replace(grid, clip="none"), along), rule, (coarse,)).to(torch.int32)


def _with_operators(grid: GridMap, operators: Sequence[AxisOperator]) -> GridMap:
    z, y, x = operators
    return replace(grid, operators=(z, y, x))


def _resampled(labels: Tensor, grid: GridMap, resampling: Resampling, axes: tuple[int, ...]) -> Tensor:
    """Resample labels (Z, Y, X) float32 by a grid map that changes no other axes than `axes`."""
    values = labels.unique().tolist()
    if len(values) == 1 or all(operator.is_selection for operator in grid.operators):
        return resample(labels[None], grid)[0]
    if resampling.majority:
        winner = torch.zeros(grid.shape)
        for value in values:
            winner[_score(labels, value, grid) > 0.5] = value
        return winner
    if resampling.function != "spline":
        return _greatest_in_half(labels, values, grid)
    to_nearest = [spline_operator(each.n_in, each.n_out, 0) for each in grid.operators]
    nearest = resample(labels[None], _with_operators(replace(grid, clip="none"), to_nearest))[0]
    winner, best, second = torch.full(grid.shape, values[0]), torch.zeros(grid.shape), torch.zeros(grid.shape)
    of_nearest = torch.zeros(grid.shape)
    for value in values:
        score = _score(labels, value, grid)
        winner[score > best] = value
        second = torch.maximum(second, torch.minimum(best, score))
        best = torch.maximum(best, score)
        of_nearest = torch.where(nearest == value, score, of_nearest)
    if resampling.order > 1:
        return torch.where(of_nearest == best, nearest, winner)
    tied = best - second < NEAR_TIE
    winner[tied] = _settled(labels, values, grid.shape, axes, tied.nonzero(), nearest[tied])
    return winner


def _greatest_in_half(labels: Tensor, values: Sequence[float], grid: GridMap) -> Tensor:
    """Give each voxel the label with the greatest score; if scores are equal in fp16, the least of these labels."""
    winner, best = torch.full(grid.shape, values[0]), torch.zeros(grid.shape, dtype=torch.float16)
    for value in values:
        score = (1000 * _score(labels, value, grid)).half()
        winner[score > best] = value
        best = torch.maximum(best, score)
    return winner


def _settled(
    labels: Tensor,
    values: Sequence[float],
    shape: Sequence[int],
    axes: tuple[int, ...],
    voxels: Tensor,
    nearest: Tensor,
) -> Tensor:
    """Decide voxels by linear scores in float64, rounded as in scipy; equal scores have a rule of their own.

    Args:
        labels: (Z, Y, X) on the old grid.
        values: All labels, ascending.
        shape: Size of the new grid.
        axes: Axes that change.
        voxels: (n, 3) indices of voxels of the new grid.
        nearest: (n,) labels of the nearest voxels of the old grid.

    Returns:
        (n,): the label with the greatest score. If several have it: the nearest voxel's label if it is among them, else
        the least.

    Note:
        scipy's NI_ZoomShift multiplies the weights of a neighbour along z, y, x, and adds neighbours in that order.
        batchgenerators' resize_segmentation compares the sums exactly (since 0.25.4).
    """
    ways = []
    for axis in range(3):
        n_in = labels.shape[axis]
        x = (voxels[:, axis].double() + 0.5) * (n_in / shape[axis]) - 0.5 if axis in axes else voxels[:, axis].double()
        x = x.clamp(0, n_in - 1)
        left = x.floor()
        right = (left + 1).clamp(max=n_in - 1).long()
        ways.append([(left.long(), 1 - (x - left)), (right, x - left)] if axis in axes else [(left.long(), 1.0)])
    scores = torch.zeros(len(values), len(voxels), dtype=torch.float64)
    for (z, weight_z), (y, weight_y), (x, weight_x) in itertools.product(*ways):
        weight, neighbour = weight_z * weight_y * weight_x, labels[z, y, x]
        for score, value in zip(scores, values, strict=True):
            score += torch.where(neighbour == value, weight, 0.0)
    best = scores.amax(0)
    winner = torch.tensor(values)[(scores == best).to(torch.uint8).argmax(0)]
    of_nearest = scores.gather(0, torch.searchsorted(torch.tensor(values), nearest)[None])[0]
    return torch.where(of_nearest == best, nearest, winner)


def _score(labels: Tensor, value: float, grid: GridMap) -> Tensor:
    return resample((labels == value)[None].float(), grid)[0]
