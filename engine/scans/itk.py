"""Calls of SimpleITK, made safe: errors take one line, nothing is printed to stderr, and memory has an owner."""

import contextlib
import math
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import VolumeError
from .voxel_data import check_dimension

_OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc")
"""How ITK, and C++ below it, say that there is no memory."""


def read_information(name: str, image_io: str) -> Any:
    """Let ITK read a file's header.

    Args:
        name: Path of the file.
        image_io: Name of ITK's reader class; without one, ITK tries them all.

    Returns:
        A SimpleITK.ImageFileReader that knows the image's grid, type and tags.

    Raises:
        VolumeError: If ITK cannot read it.
    """
    reader = _file_reader(name, image_io)
    try:
        with _FIRST_READ.alone(image_io), _QUIET_ITK:
            reader.ReadImageInformation()
    except RuntimeError as error:
        reason, advice = _itk_reason(error), "export or copy the file again"
        if "orthonormal" in reason:  # NIfTI; nothing is wrong with the file
            advice = "the scan's axes are sheared, resample it to perpendicular ones"
        raise VolumeError(f"the header cannot be read: {reason}; {advice}") from None
    return reader


def read_voxels(name: str, image_io: str) -> np.ndarray:
    """Let ITK read a file's voxels.

    Args:
        name: Path of the file.
        image_io: Name of ITK's reader class.

    Returns:
        Array (Z, Y, X), or (Y, X) for a 2D image. It uses ITK's memory, keeps that alive, and may be written to.

    Raises:
        VolumeError: If ITK cannot read it; a transient one if memory is not enough now.
    """
    try:
        with _FIRST_READ.alone(image_io, ends=True), _QUIET_ITK:
            return np.asarray(_OwnedVoxels(_file_reader(name, image_io).Execute()))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in _OUT_OF_MEMORY):
            raise VolumeError("out of memory: the voxels need more than there is", transient=True) from None
        raise VolumeError(f"the voxels cannot be read: {_itk_reason(error)}; export or copy the file again") from None


def _file_reader(name: str, image_io: str) -> Any:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(name)
    reader.LoadPrivateTagsOff()
    return reader


def check_pixels(info: Any) -> np.dtype:
    """Accept images of plain numbers in 3D or 2D.

    Returns:
        Type of the array that ITK will give.

    Raises:
        VolumeError: If the image has other dimensions, or complex, colour or vector pixels.
    """
    import SimpleITK

    check_dimension(info.GetDimension())
    pixel_id = info.GetPixelID()
    plain = {
        getattr(SimpleITK, f"sitk{kind}{bits}"): np.dtype(f"{kind.lower()}{bits}")
        for kind, all_bits in (("Int", (8, 16, 32, 64)), ("UInt", (8, 16, 32, 64)), ("Float", (32, 64)))
        for bits in all_bits
    }
    if info.GetNumberOfComponents() != 1 or pixel_id not in plain:
        raise VolumeError(
            f"voxels must be one integer or float each, got {info.GetNumberOfComponents()} x "
            f"{SimpleITK.GetPixelIDValueAsString(pixel_id)} (colour, vector or complex): convert the image"
        )
    return plain[pixel_id]


def check_memory(size: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse scans that this machine cannot hold, if the system tells its memory.

    Raises:
        VolumeError: If the voxels alone need more than the physical memory.
    """
    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return
    needed_bytes = math.prod(size) * dtype.itemsize
    if needed_bytes > memory_bytes:
        raise VolumeError(
            f"a scan must fit into memory, but {' x '.join(map(str, size))} voxels need "
            f"{needed_bytes / 2**30:.1f} of {memory_bytes / 2**30:.1f} GiB: check the header, or crop the scan"
        )


class _OwnedVoxels:
    """Memory of a SimpleITK image that numpy keeps alive.

    SimpleITK's own view does not keep its image alive: reading the view after the image is freed crashes. An array
    made from this object keeps the object, and so the image. The image has no other owner, so the array may be written
    to.
    """

    def __init__(self, image: Any) -> None:
        import SimpleITK

        interface = SimpleITK.GetArrayViewFromImage(image).__array_interface__
        self.image = image
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


class _QuietItk:
    """Keeps ITK's warnings off stderr while any thread is inside.

    ITK has one switch for the whole process: the first to enter turns it off, and the last to leave restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = True

    def __enter__(self) -> None:
        import SimpleITK

        with self._lock:
            if self._inside == 0:
                self._before = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
                SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        import SimpleITK

        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                SimpleITK.ProcessObject.SetGlobalWarningDisplay(self._before)


_QUIET_ITK = _QuietItk()


class _FirstRead:
    """Lets one thread alone read a format for the first time, until it has read a whole file.

    ITK and its libraries initialise themselves on first use, and two threads must not do that at the same time.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._over: set[str] = set()

    @contextlib.contextmanager
    def alone(self, image_io: str, *, ends: bool = False) -> Iterator[None]:
        """Wait for other threads while no thread has read this format.

        Args:
            image_io: ITK's reader of the format.
            ends: Whether a whole file has been read when the block ends without an error.
        """
        if image_io in self._over:
            yield
            return
        with self._lock:
            yield
            if ends:
                self._over.add(image_io)


_FIRST_READ = _FirstRead()


def itk_alone(what: str) -> contextlib.AbstractContextManager[None]:
    """Let one thread alone use ITK for something other than reading for the first time."""
    return _FIRST_READ.alone(what, ends=True)


def _itk_reason(error: BaseException) -> str:
    """Shorten ITK's exception text to the line with the reason, without addresses."""
    reason = re.split(r"ERROR:", str(error))[-1].split("Reason:")[0]
    lines = [line.strip() for line in re.sub(r"\w+\(0x[0-9a-f]+\):", "", reason).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return (lines[-1] if lines[-1].startswith("[") else lines[0])[:300]  # the NRRD reader gives the reason last
