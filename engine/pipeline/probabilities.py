"""Probabilities of finished planes on their way to main memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .transfers import Transfers

CHUNK_BYTES = 64 * 2**20
"""Copied from a GPU at once: a copy for each plane would take longer than its bytes do."""


class ProbabilityPlanes:
    """Puts probabilities into an array, plane by plane; from a GPU several at once, while it makes the next ones.

    Args:
        target: (K, Z, Y, X) float32 in main memory, with any strides.
        transfers: Copies from the device.
        planes_at_once: How many are copied together.
    """

    def __init__(self, target: np.ndarray, transfers: Transfers, planes_at_once: int) -> None:
        self._target, self._transfers, self._at_once = target, transfers, planes_at_once
        self._planes: list[Tensor] = []
        self._done = 0
        self._place: Callable[[], None] = lambda: None

    def add(self, plane: Tensor) -> None:
        """Take the next plane, (K, Y, X) float32, which nobody changes afterwards."""
        self._planes.append(plane)
        if len(self._planes) == self._at_once:
            self._begin()

    def finish(self) -> None:
        """Wait until all are there."""
        if self._planes:
            self._begin()
        self._place()

    def _begin(self) -> None:
        """Begin to copy the planes at hand, and then put those before into their place."""
        planes = torch.stack(self._planes, 1) if len(self._planes) > 1 else self._planes[0][:, None]
        target = self._target[:, self._done : self._done + len(self._planes)]
        self._done += len(self._planes)
        self._planes = []
        place = self._transfers.download_into(target, planes)
        self._place()
        self._place = place


def planes_at_once(device: torch.device, plane_bytes: int) -> int:
    """Say how many planes are copied together: on a CPU nothing is gained by more than one."""
    return 1 if device.type == "cpu" else max(1, CHUNK_BYTES // plane_bytes)
