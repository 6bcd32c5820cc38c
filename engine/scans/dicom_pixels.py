"""The stored bits of a DICOM slice -> grey values, such as Hounsfield units."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import VolumeError
from .dicom_compression import RLE, check_syntax, decompress
from .dicom_header import Header, read_pixel_data

_RLE_RATIO = 64  # RLE stores at most 128 bytes in two, PS3.5, annex G.3
_EXPORT_AGAIN = "export the series again"


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFormat:
    """How to read the stored bits of a slice.

    Attributes:
        rows: Height in pixels.
        columns: Width in pixels.
        bits_allocated: Bits for each pixel: 8, 16 or 32.
        bits_stored: Lower bits that hold the value.
        is_signed: Whether values are in two's complement.
        slope: Slope of the rescaling to grey values; a whole number is an int.
        intercept: Intercept of the rescaling; a whole number is an int.
        is_rescaled: Whether the header gives slope and intercept.
        padding: First and last of the stored values that are no measurements; None if there are none.
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
        """Type of the grey values: the smallest integers that hold all possible values, or float64, as in pydicom."""
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
    """Read how the pixels are stored, and refuse pixels that would get wrong grey values.

    Raises:
        VolumeError: If the slice is in colour, has a look-up table, or contradicts itself or the standard.

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
    """Read which stored values mean no measurement; values that pixels cannot have are ignored."""
    try:
        first = header.integer("PixelPaddingValue", is_signed)
        last = header.integer("PixelPaddingRangeLimit", is_signed)
    except VolumeError:  # only a warning depends on it
        return None
    lowest = -(1 << bits_stored - 1) if is_signed else 0
    if first is None or not lowest <= first < lowest + (1 << bits_stored):
        return None
    last = first if last is None else last
    return min(first, last), max(first, last)


def check_pixel_data(header: Header, pixels: PixelFormat) -> None:
    """Check, without reading the pixel data, that they can be what the header says.

    Raises:
        VolumeError: If they are missing, too short, or compressed in a way that nnturbo does not read.
    """
    if header.is_compressed:
        check_syntax(header.syntax)
    least_bytes = pixels.rows * pixels.columns * pixels.bits_allocated // 8
    if header.is_compressed:
        least_bytes = max(least_bytes // _RLE_RATIO, 1) if header.syntax == RLE else 1
    if (
        header.pixels is None
        or header.pixels.length < least_bytes
        or header.pixels.is_in_fragments != header.is_compressed
    ):
        raise VolumeError("the DICOM slice is cut off or damaged: export or copy it again")


def read_stored(path: Path, header: Header, pixels: PixelFormat, scratch: Path) -> np.ndarray:
    """Read the bits of a slice as unsigned numbers, one for each pixel.

    Args:
        path: The slice.
        header: Its header.
        pixels: As `read_format` gives it.
        scratch: Path of a temporary file, which is written for compressed slices.

    Returns:
        Array (rows, columns) of a type with at least `bits_stored` bits.

    Raises:
        VolumeError: If the pixel data are damaged.
    """
    data = read_pixel_data(path, header)
    if header.is_compressed:
        return decompress(
            data,
            header.syntax,
            shape=(pixels.rows, pixels.columns),
            bits_allocated=pixels.bits_allocated,
            bits_stored=pixels.bits_stored,
            is_signed=pixels.is_signed,
            scratch=scratch,
        )
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
        out: Array (rows, columns) that gets the grey values, of a type that holds `pixels.dtype`.

    Returns:
        Number of pixels that are padding, and whether bits above `bits_stored` were set, which are no part of values.

    Note:
        grey value = slope * stored + intercept, for padding too. The standard gives padding no grey value; ITK, and
        nnU-Net with it, computes it like this.
    """
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    unused = 8 * stored.itemsize - pixels.bits_stored
    values = stored.view(f"i{stored.itemsize}") if pixels.is_signed else stored
    has_more = False
    if unused:
        values = (stored << unused).view(values.dtype) >> unused
        # Bits above a negative value may be 1, or 0 as compression leaves them.
        has_more = bool(((values.view(stored.dtype) != stored) & (stored >> pixels.bits_stored != 0)).any())
    out[...] = values
    if (pixels.slope, pixels.intercept) != (1, 0):
        out *= pixels.slope
        out += pixels.intercept
    if pixels.padding is None:
        return 0, has_more
    first, last = pixels.padding
    return int(np.count_nonzero((values >= first) & (values <= last))), has_more
