"""Networks that a program gives to `Engine.load`, to run in place of the network that plans.json describes."""

from __future__ import annotations

import copy
import hashlib
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ModelError
from .plans import Plan

NetworkFactory = Callable[..., nn.Module]
"""Called as nnU-Net calls a trainer's `build_network_architecture`, see `GivenNetwork`."""

WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)

MOST_NAMES = 3


class GivenLogits(nn.Module):
    """A given network; of several outputs, as of deep supervision, the first one counts.

    Args:
        network: From (N, C, *patch) to (N, K, *patch), or to a tuple or list that begins with it.
        num_outputs: K.
    """

    def __init__(self, network: nn.Module, num_outputs: int) -> None:
        super().__init__()
        self.network = network
        self.num_outputs = num_outputs

    def forward(self, tiles: Tensor) -> Tensor:
        """Give the segmentation logits (N, K, *patch)."""
        output = self.network(tiles)
        return output[0] if isinstance(output, (tuple, list)) else output

    @property
    def logit_layers(self) -> list[nn.Module]:
        """Layers that may compute the logits: those with K outputs."""
        return [layer for layer in self.network.modules() if getattr(layer, "out_channels", None) == self.num_outputs]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenNetwork:
    """A network, or what makes one.

    Args:
        given: A module, which is taken with the weights it has; or a function or class that makes one, which then gets
            the weights of each fold's checkpoint.

    Note:
        nnU-Net (initialize_from_trained_model_folder) calls `build_network_architecture` in one of two ways, and so
        does `build`. A function that has a parameter `plans_manager` gets (plans_manager, configuration_manager,
        num_input_channels, num_output_channels, enable_deep_supervision=False), with nnU-Net's own managers. Any other
        gets (network_class_name, arch_kwargs, arch_kwargs_req_import, num_input_channels, num_output_channels,
        enable_deep_supervision=False), as before nnU-Net 2.8. So the method of a trainer can be given as it is.
    """

    given: nn.Module | NetworkFactory

    def __post_init__(self) -> None:
        """Check the kind."""
        if not callable(self.given):
            raise TypeError(f"network must be a torch.nn.Module, or a function that makes one, got {self.given!r:.120}")

    @property
    def has_weights(self) -> bool:
        """Whether it is a module, and checkpoints are not needed."""
        return isinstance(self.given, nn.Module)

    @property
    def can_be_copied(self) -> bool:
        """Whether each fold can have a network of its own."""
        return not isinstance(self.given, nn.Module) or _copied(self.given) is not self.given

    @property
    def name(self) -> str:
        """Whole name of the module's class, or of the function."""
        named = type(self.given) if isinstance(self.given, nn.Module) else self.given
        return f"{named.__module__}.{getattr(named, '__qualname__', type(named).__qualname__)}"

    def weights_sha256(self) -> str:
        """Hash the weights of a module."""
        assert isinstance(self.given, nn.Module)  # a factory's are in checkpoints
        digest = hashlib.sha256()
        for name, tensor in self.given.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def build(self, plan: Plan, plans: Mapping[str, Any], weights: Mapping[str, Tensor] | None) -> nn.Module:
        """Make the network of one fold, on the CPU and for inference.

        Args:
            plan: The folder's.
            plans: Content of its `plans.json`.
            weights: Of the fold; None for a module that runs with the weights it has.

        Raises:
            ModelError: Where the function makes no network.
            CheckpointError: Where the weights are not exactly those of the network.
        """
        if isinstance(self.given, nn.Module):
            network = _copied(_unwrapped(self.given))
            if weights is not None:
                network.load_state_dict(dict(weights))
        else:
            network = self._made(plan, plans)
            assert weights is not None  # each fold of a factory has some
            _load_strictly(network, weights, self.name)
        network = network.cpu().eval()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        return network

    def _made(self, plan: Plan, plans: Mapping[str, Any]) -> nn.Module:
        """Call a factory."""
        arguments = (*_description(self.given, plan, plans), plan.input_channels, plan.labels.num_outputs)
        try:
            network = self.given(*arguments, enable_deep_supervision=False)
        except Exception as error:  # whatever the caller's code raises
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ModelError(
                f"the given network {self.name} must be made from what nnU-Net gives to build_network_architecture, it "
                f"fails: {reason:.200}"
            ) from error
        if not isinstance(network, nn.Module):
            raise ModelError(f"the given network {self.name} must give a torch.nn.Module, it gave {network!r:.120}")
        return network


def _description(factory: Any, plan: Plan, plans: Mapping[str, Any]) -> tuple[Any, ...]:
    """Give the first arguments for a factory: nnU-Net's managers, or the architecture as in the plan."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a function without a signature
        parameters = {}
    if "plans_manager" not in parameters:
        described = plan.architecture
        return described.class_name, copy.deepcopy(dict(described.arguments)), described.class_arguments
    try:
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except ImportError as error:
        raise ModelError(
            "a network function with a parameter plans_manager needs nnU-Net's own: pip install nnunetv2, or give a "
            "function of (network_class_name, arch_kwargs, arch_kwargs_req_import, num_input_channels, "
            "num_output_channels, enable_deep_supervision)"
        ) from error
    manager = PlansManager(copy.deepcopy(dict(plans)))
    return manager, manager.get_configuration(plan.configuration)


def _load_strictly(network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Load the weights of a checkpoint, all of them and nothing else."""
    expected = network.state_dict()
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unknown": [key for key in weights if key not in expected],
        "of another shape": [key for key in expected if key in weights and expected[key].shape != weights[key].shape],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(keys)} {what}, such as {', '.join(keys[:MOST_NAMES])}" for what, keys in problems.items() if keys
        )
        raise CheckpointError(f"the checkpoint's weights must fit the given network {name}; {found:.400}")
    network.load_state_dict(dict(weights), strict=True)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Take a network out of what torch.compile and data parallel training put around it."""
    while True:
        inner = module.module if isinstance(module, WRAPPERS) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module, so that the caller's own stays as it is; compiled programs that cannot be copied are shared."""
    try:
        with torch.no_grad():  # else parameters of TorchScript come out as results of a computation
            return copy.deepcopy(module)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError, pickle.PicklingError):
        return module
