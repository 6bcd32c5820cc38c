"""Classification heads for the kernels: nnturbo's own run there, those of other programs in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.program import ProgramHead
from ..model.described_head import DescribedHead
from ..model.heads import AttentionHead, LinearClassifier, PooledHead
from ..model.multi_task_unet import MultiTaskUNet
from ..model.network import UNET_PARTS
from .native_builder import Builder


def program_head(builder: Builder, network: MultiTaskUNet, features: Sequence[int]) -> ProgramHead | None:
    """Describe a network's own head; None for that of another program.

    Args:
        builder: Takes the weights.
        network: With the head.
        features: Values of the encoder's stages.
    """
    head: Any = network.head
    if isinstance(head, AttentionHead):
        kind, tensors = "attention", _of_attention(head)
    elif isinstance(head, PooledHead):
        kind, tensors = "pooled", []
    elif isinstance(head, LinearClassifier):
        kind, tensors = "focus_pooling", list(head.buffers())
    else:
        return None
    layers = [layer for layer in getattr(head, "layers", ()) if isinstance(layer, (nn.LayerNorm, nn.Linear))]
    tensors += [tensor for layer in layers for tensor in layer.parameters()]
    names = [builder.weight(f"head.{index}", tensor) for index, tensor in enumerate(tensors)]
    return ProgramHead(
        kind=kind,
        features=tuple(features[stage] for stage in head_places(network)),
        focus_channels=tuple(network.scheme.focus_channels),
        regions=network.scheme.regions,
        tensors=tuple(name for name in names if name is not None),
        classes=network.scheme.num_classes,
    )


def _of_attention(head: Any) -> list[Tensor]:
    parts = zip(head.keys, head.values, head.queries, head.guidance, strict=True)
    return [
        tensor
        for key, value, queries, guidance in parts
        for tensor in (key.weight, key.bias, value.weight, value.bias, queries, guidance)
    ]


def head_places(network: MultiTaskUNet) -> tuple[int, ...]:
    """Which features the head reads: of the encoder's stages, then of the decoder's, the finest first."""
    head: Any = network.head
    if isinstance(head, DescribedHead):
        return tuple(_places(head))
    return tuple(getattr(head, "pooling", head).stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignHead:
    """The head of another program.

    Args:
        head: In torch.
        regions: Whether the logits are of regions.
    """

    head: DescribedHead
    regions: bool

    def __call__(self, features: Sequence[Tensor], logits: Tensor) -> Tensor:
        """From features that the head reads, (N, C, *grid), and logits (N, K, *patch) to class logits (N, S)."""
        places = _places(self.head)
        given = [logits] * (places[-1] + 1)  # those that it does not read may be anything
        for place, feature in zip(places, features, strict=True):
            given[place] = feature
        probabilities = torch.sigmoid(logits) if self.regions else torch.softmax(logits, 1)
        return self.head(given, self.head.mask(probabilities))


def foreign_head(network: nn.Module) -> ForeignHead | None:
    """Give the head that the kernels do not run, if a network has one."""
    if isinstance(network, MultiTaskUNet) and isinstance(network.head, DescribedHead):
        return ForeignHead(head=network.head, regions=network.scheme.regions)
    return None


def head_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a checkpoint's weights that are not the U-Net's."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(UNET_PARTS)}


def _places(head: DescribedHead) -> list[int]:
    return sorted(set(head.stages))
