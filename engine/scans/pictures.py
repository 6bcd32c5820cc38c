"""Pictures and TIFF stacks, read and written as nnU-Net's `NaturalImage2DIO` and `Tiff3DIO` do.

The pixels come from the libraries that nnU-Net uses, imageio (Pillow) and tifffile. Both read some damaged files
without an error. So problems that they only log, and checksums that they skip, are checked here.
"""

import contextlib
import json
import logging
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from ..errors import BackendUnavailable, EngineError, IncompleteFile, VolumeError
from .geometry import IDENTITY_DIRECTION
from .image_file import SLICE_SPACINGS, ImageSource
from .itk import check_memory
from .voxel_data import naming

PICTURE_READERS = {
    "NaturalImage2DIO": (".png", ".bmp", ".tif", ".tiff"),
    "Tiff3DIO": (".tif", ".tiff"),
}
"""nnU-Net's readers of pictures and of TIFF stacks, and the endings of their files."""

PICTURE_ENDINGS = PICTURE_READERS["NaturalImage2DIO"]
FLAT_ENDINGS = (".png", ".bmp")
"""Endings of formats that hold a single slice."""
PICTURE_SPACING = (float(SLICE_SPACINGS), 1.0, 1.0)

TIFF_ENDINGS = PICTURE_READERS["Tiff3DIO"]
_MOST_GROWTH = {1: 1, 8: 1032, 32946: 1032}  # by TIFF's code: uncompressed, and the most of deflate
_CUT_OFF = re.compile(r"truncat|broken|corrupt|incomplete|failed to read|bad_data", re.IGNORECASE)


def open_picture(path: Path, reader: str) -> ImageSource:
    """Read the header of a picture or a TIFF stack.

    Args:
        path: Existing file.
        reader: One of `PICTURE_READERS`.

    Returns:
        Its grid, with a function that reads the pixels as (C, Z, Y, X): grey, RGB or RGBA as 1, 3 or 4 channels with
        one slice and a spacing of 1, or a stack as one channel with the spacing of the file beside it.

    Raises:
        VolumeError: If nnU-Net's reader does not take the file, it is damaged, or it needs more memory than there is.
        BackendUnavailable: If the libraries are not installed.

    Note:
        nnU-Net's imageio/natural_image_reader_writer.py and tif_reader_writer.py; skimage's `imread`, which swaps axes
        (`_with_channels_last`) and chooses tifffile by the file's ending.
    """
    with naming(path.name):
        if not path.name.lower().endswith(PICTURE_READERS[reader]):
            raise VolumeError(
                f"files for {reader} must end with one of {', '.join(PICTURE_READERS[reader])}: convert it"
            )
        is_2d = reader == "NaturalImage2DIO"
        shape, of_file = _header(path)
        spacing, of_spacing = (PICTURE_SPACING, ()) if is_2d else _side_spacing(path)
        channels, *size = _arranged(np.broadcast_to(np.uint8(0), shape), is_2d).shape
    return ImageSource(
        name=path.name,
        channels=channels,
        size=(size[2], size[1], size[0]),
        spacing=(spacing[2], spacing[1], spacing[0]),
        origin=(0.0, 0.0, 0.0),
        direction=IDENTITY_DIRECTION,
        voxels=lambda: _arranged(_pixels(path, shape), is_2d),
        is_2d=is_2d,
        warnings=(*of_file, *of_spacing),
    )


def read_picture(path: Path) -> np.ndarray:
    """Read the pixels of a picture or stack as they are stored.

    Args:
        path: Existing file with one of `PICTURE_ENDINGS`.

    Raises:
        VolumeError: As `open_picture` does; an `IncompleteFile` if the file was not written to its end.
        BackendUnavailable: If the libraries are not installed.
    """
    with naming(path.name):
        shape, _ = _header(path)
    return _pixels(path, shape)


def _header(path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Find the pixels' shape without decoding them, and tifffile's warnings about the file."""
    warnings: tuple[str, ...] = ()
    if path.is_file() and path.stat().st_size == 0:
        raise IncompleteFile("the file is empty: export or copy it again")
    if path.name.lower().endswith(TIFF_ENDINGS):
        shape, dtype, warnings = _tiff_header(path)
    else:
        imageio = _library("imageio.v3")
        with _readable():
            _check_checksums(path)
            properties = imageio.improps(path, plugin="pillow")
        shape, dtype = properties.shape, properties.dtype
    if dtype is None or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise VolumeError(f"pixels must be plain integers or floats of up to 64 bits, got {dtype}: convert it")
    check_memory(shape, dtype)
    return shape, warnings


def _tiff_header(path: Path) -> tuple[tuple[int, ...], np.dtype | None, tuple[str, ...]]:
    tifffile = _library("tifffile")
    with _readable(), _TIFFFILE_LOG.collected() as records, tifffile.TiffFile(path) as file:
        series = file.series[0]
        if file.is_ome and any(page is not None and page.parent is not file for page in series.pages):
            raise VolumeError("the slices must be in this file, but some are in others that it names: save one stack")
        warnings = _without_errors(records)
        needed_bytes = math.prod(series.shape) * int(series.keyframe.bitspersample) // 8
        stored_bytes = path.stat().st_size
        if needed_bytes > stored_bytes * _MOST_GROWTH.get(int(series.keyframe.compression), math.inf):
            raise IncompleteFile(
                f"the header claims {needed_bytes} bytes of pixels, too much for {stored_bytes} bytes of file: it is "
                "cut off or its header is damaged; export or copy it again"
            )
        return tuple(series.shape), series.dtype, warnings


def _pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Decode a file of known shape."""
    with naming(path.name), _readable():
        if path.name.lower().endswith(TIFF_ENDINGS):
            with _TIFFFILE_LOG.collected() as records:
                pixels = np.asarray(_library("tifffile").imread(path))
            _without_errors(records)
        else:
            pixels = np.asarray(_library("imageio.v3").imread(path, plugin="pillow"))
        if pixels.shape != shape:
            raise IncompleteFile(
                f"the header claims pixels of the shape {shape}, {pixels.shape} are there: copy it again"
            )
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8)
    elif pixels.dtype == np.float16:
        pixels = pixels.astype(np.float32)
    return np.ascontiguousarray(pixels)


def _arranged(pixels: np.ndarray, is_2d: bool) -> np.ndarray:
    """Put the axes in the order (C, Z, Y, X), as nnU-Net's readers do."""
    if not is_2d:
        if pixels.ndim != 3:
            raise VolumeError(
                f"a TIFF stack must have three axes, got the shape {pixels.shape}: save it as one stack of grey slices"
            )
        return pixels[None]
    pixels = _with_channels_last(pixels)
    if pixels.ndim == 2:
        return pixels[None, None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (3, 4):
        raise VolumeError(
            f"a picture must be grey, RGB or RGBA with one frame, got the shape {pixels.shape}: convert it, without "
            "alpha where it is grey"
        )
    return pixels.transpose(2, 0, 1)[:, None]


def _with_channels_last(pixels: np.ndarray) -> np.ndarray:
    """Move an axis of length 3 or 4 from the front to the end, if the end has none (skimage/io/_io.py, imread)."""
    if pixels.ndim > 2 and pixels.shape[-1] not in (3, 4) and pixels.shape[-3] in (3, 4):
        return np.moveaxis(pixels, -3, -1)
    return pixels


def side_file(path: Path) -> Path:
    """Name the file with a stack's spacing: case.json for case_0000.tif, or for labels case.tif."""
    return path.with_name(re.sub(r"_\d{4}$", "", path.stem) + ".json")


def _side_spacing(path: Path) -> tuple[tuple[float, float, float], tuple[str, ...]]:
    """Read the spacing (z, y, x) from the file beside a stack."""
    side = side_file(path)
    if not side.is_file():
        return (1.0, 1.0, 1.0), (f"there is no {side.name} with its spacing: 1 mm along each axis is assumed",)
    try:
        spacing = tuple(float(step) for step in json.loads(side.read_text(encoding="utf-8"))["spacing"])
        z_mm, y_mm, x_mm = spacing
    except (ValueError, TypeError, KeyError, RecursionError):
        raise VolumeError(
            f'{side.name} must hold three numbers as in {{"spacing": [2.5, 0.8, 0.8]}} (z, y, x)'
        ) from None
    return (z_mm, y_mm, x_mm), ()


def write_picture(path: Path, segmentation: np.ndarray) -> None:
    """Write labels as a picture, as nnU-Net's `NaturalImage2DIO` does.

    Args:
        path: File whose ending, one of `PICTURE_ENDINGS` in lower case, decides the format.
        segmentation: (Y, X) uint8 or uint16.

    Raises:
        OSError: If the disk is full, or the format has no 16 bits.
        BackendUnavailable: If the libraries are not installed.
    """
    if path.suffix in TIFF_ENDINGS:
        _library("tifffile").imwrite(path, segmentation, photometric="minisblack")
        return
    if path.suffix == ".bmp" and segmentation.max() < 256:  # these labels do not need 16 bits
        segmentation = segmentation.astype(np.uint8)
    # Made in memory: where a format refuses, the library keeps its file open, which Windows then does not remove.
    path.write_bytes(_library("imageio.v3").imwrite("<bytes>", segmentation, plugin="pillow", extension=path.suffix))


def write_stack(path: Path, segmentation: np.ndarray, spacing: tuple[float, ...], side: Path) -> None:
    """Write labels as a TIFF stack with its spacing in a file beside it, as nnU-Net's `Tiff3DIO` does.

    Args:
        path: The stack.
        segmentation: (Z, Y, X) uint8 or uint16.
        spacing: (z, y, x).
        side: The file for the spacing.

    Raises:
        OSError: If the disk is full.
        BackendUnavailable: If the libraries are not installed.
    """
    side.write_text(json.dumps({"spacing": list(spacing)}, indent=4), encoding="utf-8")
    # Without `photometric`, tifffile takes 3 or 4 slices as colours.
    _library("tifffile").imwrite(path, segmentation, photometric="minisblack", compression="zlib")


def _library(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable("pictures need imageio and tifffile: pip install 'nnturbo[pictures]'") from error


# ---- is the file whole? ----------------------------------------------------------------------------------------------


def _check_checksums(path: Path) -> None:
    """Check the checksums of a PNG file: Pillow accepts a file that is cut off behind its last pixel."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.verify()
    except UnidentifiedImageError:
        raise VolumeError("this is not a picture, or its header is damaged; export or copy it again") from None


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turn any exception of a decoder into an error of one line."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if type(error).__name__ == "DecompressionBombError":  # Pillow's class; Pillow is imported only where it is used
            raise VolumeError(f"the picture is larger than Pillow reads ({error}): split it") from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        kind = IncompleteFile if _CUT_OFF.search(reason) else VolumeError
        raise kind(f"the file cannot be read: {reason:.200}; export or copy it again") from None


def _without_errors(records: list[logging.LogRecord]) -> tuple[str, ...]:
    """Refuse files for which tifffile logs an error, and return its warnings."""
    messages = [re.sub(r"<tifffile\.\S+ [^>]*>\s*", "", record.getMessage()) for record in records]
    for record, text in zip(records, messages, strict=True):
        if record.levelno >= logging.ERROR or "Missing data are zeroed" in text:
            raise IncompleteFile(f"the TIFF file is damaged or cut off ({text:.200}): export or copy it again")
    return tuple(messages)


class _TifffileLog(logging.Filter):
    """Collects what tifffile logs in a thread, in place of the usual log."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = threading.local()

    @contextlib.contextmanager
    def collected(self) -> Iterator[list[logging.LogRecord]]:
        logging.getLogger("tifffile").addFilter(self)  # a second call changes nothing
        self._of_thread.records = records = []
        try:
            yield records
        finally:
            del self._of_thread.records

    def filter(self, record: logging.LogRecord) -> bool:
        records = getattr(self._of_thread, "records", None)
        if records is None:
            return True
        records.append(record)
        return False


_TIFFFILE_LOG = _TifffileLog()
