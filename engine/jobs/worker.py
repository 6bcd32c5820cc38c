"""Processes of this machine that share a job: one for each GPU, or each with a share of the CPU's cores."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .job import Job

# No torch here: a process that begins sets its cores before that counts them.

_TILES_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process works.

    Args:
        device: As for `Engine.load`.
        cores: CPU cores it keeps to; none means all.
    """

    device: str
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    """What each process loads: arguments of `job.load_predictor`, but for the device."""

    models: tuple[str, ...]
    arguments: Mapping[str, Any]


def local_places(device: str, workers: int | None) -> list[Place]:
    """Say where processes work on this machine.

    Args:
        device: "cpu", one GPU as "cuda:N", or all of them: "cuda" and, where there are any, "auto".
        workers: How many; by default one for each GPU, or a single one on the CPU. More than there are GPUs share
            them; on the CPU each gets its share of the cores.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if device in ("auto", "cuda"):
        import torch

        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
        if gpus:
            return [Place(gpus[index % len(gpus)]) for index in range(workers or len(gpus))]
    if device.startswith("cuda:") or device == "mps":
        return [Place(device)] * (workers or 1)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    count = workers or 1
    if count > len(cores):
        raise ValueError(f"there are {len(cores)} cores here, not enough for {count} workers")
    return [Place(device, tuple(cores[index::count])) for index in range(count)]


def _set_up(place: Place, level: int) -> None:
    """Prepare this process: it ignores signals, logs, and keeps to its cores."""
    # Signals to the whole group are for the process that gives cases out; it closes the connection then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    if not place.cores:
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, place.cores)
    import torch

    torch.set_num_threads(len(place.cores))


def serve(connection: Connection, model_arguments: ModelArguments, job: Job, place: Place, level: int) -> None:
    """Work on what comes through a connection until it is closed; the body of a process."""
    _set_up(place, level)
    from ..errors import EngineError, OutputError, PredictionError
    from .events import Ready, Stop, Unusable
    from .job import load_predictor
    from .worker_pool import QueuedEngine, throttled

    try:
        engine = load_predictor(model_arguments.models, device=place.device, **model_arguments.arguments)
    except (EngineError, ValueError) as error:
        connection.send(Unusable(error))
        return
    left = False
    saying = threading.Lock()

    def say(message: Any) -> None:
        # Where nobody listens any more, that shows where cases are received.
        with saying, contextlib.suppress(OSError):
            connection.send(message)

    def on_event(event: Any) -> None:
        if left:
            raise PredictionError("abandoned")
        send_tiles(event)

    def ended(future: Future[Any]) -> None:
        try:
            say(future.result())
        except OutputError as error:
            say(Stop(error))
        except EngineError as error:  # a lost device
            logging.getLogger(__name__).warning("%s", error)
            os._exit(1)  # the next process may have better luck
        except BaseException:
            logging.getLogger(__name__).exception("a process ends by an unexpected error")
            os._exit(1)

    send_tiles = throttled(say, _TILES_EVERY_S, time.monotonic)
    engine_queue = QueuedEngine(engine, job, on_event)
    say(Ready(engine_queue.info))
    with contextlib.suppress(EOFError, OSError):
        while True:
            engine_queue.submit(connection.recv()).add_done_callback(ended)
    left = True
    engine_queue.close()
