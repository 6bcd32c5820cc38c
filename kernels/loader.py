"""Compiles kernels/cuda/*.cu with CuPy for a device, and launches them on torch's stream."""

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
"""Threads of a block: lines of 32, so that a line reads and writes neighbouring elements."""

MOST_BLOCKS = 4096
"""Blocks of kernels in which each row of threads takes line after line: several waves on the largest GPUs."""

TYPES = {
    torch.float32: "float",
    torch.float16: "Half",
    torch.bfloat16: "Bfloat",
    torch.int16: "short",
    torch.uint8: "unsigned char",
    torch.uint16: "unsigned short",
}
"""CUDA's names of torch's types."""


@lru_cache(maxsize=1)
def has_cupy() -> bool:
    """Whether kernels can be compiled; if not, the log says so once."""
    try:
        _compiled("gather_tiles", torch.float32, None).compile()
    except ImportError:
        reason = "CuPy is not installed, or not for this version of CUDA"
    except Exception as error:  # CuPy and NVRTC raise many types if headers or libraries of CUDA are missing
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
    """Make the source of a kernel for one number type.

    Args:
        kernel: Name of the file, and of the function in it.
        dtype: Type for its `T`.
        lines: Value of its `LINES`, if it has that parameter.
    """
    types = f"typedef {TYPES[dtype]} T;\n" + ("" if lines is None else f"const bool LINES = {str(lines).lower()};\n")
    return "\n".join(
        [
            (FOLDER / "common.cuh").read_text(encoding="utf-8"),
            types,
            (FOLDER / f"{kernel}.cu").read_text(encoding="utf-8"),
        ]
    )


@lru_cache(maxsize=64)
def _compiled(kernel: str, dtype: torch.dtype, lines: bool | None) -> Any:
    """Compile a kernel; CuPy compiles it for each device on its first launch there, and caches it on disk."""
    import cupy  # type: ignore[import-not-found]  # an extra

    return cupy.RawModule(code=source(kernel, dtype, lines), options=("-std=c++17",)).get_function(kernel)


def blocks_of(lines: int) -> int:
    """Number of blocks for so many lines, of which each row of threads takes one after the other."""
    return max(1, min(MOST_BLOCKS, -(-lines // THREADS[1])))


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; a CPU, on which tests run the kernels, has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Stream:
    """Torch's current stream, in the form that CuPy accepts."""

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
    threads: tuple[int, int] = THREADS,
    shared_bytes: int = 0,
) -> None:
    """Run a kernel on torch's current stream of a device; it may still be running on return.

    Args:
        kernel: Name of the kernel.
        dtype: Type for its `T`.
        arguments: Addresses and 64-bit integers, in the order of its parameters.
        device: CUDA device that holds all addresses.
        blocks: Number of blocks.
        lines: Value of its `LINES`, if it has that parameter.
        threads: Of a block.
        shared_bytes: Shared memory of a block, at most 48 KiB.
    """
    import cupy  # type: ignore[import-not-found]  # an extra

    with cupy.cuda.Device(device.index or 0), cupy.cuda.Stream.from_external(_Stream(device)):
        _compiled(kernel, dtype, lines)((blocks,), threads, tuple(arguments), shared_mem=shared_bytes)
