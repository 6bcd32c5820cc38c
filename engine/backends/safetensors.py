"""Reads and writes files of float32 tensors, in the safetensors format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BundleError

ALIGNMENT = 64
"""Of the first tensor within the file, in bytes."""
LARGEST_HEADER_BYTES = 100 * 2**20
"""As the format has it."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors under their names.

    Note:
        The format: eight bytes for the size of a header, the header as JSON filled up with spaces, the numbers.
    """
    described, start = {}, 0
    for name, tensor in tensors.items():
        end = start + 4 * tensor.numel()
        described[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(described).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().float().numpy().astype("<f4", copy=False).tobytes())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Give the tensors of a file by their names; the numbers stay in the file until they are read.

    Raises:
        BundleError: Where it is damaged.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > LARGEST_HEADER_BYTES:
                raise ValueError(f"its header has {size} bytes")
            described = json.loads(file.read(size))
        numbers = np.memmap(path, "<f4", "c", 8 + size)
        return {name: _tensor(numbers, entry) for name, entry in described.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} must hold float32 tensors, it cannot be read: {error!s:.200}") from error


def _tensor(numbers: Any, entry: Any) -> Tensor:
    start, end = entry["data_offsets"]
    shape = [int(length) for length in entry["shape"]]
    if entry["dtype"] != "F32" or start % 4 or not 0 <= start <= end <= 4 * len(numbers):
        raise ValueError(f"a tensor of {entry['dtype']} at {start} to {end}")
    if min(shape, default=0) < 0 or end - start != 4 * math.prod(shape):
        raise ValueError(f"a tensor of shape {shape} in {end - start} bytes")
    return torch.from_numpy(numbers[start // 4 : end // 4]).view(shape)
