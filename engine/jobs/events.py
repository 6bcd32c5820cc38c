"""The events of a job, and the messages of its workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .job import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event of a job."""

    @property
    def kind(self) -> str:
        """Name of the event in logs: the name of its class in lower case."""
        return type(self).__name__.lower()

    def to_json(self) -> dict[str, Any]:
        """Give the name and the fields."""
        return {"event": self.kind, **asdict(self)}


OnEvent = Callable[[Event], None]
"""A function that is called with each event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A job begins; numbers of cases to predict, of cases with results, and of labels that are kept."""

    cases: int
    skipped: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles(Event):
    """The network has predicted some tiles of a case."""

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Event):
    """A case has its results."""

    name: str
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """A case failed, and is not tried again."""

    name: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """A case failed, and is tried again when the others are done."""

    name: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost(Event):
    """A worker ended before it had finished its cases."""

    how: str
    cases: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """A job ends."""

    done: int
    failed: int


# ---- messages of workers, beside `Tiles` and records of cases --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded its model."""

    info: ModelInfo


@dataclass(frozen=True, slots=True)
class Unusable:
    """A worker cannot load its model."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Stop:
    """A worker met an error that ends the job."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker has ended."""

    how: str
