"""Runs a job in several processes of this machine."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

from .cases import CaseFiles
from .events import Ended
from .job import Job
from .worker import ModelArguments, Place, serve
from .worker_pool import Message, Worker, WorkerPool

_SPAWN = get_context("spawn")
_WAIT_S = 1.0
_END_S = 60
"""Time that a process has to end, for the file that it writes and the tile that it computes."""


class LocalWorkers(WorkerPool[Place]):
    """Starts a process for each place; see `run.Workers`.

    Args:
        model_arguments: Model that each process loads.
        job: Output folder and settings.
        places: Device and cores of each process.

    Raises:
        EngineError: Where no process can load the model.
    """

    def __init__(self, model_arguments: ModelArguments, job: Job, places: Sequence[Place]) -> None:
        self._model_arguments, self._job = model_arguments, job
        # One case is computed and one is read; more readers and writers have more cases at once.
        super().__init__(places, ahead=2 + job.readers + job.writers)

    def _start(self, place: Place) -> Worker[Place]:
        ours, theirs = _SPAWN.Pipe()
        arguments = (theirs, self._model_arguments, self._job, place, logging.getLogger().level)
        process = _SPAWN.Process(target=serve, args=arguments, name=f"nnturbo-{place.device}", daemon=True)
        process.start()
        theirs.close()  # so that the connection ends with the process
        return Worker(place=place, handle=(process, ours))

    def _send(self, worker: Worker[Place], case: CaseFiles) -> None:
        with contextlib.suppress(OSError):  # the process is lost, and the next message reports it
            worker.handle[1].send(case)

    def _messages(self) -> Iterable[tuple[Worker[Place], Message]]:
        by_connection = {worker.handle[1]: worker for worker in self._running}
        messages: list[tuple[Worker[Place], Message]] = []
        for connection in wait(list(by_connection), timeout=_WAIT_S):
            worker = by_connection[connection]
            try:
                message = worker.handle[1].recv()
            except (EOFError, OSError):
                message = Ended(_ending(worker.handle[0]))
            messages.append((worker, message))
        return messages

    def _end(self, workers: Sequence[Worker[Place]]) -> None:
        for worker in workers:
            worker.handle[1].close()
        until = time.monotonic() + _END_S
        for worker in workers:
            process = worker.handle[0]
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
