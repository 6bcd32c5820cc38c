"""Small image files of every format."""

import itertools
import struct

import nibabel
import numpy as np
import SimpleITK

SHAPE = (20, 30, 40)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def nifti(**changes):
    """Make the bytes of a .nii file, with bytes of its header replaced: offset=(format, values...)."""
    image = nibabel.Nifti1Image(VOXELS.transpose(2, 1, 0), np.diag([-0.5, -0.75, 2.5, 1]))
    content = bytearray(image.to_bytes())
    for offset, (form, *values) in changes.items():
        struct.pack_into(form, content, int(offset.removeprefix("at_")), *values)
    return bytes(content)


IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
SIGNED_PERMUTATIONS = [
    tuple((np.eye(3)[list(order)] * np.array(signs)).ravel())
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def oblique_direction(seed):
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return tuple(rotation.ravel())


def ramp(shape=(4, 5, 6), dtype=np.int16):
    """Make an array whose voxels all differ."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def write_image(
    path,
    array=VOXELS,
    *,
    spacing=(0.5, 0.75, 2.5),
    origin=(-10.5, 20.25, 30.125),
    direction=IDENTITY,
    compressed=True,
):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path), useCompression=compressed)
    return path
