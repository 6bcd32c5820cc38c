"""Combines a multi-task network's class logits of tiles into one answer per case."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PredictionError
from ..model.classification import Classification, ClassificationScheme
from ..model.heads import focus_map
from ..model.runner import NetworkOutput
from .finiteness import not_finite_error


def mean_vote(logits: Tensor, shown: Tensor) -> Tensor:
    """Compute the weighted mean of the tiles' logits, as `Votes` describes; TorchScript can compile this.

    Args:
        logits: (tiles, views, S).
        shown: (tiles, views), weight of each view.

    Returns:
        (S,) float64 on the CPU.
    """
    weights = shown.cpu().double().mean(1)
    if bool(weights.sum() == 0):
        weights = torch.ones_like(weights)
    return (weights @ logits.cpu().double().mean(1)) / weights.sum()


class Votes:
    """Collects the class logits of all tiles of one case, and averages them at the end.

    Args:
        scheme: Classes and focus channels.
        views: Number of mirror views of each tile.
        aggregation: "foreground": a tile's weight is its share of focus voxels; "mean": all tiles have the same weight.

    Note:
        A case's logits are `sum_t w[t] c[t] / sum_t w[t]`. `c[t]` is the mean of the class logits over the views of
        tile t, and `w[t]` the mean of `focus_map` over the voxels of these views. If all weights are 0, and for "mean",
        every tile has the same weight. Padding is part of a tile.
    """

    def __init__(self, scheme: ClassificationScheme, *, views: int, aggregation: str) -> None:
        self._scheme = scheme
        self._views = views
        self._by_foreground = aggregation == "foreground"
        # They stay on the network's device until the end, because each copy would make the device wait.
        self._logits: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, output: NetworkOutput) -> None:
        """Take one or more views of a tile; all views of one tile come before those of the next."""
        if output.class_logits is None:
            raise PredictionError("the network must give class logits, as the plan says; its backend gave none")
        self._logits.append(output.class_logits.float())
        if self._by_foreground:
            # View by view, because the softmax of many labels needs much memory.
            shown = [focus_map(view[None].float(), self._scheme).mean() for view in output.seg_logits]
            self._weights.append(torch.stack(shown))

    def mean_logits(self, *, alike: bool = False) -> Tensor:
        """Give the weighted mean over tiles, (S,) float64 on the CPU.

        Args:
            alike: Give all tiles the same weight, whatever the aggregation.

        Raises:
            PredictionError: Where class logits are not finite.
        """
        logits = torch.cat(self._logits).unflatten(0, (-1, self._views))
        weigh = self._by_foreground and not alike
        shown = torch.cat(self._weights) if weigh else torch.ones(logits.shape[:2])
        mean = mean_vote(logits, shown.reshape(-1, self._views))
        if not torch.isfinite(mean).all():
            raise not_finite_error("class logits")
        return mean

    def count(self) -> Classification:
        """Answer for the case.

        Raises:
            PredictionError: Where class logits are not finite, or not as many as the plan has classes.
        """
        logits = self.mean_logits()
        if len(logits) != self._scheme.num_classes:
            raise PredictionError(
                f"the network must give logits of the plan's {self._scheme.num_classes} classes, it gave {len(logits)}"
            )
        return Classification.from_logits(logits.tolist(), self._scheme.class_names)
