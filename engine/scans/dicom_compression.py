"""Compressed pixels of a DICOM slice -> stored bits, with GDCM.

GDCM has its own rules for values: it inverts MONOCHROME1, and rescales some kinds of objects but not others. So it gets
a file that holds only what decompression needs.
"""

import re
import struct
from pathlib import Path

import numpy as np

from ..errors import VolumeError
from .itk import read_voxels

_SECONDARY_CAPTURE = b"1.2.840.10008.5.1.4.1.1.7\0"
RLE = "1.2.840.10008.1.2.5"
_JPEGS = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.(50|51|57|70|80|81|90|91)")  # JPEG, JPEG-LS, JPEG 2000
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers of JPEG and JPEG-LS
_SIZES = b"\xff\x4f\xff\x51"  # markers of JPEG 2000: start, and the segment with the sizes


def check_syntax(syntax: str) -> None:
    """Refuse transfer syntaxes that nnturbo does not read.

    Raises:
        VolumeError: If the syntax is not one of them.
    """
    if syntax != RLE and not _JPEGS.fullmatch(syntax):
        raise VolumeError(
            f"pixel data must be uncompressed, JPEG, JPEG-LS, JPEG 2000 or RLE, got transfer syntax {syntax}: "
            "decompress the series"
        )


def decompress(
    data: bytes,
    syntax: str,
    *,
    shape: tuple[int, int],
    bits_allocated: int,
    bits_stored: int,
    is_signed: bool,
    scratch: Path,
) -> np.ndarray:
    """Decompress the pixels of one slice.

    Args:
        data: Fragments of the slice, with the items around them.
        syntax: Transfer syntax of the slice.
        shape: (rows, columns).
        bits_allocated: From the header.
        bits_stored: From the header.
        is_signed: From the header.
        scratch: Path of a temporary file.

    Returns:
        Array (rows, columns) of unsigned numbers, whose lower `bits_stored` bits are the stored ones.

    Raises:
        VolumeError: If the pixels are damaged, or do not match the header.
    """
    precision, has_sign = _compressed_as(data) if syntax != RLE else (bits_stored, is_signed)
    if (has_sign and not is_signed) or (precision < bits_stored and has_sign != is_signed):
        raise VolumeError(
            f"it is not clear which of the compressed pixels are negative: the header says {bits_stored} bits "
            f"{'with' if is_signed else 'without'} a sign, the pixels have {precision} "
            f"{'with' if has_sign else 'without'}: decompress the series with the program that wrote it"
        )
    bits = min(max(bits_stored, precision, 8), bits_allocated)  # GDCM needs 8 or more, and cuts off bits above
    _write_for_gdcm(scratch, data, syntax, (*shape, bits_allocated, bits))
    stored = read_voxels(str(scratch), "GDCMImageIO")
    if stored.shape != (1, *shape) or stored.dtype.itemsize * 8 != bits_allocated:
        raise VolumeError(
            f"the compressed pixels must be those of the header, {shape[0]} x {shape[1]} of {bits_allocated} bits, got "
            f"{stored.shape[1:]} of {stored.dtype}: export the series again"
        )
    stored = stored[0].view(f"u{stored.dtype.itemsize}")
    if precision > bits_stored and not _fits(stored, bits, bits_stored, is_signed, has_sign):
        raise VolumeError(
            f"the compressed pixels must fit in the {bits_stored} bits that the header says, some need more (they have "
            f"{precision}): decompress the series with the program that wrote it"
        )
    return stored


def _fits(stored: np.ndarray, bits: int, bits_stored: int, is_signed: bool, has_sign: bool) -> bool:
    """Whether the lower `bits_stored` of `bits` hold every value: the bits above them are 0, or repeat the sign."""
    between = (stored >> bits_stored) & ((1 << bits - bits_stored) - 1)
    if not is_signed:
        return not between.any()
    is_negative = (stored >> bits_stored - 1) & 1
    repeats_sign = between == is_negative * ((1 << bits - bits_stored) - 1)
    return bool((repeats_sign if has_sign else repeats_sign | (between == 0)).all())


def _write_for_gdcm(path: Path, data: bytes, syntax: str, sizes: tuple[int, ...]) -> None:
    """Write an image of unsigned numbers without rescaling: GDCM does not change their bits."""
    rows, columns, bits_allocated, bits_stored = sizes
    meta = (
        _element(2, 2, b"UI", _SECONDARY_CAPTURE)
        + _element(2, 3, b"UI", b"1.2")
        + _element(2, 0x10, b"UI", syntax.encode("ascii"))
    )
    numbers = {
        2: 1,
        0x10: rows,
        0x11: columns,
        0x100: bits_allocated,
        0x101: bits_stored,
        0x102: bits_stored - 1,
        0x103: 0,
    }
    path.write_bytes(
        bytes(128)
        + b"DICM"
        + _element(2, 0, b"UL", struct.pack("<I", len(meta)))
        + meta
        + _element(8, 0x16, b"UI", _SECONDARY_CAPTURE)
        + _element(8, 0x18, b"UI", b"1.2")
        + _element(0x28, 4, b"CS", b"MONOCHROME2 ")
        + b"".join(_element(0x28, number, b"US", struct.pack("<H", value)) for number, value in numbers.items())
        + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF)
        + data
    )


def _element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    """Encode an element of a DICOM file with a short value."""
    value += bytes(len(value) % 2)
    return struct.pack("<HH2sH", group, number, kind, len(value)) + value


def _compressed_as(data: bytes) -> tuple[int, bool]:
    """Read the bits for each pixel, and whether one of them is a sign, from compressed pixels.

    Note:
        JPEG, ISO 10918-1 B.2.2, and JPEG-LS, ISO 14495-1 C.2.2: segments up to the frame header, and never a sign.
        JPEG 2000, ISO 15444-1 A.5.1: component size in the SIZ segment.
    """
    place = data.find(_SIZES)
    if 0 <= place < len(data) - 42:
        return (data[place + 42] & 0x7F) + 1, data[place + 42] >= 0x80
    place = data.find(b"\xff\xd8\xff") + 2
    while 2 <= place < len(data) - 5 and data[place] == 0xFF:
        if data[place + 1] in _FRAME_HEADERS:
            return data[place + 4], False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 64, False  # GDCM reports what is wrong
