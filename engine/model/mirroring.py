"""Mirror views of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

View = tuple[int, ...]
"""The spatial axes (0, 1, 2 for z, y, x) along which a tile is flipped."""


def mirror_views(mirror_axes: Sequence[int], dimensions: int = 3) -> tuple[View, ...]:
    """Every combination of the allowed axes, the empty one first; 2 to the power of their number.

    Args:
        mirror_axes: Axes of the patch along which mirroring is allowed, counted from 0.
        dimensions: Dimensions of the patch; the axes of a 2D patch are the last two of a 3D tile.

    Returns:
        The views, in the axes (z, y, x) of a 3D tile.
    """
    axes = sorted(axis + 3 - dimensions for axis in mirror_axes if axis < dimensions)
    return tuple(view for count in range(len(axes) + 1) for view in itertools.combinations(axes, count))
