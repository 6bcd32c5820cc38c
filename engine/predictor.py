"""What predicts scans: one model (`Engine`) or several (`Ensemble`), through the same calls."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from typing import Generic, TypeVar

from .errors import PredictionError
from .model.folder import Model
from .model.provenance import Provenance
from .overlap import overlapped
from .pipeline.prediction import Prediction
from .pipeline.steps import Image, PreviousStage, Request, caught, engine_errors, requests_of

Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all)."""

_Value = TypeVar("_Value")
_Prepared = TypeVar("_Prepared")
_Segmented = TypeVar("_Segmented")


class Predictor(ABC, Generic[_Prepared, _Segmented]):
    """Predicts scans in three steps, each of which may work on another scan at the same time.

    What passes from one step to the next is the subclass's own, and named by its two types.

    Attributes:
        model: What was trained; an ensemble's first model, which stands for all where they agree.
        class_names: Classes of a case, or None for a model without a classification head.
        provenance: What makes the predictions, one entry for each model.
    """

    model: Model
    class_names: tuple[str, ...] | None
    provenance: tuple[Provenance, ...]

    def predict(
        self,
        image: Image | Request,
        *,
        previous_stage: PreviousStage = None,
        save_probabilities: bool = False,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segment one scan.

        Args:
            image: A file, the files of all channels in order, a folder of DICOM slices, a `Volume`, or a `Request`.
            previous_stage: For a cascade: label file of the stage before, or its labels (Z, Y, X), on the scan's grid.
            save_probabilities: Keep class probabilities too; takes 4 bytes per class and voxel of the scan.
            progress: Called with (tiles done, tiles in all).

        Raises:
            VolumeError: Where the scan cannot be read or does not suit the model.
            PredictionError: Where the network fails, or gives NaN or infinity.
        """
        requests = requests_of([image], None if previous_stage is None else [previous_stage])
        with engine_errors(), contextlib.closing(self._prepare(requests, readers=0)) as loaded:
            prepared = _unless_error(next(loaded))  # read, preprocess
            segmented = self._segment(prepared, save_probabilities, progress)  # network, stitch, labels
            return self._answer(segmented)

    def predict_many(
        self,
        images: Iterable[Image | Request],
        *,
        previous_stages: Iterable[PreviousStage] | None = None,
        save_probabilities: bool = False,
        readers: int = 1,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> Generator[Prediction | Exception, None, None]:
        """Segment scans; the network goes on with the next one while those after it are read, and an answer is used.

        Args:
            images: As for `predict`; taken as there is room for them. Of those given as files, `readers` + 3 are in
                memory at once.
            previous_stages: For a cascade, as for `predict`, one for each image; not needed where images are requests.
            save_probabilities: As for `predict`.
            readers: How many scans are read at once; with 0, everything is done when its turn comes, in this thread.
            progress: Called with (index of the image, tiles done, tiles in all).

        Yields:
            For each image in order its prediction, or the error that `predict` would have raised: an `EngineError`,
            unless an argument or the code is wrong.
        """
        stopped = threading.Event()
        numbered = itertools.count()

        def tiles_done(index: int, done: int, total: int) -> None:
            if stopped.is_set():
                raise PredictionError("stopped, since no more answers are asked for")
            if progress is not None:
                progress(index, done, total)

        def segment(prepared: _Prepared | Exception) -> _Segmented | Exception:
            of_case = functools.partial(tiles_done, next(numbered))
            return caught(lambda: self._segment(_unless_error(prepared), save_probabilities, of_case))

        loaded = self._prepare(requests_of(images, previous_stages), readers=readers)
        results = overlapped(segment, loaded, threads=min(readers, 1), name="nnturbo-compute", leave=stopped.set)
        with contextlib.closing(results):
            for segmented in results:
                yield caught(lambda segmented=segmented: self._answer(_unless_error(segmented)))

    @abstractmethod
    def _prepare(self, requests: Iterable[Request], *, readers: int) -> Generator[_Prepared | Exception, None, None]:
        """Read and preprocess scans in order, `readers` at once ahead; yields an error for a bad one."""

    @abstractmethod
    def _segment(self, prepared: _Prepared, save_probabilities: bool, progress: Progress | None) -> _Segmented:
        """Predict and label one scan."""

    @abstractmethod
    def _answer(self, segmented: _Segmented) -> Prediction:
        """Fetch the labels, and say how they came about."""


def _unless_error(value: _Value | Exception) -> _Value:
    if isinstance(value, Exception):
        raise value
    return value
