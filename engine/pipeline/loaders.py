"""The loaders by their names."""

from __future__ import annotations

import torch

from ..model.plans import Plan
from .loading import ExactLoader, Loader
from .transfers import Transfers


def make_loader(name: str, plan: Plan, device: torch.device, transfers: Transfers) -> Loader:
    """Make the loader of a name in `LOADERS`.

    Raises:
        BackendUnavailable: Where what it needs is not installed.
        ValueError: Where it cannot load for this model.
    """
    if name == "exact":
        return ExactLoader(plan, device, transfers)
    from .dali import DaliLoader

    return DaliLoader(plan, device, interpolation="linear" if name == "dali-linear" else "cubic")
