"""What a job has done: a record for each case, written after its results, and the tables made of them.

A case is complete where its record says so and every result has the size and the SHA-256 that the record names. So a
job may be killed at any moment: what lies under a final name is whole, and what is not recorded is done again.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import OutputError
from .files import remove_abandoned, write_json, written_atomically

logger = logging.getLogger(__name__)

RECORDS = "records"
PREDICTIONS = "predictions.json"
SUBTYPES = "subtype_results.csv"
SCHEMA = 1
Record = dict[str, Any]
"""How one case went; `predictions.json` is a list of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """The records in an output folder; several jobs may share it, each with cases of its own.

    Args:
        output: The folder.
        file_ending: Of segmentations, which the names in the table of classes keep.
        class_names: Classes of a case, or None for models without a classification head.
    """

    output: Path
    file_ending: str
    class_names: Sequence[str] | None

    def begin(self, names: Iterable[str], *, keep: bool) -> None:
        """Make the folder ready.

        Args:
            names: Cases of this job.
            keep: Whether what earlier jobs have done of them counts; else their results and records go.

        Raises:
            OutputError: Where the folder cannot be used, or holds tables that nnturbo did not write.
        """
        try:
            (self.output / RECORDS).mkdir(parents=True, exist_ok=True)
            for folder in (self.output, self.output / RECORDS):
                remove_abandoned(folder)
            _check_ours(self.output / PREDICTIONS)
            for name in () if keep else names:
                self.forget(name)
        except OSError as error:
            raise OutputError(f"the output folder {self.output} cannot be made: {error.strerror or error}") from error

    def forget(self, name: str) -> None:
        """Remove a case's results, so that nobody takes them for those of the job that begins, and then its record."""
        record = self._read(self._path(name)) or {}
        results = record.get("results")
        for result in results if isinstance(results, dict) else ():
            if Path(result).name == result:
                (self.output / result).unlink(missing_ok=True)
        self._path(name).unlink(missing_ok=True)

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep how a case went, in place of what was known of it."""
        write_json(self._path(record["name"]), record)

    def describe(self, results: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """Describe a case's results, to know them again."""
        return {path.name: _fingerprint(path) for path in results}

    def is_complete(self, name: str, results: Iterable[Path], made_of: Mapping[str, Any]) -> bool:
        """Whether a case is done, of this, with these results unchanged, and with its class where the model gives one.

        Args:
            name: Of the case.
            results: Its files.
            made_of: What they must be made of, as its record names it.
        """
        record = self._read(self._path(name))
        if record is None or record.get("status") != "done":
            return False
        if record.get("made_of") != made_of:
            logger.warning("%s was made by another model or of another scan, or with other settings: done again", name)
            return False
        if self.class_names is not None and self._subtype(record) is None:
            return False
        known = record.get("results")
        try:
            return isinstance(known, dict) and all(known.get(path.name) == _fingerprint(path) for path in results)
        except OSError:
            return False

    def collect(self) -> None:
        """Write the tables of all records in the folder, those of other jobs among them.

        Of jobs that end at the same time, the last one to write has seen the records of all.
        """
        seen = None
        while seen != (found := self._stamps()):
            seen = found
            with written_atomically(self.output / PREDICTIONS) as temporary, temporary.open("w") as file:
                file.write(f'{{"schema": {SCHEMA}, "cases": [')
                for index, record in enumerate(self.records()):
                    file.write(",\n" if index else "\n")
                    file.write(json.dumps(record, indent=1))
                file.write("\n]}\n")
            if self.class_names is not None:
                self._write_subtypes()

    def read(self, name: str) -> Record:
        """Read the record of a case that has one."""
        record = self._read(self._path(name))
        assert record is not None  # it was there before
        return record

    def records(self) -> Iterator[Record]:
        """Read the records of all cases, by name."""
        for path in sorted((self.output / RECORDS).glob("*.json")):
            if (record := self._read(path)) is not None:
                yield record

    def _write_subtypes(self) -> None:
        rows = ((f"{record['name']}{self.file_ending}", self._subtype(record)) for record in self.records())
        with written_atomically(self.output / SUBTYPES) as temporary, temporary.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("Names", "Subtype"))
            table.writerows(sorted((name, subtype) for name, subtype in rows if subtype is not None))

    def _subtype(self, record: Mapping[str, Any]) -> str | None:
        """Take the class from a record: its name where that is a number, else its index.

        They differ for a data set that lacks the class 0. None where the record has no class, or one of other classes
        than the model's.
        """
        names = self.class_names or ()
        match record:
            case {"status": "done", "classification": {"label": int(label), "probabilities": {**probabilities}}}:
                if list(probabilities) == list(names) and 0 <= label < len(names):
                    return names[label] if names[label].isdecimal() else str(label)
        return None

    def _path(self, name: str) -> Path:
        return self.output / RECORDS / f"{name}.json"

    def _stamps(self) -> dict[str, int]:
        stamps = {}
        for path in (self.output / RECORDS).glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                stamps[path.name] = path.stat().st_mtime_ns
        return stamps

    def _read(self, path: Path) -> Record | None:
        """Read a record; what is none counts as not there, so that its case is done again."""
        try:
            record = json.loads(path.read_text())
            if record["name"] == path.stem:
                return record
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.warning("%s is damaged; the case counts as not done", path)
        return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _check_ours(path: Path) -> None:
    """Refuse to replace a file of somebody else's."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] == SCHEMA and isinstance(content["cases"], list):
            return
        reason = "its schema is another one"
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise OutputError(f"{path} must be what nnturbo wrote there; it cannot be read ({reason}). Move it away")
