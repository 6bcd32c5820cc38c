"""Engines that predictors of one process share, so that a model is loaded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..bundles.opening import open_model
from ..engine import Engine
from ..errors import ModelError
from ..model.folder import Model
from ..model.given_network import GivenNetwork
from ..model.plans import Plan
from ..options import EngineOptions, ModelChoice

MOST_BYTES = 2**27
"""Of checkpoints whose engines are kept for later predictors: one of usual size; the last one is, at any size.

A program that runs one model after the other, as TotalSegmentator does, would else hold all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a predictor says about how to run.

    Args:
        device: Where.
        tile_step_size, use_gaussian, use_mirroring: nnU-Net's.
        sums_on_device: nnU-Net's perform_everything_on_device.
    """

    device: torch.device
    tile_step_size: float
    use_gaussian: bool
    use_mirroring: bool
    sums_on_device: bool

    @property
    def options(self) -> EngineOptions:
        """What an engine takes of it as options."""
        return EngineOptions(use_gaussian=self.use_gaussian, sums_on_device=self.sums_on_device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a predictor's weights come from.

    Args:
        folder: nnU-Net's model folder.
        folds: Those that are averaged.
        checkpoint: File name in each fold.
    """

    folder: Path
    folds: tuple[str, ...]
    checkpoint: str

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Tell the files from others under the same names: name, bytes and time of change of each."""
        files = [*self.folder.glob("*.json"), *self.folder.glob(f"fold_*/{self.checkpoint}")]
        return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files))


_Key = tuple[Source, Settings, tuple[tuple[str, int, int], ...]]

_kept: OrderedDict[_Key, Engine] = OrderedDict()
_alive: WeakValueDictionary[_Key, Engine] = WeakValueDictionary()  # those kept, and those that a predictor holds
_one_at_a_time = threading.Lock()


def shared_engine(source: Source, settings: Settings) -> Engine:
    """Load a model, or take it from before, where its files are still the same; a predictor holds what it gets.

    Raises:
        EngineError: As `Engine.load`.
    """
    with _one_at_a_time:
        key = (source, settings, source.stamps())
        if (engine := _alive.get(key)) is not None:
            if key in _kept:
                _kept.move_to_end(key)
            return engine
        for other in [other for other in _kept if other[:2] == key[:2]]:  # its weights were changed on disk
            del _kept[other]
        while _kept and sum(map(_checkpoint_bytes, (*_kept, key))) > MOST_BYTES:
            _kept.popitem(last=False)
        engine = Engine.load(
            source.folder,
            folds=source.folds,
            checkpoint=source.checkpoint,
            device=str(settings.device),
            tile_step_size=settings.tile_step_size,
            mirror=settings.use_mirroring,
            options=settings.options,
        )
        _kept[key] = _alive[key] = engine
        return engine


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
    """Make an engine around a network that a caller has.

    Args:
        network: (N, C, *patch) to (N, K, *patch), or a list that begins with that. It runs as a copy, or where it
            cannot be copied, as with TorchScript, as it is.
        parameters: Weights of each fold, whose logits are averaged; None takes those that the network has.
        plan: Of `plans` and `dataset`.
        mirror_axes: Axes along which views may be mirrored.
        settings: How to run.
        plans: Content of plans.json.
        dataset: Content of dataset.json.

    Raises:
        ModelError: For a network that cannot be copied, where several folds need copies.
    """
    given = GivenNetwork(given=network)
    if parameters is not None and len(parameters) > 1 and not given.can_be_copied:
        raise ModelError(f"a network of {len(parameters)} folds must be one that can be copied, {given.name} is not")
    model = Model(
        plan=plan, weights=tuple(parameters or ()), folds=(), mirror_axes=tuple(mirror_axes), trainer="",
        source=Path(), plans=plans, dataset=dataset, given=given,
    )  # fmt: skip
    choice = ModelChoice(
        tile_step_size=settings.tile_step_size, mirror=settings.use_mirroring, options=settings.options
    )
    return Engine.of_opened(open_model(model, choice, str(settings.device)), Path(), choice)


def _checkpoint_bytes(key: _Key) -> int:
    return sum(size for name, size, _ in key[2] if name.endswith(key[0].checkpoint))


def folds_of(use_folds: Sequence[int | str] | int | str) -> tuple[str, ...]:
    """Take folds in any form that nnU-Net's callers use: a tuple, a list, one name or number."""
    return tuple(map(str, (use_folds,) if isinstance(use_folds, (str, int)) else use_folds))
