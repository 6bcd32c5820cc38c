"""The learning rate over the epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate over the epochs, as a factor of the first one.

    nnU-Net's polynomial decay. If training stops early, the rate goes linearly to zero from there, because it is still
    high at that point.

    Attributes:
        epochs: Planned number of epochs.
        annealing_epochs: Number of epochs in which the rate goes to zero after an early stop.
        anneal_from: First of these epochs; `None` before an early stop.
    """

    epochs: int
    annealing_epochs: int
    anneal_from: int | None = None

    @property
    def last_epoch(self) -> int:
        """One past the last epoch."""
        if self.anneal_from is None:
            return self.epochs
        return min(self.epochs, self.anneal_from + self.annealing_epochs)

    def factor(self, epoch: int) -> float:
        """Factor of the first learning rate in an epoch, counted from 0."""
        if self.anneal_from is None or epoch < self.anneal_from:
            return (1 - epoch / self.epochs) ** 0.9
        left = (self.last_epoch - epoch) / (self.last_epoch - self.anneal_from + 1)
        return (1 - self.anneal_from / self.epochs) ** 0.9 * max(left, 0.0)


class EpochScheduler:
    """Sets the learning rates of both optimizers at the start of an epoch, as nnU-Net's scheduler does for one.

    Args:
        trainer: Object with `schedule`, which may change, `recipe` and `head_optimizer`.
        optimizer: Optimizer of encoder and decoder.
    """

    def __init__(self, trainer: Any, optimizer: Optimizer) -> None:
        self._trainer, self._optimizer = trainer, optimizer

    def step(self, epoch: int) -> None:
        """Begin an epoch, counted from 0."""
        factor, recipe = self._trainer.schedule.factor(epoch), self._trainer.recipe
        for optimizer, rate in (
            (self._optimizer, recipe.learning_rate),
            (self._trainer.head_optimizer, recipe.head_learning_rate),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
