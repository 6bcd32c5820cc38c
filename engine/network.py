"""From a plan's architecture and a checkpoint's weights to a torch network; only classes on a short list are made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ModelError
from .plans import Architecture, Plan

LIBRARY = "dynamic_network_architectures."
NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
BLOCKS = ("BasicBlockD", "BottleneckD")
MOST_STAGES = 16
MOST_FEATURES = 16384

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
"""What the architecture library raises for arguments that make no network."""


def _network_class(name: str) -> type[nn.Module]:
    from dynamic_network_architectures.architectures import unet

    short = name.rpartition(".")[2]
    if short not in NETWORKS or not name.startswith(LIBRARY):
        raise ModelError(
            f"the network must be one of {', '.join(NETWORKS)} of dynamic_network_architectures, the plan "
            f"names {name!r:.120}; other classes are never imported"
        )
    return getattr(unet, short)


def _argument_class(name: str) -> type[nn.Module]:
    """Resolve a class that a plan names as an argument: one of torch.nn's own modules, or a residual block."""
    short = name.rpartition(".")[2]
    if name.startswith("torch.nn.") and short.isidentifier():
        found = getattr(nn, short, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    if name.startswith(LIBRARY) and short in BLOCKS:
        from dynamic_network_architectures.building_blocks import residual

        return getattr(residual, short)
    raise ModelError(
        f"a plan's arguments may name modules of torch.nn and {', '.join(BLOCKS)}, this one names "
        f"{name!r:.120}; other classes are never imported"
    )


def _check_size(arguments: Mapping[str, Any]) -> None:
    """Refuse descriptions that would take for ever to build."""
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
    """Build a network without weights (on torch's meta device, taking no memory).

    Raises:
        ModelError: For a class that is not allowed, or arguments that make no network.
    """
    arguments = dict(architecture.arguments)
    _check_size(arguments)
    for key in architecture.class_arguments:
        if arguments.get(key) is not None:
            arguments[key] = _argument_class(str(arguments[key]))
    network_class = _network_class(architecture.class_name)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about initial values, which the checkpoint replaces
            return network_class(
                input_channels=input_channels, num_classes=num_outputs, **{**arguments, "deep_supervision": False}
            )
    except CONSTRUCTION_ERRORS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"the plan's architecture cannot be built: {reason:.200}") from error


def build_network(plan: Plan, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build a plan's network around a checkpoint's weights, ready for inference.

    Args:
        plan: The plan.
        weights: Parameters by name. Deep-supervision heads may be missing: inference does not use them.

    Raises:
        ModelError: Where the plan's architecture makes no network, or not one for its patch size.
        CheckpointError: Where weights are missing, unknown, or of another shape than the plan asks for.
    """
    network = make_network(plan.architecture, plan.input_channels, plan.labels.num_outputs)
    _check_patch(network, plan)
    expected = network.state_dict(keep_vars=True)
    # The library registers most parameters under several names; one of them is enough.
    known = {id(expected[name]): name for name in expected if name in weights}
    last_head = max((int(name.split(".")[2]) for name in expected if _is_head(name)), default=0)
    complete, missing = {}, []
    for name, parameter in expected.items():
        if id(parameter) in known:
            complete[name] = weights[known[id(parameter)]]
        elif _is_head(name) and int(name.split(".")[2]) != last_head:
            complete[name] = torch.zeros(parameter.shape)
        else:
            missing.append(name)
    unknown = [name for name in weights if name not in expected and not _is_head(name)]
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
    if problems:
        raise CheckpointError(
            f"the checkpoint's weights must fit the network of plans.json; {'; '.join(problems)}. "
            f"Are checkpoint and plans from the same training?"
        )
    network.load_state_dict(complete, assign=True)
    return network.requires_grad_(False).eval()


def _check_patch(network: nn.Module, plan: Plan) -> None:
    """Run one patch through the network on the meta device, where it takes neither time nor memory."""
    tiles = torch.empty(1, plan.input_channels, *plan.patch_size, device="meta")
    wanted = (1, plan.labels.num_outputs, *plan.patch_size)
    try:
        with torch.inference_mode():
            got = tuple(network.eval()(tiles).shape)
    except CONSTRUCTION_ERRORS as error:
        got = str(error).partition("\n")[0] or type(error).__name__
    if got != wanted:
        raise ModelError(
            f"the network of plans.json must turn a patch of {plan.patch_size} into logits of shape {wanted}, "
            f"it gives {got!s:.200}; the patch size must be divisible by the strides"
        )


def _is_head(name: str) -> bool:
    return name.startswith("decoder.seg_layers.")
