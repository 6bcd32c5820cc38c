"""Compiles kernels/cuda/*.cu with CuPy for the device at hand, and launches them on torch's stream."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "cuda"

THREADS = (32, 8)
"""Of a block: lines of 32, so that a line reads and writes neighbouring elements."""

TYPES = {
    torch.float32: "float",
    torch.float16: "Half",
    torch.bfloat16: "Bfloat",
    torch.int16: "short",
    torch.uint8: "unsigned char",
    torch.uint16: "unsigned short",
}
"""What the kernels call torch's types."""


@lru_cache(maxsize=1)
def has_cupy() -> bool:
    """Whether kernels can be compiled; says once, in the log, where they cannot."""
    try:
        _compiled("gather_tiles", torch.float32, None).compile()
    except ImportError:
        reason = "CuPy is not installed, or not for this version of CUDA"
    except Exception as error:  # whatever CuPy and NVRTC raise where headers or libraries of CUDA are missing
        reason = f"CuPy cannot compile here ({str(error).partition(chr(10))[0]:.200})"
    else:
        return True
    logger.warning(
        "%s, so torch does what nnturbo's CUDA kernels would do faster: pip install 'nnturbo[cuda13]', or [cuda12] "
        "with a driver for CUDA 12",
        reason,
    )
    return False


def source(kernel: str, dtype: torch.dtype, lines: bool | None = None) -> str:
    """All of a kernel's text, for one type of number.

    Args:
        kernel: Name of the file, and of the function in it.
        dtype: What its `T` is.
        lines: What its `LINES` is, where it has one.
    """
    types = f"typedef {TYPES[dtype]} T;\n" + ("" if lines is None else f"const bool LINES = {str(lines).lower()};\n")
    return "\n".join([(FOLDER / "common.cuh").read_text(), types, (FOLDER / f"{kernel}.cu").read_text()])


@lru_cache(maxsize=64)
def _compiled(kernel: str, dtype: torch.dtype, lines: bool | None) -> Any:
    """Compile a kernel; CuPy does so for each device when it is first launched there, and keeps that on disk."""
    import cupy  # type: ignore[import-not-found]  # an extra

    return cupy.RawModule(code=source(kernel, dtype, lines), options=("-std=c++17",)).get_function(kernel)


class _Stream:
    """Torch's current stream, as CuPy takes one over."""

    def __init__(self, device: torch.device) -> None:
        self._handle = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of this protocol, and the stream."""
        return 0, self._handle


def launch(
    kernel: str,
    dtype: torch.dtype,
    arguments: Sequence[int],
    *,
    device: torch.device,
    blocks: int,
    lines: bool | None = None,
    shared_bytes: int = 0,
) -> None:
    """Run a kernel on torch's current stream of a device; it may still be running on return.

    Args:
        kernel: Its name.
        dtype: What its `T` is.
        arguments: Addresses and 64-bit integers, in its order.
        device: A CUDA device, on which all addresses lie.
        blocks: How many of `THREADS`.
        lines: What its `LINES` is, where it has one.
        shared_bytes: Shared memory of a block, at most 48 KiB.
    """
    import cupy  # type: ignore[import-not-found]  # an extra

    with cupy.cuda.Device(device.index or 0), cupy.cuda.Stream.from_external(_Stream(device)):
        _compiled(kernel, dtype, lines)((blocks,), THREADS, tuple(arguments), shared_mem=shared_bytes)
