"""Ways to run the network: each turns a model into a `Runner`, by way of files or not, and says where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..model.folder import Model
from ..model.runner import Runner


class Backend(Protocol):
    """One way of running networks.

    Args:
        name: As `--backend` takes it.
        compiles: Whether it writes what it runs: such a backend loads from a bundle's folder only.
        bound_to: What its artefacts depend on, as `describe_machine` or a manifest's versions name it.
    """

    name: str
    compiles: bool
    bound_to: tuple[str, ...]

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why this backend cannot run there, in words, or None where it can."""
        ...

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Write what `load` needs.

        Args:
            model: With weights.
            tiles: (N, C, *patch) float32, N at least 2, on the device to build for: what to trace and calibrate with.
            precision: One that is available there.
            folder: Where to write.
        """
        ...

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> Runner:
        """Make ready to run.

        Args:
            model: Without weights, where there is a folder.
            folder: What `build` wrote; None for a backend that does not compile and a model with weights.
            device: Where to run.
            precision: The one it was built in.
        """
        ...
