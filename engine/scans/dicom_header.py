"""Reads the few elements of a DICOM file that say whether it is a slice, where it lies, and how values are stored.

It does so without a DICOM library: hundreds of slices take a moment, and impossible lengths take no memory.
"""

import mmap
import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import VolumeError

_KEYWORDS = {
    0x00020002: "MediaStorageSOPClassUID",
    0x00020010: "TransferSyntaxUID",
    0x00080008: "ImageType",
    0x00080016: "SOPClassUID",
    0x00080060: "Modality",
    0x0008103E: "SeriesDescription",
    0x0020000E: "SeriesInstanceUID",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00280002: "SamplesPerPixel",
    0x00280004: "PhotometricInterpretation",
    0x00280008: "NumberOfFrames",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280030: "PixelSpacing",
    0x00280100: "BitsAllocated",
    0x00280101: "BitsStored",
    0x00280102: "HighBit",
    0x00280103: "PixelRepresentation",
    0x00280120: "PixelPaddingValue",
    0x00280121: "PixelPaddingRangeLimit",
    0x00281052: "RescaleIntercept",
    0x00281053: "RescaleSlope",
    0x00283000: "ModalityLUTSequence",
}
_PIXEL_DATA = 0x7FE00010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG_KINDS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_UNKNOWN_KINDS = (b"??", b"\0\0")  # found in some old exports
_LETTERS = re.compile(rb"[A-Z]{2}")
_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

_BIG_ENDIAN, _DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
_GE_PRIVATE = "1.2.840.113619.5.2"  # little-endian with big-endian pixels
_NOT_COMPRESSED = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", _BIG_ENDIAN, _DEFLATED, _GE_PRIVATE)
_MOST_INFLATED_BYTES = 256 << 20
_LONGEST_VALUE = 1024  # bytes of a value that are kept

_ByteOrder = Literal["little", "big"]


class PixelData(NamedTuple):
    """Where the pixel data lie in the data set, their type (VR), and whether they are in fragments (if compressed)."""

    offset: int
    length: int
    kind: bytes
    is_in_fragments: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Elements of a DICOM file that are not inside sequences.

    Attributes:
        syntax: Transfer syntax; empty where the file does not name it.
        byte_order: Byte order of numbers in the data set.
        inflated_from: Byte at which a deflated data set begins, else None. Offsets then count in the inflated data set.
        pixels: Where the pixel data lie, if there are any.
        is_whole: Whether the file is as long as its elements claim.
    """

    values: dict[str, bytes] = field(repr=False)
    syntax: str
    byte_order: _ByteOrder
    inflated_from: int | None
    pixels: PixelData | None
    is_whole: bool

    @property
    def is_compressed(self) -> bool:
        """Whether the pixel data are compressed; all but a few transfer syntaxes are."""
        return self.syntax not in _NOT_COMPRESSED

    @property
    def pixel_order(self) -> Literal["<", ">"]:
        """Order of bytes in pixels that are not compressed."""
        return ">" if self.syntax in (_BIG_ENDIAN, _GE_PRIVATE) else "<"

    @property
    def sop_class(self) -> str:
        """SOP class UID, which says what kind of object it is; empty if the file has none."""
        return self.text("SOPClassUID") or self.text("MediaStorageSOPClassUID")

    def text(self, keyword: str) -> str:
        """Give an element as text on one line; empty where it is missing."""
        value = self.values.get(keyword, b"")
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            text = value.decode("latin-1")
        return "".join(each if each.isprintable() else " " for each in text.rstrip("\0")).strip()

    def decimals(self, keyword: str, count: int) -> tuple[float, ...] | None:
        """Give the numbers of an element that stores them as text; None where it is missing or empty.

        Raises:
            VolumeError: If it holds anything else.
        """
        text = self.text(keyword)
        if not text:
            return None
        words = [word.strip() for word in text.split("\\")]
        if len(words) != count or not all(map(_DECIMAL.fullmatch, words)):
            raise VolumeError(f"{keyword} must be {count} number(s), got {text[:60]!r}: export the series again")
        return tuple(map(float, words))

    def integer(self, keyword: str, is_signed: bool = False) -> int | None:
        """Give a binary number; None where it is missing or empty.

        Raises:
            VolumeError: If it does not have two or four bytes.
        """
        value = self.values.get(keyword, b"")
        if not value:
            return None
        if len(value) not in (2, 4):
            raise VolumeError(f"{keyword} must be one number, got {len(value)} bytes: export the series again")
        return int.from_bytes(value, self.byte_order, signed=is_signed)


def looks_like_dicom(path: Path) -> bool:
    """Whether a file has a preamble with its mark or, as in old exports, begins with a tag of group 0002 or 0008."""
    with path.open("rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or (start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0")


def read_header(path: Path) -> Header:
    """Read the elements of a DICOM file, up to its pixel data.

    Note:
        DICOM PS3.5, sections 7 and 10, and annex A.
    """
    values: dict[str, bytes] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = 132 if content[128:132] == b"DICM" else 0
        is_whole, is_deflated, byte_order, pixels = True, False, "little", None
        try:
            while content[place : place + 2] == b"\2\0":  # file meta information
                place = _keep(values, content, _element(content, place, True, "<"))
            syntax = _syntax(values)
            is_deflated = syntax == _DEFLATED
            byte_order = "big" if syntax == _BIG_ENDIAN else "little"
            dataset, start = (_inflate(content, place), 0) if is_deflated else (content, place)
            pixels = _walk(values, dataset, start, ">" if byte_order == "big" else "<")
        except (_Damaged, struct.error, zlib.error):
            is_whole = False
    return Header(
        values=values,
        syntax=_syntax(values),
        byte_order=byte_order,
        inflated_from=place if is_deflated else None,
        pixels=pixels,
        is_whole=is_whole,
    )


def read_pixel_data(path: Path, header: Header) -> bytes:
    """Read the pixel data as they are stored; compressed ones with all their fragments."""
    if header.pixels is None:
        return b""
    with path.open("rb") as file:
        if header.inflated_from is not None:
            return _inflate(file.read(), header.inflated_from)[header.pixels.offset :][: header.pixels.length]
        file.seek(header.pixels.offset)
        return file.read(header.pixels.length)


class _Damaged(Exception):
    """The elements cannot be read one after the other, or the file ends before they do."""


def _syntax(values: dict[str, bytes]) -> str:
    return values.get("TransferSyntaxUID", b"").rstrip(b"\0 ").decode("latin-1")


def _inflate(content: bytes | mmap.mmap, place: int) -> bytes:
    inflater = zlib.decompressobj(wbits=-15)
    dataset = inflater.decompress(content[place:], _MOST_INFLATED_BYTES)
    if not inflater.eof:
        raise _Damaged
    return dataset


def _walk(values: dict[str, bytes], dataset: bytes | mmap.mmap, place: int, order: str) -> PixelData | None:
    """Keep the elements that are not inside sequences, and find the pixel data.

    Sequences with a stated length are skipped, others are entered, so that no recursion is needed.
    """
    # The first element decides, because not all files are encoded as they claim.
    is_explicit = _LETTERS.fullmatch(dataset[place + 4 : place + 6]) is not None
    outside: list[bool] = []  # for each open sequence or item: the encoding of the elements around it
    while place + 8 <= len(dataset):
        element = _element(dataset, place, is_explicit, order)
        tag, kind, offset, length = element
        if tag in (_ITEM_END, _SEQUENCE_END):
            is_explicit = outside.pop() if outside else is_explicit
            place = offset
        elif tag == _PIXEL_DATA and not outside:
            end = _end_of_fragments(dataset, offset, order) if length == _UNDEFINED else offset + length
            if end > len(dataset):
                raise _Damaged
            return PixelData(offset, end - offset, kind, is_in_fragments=length == _UNDEFINED)
        elif length == _UNDEFINED:
            if not outside and tag in _KEYWORDS and _element(dataset, offset, False, order)[0] == _ITEM:
                values[_KEYWORDS[tag]] = kind or b"SQ"
            outside.append(is_explicit)
            is_explicit = is_explicit and kind != b"UN"  # PS3.5, section 6.2.2
            place = offset
        else:
            place = _keep({} if outside else values, dataset, element)
    if outside:
        raise _Damaged
    return None


def _element(content: bytes | mmap.mmap, place: int, is_explicit: bool, order: str) -> tuple[int, bytes, int, int]:
    """Give an element's tag, its type (VR) where it is written, and where its value lies: offset and length."""
    group, number = struct.unpack_from(f"{order}HH", content, place)
    tag = group << 16 | number
    if not is_explicit or group == 0xFFFE:
        return tag, b"", place + 8, struct.unpack_from(f"{order}I", content, place + 4)[0]
    kind = content[place + 4 : place + 6]
    if kind in _LONG_KINDS:
        return tag, kind, place + 12, struct.unpack_from(f"{order}I", content, place + 8)[0]
    if _LETTERS.fullmatch(kind) is None and kind not in _UNKNOWN_KINDS:
        raise _Damaged
    return tag, kind, place + 8, struct.unpack_from(f"{order}H", content, place + 6)[0]


def _keep(values: dict[str, bytes], content: bytes | mmap.mmap, element: tuple[int, bytes, int, int]) -> int:
    """Keep an element's value if it is in `_KEYWORDS`; return the offset behind it."""
    tag, _, offset, length = element
    if offset + length > len(content):
        raise _Damaged
    if tag in _KEYWORDS:
        values[_KEYWORDS[tag]] = content[offset : offset + min(length, _LONGEST_VALUE)]
    return offset + length


def _end_of_fragments(dataset: bytes | mmap.mmap, place: int, order: str) -> int:
    """Find the end of the fragments of compressed pixel data."""
    while True:
        tag, _, offset, length = _element(dataset, place, False, order)
        place = offset + length
        if tag == _SEQUENCE_END:
            return place
        if tag != _ITEM:
            raise _Damaged
