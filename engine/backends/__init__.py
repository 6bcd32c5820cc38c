"""Ways to run the network: each turns a model into a `Runner` and says where it cannot."""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..model import Model

logger = logging.getLogger(__name__)


class NetworkOutput(NamedTuple):
    """What a network says about a batch of tiles.

    Args:
        seg_logits: (N, K, *patch).
        class_logits: (N, S), or None for a network without a classification head.
    """

    seg_logits: Tensor
    class_logits: Tensor | None = None


class Runner(Protocol):
    """A network, ready to run on its device; averages over the model's folds."""

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32 on any device; the output lies on the runner's own."""
        ...


class Backend(Protocol):
    """One way of running networks."""

    name: str

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why this backend cannot run there, in words, or None where it can."""
        ...

    def load(self, model: Model, device: torch.device, precision: str) -> Runner:
        """Make a model ready to run."""
        ...


def backends() -> dict[str, Backend]:
    """Every backend by name, the best first."""
    from .torch import TorchBackend

    return {backend.name: backend for backend in (TorchBackend(),)}


def choose_backend(name: str, device: torch.device, precision: str) -> Backend:
    """Find the backend asked for, or with "auto" the best one that runs here, and log which and why.

    Raises:
        ValueError: For a name that is no backend.
        BackendUnavailable: Where it cannot run on this device in this precision.
    """
    known = backends()
    if name != "auto" and name not in known:
        raise ValueError(f"backend must be auto or one of {', '.join(known)}, got {name!r}")
    reasons = {}
    for candidate in known.values() if name == "auto" else (known[name],):
        reason = candidate.unavailable(device, precision)
        if reason is None:
            logger.info(
                "backend %s on %s in %s%s",
                candidate.name,
                device,
                precision,
                "".join(f"; not {other}: {why}" for other, why in reasons.items()),
            )
            return candidate
        reasons[candidate.name] = reason
    raise BackendUnavailable("; ".join(f"{other} cannot run here: {why}" for other, why in reasons.items()))
