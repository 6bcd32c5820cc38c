"""Reads scans and makes them ready for the network, the next ones while the network runs."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from ..errors import VolumeError
from ..model.plans import Plan
from ..overlap import overlapped
from ..scans.volume import Volume, read_volume
from .preprocessing import preprocess
from .properties import nnunet_properties
from .steps import Prepared, PreviousStage, Request, caught
from .timing import Timings
from .transfers import Transfers


class Loader(Protocol):
    """Makes scans ready for the network."""

    def __call__(self, requests: Iterable[Request], *, readers: int = 0) -> Generator[Prepared | Exception, None, None]:
        """Prepare scans in order.

        Args:
            requests: Taken as there is room for them.
            readers: How many scans are read at once, ahead of the one that is asked for; 0 reads each when it is.

        Yields:
            For each request the prepared scan, which is valid until the next one is asked for, or why there is none.

        Raises:
            ValueError: For labels of a previous stage where the model has none.
        """
        ...


class ExactLoader:
    """Prepares scans as nnU-Net does, to rounding.

    Args:
        plan: The model's.
        device: Where planes and sums are.
        transfers: Copies to it.
    """

    def __init__(self, plan: Plan, device: torch.device, transfers: Transfers) -> None:
        self.device = device
        self._plan, self._transfers = plan, transfers

    def __call__(self, requests: Iterable[Request], *, readers: int = 0) -> Generator[Prepared | Exception, None, None]:
        """See `Loader`."""
        return overlapped(
            lambda request: caught(lambda: self.load(request)), requests, threads=readers, name="nnturbo-read"
        )

    def load(self, request: Request) -> Prepared:
        """Read one scan and preprocess it."""
        timings = Timings(self.device)
        with timings("read", on_gpu=False):
            scan = read(request, self._plan)
        return self.prepare(scan, timings)

    def prepare(self, scan: Scan, timings: Timings) -> Prepared:
        """Preprocess one scan, and start its way to the device."""
        with self._transfers.uploading() as wait, timings("preprocess"):
            try:
                case = preprocess(scan.volume, self._plan, self.device, scan.previous)
            except torch.OutOfMemoryError:  # the network's step finds out what does fit
                case = preprocess(scan.volume, self._plan, torch.device("cpu"), scan.previous)
        return Prepared(
            geometry=scan.stored.geometry,
            properties=nnunet_properties(self._plan.reader, scan.stored.geometry, scan.volume, case),
            warnings=scan.stored.warnings,
            case=case,
            wait=wait,
            timings=timings,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A scan that was read.

    Args:
        stored: On the axes of the file.
        volume: On the axes that the network takes.
        previous: (Z, Y, X) int32 labels of a cascade's previous stage, on the network's axes, or None.
    """

    stored: Volume
    volume: Volume
    previous: np.ndarray | None


def read(request: Request, plan: Plan) -> Scan:
    """Read a scan, and for a cascade the labels of its previous stage.

    Raises:
        VolumeError: Where a file cannot be read, or does not suit the model.
        ValueError: For labels of a previous stage where the model has none.
    """
    check_previous_stage(request, plan)
    stored = read_volume(request.image, channels=len(plan.channels), reader=plan.reader)
    return Scan(
        stored=stored,
        volume=stored.reoriented() if plan.reorient else stored,
        previous=None if plan.previous_stage is None else _read_previous(request.previous_stage, stored, plan),
    )


def check_previous_stage(request: Request, plan: Plan) -> None:
    """Refuse labels of a previous stage where a model has none."""
    if plan.previous_stage is None and request.previous_stage is not None:
        raise ValueError("previous_stage is for cascades; this model's configuration has no previous stage")


def _read_previous(previous: PreviousStage, scan: Volume, plan: Plan) -> np.ndarray:
    """Read the labels of a cascade's previous stage, on the network's axes."""
    if previous is None:
        raise VolumeError(
            f"{scan.name}: this model continues from the labels of {plan.previous_stage}; give them as previous_stage "
            f"(on the command line -prev_stage_predictions)"
        )
    if isinstance(previous, np.ndarray):
        labels = replace(Volume.from_array(previous, (1, 1, 1), name="previous stage"), geometry=scan.geometry)
    else:
        labels = read_volume(previous, channels=1, reader=plan.reader)
    if labels.array.shape[1:] != scan.array.shape[1:]:
        raise VolumeError(
            f"{labels.name}: labels of the previous stage must lie on the scan's grid, "
            f"{scan.array.shape[1:]}; got {labels.array.shape[1:]}"
        )
    if not labels.geometry.matches(scan.geometry):
        raise VolumeError(
            f"{labels.name}: labels of the previous stage must lie where the scan lies, {scan.geometry}; "
            f"got {labels.geometry}"
        )
    labels = labels.reoriented() if plan.reorient else labels
    return np.rint(labels.array[0]).astype(np.int32)
