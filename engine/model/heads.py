"""Classification heads: from the stages of an encoder to class logits, always in fp32."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, ModelError
from .classification import ClassificationScheme, is_indices
from .untrusted import is_plain

_HEAD_LAYER = re.compile(r"head\.layers\.(\d+)\.weight")

SMALLEST_FOCUS = 1e-4
"""Least probability of a voxel to belong to the focus; lower ones are raised to it."""


def focus_map(seg_logits: Tensor, scheme: ClassificationScheme) -> Tensor:
    """Probability of each voxel to belong to the focus of the class, (N, 1, *patch) in 0 to 1.

    Args:
        seg_logits: (N, K, *patch) float32.
        scheme: Has the focus channels. Probabilities of labels are added; of overlapping regions, the greatest is
            taken.
    """
    return focus_of_channels(seg_logits, list(scheme.focus_channels), scheme.regions)


def focus_of_channels(seg_logits: Tensor, channels: list[int], regions: bool) -> Tensor:
    """Compute `focus_map` from focus channels and whether they are regions; TorchScript can compile this."""
    values = torch.sigmoid(seg_logits) if regions else torch.softmax(seg_logits, 1)
    # Indexing with a list would copy the list to the GPU in each call, and wait for it.
    shown = torch.stack([values[:, channel] for channel in channels], 1)
    return shown.amax(1, keepdim=True) if regions else shown.sum(1, keepdim=True)


def _pool(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Average over the voxels of each voxel of a coarser grid, whose size divides the finer one's."""
    block = [fine // coarse for fine, coarse in zip(values.shape[2:], grid, strict=True)]
    return F.avg_pool3d(values, block, block) if len(grid) == 3 else F.avg_pool2d(values, block, block)


def _rim(values: Tensor) -> Tensor:
    """The rim of two voxels around a map: its dilation, along one axis after the other, minus the map.

    Maxima of shifted maps equal max pooling, which takes torch thirty times longer on a CPU.
    """
    dilated = values
    for axis in range(2, values.ndim):
        size = values.shape[axis]
        padded = F.pad(dilated, [0, 0] * (values.ndim - 1 - axis) + [2, 2])
        dilated = padded.narrow(axis, 0, size)
        for shift in range(1, 5):
            dilated = torch.maximum(dilated, padded.narrow(axis, shift, size))
    return (dilated - values).clamp_min(0)


POOLED_KINDS = ("lda",)
"""Kinds of fitted classifiers that can replace a network's head."""


class Head(nn.Module):
    """From features of the encoder's stages, (N, C, *grid) each, and a focus map to (N, S).

    Features have the precision of the network; each head converts those that it reads to fp32.

    Attributes:
        stages: Indices of the features that it reads; the others may be anything.
    """

    stages: Sequence[int]

    def forward(self, features: Sequence[Tensor], focus: Tensor) -> Tensor:
        """Answer for each tile."""
        raise NotImplementedError


class PooledHead(Head):
    """Averages features of one or several stages over the patch, followed by one or two linear layers.

    The averages are normalised first: after instance normalisation they are small, and small inputs learn slowly.
    """

    def __init__(self, scheme: ClassificationScheme, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = scheme.stages
        width = sum(channels[stage] for stage in scheme.stages)
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        if scheme.kind == "gap_mlp":
            layers += [nn.Linear(width, scheme.hidden), nn.GELU()]
            width = scheme.hidden
        self.layers = nn.Sequential(*layers, nn.Dropout(scheme.dropout), nn.Linear(width, scheme.num_classes))

    def forward(self, features: Sequence[Tensor], focus: Tensor) -> Tensor:
        """Answer for each tile; the focus map is not used."""
        return self.layers(torch.cat([features[stage].float().flatten(2).mean(2) for stage in self.stages], 1))


class AttentionHead(Head):
    """Attention: learned queries choose voxels in each stage.

    Note:
        Scores are `q k / sqrt(d) + g log p`, with p the focus map at the stage's resolution and g one learned number
        per query. At the start g is 1 for the first half of the queries, which average over the focus, and 0 for the
        others, which average over the whole patch.
    """

    def __init__(self, scheme: ClassificationScheme, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = scheme.stages
        widths = [channels[stage] for stage in scheme.stages]
        self.keys = nn.ModuleList(nn.Linear(width, scheme.hidden) for width in widths)
        self.values = nn.ModuleList(nn.Linear(width, scheme.hidden) for width in widths)
        self.queries = nn.Parameter(torch.empty(len(widths), scheme.queries, scheme.hidden))
        if not self.queries.is_meta:  # for meta tensors torch would only import modules, for a second
            nn.init.normal_(self.queries, std=0.02)
        guided = [float(query < (scheme.queries + 1) // 2) for query in range(scheme.queries)]
        self.guidance = nn.Parameter(torch.tensor([guided] * len(widths)))
        pooled = len(widths) * scheme.queries * scheme.hidden
        self.layers = nn.Sequential(
            nn.LayerNorm(pooled), nn.Dropout(scheme.dropout), nn.Linear(pooled, scheme.num_classes)
        )

    def forward(self, features: Sequence[Tensor], focus: Tensor) -> Tensor:
        """Answer for each tile."""
        pooled = []
        for index, stage in enumerate(self.stages):
            feature = features[stage].float()
            voxels = feature.flatten(2).transpose(1, 2)  # (N, V, C)
            prior = _pool(focus, feature.shape[2:]).flatten(2).clamp_min(SMALLEST_FOCUS).log()  # (N, 1, V)
            keys = self.keys[index](voxels)  # (N, V, D)
            scores = self.queries[index] @ keys.transpose(1, 2) / math.sqrt(keys.shape[2])  # (N, Q, V)
            attention = torch.softmax(scores + self.guidance[index][:, None] * prior, 2)
            # Averaging before the linear layer gives the same values without computing them for every voxel.
            pooled.append(self.values[index](attention @ voxels).flatten(1))
        return self.layers(torch.cat(pooled, 1))


class FocusPooling(Head):
    """Features for a classifier fitted afterwards: averages over the patch, the focus and its rim, by stage."""

    def __init__(self, stages: Sequence[int]) -> None:
        super().__init__()
        self.stages = tuple(stages)

    def forward(self, features: Sequence[Tensor], focus: Tensor) -> Tensor:
        """Pool; (N, 3 times the channels of all stages)."""
        pooled = []
        for stage in self.stages:
            feature = features[stage].float()
            inside = _pool(focus, feature.shape[2:])
            voxels = feature.flatten(2)
            pooled.append(voxels.mean(2))
            for weights in (inside, _rim(inside)):
                shares = weights.flatten(2) + SMALLEST_FOCUS / 100
                pooled.append((voxels * shares).sum(2) / shares.sum(2))
        return torch.cat(pooled, 1)


class LinearClassifier(Head):
    """A linear classifier over pooled features, such as a discriminant analysis fitted after training.

    Args:
        stages: Stages to pool.
        weight: (S, F) by class and feature.
        bias: (S,).
    """

    def __init__(self, stages: Sequence[int], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.pooling = FocusPooling(stages)
        self.stages = self.pooling.stages
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, features: Sequence[Tensor], focus: Tensor) -> Tensor:
        """Answer for each tile."""
        return F.linear(self.pooling(features, focus), self.weight, self.bias)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PooledClassifier:
    """A linear classifier that was fitted after training and can replace a network's own head.

    Args:
        kind: How it was fitted: "lda", a linear discriminant analysis.
        stages: Encoder stages that `FocusPooling` pools.
        weight: (S, F) float32 by class and feature; F is three times the channels of all stages.
        bias: (S,) float32.
        temperature: By which class logits are divided, so that probabilities are as often right as they say.
        preferred: Whether it answers unless another classifier is asked for; not where validation showed the network's
            head to be as good.
    """

    kind: str
    stages: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    temperature: float = 1.0
    preferred: bool = True

    @classmethod
    def parse(cls, description: Any) -> PooledClassifier:
        """Read the entry "pooled_classifier" of a checkpoint: numbers as lists or tensors; the last two may lack.

        Raises:
            CheckpointError: Where the entry is anything else.
        """
        keys = ("kind", "stages", "weight", "bias")
        if not isinstance(description, dict) or {*description} - {"temperature", "preferred"} != {*keys}:
            has = list(description) if isinstance(description, dict) else type(description).__name__
            raise CheckpointError(f"pooled_classifier must have exactly {', '.join(keys)}; got {has!s:.120}")
        if description["kind"] not in POOLED_KINDS:
            raise CheckpointError(
                f"pooled_classifier: kind must be {' or '.join(POOLED_KINDS)}, got {description['kind']!r:.80}"
            )
        preferred, stages = description.get("preferred", True), description["stages"]
        if not isinstance(preferred, bool):
            raise CheckpointError(f"pooled_classifier: preferred must be true or false, got {preferred!r:.80}")
        if not isinstance(stages, (list, tuple)) or not is_indices(tuple(stages)):
            raise CheckpointError(f"pooled_classifier: stages must be different numbers from 0, got {stages!r:.80}")
        weight, bias = (_finite(description[key], key) for key in ("weight", "bias"))
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise CheckpointError(
                "pooled_classifier: weight must be (classes, features) and bias (classes,), got "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        return cls(
            kind=description["kind"],
            stages=tuple(stages),
            weight=weight,
            bias=bias,
            temperature=parse_temperature(description.get("temperature", 1.0), "pooled_classifier: temperature"),
            preferred=preferred,
        )

    def make_head(self, channels: Sequence[int]) -> LinearClassifier:
        """Build the head for an encoder with these channels by stage.

        Raises:
            CheckpointError: Where the encoder lacks a stage, or its stages have other widths.
        """
        if max(self.stages) >= len(channels):
            raise CheckpointError(
                f"pooled_classifier reads stages {list(self.stages)}, the encoder has {len(channels)}, from 0. "
                "Was it fitted to this network? Fit it again, or take the network's head with --classifier head"
            )
        wanted = 3 * sum(channels[stage] for stage in self.stages)
        if self.weight.shape[1] != wanted:
            raise CheckpointError(
                f"pooled_classifier: weight must have {wanted} features, 3 for each channel of stages "
                f"{list(self.stages)}; it has {self.weight.shape[1]}. Was it fitted to this network? Fit it again, or "
                "take the network's head with --classifier head"
            )
        # The part that all classes share does not change the answer, and is so large that it costs digits.
        weight, bias = self.weight - self.weight.mean(0), self.bias - self.bias.mean()
        return LinearClassifier(self.stages, weight / self.temperature, bias / self.temperature)


def parse_temperature(value: Any, what: str) -> float:
    """Read the temperature of class logits.

    Raises:
        CheckpointError: Where it is no number from 0.001 to 1000.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-3 <= value <= 1e3:
        raise CheckpointError(f"{what} must be a number from 0.001 to 1000, got {value!r:.80}")
    return float(value)


def divide_class_logits(weights: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """Divide the class logits of a network's own head by a temperature, by way of its last layer, which is linear.

    Raises:
        CheckpointError: Where the weights have no such head.
    """
    last = max((int(match[1]) for name in weights if (match := _HEAD_LAYER.fullmatch(name))), default=None)
    if last is None:
        raise CheckpointError("class_temperature may be given only with the weights of a head that nnturbo trained")
    ours = f"head.layers.{last}."
    return {name: tensor / temperature if name.startswith(ours) else tensor for name, tensor in weights.items()}


def _finite(values: Any, name: str) -> Tensor:
    """Read numbers of a checkpoint as float32, without taking more memory than the file holds."""
    try:
        tensor = values.detach() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"pooled_classifier: {name} must be numbers in equal rows; {reason:.120}") from error
    if not is_plain(tensor):
        raise CheckpointError(f"pooled_classifier: {name} must be a plain, dense tensor or lists of numbers")
    tensor = tensor.to(torch.float32, copy=True).contiguous()
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"pooled_classifier: {name} must be finite in float32, it has NaN or infinity")
    return tensor


def make_head(scheme: ClassificationScheme, channels: Sequence[int]) -> Head:
    """Build the head that a scheme describes on an encoder with these channels by stage.

    Raises:
        ModelError: Where it names a stage that the encoder does not have.
    """
    if max(scheme.stages) >= len(channels):
        raise ModelError(
            f"the classification head reads stages {list(scheme.stages)}, the encoder has {len(channels)}, from 0"
        )
    return AttentionHead(scheme, channels) if scheme.kind == "attention" else PooledHead(scheme, channels)
