"""A job shared by processes of this machine."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

from .cases import CaseFiles
from .job import Job
from .worker import Loading, Place, serve
from .worker_pool import Hand, News, SharedCrew

_SPAWN = get_context("spawn")
_WAIT_S = 1.0
_END_S = 60
"""How long a process may take to end: the file that is being written, the tile that is being computed."""


class Pool(SharedCrew[Place]):
    """A process for each place; see `batch.Crew`.

    Args:
        loading: What each loads.
        job: Where to and how.
        places: Where they work.

    Raises:
        EngineError: Where none can load its model.
    """

    def __init__(self, loading: Loading, job: Job, places: Sequence[Place]) -> None:
        self._loading, self._job = loading, job
        # One is computed and one is read; more readers and writers have more in hand.
        super().__init__(places, ahead=2 + job.readers + job.writers)

    def _hire(self, place: Place) -> Hand[Place]:
        ours, theirs = _SPAWN.Pipe()
        arguments = (theirs, self._loading, self._job, place, logging.getLogger().level)
        process = _SPAWN.Process(target=serve, args=arguments, name=f"nnturbo-{place.device}", daemon=True)
        process.start()
        theirs.close()  # so that the connection ends with the process
        return Hand(place=place, handle=(process, ours))

    def _give(self, hand: Hand[Place], case: CaseFiles) -> None:
        with contextlib.suppress(OSError):  # it is lost, and the next news says so
            hand.handle[1].send(case)

    def _news(self) -> Iterable[News[Place]]:
        by_connection = {hand.handle[1]: hand for hand in self._hands}
        news: list[News[Place]] = []
        for connection in wait(list(by_connection), timeout=_WAIT_S):
            hand = by_connection[connection]
            try:
                what, content = hand.handle[1].recv()
            except (EOFError, OSError):
                what, content = "lost", _ending(hand.handle[0])
            news.append((hand, what, content))
        return news

    def _dismiss(self, hands: Sequence[Hand[Place]]) -> None:
        for hand in hands:
            hand.handle[1].close()
        until = time.monotonic() + _END_S
        for hand in hands:
            process = hand.handle[0]
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _ending(process: Any) -> str:
    process.join(_WAIT_S)
    code = process.exitcode
    if code is None:
        return "it closed its connection"
    return f"signal {-code}" if code < 0 else f"exit status {code}"
