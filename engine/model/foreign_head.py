"""Finds the classification head that another program put beside a U-Net: described, or recognised by its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ModelError
from .described_head import DescribedHead
from .head_description import HEAD_KEY, HeadDescription
from .head_families import find_family, split_weights
from .plans import Plan

MOST_NAMES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignHead:
    """What a model's weights are besides those of its U-Net.

    Args:
        weights: By fold: those of the U-Net, and those that the head uses.
        description: Of the head, as in classification_head.json; None where there is none.
        remark: What has to be said about it.
    """

    weights: tuple[Mapping[str, Tensor], ...]
    description: Mapping[str, Any] | None
    remark: str | None


def find_head(weights: Sequence[Mapping[str, Tensor]], described: Mapping[str, Any] | None, plan: Plan) -> ForeignHead:
    """Look at what a checkpoint has besides a U-Net's weights.

    Args:
        weights: Of each fold, all of them.
        described: Content of classification_head.json, or of the same entry of plans.json, if there is one.
        plan: The model's.

    Raises:
        ModelError: Where a description does not fit.
    """
    folds = [split_weights(each) for each in weights]
    others = folds[0][1]
    remark = None
    if described is None and (found := _recognised(others, plan)) is not None:
        described, name = found
        remark = (
            f"the checkpoint has a classification head that was recognised by its keys: {name}; {HEAD_KEY}.json "
            "would describe another one, and name its classes"
        )
    used: set[str] = set()
    if described is not None:
        used = _used(HeadDescription.from_json(described))
    unused = [name for name in others if name.rpartition(".")[0] not in used and name not in used]
    if unused:
        remark = _unused(unused, described is not None)
    return ForeignHead(
        weights=tuple(
            {**unet, **{name: tensor for name, tensor in head.items() if name not in unused}} for unet, head in folds
        ),
        description=described,
        remark=remark,
    )


def _recognised(head: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Any], str] | None:
    """Describe a head of a known family, if it fits the encoder."""
    family = find_family(head)
    if family is None:
        return None
    regions, encoder = plan.labels.regions_class_order is not None, plan.architecture.encoder_channels
    described = family.describe(head, plan.labels.num_outputs, regions)
    try:
        DescribedHead(HeadDescription.from_json(described), head, encoder, len(plan.patch_size))
        HeadDescription.from_json(described).scheme(len(encoder), regions)
    except ModelError:
        return None  # names alike, shapes not
    return described, family.name


def _used(description: HeadDescription) -> set[str]:
    layers = [*description.layers, *(layer for tap in description.taps for layer in tap.layers)]
    return {layer.key for layer in layers if layer.key is not None}


def _unused(names: Sequence[str], has_head: bool) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    advice = (
        "describe them too if the class depends on them"
        if has_head
        else f"if they are a classification head, describe it in {HEAD_KEY}.json (docs/networks.md) for the class"
    )
    return (
        f"the checkpoint has {len(names)} weights that the segmentation does not need and nothing uses: "
        f"{', '.join(names[:MOST_NAMES])}{more}; {advice}"
    )
