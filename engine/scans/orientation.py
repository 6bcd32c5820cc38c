"""Which axis of a scan follows which axis of the patient, and in what direction."""

import numpy as np

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def canonical_axes(axes: np.ndarray) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Find how to turn an array so that its axes (z, y, x) run to Superior, Anterior and Right, as far as possible.

    Args:
        axes: 3x3; column k is the unit vector of image axis k of (x, y, z), in LPS.

    Returns:
        For each axis (z, y, x) of the turned array, the array axis that it comes from and whether it is flipped.

    Note:
        As `nibabel.orientations.io_orientation`: the nearest rotation R of the direction (polar decomposition), then
        image axes from the most to the least certain, each to the anatomical axis that it follows most.
    """
    left, _, right = np.linalg.svd(LPS_TO_RAS @ axes)
    rotation = left @ right
    source, flipped = [0, 0, 0], [False, False, False]
    for image_axis in np.argsort(-(rotation**2).max(axis=0), kind="stable"):
        anatomical = int(np.argmax(np.abs(rotation[:, image_axis])))
        source[2 - anatomical] = 2 - int(image_axis)
        flipped[2 - anatomical] = bool(rotation[anatomical, image_axis] < 0)
        rotation[anatomical] = 0
    return tuple(source), tuple(flipped)
