"""Distributes the cases of a job to processes, and handles processes that are lost."""

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
from ..predictor import Predictor
from .case_record import Record
from .cases import CaseFiles
from .events import Ended, Lost, OnEvent, Ready, Stop, Tiles, Unusable
from .job import Job, ModelInfo
from .run import InProcess

logger = logging.getLogger(__name__)

_Place = TypeVar("_Place")

_PATIENCE_S = 60.0
"""Time after which a job logs that it waits for a process to be ready."""


@dataclass(eq=False, kw_only=True)
class Worker(Generic[_Place]):
    """A worker process.

    Args:
        place: Place of the process, such as its device.
        handle: Process and connection, or the actor.
        ready: Whether it has loaded its model.
        given: Cases that it has, by name.
    """

    place: _Place
    handle: Any
    ready: bool = False
    given: dict[str, CaseFiles] = field(default_factory=dict)


Message = Ready | Unusable | Stop | Ended | Tiles | Record
"""A message of a worker: its state, its progress, or the record of a case."""


class WorkerPool(ABC, Generic[_Place]):
    """Gives cases to processes when they are free, and takes back the cases of lost processes; see `run.Workers`.

    Args:
        places: Places of the processes, one for each.
        ahead: Number of cases that a process has at once.

    Raises:
        EngineError: Where no process can load its model.
    """

    def __init__(self, places: Sequence[_Place], ahead: int) -> None:
        self._places, self._ahead = list(places), ahead
        self._running: list[Worker[_Place]] = []
        self._working_at = time.monotonic()
        try:
            for place in self._places:
                self._running.append(self._start(place))
            self.info = self._first_ready()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _start(self, place: _Place) -> Worker[_Place]:
        """Start a process."""

    @abstractmethod
    def _send(self, worker: Worker[_Place], case: CaseFiles) -> None:
        """Give a case to a process."""

    @abstractmethod
    def _messages(self) -> Iterable[tuple[Worker[_Place], Message]]:
        """Wait for messages, about a second."""

    @abstractmethod
    def _end(self, workers: Sequence[Worker[_Place]]) -> None:
        """End processes; their unfinished cases are dropped."""

    def _wait_for_messages(self) -> Iterator[tuple[Worker[_Place], Message]]:
        """Pass on messages, and log if the job only waits, for example for room on a cluster."""
        now = time.monotonic()
        if any(worker.ready for worker in self._running):
            self._working_at = now
        elif now - self._working_at > _PATIENCE_S:
            self._working_at = now
            logger.warning("no process is ready: waiting for %d to load their model", len(self._running))
        yield from self._messages()

    def close(self) -> None:
        """End all processes."""
        self._end(self._running)
        self._running = []

    def _first_ready(self) -> ModelInfo:
        """Wait until one process has loaded its model; the others continue to load."""
        reason: Exception = DeviceLost("there is no place for a process")
        while self._running:
            for worker, message in self._wait_for_messages():
                match message:
                    case Ready(info):
                        worker.ready = True
                        return info
                    case Unusable(error):
                        reason = error
                    case _:
                        reason = DeviceLost(f"a process ended while it loaded: {_how(message)}")
                self._drop(worker)
        raise reason

    def __call__(self, cases: Sequence[CaseFiles], *, on_event: OnEvent, alone: bool) -> Generator[Record, None, None]:
        """See `run.Workers`."""
        pending = deque(cases)
        try:
            while pending or any(worker.given for worker in self._running):
                self._refill(len(pending))
                self._distribute(pending, alone)
                for worker, message in self._wait_for_messages():
                    match message:
                        case Ready():
                            worker.ready = True
                        case Tiles():
                            on_event(message)
                        case Record(name=name):
                            del worker.given[name]
                            yield message
                        case Stop(error):
                            raise error
                        case _:
                            yield from self._lost(worker, _how(message), on_event)
        finally:
            # If the caller stopped early, cases that were given out are not needed any more.
            self._end([worker for worker in self._running if worker.given])
            self._running = [worker for worker in self._running if not worker.given]

    def _refill(self, pending: int) -> None:
        """Start processes in place of lost ones, if there are enough cases."""
        missing = list(self._places)
        for worker in self._running:
            missing.remove(worker.place)
        for place in missing[: max(0, pending - len(self._running))]:
            self._running.append(self._start(place))
        if not self._running:
            raise DeviceLost("no process is left that could load the model")

    def _distribute(self, pending: deque[CaseFiles], alone: bool) -> None:
        """Give cases to processes, fewer at once towards the end, so that all processes end at about the same time."""
        for worker in self._running:
            while worker.ready and pending:
                fair = math.ceil(len(pending) / (2 * len(self._running)))
                if len(worker.given) >= (1 if alone else max(2, min(self._ahead, fair))):
                    break
                case = pending.popleft()
                worker.given[case.name] = case
                self._send(worker, case)

    def _lost(self, worker: Worker[_Place], how: str, on_event: OnEvent) -> Generator[Record, None, None]:
        """Take back the cases of a process that has ended."""
        logger.warning("a process is lost (%s), with %s", how, ", ".join(worker.given) or "no case")
        on_event(Lost(how=how, cases=tuple(worker.given)))
        self._drop(worker)
        for case in worker.given.values():
            yield Record.failed(case, f"the process that worked on it ended ({how})", transient=True)

    def _drop(self, worker: Worker[_Place]) -> None:
        """Remove a process; if it could not load its model, no other one is started at its place."""
        self._running.remove(worker)
        self._end([worker])
        if not worker.ready:
            self._places.remove(worker.place)


def _how(message: Message) -> str:
    """Say how a worker ended."""
    return message.how if isinstance(message, Ended) else str(getattr(message, "error", message))


class QueuedEngine:
    """A loaded model that takes cases one by one, and overlaps reading, computing and writing.

    Args:
        engine: The model, or several.
        job: Output folder and settings.
        on_event: Called with `Tiles`; an exception from it ends the current case.
    """

    def __init__(self, engine: Predictor, job: Job, on_event: OnEvent) -> None:
        self._in_process = InProcess(engine, job)
        self.info = self._in_process.info
        self._on_event = on_event
        self._feed: queue.SimpleQueue[CaseFiles | None] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Record]] = {}
        self._failure: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="nnturbo-engine", daemon=True)
        self._thread.start()

    def submit(self, case: CaseFiles) -> Future[Record]:
        """Queue a case; it begins when there is room for it."""
        future: Future[Record] = Future()
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            self._waiting[case.name] = future
        self._feed.put(case)
        return future

    def close(self) -> None:
        """End; cases that have not begun are dropped."""
        self._closed = True
        self._feed.put(None)
        self._thread.join()

    def _cases(self) -> Iterator[CaseFiles]:
        while (case := self._feed.get()) is not None and not self._closed:
            yield case

    def _work(self) -> None:
        try:
            # If a result cannot be written, a reader may still wait for the next case.
            leave = functools.partial(self._feed.put, None)
            for record in self._in_process(self._cases(), on_event=self._on_event, leave=leave):
                with self._lock:
                    future = self._waiting.pop(record.name)
                future.set_result(record)
        except BaseException as error:
            with self._lock:
                self._failure = error
                waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                future.set_exception(error)


def throttled(on_event: Callable[[Tiles], None], every_s: float, clock: Callable[[], float]) -> Callable[[Tiles], None]:
    """Pass on at most one event in `every_s` seconds, but always the last tile of a case."""
    last = -math.inf

    def passed(event: Tiles) -> None:
        nonlocal last
        if event.done == event.total or clock() - last >= every_s:
            last = clock()
            on_event(event)

    return passed
