"""Scans in NIfTI for the library and its command."""

import nibabel
import numpy as np

from tests.cpp.factory import SHAPE
from tests.engine.factory import smooth_scan

SPACING = (3.0, 1.1, 1.2)


def write_nifti(path, array=None, *, version=1, order="<", spacing=SPACING, **header):
    """Write (Z, Y, X) with a tilted direction; `header` sets fields afterwards."""
    array = smooth_scan(SHAPE) if array is None else array
    angle = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = angle * spacing[::-1]
    affine[:3, 3] = (-10.5, 20.25, 30.125)
    kind = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}[version]
    image = kind(array.transpose(2, 1, 0), affine, kind.header_class(endianness=order), dtype=array.dtype)
    image.set_qform(affine, 1)
    for field, value in header.items():
        image.header[field] = value
    image.header.set_slope_inter(header.get("scl_slope", 1), header.get("scl_inter", 0))
    nibabel.save(image, path)
    return path
