"""An exponential moving average of a network's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Follows the parameters of a network; buffers are not averaged.

    Args:
        network: The network; its parameters are where the average begins.
        decay: Decay per step, in 0 to 1.

    Note:
        average = d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)) in step t, counted from 0: at the
        beginning the average follows faster (as in TensorFlow's `ExponentialMovingAverage`).

    Attributes:
        steps: Number of steps so far.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network, self._decay = network, decay
        self._average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Follow the parameters after a step of the optimizers."""
        share = 1 - min(self._decay, (1 + self.steps) / (10 + self.steps))
        for parameter, average in zip(self._network.parameters(), self._average.values(), strict=True):
            average.lerp_(parameter, share)
        self.steps += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Give the network's state with the average in place of its parameters, also under their second names."""
        with self.applied():
            return self._network.state_dict()

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from a state whose parameters are an average over some steps."""
        for name, average in self._average.items():
            average.copy_(state[name])
        self.steps = steps

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network compute with the average for a while."""
        trained = [parameter.data for parameter in self._network.parameters()]
        try:
            for parameter, average in zip(self._network.parameters(), self._average.values(), strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, weights in zip(self._network.parameters(), trained, strict=True):
                parameter.data = weights
