"""What passes from one step of a prediction to the next, and how a step fails."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import PredictionError
from ..scans.geometry import Geometry
from ..scans.volume import Volume
from .preprocessing import Case
from .timing import Timings
from .voting import Votes

logger = logging.getLogger(__name__)

Image = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Volume
"""A file, the files of all channels, a folder of DICOM slices, or a volume."""

PreviousStage = str | os.PathLike[str] | np.ndarray | None
"""For a cascade: label file of the stage before, or its labels (Z, Y, X), on the scan's grid."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Request:
    """A scan to predict.

    Args:
        image: A file, the files of all channels in order, a folder of DICOM slices, or a `Volume`.
        previous_stage: For a cascade: label file of the stage before, or its labels (Z, Y, X), on the scan's grid.
    """

    image: Image
    previous_stage: PreviousStage = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A scan that is read and preprocessed, and on its way to the device.

    Args:
        geometry: Of the scan as it was read.
        properties: What nnU-Net keeps about the scan.
        warnings: What was odd about the scan.
        case: The scan on the device.
        wait: Makes the current stream wait until it is there.
        timings: Of what was done so far.
    """

    geometry: Geometry
    properties: Mapping[str, Any]
    warnings: tuple[str, ...]
    case: Case
    wait: Callable[[], None]
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How much of a scan is on the device at once.

    Args:
        views_per_call: Mirrored views, of one tile or of several, that go through the network at once.
        sums_device: Where planes and sums are.
    """

    views_per_call: int
    sums_device: torch.device

    def smaller(self) -> Placement | None:
        """Return what takes less of the device's memory (half the views, in the end sums in main memory), or None."""
        if self.views_per_call > 1:
            return replace(self, views_per_call=self.views_per_call // 2)
        if self.sums_device.type != "cpu":
            return replace(self, sums_device=torch.device("cpu"))
        return None

    def __str__(self) -> str:
        """Return a description for messages."""
        return f"{self.views_per_call} views at once, sums on {self.sums_device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmented:
    """A scan whose labels are on their way back from the device.

    Args:
        prepared: The scan.
        segmentation: Gives the labels (Z, Y, X), when they are there.
        probabilities: (K, Z, Y, X) float32, or None.
        votes: What a multi-task network said about tiles.
        placement: How it was done.
    """

    prepared: Prepared
    segmentation: Callable[[], np.ndarray]
    probabilities: np.ndarray | None
    votes: Votes | None
    placement: Placement


def requests_of(
    images: Iterable[Image | Request], previous_stages: Iterable[PreviousStage] | None
) -> Iterator[Request]:
    """Put each image and the labels of its previous stage together; requests pass as they are."""
    if previous_stages is not None:
        for image, stage in zip(images, previous_stages, strict=True):
            yield Request(image.image if isinstance(image, Request) else image, stage)
        return
    for image in images:
        yield image if isinstance(image, Request) else Request(image)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was not enough; torch has a class of errors for a GPU's, and only sentences for a CPU's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator", "std::bad_alloc"))


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Turn what libraries raise while a scan is predicted into a `PredictionError`; what is known to pass is transient.

    Raises:
        PredictionError: In place of a `MemoryError` or `RuntimeError` from inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise PredictionError("out of memory: the scan needs more than there is", transient=True) from error
        logger.warning("unexpected error", exc_info=True)
        reason = str(error).strip().partition("\n")[0]
        raise PredictionError(f"{reason:.300}") from error


def caught(run: Callable[[], _Result]) -> _Result | Exception:
    """Give what a function raises for a bad scan as a value."""
    try:
        with engine_errors():
            return run()
    except Exception as error:  # an error in the code fails its scan too, and no other one
        return error
