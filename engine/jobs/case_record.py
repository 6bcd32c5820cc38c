"""The record of one case: its status, its result files, and the inputs and models that they were made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import sha256
from .made_of import MadeOf

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
        classification, volumes_ml, timings_ms, warnings, provenance: As in `Prediction`.
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
    classification: Mapping[str, Any] | None = None
    volumes_ml: Mapping[str, float] | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None

    def knows(self, file: str, fingerprint: Fingerprint) -> bool:
        """Whether nnturbo wrote a file, for this result or for the result that it replaces."""
        return fingerprint in (self.results.get(file), self.replaces.get(file))

    def to_json(self) -> dict[str, Any]:
        """Give the fields that are not empty, and those that the status always has."""
        content: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool):  # `transient` matters only while the job runs
                continue
            if isinstance(value, MadeOf):
                value = value.to_json()
            is_empty = value is None or len(value) == 0
            if is_empty and each.name not in ("name", *_ALWAYS[self.status]):
                continue
            content[each.name] = list(value) if isinstance(value, tuple) else value
        for name in content.keys() & {"results", "replaces"}:
            content[name] = {file: asdict(of) for file, of in content[name].items()}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Record:
        """Read the output of `to_json`.

        Raises:
            ValueError, TypeError: For any other content.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"a record must be a JSON object, got {type(content).__name__}")
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        for name in ("results", "replaces"):
            if name in values:
                values[name] = {file: Fingerprint(**of) for file, of in dict(values[name]).items()}
        for name in ("images", "warnings"):
            if name in values:
                values[name] = tuple(map(str, values[name]))
        if "made_of" in values:
            values["made_of"] = _made_of(values["made_of"])
        if values.get("status") not in _ALWAYS or not isinstance(values.get("name"), str):
            raise ValueError("a record must have a name and a known status")
        return cls(**values)


def _made_of(content: Any) -> MadeOf | None:
    try:
        return MadeOf.from_json(content)
    except (KeyError, TypeError, ValueError):
        return None


_ALWAYS = {
    WRITING: ("images", "results"),
    DONE: ("images", "results", "timings_ms", "warnings", "volumes_ml"),
    FAILED: ("images", "error"),
    KEPT: ("images", "kept"),
}
"""By status: fields that `to_json` gives also if they are empty."""
