"""The stored bits of a DICOM slice -> grey values, such as Hounsfield units.

GDCM only decompresses. It reads values by rules of its own (it inverts MONOCHROME1, and rescales some kinds of objects
but not others), so it is given a file that holds what decompression needs and nothing else.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dicom_header import Header, read_pixel_data
from .errors import VolumeError
from .itk import read_voxels

_SECONDARY_CAPTURE = b"1.2.840.10008.5.1.4.1.1.7\0"
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers of JPEG and JPEG-LS
_EXPORT_AGAIN = "export the series again"
_READABLE = (
    r"1\.2\.840\.10008\.1\.2\.(5|4\.(50|51|57|70|80|81|90|91))"  # transfer syntaxes: RLE, JPEG, JPEG-LS, JPEG 2000
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFormat:
    """How the stored bits of a slice are to be read.

    Attributes:
        rows: Height in pixels.
        columns: Width in pixels.
        bits_allocated: For each pixel: 8, 16 or 32.
        bits_stored: The lower ones of these, which hold the value.
        is_signed: Whether values are in two's complement.
        slope: Of the rescaling to grey values; a whole number is an int.
        intercept: The same.
        is_rescaled: Whether the header gives the two.
        padding: The stored values from the first to the second are no measurements; None if there are none such.
    """

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    is_signed: bool
    slope: float
    intercept: float
    is_rescaled: bool
    padding: tuple[int, int] | None

    @property
    def stored_dtype(self) -> np.dtype:
        """Type of the stored values."""
        return np.dtype(f"{'i' if self.is_signed else 'u'}{self.bits_allocated // 8}")

    @property
    def dtype(self) -> np.dtype:
        """Type of the grey values: the smallest integers that hold all that may come, or float64 as in pydicom."""
        if (self.slope, self.intercept) == (1, 0):
            return self.stored_dtype
        if isinstance(self.slope, float) or isinstance(self.intercept, float):
            return np.dtype(np.float64)
        lowest = -(1 << self.bits_stored - 1) if self.is_signed else 0
        extremes = [stored * self.slope + self.intercept for stored in (lowest, lowest + (1 << self.bits_stored) - 1)]
        for dtype in (np.int8, np.int16, np.int32, np.int64):
            if all(np.iinfo(dtype).min <= number <= np.iinfo(dtype).max for number in (*extremes, self.slope)):
                return np.dtype(dtype)
        return np.dtype(np.float64)


def read_format(header: Header) -> PixelFormat:
    """Read how the pixels are stored, and refuse what would not become the right grey values.

    Raises:
        VolumeError: If it is colour, has a look-up table, or contradicts itself or the standard.

    Note:
        DICOM PS3.3, sections C.7.6.3 (image pixels), C.7.5.1 (padding) and C.11.1 (look-up tables and rescaling).
        MONOCHROME1 is about display: it does not change the grey values.
    """
    samples, interpretation = header.integer("SamplesPerPixel") or 1, header.text("PhotometricInterpretation")
    if samples != 1 or interpretation not in ("MONOCHROME1", "MONOCHROME2", ""):
        raise VolumeError(
            f"pixels must be one grey value each (MONOCHROME1 or MONOCHROME2), got {samples} x {interpretation}: "
            "move colour images out of the folder"
        )
    if header.values.get("ModalityLUTSequence"):
        raise VolumeError(
            "grey values must be stored values times a slope plus an intercept, but the slice has a look-up table "
            "(ModalityLUTSequence): convert the series to .nii.gz with a program that applies it"
        )
    rows, columns = _number(header, "Rows"), _number(header, "Columns")
    if rows == 0 or columns == 0:
        raise VolumeError(f"a slice must have rows and columns, got {rows} x {columns}: {_EXPORT_AGAIN}")
    allocated, stored = _number(header, "BitsAllocated"), _number(header, "BitsStored")
    is_signed, highest = _number(header, "PixelRepresentation"), header.integer("HighBit")
    if (
        allocated not in (8, 16, 32)
        or not 1 <= stored <= allocated
        or is_signed > 1
        or highest not in (None, stored - 1)
    ):
        raise VolumeError(
            "pixels must have 8, 16 or 32 bits, of which the lower ones hold the value, got "
            f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {highest}, PixelRepresentation {is_signed}: "
            f"{_EXPORT_AGAIN}, or convert it to .nii.gz"
        )
    rescaling = _read_rescaling(header)
    slope, intercept = rescaling or (1, 0)
    return PixelFormat(
        rows=rows,
        columns=columns,
        bits_allocated=allocated,
        bits_stored=stored,
        is_signed=bool(is_signed),
        slope=slope,
        intercept=intercept,
        is_rescaled=rescaling is not None,
        padding=_read_padding(header, stored, bool(is_signed)),
    )


def _number(header: Header, keyword: str) -> int:
    number = header.integer(keyword)
    if number is None:
        raise VolumeError(f"a slice must have {keyword}, but it is missing: {_EXPORT_AGAIN}")
    return number


def _read_rescaling(header: Header) -> tuple[float, float] | None:
    """Read slope and intercept, whole numbers as ints; None where the header has neither."""
    given = {keyword: header.decimals(keyword, 1) for keyword in ("RescaleSlope", "RescaleIntercept")}
    slope, intercept = (None if numbers is None else numbers[0] for numbers in given.values())
    if slope is None and intercept is None:
        return None
    if slope is None or intercept is None or slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
        raise VolumeError(
            f"RescaleSlope and RescaleIntercept must both be there and finite, the slope not 0, got {slope} and "
            f"{intercept}: {_EXPORT_AGAIN}"
        )
    return _whole(slope), _whole(intercept)


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


def _read_padding(header: Header, bits_stored: int, is_signed: bool) -> tuple[int, int] | None:
    """Read which stored values stand for no measurement; what cannot be among them is no such value."""
    try:
        first = header.integer("PixelPaddingValue", is_signed)
        last = header.integer("PixelPaddingRangeLimit", is_signed)
    except VolumeError:  # nothing depends on it but a warning
        return None
    lowest = -(1 << bits_stored - 1) if is_signed else 0
    if first is None or not lowest <= first < lowest + (1 << bits_stored):
        return None
    last = first if last is None else last
    return min(first, last), max(first, last)


def check_pixel_data(header: Header, pixels: PixelFormat) -> None:
    """Check, without reading them, that the pixel data can be what the header says.

    Raises:
        VolumeError: If they are missing, too short, or compressed in a way that is not read here.
    """
    if header.is_compressed and not re.fullmatch(_READABLE, header.syntax):
        raise VolumeError(
            f"pixel data must be uncompressed, JPEG, JPEG-LS, JPEG 2000 or RLE, got transfer syntax {header.syntax}: "
            "decompress the series"
        )
    least_bytes = 1 if header.is_compressed else pixels.rows * pixels.columns * pixels.bits_allocated // 8
    if (
        not header.is_whole
        or header.pixels is None
        or header.pixels.length < least_bytes
        or header.pixels.is_in_fragments != header.is_compressed
    ):
        raise VolumeError("the DICOM slice is cut off or damaged: export or copy it again")


def read_stored(path: Path, header: Header, pixels: PixelFormat, scratch: Path) -> np.ndarray:
    """Read the bits of a slice as numbers without sign, one for each pixel.

    Args:
        path: The slice.
        header: Its header.
        pixels: As `read_format` gives it.
        scratch: Name of a file that may be written, for compressed slices.

    Returns:
        Array (rows, columns) of a type with at least `bits_stored` bits.

    Raises:
        VolumeError: If the pixel data are damaged.
    """
    data = read_pixel_data(path, header)
    if header.is_compressed:
        return _decompress(data, pixels, header.syntax, scratch)
    size = pixels.rows * pixels.columns
    itemsize = pixels.bits_allocated // 8
    if len(data) < size * itemsize:
        raise VolumeError("the pixel data are cut off: export or copy the slice again")
    if header.pixel_order == ">" and itemsize == 1 and header.pixels is not None and header.pixels.kind == b"OW":
        # PS3.5, section 8.1.1: they lie in words of two bytes.
        data = np.frombuffer(data + bytes(len(data) % 2), ">u2").astype("<u2").tobytes()
    return np.frombuffer(data, f"{header.pixel_order}u{itemsize}", size).reshape(pixels.rows, pixels.columns)


def rescale(stored: np.ndarray, pixels: PixelFormat, out: np.ndarray) -> tuple[int, bool]:
    """Turn stored bits into grey values.

    Args:
        stored: As `read_stored` gives it.
        pixels: How to read it.
        out: (rows, columns) of a type that holds `pixels.dtype`; is written to.

    Returns:
        How many pixels are padding, and whether bits above `bits_stored` were set, which do not belong to the values.

    Note:
        grey value = slope * stored + intercept, for padding too: the standard gives it no grey value, and so it is what
        ITK and with it nnU-Net makes of it.
    """
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    unused = 8 * stored.itemsize - pixels.bits_stored
    values = stored.view(f"i{stored.itemsize}") if pixels.is_signed else stored
    has_more = False
    if unused:
        values = (stored << unused).view(values.dtype) >> unused
        # Above a negative value they may be 1, or 0 as compression leaves them.
        has_more = bool(((values.view(stored.dtype) != stored) & (stored >> pixels.bits_stored != 0)).any())
    out[...] = values
    if (pixels.slope, pixels.intercept) != (1, 0):
        out *= pixels.slope
        out += pixels.intercept
    if pixels.padding is None:
        return 0, has_more
    first, last = pixels.padding
    return int(np.count_nonzero((values >= first) & (values <= last))), has_more


def _decompress(data: bytes, pixels: PixelFormat, syntax: str, scratch: Path) -> np.ndarray:
    """Let GDCM decompress; told of numbers without sign, it leaves their bits as they are."""
    precision, is_signed = _compressed_as(data)
    if precision < pixels.bits_stored and is_signed != pixels.is_signed:
        raise VolumeError(
            f"it is not clear which of the compressed pixels are negative: the header says {pixels.bits_stored} bits "
            f"{'with' if pixels.is_signed else 'without'} a sign, the pixels have {precision} "
            f"{'with' if is_signed else 'without'}: decompress the series with the program that wrote it"
        )
    bits_stored = max(pixels.bits_stored, 8)  # it takes no fewer
    sizes = (1, pixels.rows, pixels.columns, pixels.bits_allocated, bits_stored, bits_stored - 1, 0)
    meta = b"".join(
        _element(2, number, b"UI", value)
        for number, value in ((2, _SECONDARY_CAPTURE), (3, b"1.2"), (0x10, syntax.encode("latin-1")))
    )
    scratch.write_bytes(
        bytes(128)
        + b"DICM"
        + _element(2, 0, b"UL", struct.pack("<I", len(meta)))
        + meta
        + _element(8, 0x16, b"UI", _SECONDARY_CAPTURE)
        + _element(8, 0x18, b"UI", b"1.2")
        + _element(0x28, 4, b"CS", b"MONOCHROME2")
        + b"".join(
            _element(0x28, number, b"US", struct.pack("<H", value))
            for number, value in zip((2, 0x10, 0x11, 0x100, 0x101, 0x102, 0x103), sizes, strict=True)
        )
        + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF)
        + data
    )
    stored = read_voxels(str(scratch), "GDCMImageIO")
    if stored.shape != (1, pixels.rows, pixels.columns) or stored.dtype.itemsize * 8 != pixels.bits_allocated:
        raise VolumeError(
            f"the compressed pixels must be those of the header, {pixels.rows} x {pixels.columns} of "
            f"{pixels.bits_allocated} bits, got {stored.shape[1:]} of {stored.dtype}: export the series again"
        )
    return stored[0].view(f"u{stored.dtype.itemsize}")


def _compressed_as(data: bytes) -> tuple[int, bool]:
    """Read the bits for each pixel, and whether one is for the sign, from compressed pixels; RLE has no such rules.

    Note:
        JPEG, ISO 10918-1 B.2.2, and JPEG-LS, ISO 14495-1 C.2.2: segments up to the frame header, and never a sign.
        JPEG 2000, ISO 15444-1 A.5.1: component size in the SIZ segment.
    """
    place = data.find(b"\xff\x4f\xff\x51")
    if 0 <= place < len(data) - 42:
        return (data[place + 42] & 0x7F) + 1, data[place + 42] >= 0x80
    place = data.find(b"\xff\xd8\xff") + 2
    while 2 <= place < len(data) - 5 and data[place] == 0xFF:
        if data[place + 1] in _FRAME_HEADERS:
            return data[place + 4], False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 64, False


def _element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    """Encode an element with a short value."""
    value += (b" " if kind == b"CS" else b"\0") * (len(value) % 2)
    return struct.pack("<HH2sH", group, number, kind, len(value)) + value
