"""Bundles of the native backend for tests: made, changed with the right hashes, and scans in NIfTI."""

import hashlib
import json

import nibabel
import numpy as np

from tests.engine.factory import smooth_scan

SHAPE = (9, 24, 26)
SPACING = (3.0, 1.1, 1.2)


def with_hashes(folder, **changes):
    """Write the hashes of a bundle's files as they are now into its manifest, and change entries of it."""
    manifest = json.loads((folder / "engine.json").read_text())
    manifest["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != "engine.json"
    }
    (folder / "engine.json").write_text(json.dumps(manifest | changes))
    return folder


def write_nifti(path, array=None, *, version=1, order="<", **header):
    """Write (Z, Y, X) with a tilted direction; `header` sets fields afterwards."""
    array = smooth_scan(SHAPE) if array is None else array
    angle = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = angle * SPACING[::-1]
    affine[:3, 3] = (-10.5, 20.25, 30.125)
    kind = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}[version]
    image = kind(array.transpose(2, 1, 0), affine, kind.header_class(endianness=order), dtype=array.dtype)
    image.set_qform(affine, 1)
    for field, value in header.items():
        image.header[field] = value
    image.header.set_slope_inter(header.get("scl_slope", 1), header.get("scl_inter", 0))
    nibabel.save(image, path)
    return path
