"""The tiles that cover a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.mirroring import View
from ..model.plans import Plan

VIEWS_ON_GPU = 8
"""That go through the network at once: all mirror views of a tile, or, where it has fewer, those of several tiles."""

VOXELS_ON_GPU = 2**21
"""Of all these views together: features take memory in proportion, and more voxels make a large GPU little faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """The tiles that cover a grid.

    Args:
        patch_size: (z, y, x) voxels of a tile.
        tile_step_size: Distance of neighbouring tiles as a fraction of the patch, in (0, 1].
        views: Mirror views of each tile, the unflipped one first.
        views_per_call: Views that go through the network at once; where a tile has fewer, those of several tiles.
        tiles_dtype: Number type of the tiles that the network gets.
        slicewise: Whether every plane is a row of tiles and the network takes (N, C, y, x), as in 2d configurations.
        use_gaussian: Whether voxels in the middle of a tile count more, as in nnU-Net; else all count alike.
    """

    patch_size: tuple[int, int, int]
    tile_step_size: float
    views: tuple[View, ...]
    views_per_call: int
    tiles_dtype: torch.dtype = torch.float32
    slicewise: bool = False
    use_gaussian: bool = True

    def __post_init__(self) -> None:
        """Check the step."""
        if not 0 < self.tile_step_size <= 1:
            raise ValueError(f"tile_step_size must be in (0, 1], got {self.tile_step_size}")

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        *,
        tile_step_size: float = 0.5,
        views: tuple[View, ...] = ((),),
        views_per_call: int = 1,
        tiles_dtype: torch.dtype = torch.float32,
        use_gaussian: bool = True,
    ) -> SlidingWindow:
        """Cover a grid with tiles of the plan's patch size, by default without mirroring."""
        return cls(
            patch_size=plan.patch_size_3d,
            tile_step_size=tile_step_size,
            views=views,
            views_per_call=views_per_call,
            tiles_dtype=tiles_dtype,
            slicewise=len(plan.patch_size) == 2,
            use_gaussian=use_gaussian,
        )

    @property
    def tiles_per_call(self) -> int:
        """Tiles of which all views go through the network at once."""
        return max(1, self.views_per_call // len(self.views))

    def positions(self, shape: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """First voxel of every tile along z, y, x of a grid at least as large as the patch."""
        z, y, x = tile_starts(list(shape), list(self.patch_size), self.tile_step_size, self.slicewise)
        return z, y, x


def usual_views_per_call(plan: Plan, device: torch.device) -> int:
    """Choose how many mirror views go through a network at once, where nobody does: a power of two on a GPU."""
    views = 1 if device.type == "cpu" else VIEWS_ON_GPU
    while views > 1 and views * math.prod(plan.patch_size) > VOXELS_ON_GPU:
        views //= 2
    return views


def tile_positions(length: int, patch: int, step: float) -> list[int]:
    """First voxels of the tiles along one axis, spread evenly (nnU-Net: compute_steps_for_sliding_window)."""
    count = math.ceil((length - patch) / (patch * step)) + 1
    if count == 1:
        return [0]
    actual_step = (length - patch) / (count - 1)
    return [int(round(actual_step * i)) for i in range(count)]  # noqa: RUF046  # TorchScript's round gives a float


def tile_starts(shape: list[int], patch_size: list[int], step: float, slicewise: bool) -> list[list[int]]:
    """First voxels of the tiles along each axis; `slicewise`, every plane is a row of tiles."""
    starts = [tile_positions(shape[axis], patch_size[axis], step) for axis in range(3)]
    if slicewise:
        starts[0] = [plane for plane in range(shape[0])]  # noqa: C416  # TorchScript's list() takes no range
    return starts
