"""Classification heads that other programs trained, built from their description and a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from .head_description import HEAD_KEY, HeadDescription, Layer
from .heads import Head

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}

PROBE_VOXELS = 4
"""Along each axis of the features on which a head is tried when it is built."""

MOST_NAMES = 4


class DescribedHead(Head):
    """A head of taps, layers on each, and layers on what they give together.

    Args:
        description: Of the head.
        weights: Parameters by their names in the checkpoint.
        channels: Of the encoder's stages, the finest first.
        dimensions: 2 or 3.

    Raises:
        ModelError: Where a key is missing, or layers do not fit each other, the features or the classes.
    """

    def __init__(
        self, description: HeadDescription, weights: Mapping[str, Tensor], channels: Sequence[int], dimensions: int
    ) -> None:
        super().__init__()
        self.description = description
        self.stages = [description.place(tap, len(channels)) for tap in description.taps]
        self.branches = nn.ModuleList(_sequence(tap.layers, weights, dimensions) for tap in description.taps)
        self.layers = _sequence(description.layers, weights, dimensions)
        self._probe([*channels, *channels[:-1]], dimensions)
        self.requires_grad_(False)

    def forward(self, features: Sequence[Tensor], focus: Tensor) -> Tensor:
        """Answer for each tile."""
        read = [
            _run(branch, features[stage].float(), focus)
            for stage, branch in zip(self.stages, self.branches, strict=True)
        ]
        return _run(self.layers, torch.cat(read, 1), focus)

    def mask(self, probabilities: Tensor) -> Tensor:
        """Give the mask of masked pooling, (N, 1, *patch), from probabilities (N, K, *patch)."""
        shown = torch.stack([probabilities[:, channel] for channel in self.description.mask_channels], 1)
        largest = self.description.mask_combine == "max"
        return shown.amax(1, keepdim=True) if largest else shown.sum(1, keepdim=True)

    def _probe(self, channels: Sequence[int], dimensions: int) -> None:
        grid = [PROBE_VOXELS] * dimensions
        wanted = (1, len(self.description.class_names))
        with torch.inference_mode():
            features = [torch.zeros(1, count, *grid) for count in channels]
            try:
                got: Any = tuple(self.eval()(features, torch.ones(1, 1, *grid)).shape)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                got = str(error).partition("\n")[0]
        if got != wanted:
            raise ModelError(
                f"{HEAD_KEY}: the layers must turn features of {', '.join(map(str, channels))} channels into class "
                f"logits {wanted}, they give {got!s:.200}"
            )


def _run(layers: Any, values: Tensor, focus: Tensor) -> Tensor:
    for layer in layers:
        values = layer(values, focus) if isinstance(layer, Pool) else layer(values)
    return values


def _sequence(layers: Sequence[Layer], weights: Mapping[str, Tensor], dimensions: int) -> nn.ModuleList:
    return nn.ModuleList(_layer(each, weights, dimensions) for each in layers)


class Pool(nn.Module):
    """Pooling over a map, or over a mask.

    Note:
        With values x, mask m and exponent p, by `how`: "gem": mean(max(x, eps)^p)^(1/p). "masked_average":
        sum(m x) / max(sum m, least_sum). "masked_gem": max(sum(m max(x, 0)^p) / max(sum m, least_sum), eps)^(1/p).
        Where mean(m) is below `least_share`, both masked ones give the mean of x. The mask is averaged to the
        grid of x.
    """

    p: Tensor

    def __init__(self, layer: Layer, exponent: Tensor | None) -> None:
        super().__init__()
        self.layer, self.eps = layer, 1e-6 if layer.eps is None else layer.eps
        p = torch.tensor(float(layer.p)) if exponent is None else exponent.reshape(())
        self.register_buffer("p", p if layer.p_range is None else p.clamp(*layer.p_range))

    def forward(self, values: Tensor, focus: Tensor) -> Tensor:
        """From (N, C, *grid) to (N, C), or to (N, C, *smaller grid)."""
        layer, flat = self.layer, values.flatten(2)
        if layer.grid is not None:
            return _to_grid(layer.how, values, layer.grid)
        if layer.how == "max":
            return flat.amax(2)
        if layer.how == "average":
            return flat.mean(2)
        if layer.how == "gem":
            return flat.clamp_min(self.eps).pow(self.p).mean(2).pow(1 / self.p)
        mask = _to_grid("average", focus, values.shape[2:]).flatten(2)
        total = mask.sum(2).clamp_min(layer.least_sum)
        if layer.how == "masked_average":
            pooled = (flat * mask).sum(2) / total
        else:
            powers = flat.clamp_min(0).pow(self.p)
            pooled = ((powers * mask).sum(2) / total).clamp_min(self.eps).pow(1 / self.p)
        return torch.where(mask.mean(2) < layer.least_share, flat.mean(2), pooled)


def _to_grid(how: str, values: Tensor, grid: Sequence[int]) -> Tensor:
    """Average, or take the greatest, over the parts of a map that belong to each voxel of a smaller grid."""
    if how == "average":
        pool: Any = F.adaptive_avg_pool3d if len(grid) == 3 else F.adaptive_avg_pool2d
    else:
        pool = F.adaptive_max_pool3d if len(grid) == 3 else F.adaptive_max_pool2d
    return pool(values, tuple(grid))


class Norm(nn.Module):
    """A norm with the weights of a checkpoint."""

    def __init__(self, layer: Layer, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kind, self.groups, self.eps = layer.kind, layer.groups, 1e-5 if layer.eps is None else layer.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, weights.get(f"{layer.key}.{name}"))
        if self.kind == "batch_norm":
            for name in ("running_mean", "running_var"):
                _take(weights, f"{layer.key}.{name}")

    def forward(self, values: Tensor) -> Tensor:
        """Normalise."""
        weight: Any = self.weight
        bias: Any = self.bias
        if self.kind == "batch_norm":
            return F.batch_norm(values, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)  # type: ignore[arg-type]
        if self.kind == "layer_norm":
            return F.layer_norm(values, values.shape[-1:], weight, bias, self.eps)
        if self.kind == "instance_norm":
            return F.instance_norm(values, None, None, weight, bias, True, 0.0, self.eps)
        return F.group_norm(values, self.groups, weight, bias, self.eps)


def _layer(layer: Layer, weights: Mapping[str, Tensor], dimensions: int) -> nn.Module:
    """Build one layer."""
    if layer.kind in ACTIVATIONS:
        return ACTIVATIONS[layer.kind]()
    if layer.kind == "leaky_relu":
        return nn.LeakyReLU(layer.slope)
    if layer.kind == "dropout":
        return nn.Identity()  # there is none in inference
    if layer.kind == "flatten":
        return nn.Flatten()
    if layer.kind == "pool":
        return Pool(layer, None if layer.key is None else _take(weights, layer.key, numbers=1))
    if layer.kind.endswith("_norm"):
        if layer.key is not None and f"{layer.key}.running_mean" not in weights:
            _take(weights, f"{layer.key}.weight")
        return Norm(layer, weights)
    return _product(layer, weights, dimensions)


def _product(layer: Layer, weights: Mapping[str, Tensor], dimensions: int) -> nn.Module:
    """Build a linear layer or a convolution."""
    weight, bias = _take(weights, f"{layer.key}.weight"), weights.get(f"{layer.key}.bias")
    axes = 2 if layer.kind == "linear" else 2 + dimensions
    if weight.ndim != axes:
        raise ModelError(
            f"{HEAD_KEY}: {layer.key}.weight must have {axes} axes, it has the shape {tuple(weight.shape)}"
        )
    outputs, inputs, *kernel = weight.shape
    if layer.kind == "linear":
        made: Any = nn.Linear(inputs, outputs, bias=bias is not None)
    else:
        padding: Any = tuple(taps // 2 for taps in kernel) if layer.padding is None else layer.padding
        convolution: Any = nn.Conv3d if dimensions == 3 else nn.Conv2d
        made = convolution(inputs, outputs, tuple(kernel), padding=padding, bias=bias is not None)
    try:
        made.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    except RuntimeError as error:
        reason = str(error).rpartition("\n")[2].strip()
        raise ModelError(f"{HEAD_KEY}: the weights under {layer.key} must fit each other; {reason:.160}") from error
    return made


def _take(weights: Mapping[str, Tensor], name: str, numbers: int | None = None) -> Tensor:
    if name not in weights:
        has = ", ".join(list(weights)[:MOST_NAMES]) or "none"
        raise ModelError(
            f"{HEAD_KEY} names {name:.120}, which the checkpoint must have; keys that are not the U-Net's: {has:.200}"
        )
    if numbers is not None and weights[name].numel() != numbers:
        raise ModelError(f"{HEAD_KEY}: {name:.120} must be one number, it has the shape {tuple(weights[name].shape)}")
    return weights[name]
