"""Runs a job of many scans: predicts each and writes its results; one bad case does not stop the others."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..errors import DeviceLost, EngineError, OutputError, PredictionError
from ..files import staging_folder, written_atomically
from ..overlap import overlapped
from ..pipeline.prediction import Prediction
from ..pipeline.steps import Request
from ..predictor import Predictor
from .case_record import DONE, FAILED, KEPT, Record
from .cases import CaseFiles
from .dicom_seg import write_dicom_seg
from .events import OnEvent, Started, Tiles
from .job import Job, ModelInfo, check_dicom, check_overwriting
from .made_of import MadeOf
from .outcome import Outcome, Run

logger = logging.getLogger(__name__)


class Workers(Protocol):
    """What predicts the cases: this process, several processes, or a cluster."""

    info: ModelInfo

    def close(self) -> None:
        """End all processes that it has started."""
        ...

    def __call__(self, cases: Sequence[CaseFiles], *, on_event: OnEvent, alone: bool) -> Generator[Record, None, None]:
        """Predict cases, write results and records of those that are done, and yield the records of all.

        Args:
            cases: Cases to predict.
            on_event: Called with `Tiles` and `Lost`.
            alone: Whether each process has one case at a time, so that it is clear which case ended it.

        Raises:
            OutputError: Where results cannot be written, so that the job must end.
        """
        ...


def predict_cases(
    engine: Predictor, cases: Sequence[CaseFiles], job: Job, *, on_event: OnEvent | None = None
) -> Outcome:
    """Run a job in this process; see `run_job`."""
    return run_job(InProcess(engine, job), cases, job, on_event=on_event)


def run_job(workers: Workers, cases: Sequence[CaseFiles], job: Job, *, on_event: OnEvent | None = None) -> Outcome:
    """Predict cases and write their results, a record of each, and `predictions.json` of all.

    A case that failed by an error that may pass (`EngineError.transient`), or whose process was lost, is tried once
    more when the others are done.

    Args:
        workers: What predicts the cases.
        cases: Cases to predict.
        job: Output folder and settings.
        on_event: Called with each event.

    Raises:
        OutputError: Where the output folder cannot be used.
        ValueError: Where two cases have the same name, or a result would replace an input.
    """
    info, on_event = workers.info, on_event or (lambda event: None)
    _check_names(cases)
    check_overwriting(info, cases, job)
    if job.dicom_seg:
        check_dicom(cases)
    run = Run(info, job, on_event)
    run.begin()
    pending = run.without_existing(cases)
    on_event(Started(cases=len(pending), skipped=len(run.outcome.skipped), kept=len(run.outcome.kept)))
    run.write_missing_tables()
    try:
        for is_last in (False, True):
            records = workers(list(pending.values()), on_event=on_event, alone=is_last)
            pending = run.count(records, pending, is_last=is_last)
    except (OutputError, DeviceLost) as error:
        # Such an error would stop the next case too.
        run.stop(str(error), cases)
    finally:
        run.finish()
    return run.outcome


def _check_names(cases: Sequence[CaseFiles]) -> None:
    if twice := sorted(name for name, count in Counter(case.name for case in cases).items() if count > 1):
        raise ValueError(f"every case must have its own output name; {', '.join(twice)} come more than once")


class InProcess:
    """Does a job in this process.

    Args:
        engine: The model, or several.
        job: Where to and how.
    """

    def __init__(self, engine: Predictor, job: Job) -> None:
        self.info = ModelInfo.of(engine)
        self._engine, self._job = engine, job

    def close(self) -> None:
        """There is nothing to end."""

    def __call__(
        self,
        cases: Iterable[CaseFiles],
        *,
        on_event: OnEvent,
        alone: bool = False,
        leave: Callable[[], None] = lambda: None,
    ) -> Generator[Record, None, None]:
        """See `Workers`; cases may come one at a time, and `leave` is called when no more of them are taken."""
        job = self._job
        names: list[str] = []
        taken: deque[tuple[CaseFiles, MadeOf]] = deque()
        left = threading.Event()

        def requests() -> Generator[Request, None, None]:
            for case in cases:
                names.append(case.name)
                taken.append((case, self.info.made_of(job, case)))
                images = case.images if len(case.images) != 1 else case.images[0]
                yield Request(images, self.info.labels_before(job, case.name))

        def tiles_done(index: int, done: int, total: int) -> None:
            if left.is_set():
                raise PredictionError("abandoned")
            on_event(Tiles(name=names[index], done=done, total=total))

        def answers() -> Generator[tuple[CaseFiles, MadeOf, Prediction | Exception], None, None]:
            predictions = self._engine.predict_many(
                requests(),
                save_probabilities=job.save_probabilities,
                readers=job.readers,
                progress=tiles_done,
            )
            with contextlib.closing(predictions):
                for prediction in predictions:
                    yield *taken.popleft(), prediction

        def leaving() -> None:
            left.set()
            leave()

        yield from overlapped(
            lambda answer: self._keep(job, *answer),
            answers(),
            threads=job.writers,
            name="nnturbo-write",
            leave=leaving,
        )

    def _keep(self, job: Job, case: CaseFiles, made_of: MadeOf, prediction: Prediction | Exception) -> Record:
        """Write one result, and then that it is there."""
        if isinstance(prediction, Prediction):
            try:
                return self._write_results(job, case, prediction, _record(case, made_of, prediction))
            except DeviceLost:
                raise
            except OutputError as error:
                if not error.of_one_file:
                    raise
                prediction = error
            except MemoryError:
                prediction = PredictionError("out of memory while its results were written", transient=True)
            except EngineError as error:
                prediction = error
            except Exception as error:  # of a library that writes
                logger.warning("unexpected error", exc_info=True)
                prediction = PredictionError(f"its results cannot be written: {type(error).__name__}: {error}")
        if not isinstance(prediction, EngineError):
            logger.error("unexpected error", exc_info=prediction)
            prediction = PredictionError(f"unexpected error: {type(prediction).__name__}: {prediction!s:.300}")
        if isinstance(prediction, PredictionError):
            self._check_devices()
        return Record.failed(case, str(prediction), transient=prediction.transient)

    def _write_results(self, job: Job, case: CaseFiles, prediction: Prediction, record: Record) -> Record:
        """Write what a case has, its labels first, and put all of it in place, its labels last."""
        results = self.info.results(job, case.name)
        *extra, segmentation = results
        record_folder = self.info.record_folder(job)
        with staging_folder(segmentation) as folder:
            prediction.save(folder / segmentation.name)
            for path in (folder / each.name for each in extra):
                if path.exists():  # written with the labels, in a format of two files
                    continue
                try:
                    odd = self._write_beside(path, prediction, case)
                    record = replace(record, warnings=(*record.warnings, *odd))
                except Exception as error:  # of a library that writes: no reason to lose the labels
                    if isinstance(error, DeviceLost) or (isinstance(error, OutputError) and not error.of_one_file):
                        raise
                    what = "DICOM segmentation" if path.suffix == ".dcm" else f"{path.suffix} file"
                    reason = str(error) if isinstance(error, EngineError) else f"{type(error).__name__} {error}".strip()
                    record = replace(
                        record,
                        status=FAILED,
                        error=f"its labels are written, but no {what}: {reason}",
                        transient=isinstance(error, MemoryError) or getattr(error, "transient", False),
                    )
            if job.skip_existing:  # somebody may have put labels there meanwhile
                found = record_folder.state(case.name, results, record.made_of, redo_outdated=job.redo_outdated)
                if found.kept is not None:
                    record_folder.settle(case.name, case.images, found)
                    return Record(name=case.name, status=KEPT, kept=found.kept)
            written = [path.name for path in results if (folder / path.name).exists()]
            return record_folder.publish(record, folder, written)

    def _write_beside(self, path: Path, prediction: Prediction, case: CaseFiles) -> tuple[str, ...]:
        """Write a file beside labels; gives what is odd about it."""
        if path.suffix == ".dcm":
            return write_dicom_seg(path, prediction, case.images[0])
        with written_atomically(path) as temporary:
            if path.suffix == ".npz":
                np.savez_compressed(temporary, probabilities=prediction.reader_probabilities)  # type: ignore[arg-type]
            else:
                temporary.write_bytes(pickle.dumps(dict(prediction.properties)))
        return ()

    def _check_devices(self) -> None:
        """Find out whether a GPU still works after a failure; errors in kernels end all that a process can do there."""
        for device in {each.device for each in self._engine.provenance}:
            if not device.startswith("cuda"):
                continue
            try:
                torch.cuda.synchronize(device)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise DeviceLost(f"{device} does not answer any more ({reason}); start again to go on") from error


def _record(case: CaseFiles, made_of: MadeOf, prediction: Prediction) -> Record:
    """Make the record of a case that is done, without its results."""
    return Record(
        name=case.name,
        status=DONE,
        images=tuple(os.fspath(path) for path in case.images),
        made_of=made_of,
        classification=prediction.classification,
        volumes_ml=prediction.volumes_ml,
        timings_ms={stage: round(ms, 3) for stage, ms in prediction.timings.items()},
        warnings=prediction.warnings,
        provenance=prediction.provenance,
    )
