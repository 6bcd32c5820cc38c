"""Ways to run the network: each turns a model into a `Runner`, some with compiled files, and says where it cannot."""

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
        name: Name for `--backend`.
        compiles: Whether it writes compiled files; such a backend loads only from a bundle's folder.
        bound_to: Properties of a machine that its files depend on, named as in `describe_machine` or a manifest's
            versions.
    """

    name: str
    compiles: bool
    bound_to: tuple[str, ...]

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why this backend cannot run on a device in a precision, or None if it can."""
        ...

    def cannot_build(self) -> str | None:
        """Return what `build` lacks here, which running what was built does not need, or None."""
        ...

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Write the files that `load` needs.

        Args:
            model: Model with weights.
            tiles: (N, C, *patch) float32, N at least 2, on the device to build for; used to trace and to calibrate.
            precision: A precision that is available on that device.
            folder: Folder for the files.
        """
        ...

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> Runner:
        """Prepare to run.

        Args:
            model: Model; without weights if there is a folder.
            folder: Files that `build` wrote; None for a backend that does not compile, with a model with weights.
            device: Device to run on.
            precision: Precision of the build.
        """
        ...
