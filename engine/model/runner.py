"""A network, ready to run: backends make it, and the pipeline calls it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class NetworkOutput(NamedTuple):
    """The network's output for a batch of tiles.

    Args:
        seg_logits: (N, K, *patch).
        class_logits: (N, S), or None for a network without a classification head.
    """

    seg_logits: Tensor
    class_logits: Tensor | None = None


class Runner(Protocol):
    """A network, ready to run on its device; averages over the model's folds."""

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32 on any device; the output is on the runner's device."""
        ...


def tiles_dtype_of(runner: Runner) -> torch.dtype:
    """Return the number type of tiles that a runner takes without a copy: its `tiles_dtype`, or float32."""
    return getattr(runner, "tiles_dtype", torch.float32)
