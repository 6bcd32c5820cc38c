"""Reads one checkpoint of a trained model, and runs nothing that it contains."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .heads import PooledClassifier, parse_temperature
from .untrusted import is_plain

UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions of torch and zipfile for damaged files."""

TEMPERATURE_KEY = "class_temperature"
"""Key of the temperature of a network's own classification head."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to parameter names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The parts of a checkpoint file that inference needs.

    Args:
        temperature: By which the class logits of the network's own head are divided.
        other_weights: Of networks beside the main one: those under `class_decoder_weights` as `class_decoder.*`.
    """

    weights: Mapping[str, Tensor]
    configuration: str
    mirror_axes: tuple[int, ...]
    trainer: str
    pooled_classifier: PooledClassifier | None
    temperature: float = 1.0
    other_weights: Mapping[str, Tensor] = field(default_factory=dict)


def _harmless_types() -> list[Any]:
    """Types of numpy's plain numbers, which nnU-Net stores in its training log; unpickling them cannot run code."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = (np.float64, np.float32, np.int64, np.int32, np.bool_)
    # Checkpoints written under numpy 1 and 2 name the same function differently.
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *{type(np.dtype(number)) for number in numbers},
    ]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint with torch's restricted unpickler, which takes only weights and plain values.

    Raises:
        CheckpointError: Where the file is damaged, holds other objects, or lacks a part that inference needs.
    """
    try:
        with torch.serialization.safe_globals(_harmless_types()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about files that are refused below
            # The file is mapped, so the optimizer's state, twice the size of the weights, is never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named.group(1)}" if named else str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} must hold weights and plain values only; {what:.160}. Nothing in it was run. If you "
            f"trust it, load it with nnU-Net and save its network_weights again"
        ) from error
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} must be a torch checkpoint; it cannot be read: {str(error).partition(chr(10))[0]:.160}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary, it holds a {type(content).__name__}")
    weights, arguments = content.get("network_weights"), content.get("init_args")
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(
            f"{path} must have tensors under 'network_weights'; it has {', '.join(map(str, content))[:160]}"
        )
    if not isinstance(arguments, dict) or not isinstance(arguments.get("configuration"), str):
        raise CheckpointError(f"{path} must name its configuration under 'init_args', as nnU-Net v2 checkpoints do")
    axes = content.get("inference_allowed_mirroring_axes")
    axes = () if axes is None else axes
    if not isinstance(axes, (tuple, list)) or not all(type(axis) is int and 0 <= axis <= 2 for axis in axes):
        raise CheckpointError(f"{path}: inference_allowed_mirroring_axes must be among 0, 1, 2, got {axes!r:.80}")
    return Checkpoint(
        weights=_own_copies(weights, path),
        configuration=arguments["configuration"],
        mirror_axes=tuple(sorted(set(axes))),
        trainer=str(content.get("trainer_name", "unknown")),
        pooled_classifier=_pooled_classifier(content, path),
        temperature=parse_temperature(content.get(TEMPERATURE_KEY, 1.0), f"{path}: {TEMPERATURE_KEY}"),
        other_weights=_own_copies(_other_weights(content), path),
    )


def _other_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the weights of networks that a program keeps beside the main one."""
    return {
        f"{key.removesuffix('_weights')}.{name}": tensor
        for key, values in content.items()
        if isinstance(key, str) and key.endswith("_weights") and key != "network_weights" and isinstance(values, dict)
        for name, tensor in values.items()
        if isinstance(tensor, Tensor)
    }


def _pooled_classifier(content: Mapping[str, Any], path: Path) -> PooledClassifier | None:
    if content.get("pooled_classifier") is None:
        return None
    try:
        return PooledClassifier.parse(content["pooled_classifier"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _own_copies(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Copy weights from the mapped file as float32; shared tensors are copied once, and prefixes are removed.

    Raises:
        CheckpointError: For tensors that cannot be weights, or that claim more memory than the file holds.
    """
    for name, tensor in weights.items():
        if not isinstance(name, str) or not is_plain(tensor):
            raise CheckpointError(f"{path} must hold plain, dense weights, which {name!r:.80} is not")
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    named = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path} must hold finite weights, {name!r:.80} has NaN or infinity")
            copies[key] = tensor.detach().to(torch.float32, copy=True).contiguous()
        while name.startswith(WRAPPER_PREFIXES):
            name = name[name.index(".") + 1 :]
        named[name] = copies[key]
    return named
