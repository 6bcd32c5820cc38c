"""The body of a worker process on this machine, and the places of such processes: GPUs, or shares of the CPU cores."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ..options import ModelChoice

if TYPE_CHECKING:
    from .job import Job

# This module does not import torch: a process sets its cores before torch counts them.

_TILES_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Place:
    """Device and cores of a process.

    Args:
        device: As for `Engine.load`.
        cores: CPU cores that it uses; empty for all.
    """

    device: str
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    """Model that each process loads: the arguments of `job.load_predictor` without the device."""

    models: tuple[str, ...]
    choice: ModelChoice


def local_places(device: str, workers: int | None) -> list[Place]:
    """Choose the places of processes on this machine.

    Args:
        device: "cpu", one GPU as "cuda:N", or all GPUs: "cuda", or "auto" if there are any.
        workers: Number of processes; by default one for each GPU, or one on the CPU. If there are more than GPUs, they
            share them; on the CPU each gets its share of the cores.

    Raises:
        ValueError: For fewer than one worker, or more workers than CPU cores.
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
    # Signals to the process group are for the main process, which then closes the connection.
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
    """Predict cases that come through a connection, until it is closed; the body of a process."""
    _set_up(place, level)
    from ..errors import EngineError, OutputError, PredictionError
    from .events import Ready, Stop, Unusable
    from .job import load_predictor
    from .worker_pool import QueuedEngine, throttled

    try:
        engine = load_predictor(model_arguments.models, model_arguments.choice, place.device)
    except (EngineError, ValueError) as error:
        connection.send(Unusable(error))
        return
    left = False
    saying = threading.Lock()

    def say(message: Any) -> None:
        # If the connection is closed, receiving the next case shows it.
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
            os._exit(1)  # a new process may succeed
        except BaseException:
            logging.getLogger(__name__).exception("a process ends because of an unexpected error")
            os._exit(1)

    send_tiles = throttled(say, _TILES_EVERY_S, time.monotonic)
    engine_queue = QueuedEngine(engine, job, on_event)
    say(Ready(engine_queue.info))
    with contextlib.suppress(EOFError, OSError):
        while True:
            engine_queue.submit(connection.recv()).add_done_callback(ended)
    left = True
    engine_queue.close()
