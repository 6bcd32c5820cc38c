"""Runs a job on the machines of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BackendUnavailable, EngineError, OutputError
from .case_record import Record
from .cases import CaseFiles
from .events import Ended, Ready, Stop, Unusable
from .job import Job, ModelInfo, load_predictor
from .worker import ModelArguments
from .worker_pool import Message, QueuedEngine, Worker, WorkerPool

_WAIT_S = 1.0
_CONNECT_S = 5.0


class Actor:
    """A loaded model on a machine of the cluster.

    Args:
        model_arguments: Model to load.
        job: Output folder, on storage that all machines share, and settings.
        device: As for `Engine.load`.
        cores: CPU cores to use.
    """

    def __init__(self, model_arguments: ModelArguments, job: Job, device: str, cores: int) -> None:
        self._model_arguments, self._job, self._device, self._cores = model_arguments, job, device, cores

    def load(self) -> ModelInfo:
        """Load the model. This is not in the constructor, because Ray passes on only the errors of methods."""
        import torch

        torch.set_num_threads(self._cores)
        engine = load_predictor(self._model_arguments.models, self._model_arguments.choice, self._device)
        self._engine_queue = QueuedEngine(engine, self._job, lambda event: None)
        return self._engine_queue.info

    def predict(self, case: CaseFiles) -> Record:
        """Predict a case; several calls at once overlap reading, computing and writing."""
        return self._engine_queue.submit(case).result()


class RayWorkers(WorkerPool[int]):
    """Starts actors on the GPUs of a Ray cluster, or each on some CPU cores; see `run.Workers`.

    Args:
        address: Address of the cluster, "auto" for the cluster of this machine, or "local" for a new one on this
            machine, which ends with the job.
        model_arguments: Model that each actor loads; every machine must have its files.
        job: Output folder and settings.
        device: "cuda" for an actor per GPU, "cpu", or "auto": "cuda" if the cluster has GPUs.
        workers: Number of actors; by default as many as the cluster has room for.
        cores: CPU cores of each actor.

    Raises:
        BackendUnavailable: Where Ray is not installed, or the cluster does not answer or has no room.
        EngineError: Where no actor can load the model.
    """

    def __init__(
        self,
        address: str,
        model_arguments: ModelArguments,
        job: Job,
        *,
        device: str = "auto",
        workers: int | None = None,
        cores: int = 4,
    ) -> None:
        self._ray = _connected(address)
        # Other machines have other working directories.
        self._model_arguments = replace(
            model_arguments, models=tuple(os.path.abspath(model) for model in model_arguments.models)
        )
        before = None if job.previous_stage is None else job.previous_stage.absolute()
        self._job, self._cores = replace(job, output=job.output.absolute(), previous_stage=before), cores
        try:
            room = self._ray.cluster_resources()
            gpus = int(room.get("GPU", 0))
            self._device = ("cuda" if gpus else "cpu") if device == "auto" else device
            if self._device not in ("cpu", "cuda"):
                raise ValueError(f"a cluster's device must be auto, cpu or cuda, got {device!r}")
            most = gpus if self._device == "cuda" else int(room.get("CPU", 0)) // cores
            count = most if workers is None else workers
            if not 1 <= count <= most:
                raise BackendUnavailable(
                    f"the cluster has room for {most} processes ({gpus} GPUs, {room.get('CPU', 0):.0f} CPU cores, "
                    f"{cores} cores for each), not for {count}"
                )
            self._calls: dict[Any, tuple[Worker[int], CaseFiles | None]] = {}
            super().__init__(range(count), ahead=2 + job.readers + job.writers)
        except BaseException:
            self._ray.shutdown()
            raise

    def close(self) -> None:
        """End the actors, and the connection."""
        super().close()
        self._ray.shutdown()

    def _start(self, place: int) -> Worker[int]:
        gpus = 1 if self._device == "cuda" else 0
        remote = self._ray.remote(
            num_cpus=self._cores, num_gpus=gpus, max_concurrency=self._ahead + 1, max_restarts=0, max_task_retries=0
        )(Actor)
        actor = remote.remote(self._model_arguments, self._job, self._device, self._cores)
        worker = Worker(place=place, handle=actor)
        self._calls[actor.load.remote()] = (worker, None)
        return worker

    def _send(self, worker: Worker[int], case: CaseFiles) -> None:
        absolute = replace(case, images=tuple(path.absolute() for path in case.images))
        self._calls[worker.handle.predict.remote(absolute)] = (worker, case)

    def _messages(self) -> Iterable[tuple[Worker[int], Message]]:
        finished, _ = self._ray.wait(list(self._calls), timeout=_WAIT_S)
        for call in finished:
            if call not in self._calls:  # its actor was removed meanwhile
                continue
            worker, case = self._calls.pop(call)
            yield worker, self._answer(call, case)

    def _answer(self, call: Any, case: CaseFiles | None) -> Message:
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(call)
        except errors.RayTaskError as error:
            if isinstance(error.cause, OutputError):
                return Stop(error.cause)
            if case is None and isinstance(error.cause, (EngineError, ValueError)):
                return Unusable(error.cause)
            return Ended(f"{error.cause!r:.200}")
        except errors.RayError as error:  # the actor, its process or its machine failed
            return Ended(str(error).strip().partition("\n")[0])
        return Ready(answer) if case is None else answer

    def _end(self, workers: Sequence[Worker[int]]) -> None:
        for worker in workers:
            self._calls = {call: of for call, of in self._calls.items() if of[0] is not worker}
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker.handle)


def _connected(address: str) -> Any:
    """Connect to a cluster."""
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable("a cluster needs Ray: pip install 'nnturbo[ray]'") from error
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdecimal():  # Ray would wait for minutes
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        if address == "local":
            ray.init(include_dashboard=False, logging_level=logging.ERROR)
        else:
            ray.init(address=address, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackendUnavailable(
            f"no Ray cluster answers at {address} ({reason:.200}); start one with ray start --head, or give local"
        ) from error
    return ray
