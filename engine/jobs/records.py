"""The records of a job's cases in the output folder, and the tables made from them.

Results get their names only when they are complete, and replace older files at that moment. The record with their sizes
and SHA-256 is written before that, and again when all results have their names. So a job may be killed at any moment:
files with a final name are complete. If a format has two files and the job was killed between them, they are complete
after the job was continued. Files that no record names as nnturbo's are not changed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import OutputError
from ..files import put_in_place, remove_abandoned, write_json, written_atomically
from ..scans.label_file import is_whole
from .case_record import DONE, FAILED, KEPT, WRITING, Fingerprint, Record
from .class_table import write_class_table
from .made_of import MadeOf

logger = logging.getLogger(__name__)

RECORDS = "records"
PREDICTIONS = "predictions.json"
SUBTYPES = "subtype_results.csv"
SCHEMA = 1

_TABLE_BEGINS = f'{{"schema": {SCHEMA}, "cases": [\n'


@dataclass(frozen=True, slots=True)
class CaseState:
    """The results of a case in the output folder: none, complete ones, or labels that must not be replaced.

    Args:
        is_done: Whether all results exist and were made from the job's inputs and models.
        kept: Why labels that this job did not make are not replaced.
    """

    is_done: bool = False
    kept: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFolder:
    """The records in an output folder; several jobs with different cases may share it.

    Args:
        output: The folder.
        file_ending: File ending of segmentations, which names in the table of classes have too.
        class_names: Classes of a case, or None for models without a classification head.
        class_probabilities: Whether the table of classes has their probabilities too.
    """

    output: Path
    file_ending: str
    class_names: Sequence[str] | None
    class_probabilities: bool = False

    def begin(self) -> None:
        """Prepare the folder.

        Raises:
            OutputError: Where the folder cannot be used, or holds tables that nnturbo did not write.
        """
        try:
            (self.output / RECORDS).mkdir(parents=True, exist_ok=True)
            for folder in (self.output, self.output / RECORDS):
                remove_abandoned(folder)
            _check_ours(self.output / PREDICTIONS)
        except OSError as error:
            raise OutputError(f"the output folder {self.output} cannot be made: {error.strerror or error}") from error

    def has_own(self) -> bool:
        """Whether a job has written to the folder before."""
        return (self.output / PREDICTIONS).exists() or next(self.records(), None) is not None

    def state(
        self, name: str, results: Sequence[Path], made_of: MadeOf | None, *, redo_outdated: bool = False
    ) -> CaseState:
        """Find out which results of a case exist.

        Labels that nnturbo did not write, or that were changed later, are kept if the file is complete. Labels of
        another model, other settings or another scan are kept too, unless `redo_outdated` is true.

        Args:
            name: Name of the case.
            results: Its files, the segmentation last.
            made_of: Inputs and models of this job, as in `Record.made_of`.
            redo_outdated: Whether nnturbo's results from other inputs or models are to be made again.
        """
        try:
            return self._judge(name, results, made_of, redo_outdated)
        except OSError as error:
            return CaseState(kept=f"{error.filename} cannot be read ({error.strerror})")

    def _judge(self, name: str, results: Sequence[Path], made_of: MadeOf | None, redo_outdated: bool) -> CaseState:
        segmentation = results[-1]
        if segmentation.is_symlink() and not segmentation.exists():
            return CaseState(kept="a link to a file that does not exist")
        there = {path.name: of for path in results if (of := Fingerprint.if_there(path)) is not None}
        if segmentation.name not in there:
            return CaseState()
        record = self.read(name) or Record(name=name, status=FAILED)
        foreign = [path for path in results if path.name in there and not record.knows(path.name, there[path.name])]
        if segmentation in foreign and not is_whole(segmentation):
            logger.warning("%s is not complete, and is made again", segmentation)
            return CaseState()
        if segmentation in foreign:
            is_changed = segmentation.name in record.results
            return CaseState(kept="changed since nnturbo wrote it" if is_changed else "not written by nnturbo")
        if foreign:
            return CaseState(kept=f"its {foreign[0].suffix} file is not what nnturbo wrote")
        is_complete = all(path.name in there and there[path.name] == record.results.get(path.name) for path in results)
        if record.status == FAILED or there[segmentation.name] != record.results.get(segmentation.name):
            return CaseState()
        if record.made_of is None or record.made_of != made_of:
            reason = (
                "made with another model, other settings or another version of the scan; --redo_outdated replaces it"
            )
            return CaseState(kept=None if redo_outdated else reason)
        return CaseState(is_done=is_complete and (self.class_names is None or self._answer(record) is not None))

    def settle(self, name: str, images: Iterable[Path], state: CaseState) -> None:
        """Record that an existing result is done, or why labels are kept."""
        before = self.read(name)
        if before is not None and (state.is_done or before.status == DONE):
            record = replace(before, status=DONE, replaces={}, kept=state.kept)
        else:
            record = Record(name=name, status=KEPT, images=tuple(map(os.fspath, images)), kept=state.kept)
        if record != before:
            self.write(record)

    def publish(self, record: Record, folder: Path, files: Sequence[str]) -> Record:
        """Move results to their names, in place of older ones, and record it.

        Args:
            record: Record of the case, without results.
            folder: Folder with the results.
            files: Names of the results, the segmentation last.

        Returns:
            The record, with the results.

        Raises:
            OutputError: Where they cannot be moved.
        """
        before, target = self._known(record.name), folder
        try:
            results = {file: Fingerprint.of(folder / file) for file in files}
            record = replace(record, results=results)
            self.write(replace(record, status=WRITING, replaces=before))
            for file in files:
                target = self.output / file
                put_in_place(folder / file, target)
            for file in before.keys() - results.keys():  # files of the replaced result
                target = self.output / file
                target.unlink()
        except OSError as error:
            raise OutputError.of(target, error) from error
        self.write(record)
        return record

    def fail(self, record: Record) -> None:
        """Record that a case failed; results of an earlier job stay, and the record names them."""
        self.write(replace(record, results=self._known(record.name)))

    def _known(self, name: str) -> dict[str, Fingerprint]:
        """Find the files of a case that exist as nnturbo wrote them."""
        record = self.read(name)
        if record is None:
            return {}
        files = {file for file in {*record.results, *record.replaces} if Path(file).name == file}
        known = {}
        for file in files:
            with contextlib.suppress(OSError):
                if record.knows(file, found := Fingerprint.of(self.output / file)):
                    known[file] = found
        return known

    def write(self, record: Record) -> None:
        """Write the record of a case, in place of an older one."""
        write_json(self._path(record.name), record.to_json())

    def collect(self) -> None:
        """Write the tables of all records in the folder, also of other jobs.

        If several jobs end at the same time, the last one to write has read the records of all.
        """
        seen = None
        while seen != (found := self.stamps()):
            seen = found
            kept = []
            with (
                written_atomically(self.output / PREDICTIONS) as temporary,
                temporary.open("w", encoding="utf-8") as file,
            ):
                file.write(_TABLE_BEGINS)
                for index, record in enumerate(self._ended()):
                    file.write(",\n" if index else "")
                    file.write(json.dumps(record.to_json(), indent=1))
                    kept += [record.name] if record.kept is not None else []
                file.write(f'\n], "kept": {json.dumps({"count": len(kept), "names": kept})}}}\n')
            if self.class_names is not None:
                self._write_subtypes()

    def read(self, name: str) -> Record | None:
        """Read the record of a case; None if it is missing or damaged, so that no file counts as its result."""
        path = self._path(name)
        try:
            record = Record.from_json(json.loads(path.read_bytes()))
            if record.name == name:
                return record
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.warning("%s is damaged; the case counts as not done", path)
        return None

    def records(self) -> Iterator[Record]:
        """Read the records of all cases, by name."""
        for path in sorted((self.output / RECORDS).glob("*.json")):
            if (record := self.read(path.stem)) is not None:
                yield record

    def _ended(self) -> Iterator[Record]:
        return (record for record in self.records() if record.status != WRITING)

    def stamps(self) -> dict[str, int]:
        """Time at which each case's record was written, in nanoseconds, by name."""
        with os.scandir(self.output / RECORDS) as entries:
            names = [entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json")]
        return {name: stamp for name in names if (stamp := self.stamp(name)) is not None}

    def stamp(self, name: str) -> int | None:
        """Time at which a case's record was written, in nanoseconds."""
        try:
            return self._path(name).stat().st_mtime_ns
        except OSError:
            return None

    def has_tables(self) -> bool:
        """Whether all tables exist."""
        return all((self.output / name).exists() for name in (PREDICTIONS, *([SUBTYPES] if self.class_names else [])))

    def _write_subtypes(self) -> None:
        answers = ((f"{record.name}{self.file_ending}", self._answer(record)) for record in self._ended())
        write_class_table(
            self.output / SUBTYPES,
            {name: answer for name, answer in answers if answer is not None},
            self.class_names or (),
            with_probabilities=self.class_probabilities,
        )

    def _answer(self, record: Record) -> tuple[int, Sequence[float]] | None:
        """Take class and probabilities from a record; None if it has none, or its classes are not the model's."""
        answer = record.classification
        if answer is None or self.class_names is None or answer.class_names != tuple(self.class_names):
            return None
        return answer.label, answer.probabilities

    def _path(self, name: str) -> Path:
        return self.output / RECORDS / f"{name}.json"


def _check_ours(path: Path) -> None:
    """Refuse to replace a file that nnturbo did not write."""
    try:
        with path.open("rb") as file:
            # Parsing a table of thousands of cases takes a second.
            if file.read(len(_TABLE_BEGINS)) == _TABLE_BEGINS.encode():
                return
        content = json.loads(path.read_bytes())
        if content["schema"] == SCHEMA and isinstance(content["cases"], list):
            return
        reason = "it has another schema"
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise OutputError(f"{path} must be what nnturbo wrote there; it cannot be read ({reason}). Move it away")
