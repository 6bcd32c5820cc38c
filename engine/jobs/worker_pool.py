"""Processes that share a job: who gets which case, and what happens where one of them is lost."""

from __future__ import annotations

import functools
import logging
import math
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..errors import DeviceLost
from .cases import CaseFiles
from .job import About, Job, Predictor
from .records import FAILED, Record
from .run import Here, Tell

logger = logging.getLogger(__name__)

_Place = TypeVar("_Place")

_PATIENCE_S = 60.0
"""After that a job says that it waits for a process to be ready."""


@dataclass(eq=False, kw_only=True)
class Hand(Generic[_Place]):
    """A process that works.

    Args:
        place: Where it does.
        handle: What is known of it to those who talk to it.
        ready: Whether it has loaded its model.
        given: The cases it has, by name.
    """

    place: _Place
    handle: Any
    ready: bool = False
    given: dict[str, CaseFiles] = field(default_factory=dict)


News = tuple[Hand[_Place], str, Any]
"""A process, what happened, and what to know of it: "ready" (`About`), "tiles" (an event), "record" (a `Record`),
"stop" (the error that ends the job), "unusable" (why it cannot load), "lost" (how it ended)."""


class SharedCrew(ABC, Generic[_Place]):
    """Gives cases out to processes as they get free, and takes those of lost ones back; see `batch.Crew`.

    Args:
        places: Where to have a process each.
        ahead: How many cases a process has at once.

    Raises:
        EngineError: Where no process can load its model.
    """

    def __init__(self, places: Sequence[_Place], ahead: int) -> None:
        self._places, self._ahead = list(places), ahead
        self._hands: list[Hand[_Place]] = []
        self._working_at = time.monotonic()
        try:
            for place in self._places:
                self._hands.append(self._hire(place))
            self.about = self._first_ready()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _hire(self, place: _Place) -> Hand[_Place]:
        """Start a process."""

    @abstractmethod
    def _give(self, hand: Hand[_Place], case: CaseFiles) -> None:
        """Let a process do a case."""

    @abstractmethod
    def _news(self) -> Iterable[News[_Place]]:
        """Wait for what happens, for a second or so."""

    @abstractmethod
    def _dismiss(self, hands: Sequence[Hand[_Place]]) -> None:
        """End processes; what they have not finished is abandoned."""

    def _listen(self) -> Iterator[News[_Place]]:
        """Pass news on, and say so where the job only waits, such as for room on a cluster."""
        now = time.monotonic()
        if any(hand.ready for hand in self._hands):
            self._working_at = now
        elif now - self._working_at > _PATIENCE_S:
            self._working_at = now
            logger.warning("no process is ready: waiting for %d to load their model", len(self._hands))
        yield from self._news()

    def close(self) -> None:
        """End all processes."""
        self._dismiss(self._hands)
        self._hands = []

    def _first_ready(self) -> About:
        """Wait until one process has its model; the others go on loading."""
        reason: Exception = DeviceLost("there is no place to work at")
        while self._hands:
            for hand, what, content in self._listen():
                if what == "ready":
                    hand.ready = True
                    return content
                reason = content if what == "unusable" else DeviceLost(f"a process ended while it loaded: {content}")
                self._drop(hand)
        raise reason

    def __call__(self, cases: Sequence[CaseFiles], *, tell: Tell, alone: bool) -> Generator[Record, None, None]:
        """See `batch.Crew`."""
        pending = deque(cases)
        try:
            while pending or any(hand.given for hand in self._hands):
                self._refill(len(pending))
                self._share(pending, alone)
                for hand, what, content in self._listen():
                    if what == "ready":
                        hand.ready = True
                    elif what == "tiles":
                        tell(content)
                    elif what == "record":
                        del hand.given[content.name]
                        yield content
                    elif what == "stop":
                        raise content
                    else:
                        yield from self._lost(hand, str(content), tell)
        finally:
            # Whoever left before the end wants no more of it.
            self._dismiss([hand for hand in self._hands if hand.given])
            self._hands = [hand for hand in self._hands if not hand.given]

    def _refill(self, pending: int) -> None:
        """Start new processes in place of those that are gone, as far as there is work."""
        missing = list(self._places)
        for hand in self._hands:
            missing.remove(hand.place)
        for place in missing[: max(0, pending - len(self._hands))]:
            self._hands.append(self._hire(place))
        if not self._hands:
            raise DeviceLost("no process is left that could load the model")

    def _share(self, pending: deque[CaseFiles], alone: bool) -> None:
        """Give cases out, fewer at once towards the end, so that all processes end at the same time."""
        for hand in self._hands:
            while hand.ready and pending:
                fair = math.ceil(len(pending) / (2 * len(self._hands)))
                if len(hand.given) >= (1 if alone else max(2, min(self._ahead, fair))):
                    break
                case = pending.popleft()
                hand.given[case.name] = case
                self._give(hand, case)

    def _lost(self, hand: Hand[_Place], how: str, tell: Tell) -> Generator[Record, None, None]:
        """Take back the cases of a process that has ended."""
        logger.warning("a process is lost (%s), with %s", how, ", ".join(hand.given) or "no case")
        tell({"event": "lost", "how": how, "cases": list(hand.given)})
        self._drop(hand)
        for case in hand.given.values():
            yield Record(
                name=case.name,
                status=FAILED,
                images=tuple(str(path) for path in case.images),
                error=f"the process that worked on it ended ({how})",
                transient=True,
            )

    def _drop(self, hand: Hand[_Place]) -> None:
        """Forget a process; where it could not load, there will not be another one."""
        self._hands.remove(hand)
        self._dismiss([hand])
        if not hand.ready:
            self._places.remove(hand.place)


class Resident:
    """A loaded model that takes cases one at a time, and works on several steps of them at once.

    Args:
        engine: The model, or several.
        job: Where to and how.
        tell: Is told of tiles; what it raises ends the case at hand.
    """

    def __init__(self, engine: Predictor, job: Job, tell: Tell) -> None:
        self._here = Here(engine, job)
        self.about = self._here.about
        self._tell = tell
        self._feed: queue.SimpleQueue[CaseFiles | None] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Record]] = {}
        self._failure: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="nnturbo-resident", daemon=True)
        self._thread.start()

    def submit(self, case: CaseFiles) -> Future[Record]:
        """Begin with a case when there is room for it."""
        future: Future[Record] = Future()
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            self._waiting[case.name] = future
        self._feed.put(case)
        return future

    def close(self) -> None:
        """End; cases that were not begun are not done any more."""
        self._closed = True
        self._feed.put(None)
        self._thread.join()

    def _cases(self) -> Iterator[CaseFiles]:
        while (case := self._feed.get()) is not None and not self._closed:
            yield case

    def _work(self) -> None:
        try:
            # A reader may wait for the next case when the first result cannot be written.
            leave = functools.partial(self._feed.put, None)
            for record in self._here(self._cases(), tell=self._tell, leave=leave):
                with self._lock:
                    future = self._waiting.pop(record.name)
                future.set_result(record)
        except BaseException as error:
            with self._lock:
                self._failure = error
                waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                future.set_exception(error)


def throttled(tell: Tell, every_s: float, clock: Callable[[], float]) -> Tell:
    """Pass events on no more often than that, but always the last tile of a case."""
    last = -math.inf

    def passed(event: Any) -> None:
        nonlocal last
        if event["done"] == event["total"] or clock() - last >= every_s:
            last = clock()
            tell(event)

    return passed
