"""The network that a plan asks for, described by its class and the arguments for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .json_values import take

RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"

RESIDUAL_ENCODERS = ("ResEncM", "ResEncL", "ResEncXL")
"""Names of the residual encoder U-Net in plans that say nothing more about it."""

WITH_CLASSIFIER, CLASSIFIER_ARGUMENTS = "ResidualEncoderUNetWithClassifier", ("num_subtypes", "clf_")
"""The same with a classification head in forks of nnU-Net, and what arguments of that begin with."""

MOST_STAGES = 16
"""Of a U-Net."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The network of a plan: class name, arguments, and the names of those arguments that are classes."""

    class_name: str
    arguments: Mapping[str, Any]
    class_arguments: tuple[str, ...]

    @property
    def encoder_channels(self) -> tuple[int, ...]:
        """Channels of a U-Net's encoder by stage, the finest first; none where the arguments do not say it."""
        stages, features = self.arguments.get("n_stages"), self.arguments.get("features_per_stage")
        if type(features) is int and type(stages) is int and 0 < stages <= MOST_STAGES:
            return tuple(features * 2**stage for stage in range(stages))  # as the architecture library does
        if isinstance(features, list) and all(type(count) is int for count in features):
            return tuple(features)
        return ()


def parse_architecture(configuration: Mapping[str, Any]) -> Architecture:
    """Read the network's description; plans from before nnU-Net 2.4 spread it over the configuration.

    Args:
        configuration: One entry of `configurations` in plans.json, with what it inherits.

    Raises:
        ModelError: Where something is missing or of the wrong kind.
    """
    if "architecture" in configuration:
        described = take(configuration, "architecture", dict, "plans.json")
        where = "plans.json: architecture"
        return _without_alias(
            Architecture(
                class_name=take(described, "network_class_name", str, where),
                arguments=take(described, "arch_kwargs", dict, where),
                class_arguments=tuple(map(str, take(described, "_kw_requires_import", list, where))),
            ),
            len(take(configuration, "patch_size", list, where)),
        )
    where = "plans.json without 'architecture'"
    name = take(configuration, "UNet_class_name", str, where)
    blocks = take(configuration, "n_conv_per_stage_encoder", list, where)
    base = take(configuration, "UNet_base_num_features", int, where)
    most = take(configuration, "unet_max_num_features", int, where)
    dimensions = len(take(configuration, "patch_size", list, where))
    arguments = {
        "n_stages": len(blocks),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(min(len(blocks), 32))],
        "conv_op": f"torch.nn.Conv{dimensions}d",
        "kernel_sizes": take(configuration, "conv_kernel_sizes", list, where),
        "strides": take(configuration, "pool_op_kernel_sizes", list, where),
        "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage": blocks,
        "n_conv_per_stage_decoder": take(configuration, "n_conv_per_stage_decoder", list, where),
        "conv_bias": True,
        "norm_op": f"torch.nn.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(
        class_name=f"dynamic_network_architectures.architectures.unet.{name}",
        arguments=arguments,
        class_arguments=("conv_op", "norm_op", "dropout_op", "nonlin"),
    )


def _without_alias(architecture: Architecture, dimensions: int) -> Architecture:
    """Put the residual encoder U-Net in place of names for one of its forms."""
    short = architecture.class_name.rpartition(".")[2]
    if short in RESIDUAL_ENCODERS:
        arguments = {**_residual_encoder(dimensions), **architecture.arguments}
        named = {*architecture.class_arguments, "conv_op", "norm_op", "dropout_op", "nonlin"}
        return Architecture(class_name=RESIDUAL, arguments=arguments, class_arguments=tuple(sorted(named)))
    if short == WITH_CLASSIFIER:
        arguments = {
            key: value for key, value in architecture.arguments.items() if not key.startswith(CLASSIFIER_ARGUMENTS)
        }
        return Architecture(class_name=RESIDUAL, arguments=arguments, class_arguments=architecture.class_arguments)
    return architecture


def _residual_encoder(dimensions: int) -> dict[str, Any]:
    """Give the arguments that nnU-Net's planners for residual encoders choose for an isotropic patch of six stages.

    Note:
        nnU-Net: ResEncUNetPlanner. M, L and XL differ in the memory they are planned for, so in their patch; where that
        gives other stages, a plan says so.
    """
    return {
        "n_stages": 6,
        "features_per_stage": [min(32 * 2**stage, 320 if dimensions == 3 else 512) for stage in range(6)],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * 6,
        "strides": [[1] * dimensions, *[[2] * dimensions] * 5],
        "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
        "n_conv_per_stage_decoder": [1] * 5,
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
