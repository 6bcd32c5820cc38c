"""Builds a torch network from a plan's architecture and a checkpoint's weights; only listed classes are allowed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ModelError
from .architecture import MOST_STAGES, Architecture
from .described_head import DescribedHead
from .heads import PooledClassifier
from .multi_task_unet import DescribedUNet, MultiTaskUNet
from .named_networks import HOW_TO_GIVE, UNCHANGED, NamedNetwork, named_network, trained_architecture
from .plan_classes import NETWORKS, argument_classes, network_class, remarks_on
from .plans import MULTI_TASK_NETWORK, Plan

MOST_FEATURES = 16384

UNET_PARTS = ("encoder.", "decoder.")
"""What the names of a U-Net's weights begin with."""

CONSTRUCTION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions of the architecture library for wrong arguments."""


def is_known(network: nn.Module) -> bool:
    """Whether this is a network of exactly a class that plans may name, with its usual decoder and nothing added."""
    kinds = {MultiTaskUNet, DescribedUNet, *map(network_class, NETWORKS)}
    return (
        type(network) in kinds
        and hasattr(network.get_submodule("decoder"), "seg_layers")
        and not any(map(_does_more, network.modules()))
    )


def _does_more(module: nn.Module) -> bool:
    """Whether something was made to run before, after or in place of a module's own code."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def _check_size(arguments: Mapping[str, Any]) -> None:
    """Refuse descriptions of networks that are too large to build."""
    stages = arguments.get("n_stages")
    if not isinstance(stages, int) or not 1 <= stages <= MOST_STAGES:
        raise ModelError(f"the architecture's n_stages must be 1 to {MOST_STAGES}, got {stages!r:.80}")
    pending = [
        value for key, value in arguments.items() if key not in ("norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs")
    ]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value[: MOST_STAGES * 4])
        elif isinstance(value, (int, float)) and not 0 <= value <= MOST_FEATURES:
            raise ModelError(f"the architecture's numbers must lie in 0 to {MOST_FEATURES}, got {value!r:.80}")


def make_network(architecture: Architecture, input_channels: int, num_outputs: int) -> nn.Module:
    """Build a network without weights, on torch's meta device, which takes no memory.

    Raises:
        ModelError: For a class that is not allowed, or wrong arguments.
    """
    _check_size(architecture.arguments)
    arguments = argument_classes(architecture)
    multi_task = architecture.class_name == MULTI_TASK_NETWORK
    chosen = MultiTaskUNet if multi_task else network_class(architecture.class_name)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about initial values, which the checkpoint replaces
            return chosen(
                input_channels=input_channels, num_classes=num_outputs, **{**arguments, "deep_supervision": False}
            )
    except CONSTRUCTION_ERRORS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"the plan's architecture cannot be built: {reason:.200}") from error


def build_network(
    plan: Plan,
    weights: Mapping[str, Tensor],
    pooled_classifier: PooledClassifier | None = None,
    trainer: str = "nnUNetTrainer",
) -> nn.Module:
    """Build a plan's network around a checkpoint's weights, ready for inference.

    Args:
        plan: The plan.
        weights: Parameters by name. Layers for deep supervision may be missing: inference does not use them.
        pooled_classifier: Replaces a multi-task network's classification head.
        trainer: Class that trained the network, for messages.

    Raises:
        ModelError: Where the plan's architecture cannot be built, does not fit its patch size, or is not what the
            trainer is known to build.
        CheckpointError: Where weights are missing, unknown, or do not have the shapes of the plan, or the fitted
            classifier does not fit the encoder.
    """
    if (named := named_network(plan.architecture, trainer)) is not None:
        return _build_named(named, plan, weights, trainer)
    plan = replace(plan, architecture=trained_architecture(plan.architecture, trainer))
    network: Any = make_network(plan.architecture, plan.input_channels, plan.labels.num_outputs)
    _check_patch(network, plan)
    of_head = {}
    if plan.head is not None:
        of_head = {name: tensor for name, tensor in weights.items() if not name.startswith(UNET_PARTS)}
        weights = {name: tensor for name, tensor in weights.items() if name not in of_head}
    complete, problems = _complete_weights(network.state_dict(keep_vars=True), weights)
    if problems:
        raise CheckpointError(
            f"the checkpoint's weights must fit the network of plans.json; {'; '.join(problems)}. "
            f"{_likely_reason(plan.architecture, trainer)}"
        )
    network.load_state_dict(complete, assign=True)
    if plan.head is not None:
        assert plan.classification is not None  # they come together
        channels = tuple(network.encoder.output_channels)
        network = DescribedUNet(
            network, DescribedHead(plan.head, of_head, channels, len(plan.patch_size)), plan.classification
        )
    if pooled_classifier is not None:
        network.head = pooled_classifier.make_head(network.encoder.output_channels)
    return network.requires_grad_(False).eval()


def _build_named(named: NamedNetwork, plan: Plan, weights: Mapping[str, Tensor], trainer: str) -> nn.Module:
    """Build a network that the plan does not describe."""
    weights = {name: tensor for name, tensor in weights.items() if not named.unused.match(name)}
    try:
        network = named.make(plan, weights)
    except KeyError as error:
        raise CheckpointError(
            f"the weights trained by {trainer:.80} must be those of {named.name}; {error} is missing. Are checkpoint "
            "and trainer of the same network?"
        ) from error
    except CONSTRUCTION_ERRORS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"{named.name} cannot be built for this plan and these weights: {reason:.200}") from error
    if problems := _complete_weights(network.state_dict(keep_vars=True), weights)[1]:
        raise CheckpointError(
            f"the weights trained by {trainer:.80} must be those of {named.name}; {'; '.join(problems)}"
        )
    network.load_state_dict(dict(weights), assign=True)
    tiles = torch.empty(1, plan.input_channels, *plan.patch_size, device="meta")
    _check_output(copy.deepcopy(network).to("meta"), tiles, [(1, plan.labels.num_outputs, *plan.patch_size)])
    return network.requires_grad_(False).eval()


def _complete_weights(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Give a network's parameters their weights under all their names, and say what does not fit."""
    # The library registers most parameters under several names; the checkpoint needs one of them.
    known = {id(expected[name]): name for name in expected if name in weights}
    last_layer = max((int(name.split(".")[2]) for name in expected if _is_seg_layer(name)), default=0)
    complete, missing = {}, []
    for name, parameter in expected.items():
        if id(parameter) in known:
            complete[name] = weights[known[id(parameter)]]
        elif _is_seg_layer(name) and int(name.split(".")[2]) != last_layer:
            complete[name] = torch.zeros(parameter.shape)
        else:
            missing.append(name)
    unknown = [name for name in weights if name not in expected and not _is_seg_layer(name)]
    wrong = [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(parameter.shape)}"
        for name, parameter in expected.items()
        if name in weights and weights[name].shape != parameter.shape
    ]
    problems = [
        f"{len(names)} {what}, such as {names[0]}"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (wrong, "of another shape"))
        if names
    ]
    return complete, problems


def _likely_reason(architecture: Architecture, trainer: str) -> str:
    """Say in a sentence why the weights may not fit the plan's network."""
    if not UNCHANGED.match(trainer):
        network = architecture.class_name.rpartition(".")[2]
        trained = f"They were trained by {trainer:.80}, whose network is probably not the plan's {network:.80}"
        return f"{trained}: {HOW_TO_GIVE}"
    return "; ".join(remarks_on(architecture)) or "Are checkpoint and plans from the same training?"


def is_known_to_fit(architecture: Architecture, patch_size: Sequence[int]) -> bool:
    """Whether a network's arguments alone show that it fits its patch, as those of nnU-Net's planners do.

    Convolutions with an odd number of taps keep the size of their input, or divide it by their stride. Pooling and
    transposed convolutions depend only on the stride.
    """
    arguments, axes = architecture.arguments, len(patch_size)
    names = [str(arguments.get(key)).rpartition(".")[2] for key in ("conv_op", "norm_op", "dropout_op", "nonlin")]
    ordinary = zip(
        names,
        ((f"Conv{axes}d",), (f"InstanceNorm{axes}d",), ("None", f"Dropout{axes}d"), ("LeakyReLU", "ReLU")),
        strict=True,
    )
    kernels, strides = (arguments.get(key) for key in ("kernel_sizes", "strides"))
    if (
        any(name not in choice for name, choice in ordinary)
        or not _are_sizes(kernels, axes)
        or not _are_sizes(strides, axes)
        or any(taps % 2 == 0 for stage in kernels for taps in stage)
        or set(strides[0]) != {1}
    ):
        return False
    overall = [math.prod(along) for along in zip(*strides, strict=True)]
    divides = all(size % stride == 0 for size, stride in zip(patch_size, overall, strict=True))
    # torch refuses a norm over a single voxel.
    return divides and math.prod(patch_size) > math.prod(overall)


def _are_sizes(given: Any, axes: int) -> TypeGuard[list[list[int]]]:
    """Whether a value holds a positive integer for each axis of each stage."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(
            isinstance(stage, list) and len(stage) == axes and all(type(size) is int and size > 0 for size in stage)
            for stage in given
        )
    )


def _check_patch(network: nn.Module, plan: Plan) -> None:
    """Run one patch through the network on the meta device: this takes no memory, but a second of imports."""
    if is_known_to_fit(plan.architecture, plan.patch_size):
        return
    wanted = [(1, plan.labels.num_outputs, *plan.patch_size)]
    if isinstance(network, MultiTaskUNet) and plan.classification is not None:
        wanted.append((1, plan.classification.num_classes))
    _check_output(network, torch.empty(1, plan.input_channels, *plan.patch_size, device="meta"), wanted)


def _check_output(network: nn.Module, tiles: Tensor, wanted: Sequence[tuple[int, ...]]) -> None:
    network.eval()
    try:
        with torch.inference_mode():
            outputs: Any = network.forward_multitask(tiles) if isinstance(network, MultiTaskUNet) else (network(tiles),)
        got = [tuple(output.shape) for output in outputs]
    except CONSTRUCTION_ERRORS as error:
        got = str(error).partition("\n")[0] or type(error).__name__
    if got != wanted:
        raise ModelError(
            f"the network of plans.json must turn a patch of {tuple(tiles.shape[2:])} into logits of shape "
            f"{' and '.join(map(str, wanted))}, it gives {got!s:.200}; the patch size must be divisible by the strides"
        )


def _is_seg_layer(name: str) -> bool:
    return name.startswith("decoder.seg_layers.")
