"""The declared description of a classification head that another program trained: classification_head.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from .classification import DESCRIBED, ClassificationScheme, is_indices

HEAD_KEY = "classification_head"
"""Name of the description in plans.json, and of the file beside it."""

LAYERS: dict[str, tuple[str, ...]] = {
    "linear": ("key",),
    "conv": ("key", "padding"),
    "batch_norm": ("key", "eps"),
    "layer_norm": ("key", "eps"),
    "instance_norm": ("key", "eps"),
    "group_norm": ("key", "eps", "groups"),
    "relu": (),
    "leaky_relu": ("slope",),
    "gelu": (),
    "silu": (),
    "tanh": (),
    "dropout": (),
    "flatten": (),
    "pool": ("how", "grid", "key", "p", "eps", "p_range", "least_sum", "least_share"),
}
"""Kinds of layers, and what can be said about each."""

NEEDS_KEY = ("linear", "conv", "batch_norm", "layer_norm", "group_norm")
POOLINGS = ("average", "max", "gem", "masked_average", "masked_gem")
COMBINATIONS = ("sum", "max")
MOST_LAYERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of a head.

    Args:
        kind: One of `LAYERS`.
        key: Name of its weights in the checkpoint, without ".weight"; for "pool", of the exponent p.
        padding: Of a convolution; by default half its kernel.
        eps: Of a norm; for "pool" the least value before the exponent 1 / p.
        groups: Of a group norm.
        slope: Of a leaky ReLU.
        how: Of "pool", one of `POOLINGS`.
        grid: Of "average" and "max": voxels by axis that are left; without it a vector is.
        p: Exponent of "gem" and "masked_gem" that is not in the checkpoint.
        p_range: Least and greatest exponent; others are clamped to them.
        least_sum: Least sum of a mask that is divided by.
        least_share: Mean of a mask, below which the average over all voxels is taken instead.
    """

    kind: str
    key: str | None = None
    padding: int | None = None
    eps: float | None = None
    groups: int = 1
    slope: float = 0.01
    how: str = "average"
    grid: tuple[int, ...] | None = None
    p: float = 3.0
    p_range: tuple[float, float] | None = None
    least_sum: float = 1e-6
    least_share: float = 0.0

    def __post_init__(self) -> None:
        """Check all values, because descriptions may come from strangers."""
        sizes = self.grid if self.grid is not None else (1,)
        numbers = (0.0 if self.eps is None else self.eps, self.slope, self.p, self.least_sum, self.least_share)
        checks = {
            "key must be a text": isinstance(self.key, str)
            if self.kind in NEEDS_KEY
            else self.key is None or isinstance(self.key, str),
            "padding must be 0 to 64": self.padding is None or (type(self.padding) is int and 0 <= self.padding <= 64),
            "groups must be 1 to 65536": type(self.groups) is int and 1 <= self.groups <= 65536,
            f"how must be one of {', '.join(POOLINGS)}": self.how in POOLINGS,
            "grid must be 2 or 3 numbers from 1 to 64": self.grid is None
            or (
                isinstance(sizes, tuple)
                and len(sizes) in (2, 3)
                and all(type(size) is int and 1 <= size <= 64 for size in sizes)
            ),
            "grid must be left out for gem and masks": self.grid is None or self.how in ("average", "max"),
            "p_range must be two numbers": self.p_range is None
            or (isinstance(self.p_range, tuple) and len(self.p_range) == 2 and all(map(_is_number, self.p_range))),
            "eps, slope, p, least_sum and least_share must be numbers from 0": all(
                _is_number(number) and number >= 0 for number in numbers
            ),
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise ModelError(f"{HEAD_KEY}: layer {self.kind}: {'; '.join(broken)}")

    @classmethod
    def from_json(cls, described: Any) -> Layer:
        """Read one layer.

        Raises:
            ModelError: Where something is missing, unknown or out of range.
        """
        kind = described.get("kind") if isinstance(described, Mapping) else None
        if kind not in LAYERS:
            raise ModelError(f"{HEAD_KEY}: a layer must have a kind of {', '.join(LAYERS)}, got {described!r:.120}")
        if unknown := set(described) - {"kind", *LAYERS[kind]}:
            raise ModelError(
                f"{HEAD_KEY}: layer {kind} may have {', '.join(LAYERS[kind]) or 'nothing'}, got {min(unknown)!r:.80}"
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in described.items()
        }
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """Features that a head reads.

    Args:
        part: "encoder" or "decoder".
        stage: Counted from the finest, 0, or with negative numbers from the coarsest, -1. The decoder's stages have
            the numbers of the encoder's at the same resolution, and it has none at the coarsest.
        layers: What is done with them before those of all taps are put together.
    """

    part: str
    stage: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadDescription:
    """A classification head on the features of a U-Net.

    Args:
        taps: What it reads; results are concatenated as channels.
        layers: What is done with that, up to class logits (N, S).
        class_names: One per class.
        focus_channels: As in `ClassificationScheme`.
        mask_channels: Channels of the segmentation output that masked pooling looks at.
        mask_combine: Whether their probabilities are added ("sum"), or the greatest is taken ("max").
    """

    taps: tuple[Tap, ...]
    layers: tuple[Layer, ...]
    class_names: tuple[str, ...]
    focus_channels: tuple[int, ...]
    mask_channels: tuple[int, ...]
    mask_combine: str

    @classmethod
    def from_json(cls, described: Any) -> HeadDescription:
        """Read a description.

        Raises:
            ModelError: Where something is missing, unknown or out of range.
        """
        known = ("taps", "layers", "class_names", "focus_channels", "mask")
        if not isinstance(described, Mapping) or set(described) - {"mask"} != set(known) - {"mask"}:
            has = ", ".join(map(str, described)) if isinstance(described, Mapping) else repr(described)
            raise ModelError(f"{HEAD_KEY} must have {', '.join(known[:-1])}, and may have mask; it has {has:.200}")
        mask = described.get("mask", {})
        if not isinstance(mask, Mapping) or set(mask) - {"channels", "combine"}:
            raise ModelError(f"{HEAD_KEY}: mask may have channels and combine, got {mask!r:.120}")
        focus = _indices(described["focus_channels"], "focus_channels")
        description = cls(
            taps=tuple(_tap(each) for each in _few(described["taps"], "taps", least=1)),
            layers=tuple(Layer.from_json(each) for each in _few(described["layers"], "layers")),
            class_names=tuple(_few(described["class_names"], "class_names", most=1024)),
            focus_channels=focus,
            mask_channels=_indices(mask.get("channels", list(focus)), "mask channels"),
            mask_combine=mask.get("combine", "sum"),
        )
        if description.mask_combine not in COMBINATIONS:
            raise ModelError(
                f"{HEAD_KEY}: combine must be one of {', '.join(COMBINATIONS)}, got {mask['combine']!r:.80}"
            )
        return description

    def scheme(self, stages: int, regions: bool) -> ClassificationScheme:
        """Say what is asked, in the terms of nnturbo's own heads.

        Args:
            stages: Of the encoder.
            regions: Whether the segmentation has regions.

        Raises:
            ModelError: Where a tap is not there.
        """
        return ClassificationScheme(
            kind=DESCRIBED,
            stages=tuple(sorted({self.place(tap, stages) % stages for tap in self.taps})),
            class_names=self.class_names,
            focus_channels=self.focus_channels,
            regions=regions,
        )

    @staticmethod
    def place(tap: Tap, stages: int) -> int:
        """Number a tap among the features: the encoder's, the finest first, then the decoder's."""
        count = stages if tap.part == "encoder" else stages - 1
        if not -count <= tap.stage < count:
            raise ModelError(f"{HEAD_KEY}: the {tap.part} has stages 0 to {count - 1}, a tap names {tap.stage}")
        return tap.stage % count + (0 if tap.part == "encoder" else stages)

    @property
    def taps_decoder(self) -> bool:
        """Whether features of the decoder are read."""
        return any(tap.part == "decoder" for tap in self.taps)


def _tap(described: Any) -> Tap:
    parts = [part for part in ("encoder", "decoder") if isinstance(described, Mapping) and part in described]
    if len(parts) != 1 or set(described) - {*parts, "layers"} or type(described[parts[0]]) is not int:
        raise ModelError(
            f"{HEAD_KEY}: a tap must have the number of a stage under encoder or decoder, and layers; got "
            f"{described!r:.160}"
        )
    layers = tuple(Layer.from_json(each) for each in _few(described.get("layers", []), "layers of a tap"))
    return Tap(part=parts[0], stage=described[parts[0]], layers=layers)


def _few(values: Any, what: str, *, least: int = 0, most: int = MOST_LAYERS) -> Sequence[Any]:
    if not isinstance(values, list) or not least <= len(values) <= most:
        raise ModelError(f"{HEAD_KEY}: {what} must be a list of {least} to {most}, got {values!r:.120}")
    return values


def _indices(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not is_indices(tuple(values)):
        raise ModelError(f"{HEAD_KEY}: {what} must be a list of different numbers from 0, got {values!r:.120}")
    return tuple(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
