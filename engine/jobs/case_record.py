"""The record of one case: its status, its result files, and the inputs and models that they were made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import sha256
from ..model.classification import Classification
from ..model.provenance import Provenance, provenance_json, read_provenance
from .made_of import MadeOf

if TYPE_CHECKING:
    from .cases import CaseFiles

WRITING, DONE, FAILED, KEPT = "writing", "done", "failed", "kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Size and SHA-256 of a file, by which it is recognised."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """Compute it for a file."""
        return cls(bytes=path.stat().st_size, sha256=sha256(path))

    @classmethod
    def if_there(cls, path: Path) -> Fingerprint | None:
        """Compute it for a file; None if the file does not exist."""
        try:
            return cls.of(path)
        except FileNotFoundError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of one case; `predictions.json` is a list of them.

    Args:
        name: Name of the case.
        status: "done"; "failed"; "kept": there are labels that nnturbo did not make; "writing": results are being moved
            to their names.
        images: Files or folder of the scan.
        results: Files in the output folder that nnturbo wrote, by name; for a failed case, files of an earlier job.
        replaces: While results are moved to their names: the files that they replace.
        made_of: Models with their settings, and size and time of every input file; also None for results of a version
            that recorded other facts.
        error: Why a case failed.
        transient: Whether a second try may succeed; not written to JSON.
        kept: Why `--continue_prediction` did not replace labels that this job did not make.
        classification, volumes_ml, timings_ms, warnings: As in `Prediction`.
        provenance: As in `Prediction`; a mapping for a result of a version that recorded other facts.
    """

    name: str
    status: str
    images: tuple[str, ...] = ()
    results: Mapping[str, Fingerprint] = field(default_factory=dict)
    replaces: Mapping[str, Fingerprint] = field(default_factory=dict)
    made_of: MadeOf | None = None
    error: str | None = None
    transient: bool = False
    kept: str | None = None
    classification: Classification | None = None
    volumes_ml: Mapping[str, float] | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    provenance: tuple[Provenance, ...] | Mapping[str, Any] = ()

    @classmethod
    def failed(cls, case: CaseFiles, error: str, *, transient: bool = False) -> Record:
        """Make the record of a case that failed."""
        images = tuple(os.fspath(path) for path in case.images)
        return cls(name=case.name, status=FAILED, images=images, error=error, transient=transient)

    def knows(self, file: str, fingerprint: Fingerprint) -> bool:
        """Whether nnturbo wrote a file, for this result or for the result that it replaces."""
        return fingerprint in (self.results.get(file), self.replaces.get(file))

    def to_json(self) -> dict[str, Any]:
        """Give the fields that are not empty, and those that the status always has."""
        made_of, answer, provenance = self.made_of, self.classification, self.provenance
        content = {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "results": {file: asdict(of) for file, of in self.results.items()},
            "replaces": {file: asdict(of) for file, of in self.replaces.items()},
            "made_of": None if made_of is None else made_of.to_json(),
            "classification": None if answer is None else answer.to_json(),
            "provenance": provenance_json(provenance) if isinstance(provenance, tuple) and provenance else provenance,
        }
        del content["transient"]
        always = ("name", *_ALWAYS[self.status])
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in content.items()
            if name in always or not (value is None or len(value) == 0)
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Record:
        """Read the output of `to_json`.

        Raises:
            ValueError, TypeError: For any other content.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"a record must be a JSON object, got {type(content).__name__}")
        known = {each.name for each in fields(cls)} - {"transient"}
        values = {name: value for name, value in content.items() if name in known}
        for name in ("results", "replaces"):
            if name in values:
                values[name] = {file: Fingerprint(**of) for file, of in dict(values[name]).items()}
        for name in ("images", "warnings"):
            if name in values:
                values[name] = tuple(map(str, values[name]))
        for name, read in _READ.items():
            if name in values:
                try:
                    values[name] = read(values[name])
                except (KeyError, TypeError, ValueError):  # another version recorded other facts
                    values[name] = dict(values[name]) if name == "provenance" else None
        if values.get("status") not in _ALWAYS or not isinstance(values.get("name"), str):
            raise ValueError("a record must have a name and a known status")
        return cls(**values)


_READ: dict[str, Callable[[Any], Any]] = {
    "made_of": MadeOf.from_json,
    "classification": Classification.from_json,
    "provenance": read_provenance,
}
"""Values of a record that are objects of their own."""

_ALWAYS = {
    WRITING: ("images", "results"),
    DONE: ("images", "results", "timings_ms", "warnings", "volumes_ml"),
    FAILED: ("images", "error"),
    KEPT: ("images", "kept"),
}
"""By status: fields that `to_json` gives also if they are empty."""
