"""The loss of the classification head: cross-entropy of each patch, weighted by the focus in the patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..engine.model.classification import ClassificationScheme


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Weights that give every class the same total weight, with mean 1 over the cases.

    Args:
        labels: Class of every training case.
        num_classes: S.

    Returns:
        (S,) float32.

    Raises:
        ValueError: Where a class has no training case.
    """
    counts = torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=num_classes)
    if len(counts) > num_classes or not bool((counts > 0).all()):
        raise ValueError(f"every class must have a training case, counts by class are {counts.tolist()}")
    return (len(labels) / (num_classes * counts)).float()


def shown_content(target: Tensor, scheme: ClassificationScheme, ignore_label: int | None) -> tuple[Tensor, Tensor]:
    """Find the voxels of the focus and of the foreground in patches.

    Args:
        target: nnU-Net's target at full resolution: (N, 1, *patch) labels; or (N, R, *patch) of 0 and 1 by region, and
            if there is an ignore label, one more channel of ignored voxels at the end.
        scheme: Has the focus channels.
        ignore_label: Value of the ignore label, if there is one.

    Returns:
        Focus and foreground, (N, *patch) bool each, without ignored voxels.
    """
    channels = list(scheme.focus_channels)
    if scheme.regions:
        regions = target.bool()
        known = torch.ones_like(regions[:, 0])
        if ignore_label is not None:
            regions, known = regions[:, :-1], ~regions[:, -1]
        return regions[:, channels].any(1) & known, regions.any(1) & known
    labels = target[:, 0]
    known = torch.ones_like(labels, dtype=torch.bool) if ignore_label is None else labels != ignore_label
    focus = torch.isin(labels, torch.tensor(channels, device=labels.device, dtype=labels.dtype))
    return focus & known, (labels > 0) & known


def content_weights(focus: Tensor, foreground: Tensor, pancreas_weight: float) -> Tensor:
    """Weight of each patch in the class loss.

    Args:
        focus: (N, *patch) bool, voxels of the focus.
        foreground: (N, *patch) bool.
        pancreas_weight: Weight of a patch with foreground but without focus.

    Returns:
        (N,) float32: 1, `pancreas_weight` or 0.
    """
    shows_focus, shows_foreground = focus.flatten(1).any(1), foreground.flatten(1).any(1)
    return torch.where(shows_focus, 1.0, torch.where(shows_foreground, pancreas_weight, 0.0))


def class_loss(logits: Tensor, labels: Tensor, by_class: Tensor, by_content: Tensor, label_smoothing: float) -> Tensor:
    """Class-weighted, label-smoothed cross-entropy, averaged over the batch with the patches' weights.

    Args:
        logits: (N, S) float32.
        labels: (N,) int64.
        by_class: (S,) weights.
        by_content: (N,) weights.
        label_smoothing: In 0 to 1.

    Returns:
        Scalar `sum(by_content * ce) / N`: patches of weight 0 do not raise the weight of others.
    """
    losses = F.cross_entropy(logits.float(), labels, weight=by_class, label_smoothing=label_smoothing, reduction="none")
    return (losses * by_content).mean()
