"""What training costs: one batch is tried before the first epoch, on the device and with the network itself."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import EngineError
from .random_state import random_state, restore_random_state


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Cost of one batch of each kind.

    Attributes:
        training_s: Forward and backward of both tasks.
        validation_s: Forward.
        memory_bytes: Peak of the device, with the optimizers' state to come; of the process on a CPU; `None` where it
            cannot be measured.
    """

    training_s: float
    validation_s: float
    memory_bytes: int | None

    def described(self, epochs: int, iterations: int, validation_iterations: int) -> str:
        """Say how long epochs take, and how much memory."""
        epoch_s = iterations * self.training_s + validation_iterations * self.validation_s
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / 2**30:.1f} GiB of memory"
        return (
            f"Estimate: {_duration(epoch_s)} an epoch and {_duration(epochs * epoch_s)} for {epochs} epochs{memory}. "
            f"It rests on one batch ({self.training_s:.3g} s), without whole cases, and with batches ready in time"
        )


def _duration(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h"), (math.inf, 24 * 3600, "days")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError("time ends")


def try_batch(trainer: Any) -> StepCost:
    """Train on one batch twice, and time the second; weights, buffers and random numbers stay as they were.

    Raises:
        EngineError: Where the device has too little memory.
    """
    before = random_state()
    buffers = [(buffer, buffer.clone()) for buffer in trainer.network.buffers()]
    configuration, device = trainer.configuration_manager, trainer.device
    shape = (configuration.batch_size, trainer.num_input_channels, *configuration.patch_size)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    trainer.network.train()
    try:
        data = torch.zeros(shape, device=device)
        with torch.no_grad():
            target = _empty_target(trainer, data)
            labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
        joint = trainer.recipe.class_loss_weight > 0
        times = [
            _timed(device, lambda: trainer.losses(data, target, labels, with_class=True, joint=joint)[0].backward())
            for _ in range(2)
        ]
        trainer.network.zero_grad(set_to_none=True)
        trainer.network.eval()
        with torch.no_grad():
            validation_s = [_timed(device, lambda: trainer.network(data)) for _ in range(2)][1]
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"a batch of {shape[0]} patches of {' x '.join(map(str, shape[2:]))} needs more memory than {device} has: "
            f"plan again with less --memory, or with another planner"
        ) from error
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        restore_random_state(before)
    return StepCost(training_s=times[1], validation_s=validation_s, memory_bytes=_peak_bytes(trainer))


def _empty_target(trainer: Any, data: Tensor) -> list[Tensor] | Tensor:
    """Make background of nnU-Net's form: labels, or a channel for each region and for ignored voxels."""
    labels, outputs = trainer.label_manager, trainer.network(data)
    channels = 1
    if labels.has_regions:
        channels = len(labels.foreground_regions) + int(labels.has_ignore_label)
    made = [
        torch.zeros((len(data), channels, *output.shape[2:]), device=data.device)
        for output in (outputs if isinstance(outputs, list | tuple) else [outputs])
    ]
    return made if isinstance(outputs, list | tuple) else made[0]


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak_bytes(trainer: Any) -> int | None:
    if trainer.device.type == "cuda":
        weights = sum(parameter.nbytes for parameter in trainer.network.parameters())
        moments = 1 if trainer.recipe.optimizer == "sgd" else 2
        return torch.cuda.max_memory_allocated(trainer.device) + moments * weights
    try:
        import resource
    except ImportError:  # on Windows
        return None
    if trainer.device.type != "cpu":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # other systems count kibibytes
