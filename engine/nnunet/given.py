"""An engine around a network that a caller has, with nnU-Net's plans for all else."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.choose import choose_precision
from ..backends.torch import TorchRunner
from ..engine import Engine
from ..errors import ModelError
from ..model.folder import Model
from ..model.folds import InferenceNetwork
from ..model.given_network import GivenLogits
from ..model.plans import Plan
from ..pipeline.window import SlidingWindow
from .engines import Settings


def engine_around(
    network: nn.Module,
    parameters: Sequence[Mapping[str, Tensor]] | None,
    plan: Plan,
    mirror_axes: Sequence[int],
    settings: Settings,
    *,
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
) -> Engine:
    """Make an engine around a network.

    Args:
        network: (N, C, *patch) to (N, K, *patch), or a list that begins with that; moved to the device.
        parameters: Weights of each fold, whose logits are averaged; None takes the network as it is.
        plan: Of `plans` and `dataset`.
        mirror_axes: Axes along which views may be mirrored.
        settings: How to run.
        plans: Content of plans.json.
        dataset: Content of dataset.json.

    Raises:
        ModelError: For a network that cannot be copied, where several folds need copies.
    """
    networks = [network]
    if parameters is not None:
        original = getattr(network, "_orig_mod", network)  # of what torch.compile has wrapped
        try:
            copies = [original, *(copy.deepcopy(original) for _ in parameters[1:])]
        except Exception as error:  # of a library whose modules hold more than tensors
            raise ModelError(f"a network of {len(parameters)} folds must be one that can be copied: {error}") from error
        for each, weights in zip(copies, parameters, strict=True):
            each.load_state_dict(weights)
        networks = [network, *copies[1:]]
    whole = (
        InferenceNetwork([GivenLogits(each, plan.labels.num_outputs) for each in networks]).to(settings.device).eval()
    )
    model = Model(
        plan=plan, weights=(), folds=("given",), mirror_axes=tuple(mirror_axes), trainer="", source=Path(),
        plans=plans, dataset=dataset,
    )  # fmt: skip
    views = model.views if settings.use_mirroring else ((),)
    return Engine(
        model,
        TorchRunner(whole, settings.device, choose_precision("auto", settings.device)),
        window=SlidingWindow.of_plan(
            plan,
            tile_step_size=settings.tile_step_size,
            views=views,
            views_per_call=1 if settings.device.type == "cpu" else len(views),
            use_gaussian=settings.use_gaussian,
        ),
        sums_device=settings.device if settings.sums_on_device else torch.device("cpu"),
    )
