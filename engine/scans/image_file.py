"""One image file -> its grid and, later, its voxels, with a proof that they are complete.

ITK fills the missing part of a cut-off .nii.gz with zeros, ignores checksums, and turns NaN in NIfTI into 0. So the
file's size is compared with its header before memory is taken. The checksum at its end is compared with the voxels that
ITK gave.
"""

import contextlib
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import IncompleteFile, VolumeError
from .image_header import image_ending, locate_voxels
from .itk import check_memory, check_pixels, read_information, read_voxels
from .nifti import header_warnings
from .orientation import LPS_TO_RAS
from .voxel_data import GZIP_MAGIC, VoxelData, naming

_DEFLATE_RATIO = 1032  # deflate expands a byte to at most this many, https://zlib.net/zlib_tech.html
_PIECE_BYTES = 1 << 20

SLICE_SPACINGS = 999
"""Slice distance that nnU-Net gives a 2D image, as a multiple of its largest spacing."""

NOT_FINITE = (
    "voxels must be finite, got NaN or infinity: set them, with numpy by array[~numpy.isfinite(array)] = 0 "
    "(-1024 in CT), and save the scan again"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """A scan whose header has been read and whose voxels have not.

    Attributes:
        name: File name or folder name, for messages.
        size: Voxels along (x, y, z); one along z for a 2D image.
        spacing: Millimetres along (x, y, z); for a 2D image nnU-Net's own value along z.
        origin: Position of the first voxel in mm, LPS (x, y, z).
        direction: Nine cosines, row-major; its columns belong to the axes x, y, z.
        voxels: Function that reads the voxels as an array (Z, Y, X), or (C, Z, Y, X). It raises `VolumeError` if they
            are damaged.
        channels: Number of channels in the file.
        is_2d: Whether the file has no third axis.
        warnings: Facts that the user should know although the scan can be used; complete after the voxels are read.
        resampling_spacing: Millimetres along (x, y, z) by which nnU-Net resamples, if they differ from `spacing`.
    """

    name: str
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    voxels: Callable[[], np.ndarray]
    channels: int = 1
    is_2d: bool = False
    warnings: Sequence[str] = ()
    resampling_spacing: tuple[float, float, float] | None = None


def open_image_file(path: Path) -> ImageSource:
    """Read the header of an image file and check that the file can hold what it claims.

    Args:
        path: Existing file with one of `IMAGE_ENDINGS`.

    Returns:
        Its grid, with a function that reads the voxels.

    Raises:
        VolumeError: If the file is not an image of plain numbers in 3D or 2D, is incomplete, or cannot be read.
    """
    with naming(path.name):
        if path.stat().st_size == 0:
            raise IncompleteFile("the file is empty: export or copy it again")
        data = locate_voxels(path)
        with _name_for_itk(path) as itk_name:
            info = read_information(itk_name, _image_io(path))
        dtype = check_pixels(info)
        size = info.GetSize()
        check_memory(size, dtype)
        expected_bytes = len(data.prefix) + math.prod(size) * (data.bytes_per_voxel or dtype.itemsize)
        check_claim(size, expected_bytes, data)
    spacing, origin, direction = info.GetSpacing(), info.GetOrigin(), info.GetDirection()
    is_2d = len(size) == 2
    if is_2d:
        size, origin = (*size, 1), (*origin, 0.0)
        spacing = (*spacing, SLICE_SPACINGS * max(spacing))
        direction = (*direction[:2], 0.0, *direction[2:], 0.0, 0.0, 0.0, 1.0)
    return ImageSource(
        name=path.name,
        size=size,
        spacing=spacing,
        origin=origin,
        direction=direction,
        voxels=lambda: _read_voxels(path, data, expected_bytes),
        is_2d=is_2d,
        warnings=_warnings(data, info),
    )


def check_claim(size: tuple[int, ...], expected_bytes: int, data: VoxelData) -> None:
    """Refuse a header that claims more than the file can hold.

    Args:
        size: Voxels along (x, y, z).
        expected_bytes: Their decompressed bytes, including the bytes before them in the stream.
        data: Where they are.

    Raises:
        IncompleteFile: If there are too few bytes.
    """
    if expected_bytes > data.stored_bytes * (1 if data.compression == "none" else _DEFLATE_RATIO):
        raise IncompleteFile(
            f"the header claims {' x '.join(map(str, size))} voxels in {expected_bytes} bytes, too much for "
            f"{data.stored_bytes} bytes of file: it is cut off or its header is damaged; export or copy it again"
        )


def _warnings(data: VoxelData, info: Any) -> tuple[str, ...]:
    """Warn about facts that a NIfTI header gives twice, and say which of them ITK used."""
    if data.nifti is None:
        return ()
    axes = info.GetDimension()
    used = np.eye(4)
    used[:axes, :axes] = LPS_TO_RAS[:axes, :axes] @ np.reshape(info.GetDirection(), (axes, axes)) * info.GetSpacing()
    used[:axes, 3] = LPS_TO_RAS[:axes, :axes] @ info.GetOrigin()
    return tuple(header_warnings(data.nifti, used, info.GetSpacing(), data.nifti.unit_mm))


def _read_voxels(path: Path, data: VoxelData, expected_bytes: int) -> np.ndarray:
    """Read (Z, Y, X) with ITK, and check that nothing is missing and no bit is wrong.

    Note:
        The usual file is decompressed once, and its checksum is computed from the voxels. If the checksum does not
        match, the stream is decompressed a second time. Then either the file is damaged, or ITK gives other bytes than
        the stored ones (NaN or infinity, scaled or big-endian NIfTI, several gzip members, bytes behind the voxels).
    """
    with naming(path.name):
        is_plain = data.compression == "none"
        is_suspect = is_plain and data.float_type != ""
        if data.compression == "gzip":
            is_suspect = _last_number(data, 0) != expected_bytes % 2**32
        if is_suspect:  # check now, before memory is taken
            check_stored(data, expected_bytes)
        with _name_for_itk(path) as itk_name:
            voxels = read_voxels(itk_name, _image_io(path))
        if not (is_suspect or is_plain or _checksum_agrees(data, voxels)):
            check_stored(data, expected_bytes)
    return voxels[None] if voxels.ndim == 2 else voxels


def _image_io(path: Path) -> str:
    """Name ITK's reader class for a file."""
    formats = {".nii": "NiftiImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".gipl": "GiplImageIO"}
    return formats.get(image_ending(path).removesuffix(".gz"), "MetaImageIO")


@contextlib.contextmanager
def _name_for_itk(path: Path) -> Iterator[str]:
    """Give a path by which ITK reads this file and no other.

    When ITK's NIfTI reader is given v.nii.gz, it reads the voxels of v.nii if that exists. It also needs lower-case
    endings.
    """
    ending = image_ending(path)
    has_twin = ending == ".nii.gz" and path.with_suffix("").exists()
    if ending not in (".nii", ".nii.gz") or (path.name.endswith(ending) and not has_twin):
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="volume-") as folder:
        alias = Path(folder) / f"volume{ending}"
        try:
            alias.symlink_to(path.resolve())
        except (OSError, NotImplementedError):  # Windows lets only some users make links
            shutil.copyfile(path, alias)
        yield str(alias)


# ---- is the file whole? ----------------------------------------------------------------------------------------------


def check_stored_voxels(path: Path, voxels: np.ndarray) -> None:
    """Check that a file just written holds these voxels; compressed ones are checked by their checksum.

    Args:
        path: File with one of `IMAGE_ENDINGS`.
        voxels: C-contiguous array (Z, Y, X) in the type that was written.

    Raises:
        VolumeError: If the file is too short or its checksum is not that of the voxels.
    """
    data = locate_voxels(path)
    is_whole = data.stored_bytes >= voxels.nbytes if data.compression == "none" else _checksum_agrees(data, voxels)
    if not is_whole:
        raise IncompleteFile("the file came out incomplete")


def _checksum_agrees(data: VoxelData, voxels: np.ndarray) -> bool:
    """Compare the checksum at a compressed stream's end with that of the voxels as they lie in memory."""
    content = voxels.reshape(-1).data
    if data.compression == "gzip":
        return _last_number(data, 4) == zlib.crc32(content, zlib.crc32(data.prefix))
    return _last_number(data, 0, "big") == zlib.adler32(content)


def _last_number(data: VoxelData, bytes_behind: int, order: Literal["little", "big"] = "little") -> int:
    """Read the 32-bit number before the last `bytes_behind` bytes; of gzip: 0 gives its length, 4 its checksum."""
    with data.path.open("rb") as file:
        file.seek(max(data.offset, data.offset + data.stored_bytes - bytes_behind - 4))
        return int.from_bytes(file.read(4), order)


def check_stored(data: VoxelData, expected_bytes: int) -> None:
    """Read a file's stored bytes in small pieces, and check length, checksums and, where ITK hides them, NaN values.

    Raises:
        VolumeError: If the stream ends early, is too short, fails its checksum, or holds NaN or infinity.
    """
    total_bytes = 0
    floats = bytearray()
    for piece in stored_pieces(data):
        if data.float_type:
            floats += piece[max(len(data.prefix) - total_bytes, 0) : max(expected_bytes - total_bytes, 0)]
            whole = len(floats) - len(floats) % np.dtype(data.float_type).itemsize
            if not np.isfinite(np.frombuffer(bytes(floats[:whole]), data.float_type)).all():
                raise VolumeError(NOT_FINITE)
            del floats[:whole]
        total_bytes += len(piece)
    if total_bytes < expected_bytes:
        raise IncompleteFile(
            f"the header claims {expected_bytes} bytes, {total_bytes} are there: export or copy it again"
        )


def stored_pieces(data: VoxelData) -> Iterator[bytes]:
    """Read the stored bytes, decompressed: the prefix, the voxels, and any bytes behind them.

    Raises:
        IncompleteFile: If a compressed stream ends early or fails its checksum.
    """
    if data.compression != "none":
        try:
            yield from _decompressed(data)
        except (zlib.error, EOFError) as error:
            raise IncompleteFile(
                f"compressed voxels are damaged or cut off ({error}): export or copy them again"
            ) from None
        return
    with data.path.open("rb") as file:
        file.seek(data.offset)
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _decompressed(data: VoxelData) -> Iterator[bytes]:
    """Decompress zlib or gzip, one gzip member after the other; ignore bytes behind the last one, like ITK."""
    inflater = zlib.decompressobj(wbits=47)
    pending = b""
    with data.path.open("rb") as file:
        file.seek(data.offset)
        while True:
            pending = pending or file.read(_PIECE_BYTES)
            if not pending:
                raise EOFError("the stream has no end")
            yield inflater.decompress(pending, _PIECE_BYTES)
            pending = inflater.unconsumed_tail
            if inflater.eof:
                pending = inflater.unused_data
                if len(pending) < len(GZIP_MAGIC):
                    pending += file.read(_PIECE_BYTES)
                if not pending.startswith(GZIP_MAGIC):
                    return
                inflater = zlib.decompressobj(wbits=31)
