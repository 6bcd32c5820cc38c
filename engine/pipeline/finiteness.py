"""Refuses logits that are no numbers, without making a GPU wait."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import PredictionError
from .transfers import begin_to_ask


def watch_finite(logits: Tensor) -> Callable[[], None]:
    """Begin to find out whether all logits are numbers.

    Returns:
        What raises a `PredictionError` where they are not; to be called when the device has something to go on with.
    """
    if logits.numel() == 0:
        return lambda: None
    # Least and greatest value show it without a mask in memory.
    all_finite = begin_to_ask(torch.isfinite(torch.stack(torch.aminmax(logits))).all())

    def require() -> None:
        if not all_finite():
            raise PredictionError(
                "the network's logits must be finite, got NaN or infinity: its weights are damaged, or the "
                "precision is too low for this model; try --precision fp32"
            )

    return require
