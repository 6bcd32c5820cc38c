"""What happens in a job, as those who watch it are told, and what its workers say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .job import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happens in a job."""

    @property
    def kind(self) -> str:
        """Its name in logs: that of its class in lower case."""
        return type(self).__name__.lower()

    def to_json(self) -> dict[str, Any]:
        """Give its name and its fields."""
        return {"event": self.kind, **asdict(self)}


OnEvent = Callable[[Event], None]
"""Is called with what happens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A job begins: so many cases are to be predicted, so many have their results, so many labels are kept."""

    cases: int
    skipped: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles(Event):
    """The network has done some tiles of a case."""

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
    """A case failed, for good."""

    name: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """A case failed, and is tried again when the others are done."""

    name: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost(Event):
    """A worker ended, with cases that it had not finished."""

    how: str
    cases: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """A job ends."""

    done: int
    failed: int


# ---- what workers say, beside `Tiles` and the records of their cases -------------------------------------------------


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
    """A worker met what ends the job."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker has ended."""

    how: str
