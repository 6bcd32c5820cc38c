"""The network for inference: it averages all folds and gives both outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .folder import Model
from .given_network import GivenLogits
from .network import MultiTaskUNet, build_network, is_known


class InferenceNetwork(nn.Module):
    """Averages the logits of several folds; every backend runs or compiles this network.

    Args:
        networks: One per fold, all of the same kind.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.multi_task = isinstance(networks[0], MultiTaskUNet)
        self.given = isinstance(networks[0], GivenLogits)

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """Run (N, C, *patch).

        Returns:
            Segmentation logits (N, K, *patch) and, for multi-task networks, class logits (N, S) in float32.
        """
        outputs = [_run(network, tiles) for network in self.networks]
        if len(outputs) == 1:
            return outputs[0]
        return tuple(torch.stack(parts).mean(0) for parts in zip(*outputs, strict=True))


def _run(network: nn.Module, tiles: Tensor) -> tuple[Tensor, ...]:
    if isinstance(network, MultiTaskUNet):
        return network.forward_multitask(tiles)  # type: ignore[return-value]  # no deep supervision in inference
    return (network(tiles),)


def inference_network(model: Model) -> InferenceNetwork:
    """Build a model's networks, one per fold, without the outputs for deep supervision.

    Raises:
        ModelError: Where a network cannot be built.
        CheckpointError: Where weights do not fit it.
    """
    return InferenceNetwork([_without_deep_supervision(network) for network in _networks(model)]).eval()


def _networks(model: Model) -> list[nn.Module]:
    """Build the network of each fold."""
    if model.given is None:
        fitted = model.pooled_classifiers or [None] * len(model.weights)
        return [
            build_network(model.plan, weights, classifier, model.trainer)
            for weights, classifier in zip(model.weights, fitted, strict=True)
        ]
    given = [model.given.build(model.plan, model.plans, weights) for weights in model.weights or (None,)]
    # Classes that nnturbo knows are treated as if the plan had named them.
    return [network if is_known(network) else GivenLogits(network, model.plan.labels.num_outputs) for network in given]


def _without_deep_supervision(network: nn.Module) -> nn.Module:
    """Keep the last layer of a U-Net's decoder alone."""
    if is_known(network):
        decoder: Any = network.get_submodule("decoder")
        decoder.seg_layers, decoder.deep_supervision = decoder.seg_layers[-1:], False
    return network
