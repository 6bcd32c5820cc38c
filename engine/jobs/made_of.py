"""What a case's results are made of: the models with their settings, and every file that was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.provenance import LabelSettings


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells a file from another one under the same name, without reading it."""

    name: str
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Look at a file."""
        status = path.stat()
        return cls(path.name, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeOf:
    """What results are made of. Two of them are equal where the same labels come out.

    Args:
        models: What decides the labels of each model.
        inputs: By the absolute path of each image, and of the labels of a previous stage: its files; None where there
            are none.
    """

    models: tuple[LabelSettings, ...]
    inputs: Mapping[str, tuple[FileStamp, ...] | None]

    def to_json(self) -> dict[str, Any]:
        """Give all of it."""
        return {
            "models": [model.to_json() for model in self.models],
            "inputs": {
                path: None if files is None else [[file.name, file.bytes, file.modified_ns] for file in files]
                for path, files in self.inputs.items()
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MadeOf:
        """Read what `to_json` gave.

        Raises:
            ValueError, TypeError, KeyError: For anything else.
        """
        inputs: dict[str, Iterable[list[Any]] | None] = dict(content["inputs"])
        return cls(
            models=tuple(LabelSettings.from_json(model) for model in content["models"]),
            inputs={
                path: None if files is None else tuple(FileStamp(*file) for file in files)
                for path, files in inputs.items()
            },
        )
