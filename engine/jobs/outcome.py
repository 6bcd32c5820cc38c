"""Counts, records and announces each case of a job when it ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import OutputError
from ..files import write_json
from ..model.plans import DATASET, PLANS
from .case_record import FAILED, KEPT, Record
from .cases import CaseFiles
from .events import Done, Failed, Finished, OnEvent, Retried
from .job import Job, ModelInfo
from .records import CaseState, RecordFolder

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Outcome:
    """The outcome of a job.

    Args:
        done: Cases with results.
        skipped: Cases that had results before.
        kept: Cases with labels that this job did not make and did not replace, with the reason.
        failed: Cases that failed, with the reason.
        stopped: Why the job ended early, such as a full disk.
        left: Cases that were not begun or not finished.
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    left: list[str] = field(default_factory=list)


class Run:
    """One run of a job: it keeps the outcome and the records of the cases.

    Args:
        info: Facts about the model.
        job: Output folder and settings.
        on_event: Called with each event.
    """

    def __init__(self, info: ModelInfo, job: Job, on_event: OnEvent) -> None:
        self.outcome = Outcome()
        self._info, self._job, self._on_event = info, job, on_event
        self._record_folder = info.record_folder(job)
        self._stamps: Mapping[str, int] = {}

    def begin(self) -> None:
        """Prepare the output folder.

        Raises:
            OutputError: Where it cannot be used.
        """
        self._record_folder.begin()
        write_json(self._job.output / PLANS, self._info.plans)
        write_json(self._job.output / DATASET, self._info.dataset)

    def without_existing(self, cases: Sequence[CaseFiles]) -> dict[str, CaseFiles]:
        """Count the cases whose results stay, and return the other cases by name."""
        pending = {case.name: case for case in cases}
        for case in cases if self._job.skip_existing else ():
            found = self._state(case)
            if found.is_done:
                self.outcome.skipped.append(case.name)
            elif found.kept is not None:
                self.outcome.kept[case.name] = found.kept
            if found != CaseState():
                self._record_folder.settle(case.name, case.images, found)
            if found.is_done or found.kept is not None:
                del pending[case.name]
        self._stamps = self._record_folder.stamps()
        return pending

    def write_missing_tables(self) -> None:
        """Write the tables of all records if one is missing."""
        if not self._record_folder.has_tables():
            self._record_folder.collect()

    def count(
        self, records: Generator[Record, None, None], pending: Mapping[str, CaseFiles], *, is_last: bool
    ) -> dict[str, CaseFiles]:
        """Count each case that ends.

        Args:
            records: Record of each case when it ends; the generator is closed if an error stops the job.
            pending: The cases, by name.
            is_last: Whether failed cases are not tried again.

        Returns:
            The cases to try again, by name.
        """
        again = {}
        with contextlib.closing(records):
            for record in records:
                name = record.name
                if record.status == FAILED and record.transient and not is_last:
                    logger.warning("%s failed, and is tried again at the end: %s", name, record.error)
                    self._on_event(Retried(name=name, error=str(record.error)))
                    again[name] = pending[name]
                    continue
                if record.status == FAILED and not record.results and self._is_done_now(pending[name]):
                    # Its process was lost between writing the record and sending it.
                    record = self._record_folder.read(name) or record
                self._count_one(record)
        return again

    def stop(self, reason: str, cases: Iterable[CaseFiles]) -> None:
        """Note why the job ended early; workers may have finished some of the other cases meanwhile."""
        outcome = self.outcome
        outcome.stopped = reason
        ended = {*outcome.done, *outcome.skipped, *outcome.kept, *outcome.failed}
        for case in cases:
            if case.name not in ended:
                (outcome.done if self._is_done_now(case) else outcome.left).append(case.name)

    def finish(self) -> None:
        """Announce the end of the job, and write the tables."""
        self._on_event(Finished(done=len(self.outcome.done), failed=len(self.outcome.failed)))
        with contextlib.suppress(OutputError):  # a full disk has no room for tables either
            self._record_folder.collect()

    def _state(self, case: CaseFiles) -> CaseState:
        results, made_of = self._info.results(self._job, case.name), self._info.made_of(self._job, case)
        return self._record_folder.state(case.name, results, made_of, redo_outdated=self._job.redo_outdated)

    def _is_done_now(self, case: CaseFiles) -> bool:
        """Whether a case was done in this run."""
        is_new = self._record_folder.stamp(case.name) != self._stamps.get(case.name)
        return is_new and self._state(case).is_done

    def _count_one(self, record: Record) -> None:
        """Count a case; if its results were written, it has its record already."""
        name = record.name
        if record.status == FAILED:
            if not record.results:
                _record_failure(self._record_folder, record)
            self.outcome.failed[name] = str(record.error)
            logger.info("%s failed: %s", name, record.error)
            self._on_event(Failed(name=name, error=str(record.error)))
            return
        if record.status == KEPT:
            self.outcome.kept[name] = str(record.kept)
            return
        self.outcome.done.append(name)
        logger.info("%s: %s", name, ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in record.timings_ms.items()))
        self._on_event(Done(name=name, timings_ms=record.timings_ms, warnings=record.warnings))


def _record_failure(record_folder: RecordFolder, record: Record) -> None:
    try:
        record_folder.fail(record)
    except OutputError as error:
        if not error.of_one_file:  # such as a name that is too long for a record too
            raise
        logger.warning("%s", error)
