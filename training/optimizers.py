"""The two optimizers of a multi-task training: one for encoder and decoder, one for the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .recipe import Recipe


def make_optimizers(network: Any, recipe: Recipe) -> tuple[Optimizer, Optimizer]:
    """Make the optimizer of encoder and decoder, and the head's own.

    Args:
        network: A `MultiTaskUNet`.
        recipe: Has kind, rates and decays.
    """
    backbone, head = _parts(network)
    optimizer: Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            backbone, recipe.learning_rate, weight_decay=recipe.weight_decay, momentum=0.99, nesterov=True
        )
    else:
        optimizer = torch.optim.AdamW(backbone, recipe.learning_rate, weight_decay=recipe.weight_decay)
    return optimizer, torch.optim.AdamW(head, recipe.head_learning_rate, weight_decay=recipe.head_weight_decay)


def step_optimizers(network: Any, optimizers: Sequence[Optimizer], grad_scaler: Any, recipe: Recipe) -> None:
    """Clip the gradients of each part, and step.

    Args:
        network: Has gradients.
        optimizers: Those that step.
        grad_scaler: That scaled the loss, or `None`.
        recipe: Has the greatest norms.
    """
    backbone, head = _parts(network)
    if grad_scaler is not None:
        for optimizer in optimizers:
            grad_scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(backbone, recipe.gradient_clip)
    nn.utils.clip_grad_norm_(head, recipe.head_gradient_clip)
    for optimizer in optimizers:
        if grad_scaler is None:
            optimizer.step()
        else:
            grad_scaler.step(optimizer)
    if grad_scaler is not None:
        grad_scaler.update()


def _parts(network: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of encoder and decoder, and of the head, in lists: checkpoints know them by their position."""
    head = list(network.head.parameters())
    of_head = set(map(id, head))
    return [parameter for parameter in network.parameters() if id(parameter) not in of_head], head
