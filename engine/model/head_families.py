"""Classification heads that several programs share, recognised by the names of their weights in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARTS = re.compile(r"((?:.*?\.)?)(encoder|decoder)\.")
"""What names of a U-Net's weights begin with, after the name of a network around it."""

SINGLE_LAYER = re.compile(
    r"((cls|class|classification)_?(head|ifier|layer)|classifier)(\.(\d|fc|linear))?\.weight", re.I
)
"""Weights of a head of one layer, as programs name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Heads with the same names of weights.

    Args:
        name: In words.
        last: The layer whose rows are the classes.
        taps, layers: As in a description.
        masked: Whether it pools over the segmentation.
    """

    name: str
    last: str
    taps: tuple[Mapping[str, Any], ...]
    layers: tuple[Mapping[str, Any], ...]
    masked: bool = False

    def describe(self, weights: Mapping[str, Tensor], num_outputs: int, regions: bool) -> dict[str, Any]:
        """Write the description of a head; its classes are called by their numbers.

        Args:
            weights: Of the head.
            num_outputs: K of the segmentation, of which all but the background count.
            regions: Whether they are regions, of which all count.
        """
        foreground = list(range(0 if regions else 1, num_outputs))
        return {
            "class_names": [str(index) for index in range(len(weights[f"{self.last}.weight"]))],
            "focus_channels": foreground,
            **({"mask": {"channels": foreground, "combine": "max"}} if self.masked else {}),
            "taps": [dict(tap) for tap in self.taps],
            "layers": [dict(layer) for layer in self.layers],
        }

    @property
    def keys(self) -> set[str]:
        """Layers that have weights."""
        layers = [*self.layers, *(layer for tap in self.taps for layer in tap.get("layers", ()))]
        return {layer["key"] for layer in layers if "key" in layer}


def _linear(key: str) -> dict[str, Any]:
    return {"kind": "linear", "key": key}


def _single_layer(key: str) -> Family:
    return Family(
        name="average pooling and one linear layer on the bottleneck",
        last=key,
        taps=({"encoder": -1, "layers": [{"kind": "pool", "how": "average"}]},),
        layers=(_linear(key),),
    )


def _fused(prefix: str, fusion: str, activation: str, grid: int) -> Family:
    """Three stages at one small grid, through a common convolution."""
    return Family(
        name="the last three stages, fused by a convolution",
        last=f"{prefix}.classifier.4",
        taps=tuple(
            {
                "encoder": stage,
                "layers": [
                    {"kind": "conv", "key": f"{prefix}.feature_adapters.{index}.0"},
                    {"kind": "batch_norm", "key": f"{prefix}.feature_adapters.{index}.1"},
                    {"kind": activation},
                    {"kind": "pool", "how": "average", "grid": [grid] * 3},
                ],
            }
            for index, stage in enumerate((-3, -2, -1))
        ),
        layers=(
            {"kind": "conv", "key": f"{prefix}.{fusion}.0"},
            {"kind": "batch_norm", "key": f"{prefix}.{fusion}.1"},
            {"kind": activation},
            {"kind": "pool", "how": "average"},
            _linear(f"{prefix}.classifier.0"),
            {"kind": "batch_norm", "key": f"{prefix}.classifier.1"},
            {"kind": "gelu"},
            _linear(f"{prefix}.classifier.4"),
        ),
    )


FAMILIES = (
    Family(
        name="pooling by powers over the segmentation, and three linear layers on the bottleneck",
        last="classification_head.7",
        taps=(
            {
                "encoder": -1,
                "layers": [
                    {
                        "kind": "pool",
                        "how": "masked_gem",
                        "key": "gem_p",
                        "p_range": [1, 6],
                        "least_sum": 1.0,
                        "least_share": 5e-4,
                    }
                ],
            },
        ),
        layers=(
            _linear("classification_head.1"),
            {"kind": "relu"},
            _linear("classification_head.4"),
            {"kind": "relu"},
            _linear("classification_head.7"),
        ),
        masked=True,
    ),
    _fused("ClassificationHead", "fusion", "gelu", 4),
    _fused("ClassificationHead", "feature_fusion", "relu", 5),
    Family(
        name="two convolutions and five linear layers on the bottleneck",
        last="fc_out",
        taps=(
            {
                "encoder": -1,
                "layers": [
                    {"kind": "conv", "key": "cfe.0", "padding": 0},
                    {"kind": "batch_norm", "key": "cfe.1"},
                    {"kind": "relu"},
                    {"kind": "conv", "key": "cfe.3", "padding": 0},
                    {"kind": "batch_norm", "key": "cfe.4"},
                    {"kind": "relu"},
                    {"kind": "pool", "how": "average"},
                ],
            },
        ),
        layers=(
            *(
                layer
                for block in (0, 4, 8, 12)
                for layer in (
                    _linear(f"fc_blocks.{block}"),
                    {"kind": "batch_norm", "key": f"fc_blocks.{block + 1}"},
                    {"kind": "relu"},
                )
            ),
            _linear("fc_out"),
            {"kind": "batch_norm", "key": "bn_out"},
        ),
    ),
)
"""Of forks of nnU-Net for the pancreas task."""


def find_family(head: Mapping[str, Tensor]) -> Family | None:
    """Find the family whose names are those of a head; None for any other head."""
    layers = {re.sub(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", "", name) for name in head}
    for family in FAMILIES:
        if family.keys == layers:
            return family
    names = [name for name in head if name.endswith("weight")]
    if len(layers) == 1 and len(names) == 1 and SINGLE_LAYER.fullmatch(names[0]) and head[names[0]].ndim == 2:
        return _single_layer(names[0].removesuffix(".weight"))
    return None


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate the weights of a U-Net, under its own names, from all others.

    Programs put the U-Net into a network of theirs, under a name such as `seg_network`, and may keep its parts under
    further names. A weight that is the same tensor as one of the U-Net is no other weight.
    """
    matches = [match for match in map(PARTS.match, weights) if match]
    found: dict[str, set[str]] = {}
    for match in matches:
        found.setdefault(match.group(1), set()).add(match.group(2))
    whole = [prefix for prefix, parts in found.items() if parts == {"encoder", "decoder"}]
    if not whole:
        return dict(weights), {}
    prefix = min(whole, key=len)
    own = tuple(f"{prefix}{part}." for part in ("encoder", "decoder"))
    unet = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(own)}
    same = {id(tensor) for tensor in unet.values()}
    others = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith(own) and id(tensor) not in same and not _is_copy(name, tensor, unet)
    }
    return unet, others


def _is_copy(name: str, tensor: Tensor, unet: Mapping[str, Tensor]) -> bool:
    """Whether a weight equals the U-Net's of the same name, but for the name of what is around it."""
    match, inner = PARTS.match(name), name.partition(".")[2]
    names = [f"decoder.{inner}", f"encoder.{inner}", *([name[match.start(2) :]] if match else [])]
    twins = [unet[other] for other in names if other in unet]
    return any(twin.shape == tensor.shape and torch.equal(twin, tensor) for twin in twins)
