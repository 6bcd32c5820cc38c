"""Engines that predictors of one process share, so that a model is loaded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine import Engine
from ..options import EngineOptions

MOST_BYTES = 2**30
"""Of checkpoints whose engines are kept; the last one is, whatever its size."""


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
_one_at_a_time = threading.Lock()


def shared_engine(source: Source, settings: Settings) -> Engine:
    """Load a model, or take it from before, where its files are still the same.

    Raises:
        EngineError: As `Engine.load`.
    """
    with _one_at_a_time:
        key = (source, settings, source.stamps())
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
        for other in [other for other in _kept if other[:2] == key[:2]]:  # its weights were changed on disk
            del _kept[other]
        engine = Engine.load(
            source.folder,
            folds=source.folds,
            checkpoint=source.checkpoint,
            device=str(settings.device),
            tile_step_size=settings.tile_step_size,
            mirror=settings.use_mirroring,
            options=EngineOptions(use_gaussian=settings.use_gaussian, sums_on_device=settings.sums_on_device),
        )
        _kept[key] = engine
        while len(_kept) > 1 and sum(map(_checkpoint_bytes, _kept)) > MOST_BYTES:
            _kept.popitem(last=False)
        return engine


def forget_engines() -> None:
    """Let go of all engines."""
    with _one_at_a_time:
        _kept.clear()


def _checkpoint_bytes(key: _Key) -> int:
    return sum(size for name, size, _ in key[2] if name.endswith(key[0].checkpoint))


def folds_of(use_folds: Sequence[int | str] | int | str) -> tuple[str, ...]:
    """Take folds in any form that nnU-Net's callers use: a tuple, a list, one name or number."""
    return tuple(map(str, (use_folds,) if isinstance(use_folds, (str, int)) else use_folds))
