"""Pairs of slices with grey values of all kinds, and how they are compressed."""

import numpy as np
import pydicom
import pytest
from nnturbo.engine.scans.volume import read_volume
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut

from tests.engine.scans.dicom_slices import write_slice

MR, PET = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"
EXPLICIT = "1.2.840.10008.1.2.1"
NATIVE = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": EXPLICIT,
    "big-endian": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
}

COMPRESSED = {
    "rle": "1.2.840.10008.1.2.5",
    "jpeg-lossless": "1.2.840.10008.1.2.4.70",
    "jpeg-ls": "1.2.840.10008.1.2.4.80",
    "jpeg-2000": "1.2.840.10008.1.2.4.90",
}

RESCALINGS = [
    (None, None),
    (1, 0),
    (1, -1024),
    (-1, 5),
    (2, 3),
    ("1.5", "-3.25"),
    ("0.0012345", "1e2"),
    (40000, -40000),
]

SHAPE = (9, 12)  # GDCM does not decompress RLE of fewer than some 70 pixels


def stored_values(bits_stored, is_signed, bits_allocated=16):
    """Make values over all that the bits can hold, both ends included."""
    lowest = -(1 << bits_stored - 1) if is_signed else 0
    values = np.random.default_rng(bits_stored).integers(lowest, lowest + (1 << bits_stored), SHAPE)
    values[0, :2] = lowest, lowest + (1 << bits_stored) - 1
    return values.astype(f"{'i' if is_signed else 'u'}{bits_allocated // 8}")


def write_pair(folder, pixels, bits_stored, **options):
    """Write two slices of the same pixels; gives what pydicom makes of one."""
    folder.mkdir(exist_ok=True)
    options = {"BitsStored": bits_stored, "HighBit": bits_stored - 1, **options}
    for number in range(2):
        write_slice(folder / f"{number}.dcm", pixels, (0, 0, number), **options)
    slice_ = pydicom.dcmread(folder / "0.dcm")
    return apply_modality_lut(slice_.pixel_array, slice_)


def assert_read_as(folder, expected):
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array[0], [expected, expected])
    return volume


def compress(path, syntax, pixels, precision):
    """Compress a slice that is not; as other programs do, without signs where the format has none."""
    slice_ = pydicom.dcmread(path)
    if syntax in (COMPRESSED["rle"], COMPRESSED["jpeg-ls"]):
        slice_.compress(syntax, generate_instance_uid=False)
    else:
        codecs = pytest.importorskip("imagecodecs")
        if syntax == COMPRESSED["jpeg-2000"]:
            frame = codecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True, level=0, bitspersample=precision)
        else:
            bits = pixels.view(f"u{pixels.itemsize}") & np.array((1 << precision) - 1, f"u{pixels.itemsize}")
            frame = codecs.ljpeg_encode(bits, bitspersample=precision)
        put_frame(slice_, bytes(frame), syntax)
    slice_.save_as(path)


def put_frame(slice_, frame, syntax):
    slice_.PixelData = encapsulate([frame])
    slice_["PixelData"].is_undefined_length = True
    slice_.file_meta.TransferSyntaxUID = syntax
