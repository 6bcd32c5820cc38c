"""Refuses logits that are no numbers, without making a GPU wait."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import PredictionError
from .transfers import begin_to_ask


def all_finite(values: Tensor) -> Tensor:
    """Find out whether all values, at least one, are finite; TorchScript can compile this.

    Returns:
        () bool on the device of the values.
    """
    # Least and greatest value show it without a mask in memory.
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()


def not_finite(what: str) -> str:
    """Say what must hold of a network's output, such as "logits"; TorchScript can compile this."""
    return (
        f"the network's {what} must be finite, got NaN or infinity: its weights are damaged, or the precision is too "
        "low for this model"
    )


def not_finite_error(what: str) -> PredictionError:
    """Make the error for an output of a network that is not finite."""
    return PredictionError(f"{not_finite(what)}; try --precision fp32")


def watch_finite(logits: Tensor) -> Callable[[], None]:
    """Begin to find out whether all logits are numbers.

    Returns:
        What raises a `PredictionError` where they are not; to be called when the device has something to go on with.
    """
    if logits.numel() == 0:
        return lambda: None
    finite = begin_to_ask(all_finite(logits))

    def require() -> None:
        if not finite():
            raise not_finite_error("logits")

    return require
