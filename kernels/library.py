"""Finds the library of kernels for CPUs, or compiles it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from pathlib import Path

from .compilation import FOLDER, compile_kernels, compiler, here, library_name

INSTALLED = Path(__file__).parent / library_name(here()[0])
"""The library that comes with nnturbo's wheels; a clone has none."""


def find_library(folder: Path) -> ctypes.CDLL | None:
    """Load the library that came with nnturbo, or one that was compiled before; None where there is neither.

    Args:
        folder: Where compiled ones are kept.

    Raises:
        OSError: Where the processor lacks the instructions.
    """
    for path in (INSTALLED, _kept(folder)):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # it is not there, or is for another system
            continue
        return _declared(library)
    return None


def load_library(folder: Path) -> ctypes.CDLL:
    """Give what `find_library` finds, or compile it.

    Args:
        folder: Where to keep it; made if it is not there.

    Raises:
        OSError: Where there is no compiler, or it fails, the folder cannot be written, or the processor lacks the
            instructions.
    """
    if (found := find_library(folder)) is not None:
        return found
    command = compiler()
    if command is None:
        raise OSError("there is no C++ compiler")
    system, processor = here()
    folder.mkdir(parents=True, exist_ok=True)
    path = _kept(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as aside:
        made = Path(aside) / path.name
        compile_kernels(command, made, system=system, processor=processor)
        with made.open("r+b") as written:
            os.fsync(written.fileno())  # half a library would end the process that loads it
        made.replace(path)
    return _declared(ctypes.CDLL(str(path)))


def lacking(folder: Path) -> str | None:
    """Say why there can be no library here, in words, or None; see `load_library`."""
    try:
        if find_library(folder) is None and compiler() is None:
            return "it needs one of nnturbo's wheels for this system, or a C++ compiler such as g++"
    except OSError as error:
        return str(error)
    return None


def _kept(folder: Path) -> Path:
    """Name what is compiled here, by all that it is made of."""
    sources = [path.read_bytes() for path in (*sorted(FOLDER.iterdir()), Path(__file__).with_name("compilation.py"))]
    key = hashlib.sha256(b"\n".join([*sources, " ".join(here()).encode()])).hexdigest()[:16]
    return folder / f"{key}-{library_name(here()[0])}"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.nnturbo_variant.restype = ctypes.c_char_p
    if library.nnturbo_variant() is None:
        raise OSError("this processor is too old for nnturbo's kernels, which need AVX2 and FMA")
    return library
