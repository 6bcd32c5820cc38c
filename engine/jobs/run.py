"""A job of many scans: predict each, write what comes out; one bad case does not stop the others."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import DeviceLost, EngineError, OutputError, PredictionError
from ..files import staging_folder, write_json, written_atomically
from ..model.classification import Classification
from ..model.provenance import provenance_json
from ..overlap import overlapped
from ..pipeline.prediction import Prediction
from ..pipeline.steps import Request
from ..predictor import Predictor
from .case_record import DONE, FAILED, KEPT, Record
from .cases import CaseFiles
from .dicom_seg import write_dicom_seg
from .events import Done, Failed, Finished, OnEvent, Retried, Started, Tiles
from .job import DATASET, PLANS, Job, ModelInfo, check_dicom, check_overwriting
from .made_of import MadeOf
from .records import CaseState, RecordFolder

logger = logging.getLogger(__name__)


class Workers(Protocol):
    """Who predicts: this process, several, or a cluster."""

    info: ModelInfo

    def close(self) -> None:
        """End what it has started."""
        ...

    def __call__(self, cases: Sequence[CaseFiles], *, on_event: OnEvent, alone: bool) -> Generator[Record, None, None]:
        """Predict cases, write results and records of those that are done, and give the records of all.

        Args:
            cases: What to predict.
            on_event: Called with tiles and losses.
            alone: Whether each process has one case at a time, so that it is clear which one ended it.

        Raises:
            OutputError: Where results cannot be written, so that there is no use in going on.
        """
        ...


@dataclass(slots=True)
class Outcome:
    """How a job went.

    Args:
        done: Cases with results.
        skipped: Cases that had theirs before.
        kept: Cases whose labels are left as they are although this job would not have made them, with the reason.
        failed: Cases that failed, with the reason.
        stopped: What ended the job before its time, such as a full disk.
        left: Cases that it did not come to.
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    left: list[str] = field(default_factory=list)


def predict_cases(
    engine: Predictor, cases: Sequence[CaseFiles], job: Job, *, on_event: OnEvent | None = None
) -> Outcome:
    """Do a job in this process; see `run_job`."""
    return run_job(InProcess(engine, job), cases, job, on_event=on_event)


def run_job(workers: Workers, cases: Sequence[CaseFiles], job: Job, *, on_event: OnEvent | None = None) -> Outcome:
    """Predict cases and write what comes out, with a record of each and `predictions.json` of all.

    A case that failed by what may pass (`EngineError.transient`), or whose process was lost, is tried once more when
    the others are done.

    Args:
        workers: Who does it.
        cases: What to predict.
        job: Where to and how.
        on_event: Called with what happens.

    Raises:
        OutputError: Where the output folder cannot be used.
        ValueError: Where two cases have the same name, or a result would replace what is read.
    """
    info, on_event = workers.info, on_event or (lambda event: None)
    if twice := sorted(name for name, count in Counter(case.name for case in cases).items() if count > 1):
        raise ValueError(f"every case must have its own output name; {', '.join(twice)} come more than once")
    check_overwriting(info, cases, job)
    if job.dicom_seg:
        check_dicom(cases)
    record_folder = info.record_folder(job)
    record_folder.begin()
    write_json(job.output / PLANS, info.plans)
    write_json(job.output / DATASET, info.dataset)

    def state(case: CaseFiles) -> CaseState:
        results = info.results(job, case.name)
        return record_folder.state(case.name, results, info.made_of(job, case), redo_outdated=job.redo_outdated)

    outcome = Outcome()
    if job.skip_existing:
        for case in cases:
            found = state(case)
            if found.is_done:
                outcome.skipped.append(case.name)
            elif found.kept is not None:
                outcome.kept[case.name] = found.kept
            if found != CaseState():
                record_folder.settle(case.name, case.images, found)
    left = {*outcome.skipped, *outcome.kept}
    pending = {case.name: case for case in cases if case.name not in left}
    before = record_folder.stamps()

    def is_done_now(case: CaseFiles) -> bool:
        return record_folder.stamp(case.name) != before.get(case.name) and state(case).is_done

    on_event(Started(cases=len(pending), skipped=len(outcome.skipped), kept=len(outcome.kept)))
    if not record_folder.has_tables():
        record_folder.collect()
    try:
        for last in (False, True):
            again = {}
            records = workers(list(pending.values()), on_event=on_event, alone=last)
            with contextlib.closing(records):
                for record in records:
                    name = record.name
                    if record.status == FAILED and record.transient and not last:
                        logger.warning("%s failed, and is tried again at the end: %s", name, record.error)
                        on_event(Retried(name=name, error=str(record.error)))
                        again[name] = pending[name]
                        continue
                    if record.status == FAILED and not record.results and is_done_now(pending[name]):
                        # Its process was lost between writing the record and sending it.
                        record = record_folder.read(name) or record
                    _note(record_folder, record, outcome, on_event)
            pending = again
    except (OutputError, DeviceLost) as error:
        # What stops one case stops the next one too; some may have been finished meanwhile.
        outcome.stopped = str(error)
        ended = {*outcome.done, *left, *outcome.failed}
        for case in cases:
            if case.name not in ended:
                (outcome.done if is_done_now(case) else outcome.left).append(case.name)
    finally:
        on_event(Finished(done=len(outcome.done), failed=len(outcome.failed)))
        with contextlib.suppress(OutputError):  # a full disk does not take tables either
            record_folder.collect()
    return outcome


def _note(record_folder: RecordFolder, record: Record, outcome: Outcome, on_event: OnEvent) -> None:
    """Count a case; those whose results were written have their records already."""
    name = record.name
    if record.status == FAILED:
        if not record.results:
            _record_failure(record_folder, record)
        outcome.failed[name] = str(record.error)
        logger.info("%s failed: %s", name, record.error)
        on_event(Failed(name=name, error=str(record.error)))
        return
    if record.status == KEPT:
        outcome.kept[name] = str(record.kept)
        return
    outcome.done.append(name)
    logger.info("%s: %s", name, ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in record.timings_ms.items()))
    on_event(Done(name=name, timings_ms=record.timings_ms, warnings=record.warnings))


def _record_failure(record_folder: RecordFolder, record: Record) -> None:
    try:
        record_folder.fail(record)
    except OutputError as error:
        if not error.of_one_file:  # a name that is too long for a record too
            raise
        logger.warning("%s", error)


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

        def answers() -> Generator[tuple[CaseFiles, MadeOf, Prediction | EngineError], None, None]:
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

    def _keep(self, job: Job, case: CaseFiles, made_of: MadeOf, prediction: Prediction | EngineError) -> Record:
        """Write one result, and then that it is there."""
        images = tuple(os.fspath(path) for path in case.images)
        if isinstance(prediction, Prediction):
            try:
                return self._write_results(job, case, prediction, Record(
                    name=case.name, status=DONE, images=images, made_of=made_of, **_answers(prediction)
                ))  # fmt: skip
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
        if isinstance(prediction, PredictionError):
            self._check_devices()
        return Record(
            name=case.name, status=FAILED, images=images, error=str(prediction), transient=prediction.transient
        )

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
                    record = replace(record, status=FAILED, error=f"its labels are written, but no {what}: {reason}")
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


def _answers(prediction: Prediction) -> dict[str, Any]:
    answer = prediction.classification
    return {
        "classification": None if answer is None else _describe(answer),
        "volumes_ml": prediction.volumes_ml,
        "timings_ms": {stage: round(ms, 3) for stage, ms in prediction.timings.items()},
        "warnings": prediction.warnings,
        "provenance": provenance_json(prediction.provenance),
    }


def _describe(answer: Classification) -> dict[str, Any]:
    return {
        "label": answer.label,
        "name": answer.name,
        "probabilities": dict(zip(answer.class_names, answer.probabilities, strict=True)),
        "logits": list(answer.logits),
    }
