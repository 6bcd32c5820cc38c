"""Makes a program for the kernels of a network: PlainConvUNet, ResidualEncoderUNet, ResidualUNet or STU-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...kernels.program import Program
from ..errors import BackendUnavailable
from ..model.multi_task_unet import MultiTaskUNet
from ..model.network import is_known
from ..model.stu_net import StuBlock, StuNet, StuUpsampling
from .buffers import Shape, plan_buffers
from .native_builder import Builder, Finer, of_axes
from .native_head import head_places, program_head
from .rewrites import ACTIVATIONS, last_activation, negative_slope, only_spreads

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)
POOLINGS = (nn.AvgPool2d, nn.AvgPool3d)


def network_program(
    network: Any, channels: int, patch_size: Sequence[int], *, in_int16: bool = False
) -> tuple[Program, dict[str, Tensor]]:
    """Make the program of one fold's network.

    Args:
        network: In evaluation mode.
        channels: Of a tile.
        patch_size: Of a tile.
        in_int16: Multiply in int16 where the kernels can.

    Returns:
        The program, and its weights by name.

    Raises:
        BackendUnavailable: Where the kernels cannot run all of it.
    """
    builder = Builder([Shape(channels=channels, size=of_axes(patch_size))], in_int16=in_int16)
    if isinstance(network, StuNet):
        features, value = _stu_net(builder, network)
        last: Any = network.logit_layers[0]
    elif is_known(network):
        features, value = _unet(builder, network)
        last = network.decoder.seg_layers[-1]
    else:
        raise BackendUnavailable(
            f"the native backend is for networks of classes that it knows, not for {type(network).__name__:.80}; use "
            "openvino or torch"
        )
    if not isinstance(last, CONVOLUTIONS) or set(last.kernel_size) != {1}:
        raise _refused("its last layer is no pointwise convolution")
    logits = builder.projection("logits", value, last.weight, last.bias)
    head, read = None, []
    if isinstance(network, MultiTaskUNet):
        head = program_head(builder, network, features)
        read = [features[place] for place in head_places(network)]
    values = plan_buffers(builder.shapes, builder.operations, logits, read)
    program = Program(
        values=values,
        operations=tuple(builder.operations),
        logits=logits,
        head=head,
        features=() if head is not None else tuple(read),
    )
    return program, builder.weights


def _unet(builder: Builder, network: Any) -> tuple[list[int], int]:
    """Give the features of encoder and decoder, and the last value."""
    values: list[int | Finer] = [0]
    if getattr(network.encoder, "stem", None) is not None:
        values = [run(builder, "encoder.stem", network.encoder.stem, values)]
    features: list[int] = []
    for index, stage in enumerate(network.encoder.stages):
        features.append(run(builder, f"encoder.stages.{index}", stage, features[-1:] or values))
    value, decoded = features[-1], []
    for index, (upward, stage) in enumerate(zip(network.decoder.transpconvs, network.decoder.stages, strict=True)):
        if not only_spreads(upward):
            raise _refused("its upsampling is no transposed convolution whose kernel equals its stride")
        finer = builder.upsampling(f"decoder.transpconvs.{index}", value, upward.weight, upward.bias)
        value = run(builder, f"decoder.stages.{index}", stage, [finer, features[-(index + 2)]])
        decoded.insert(0, value)
    return [*features, *decoded], value


def _stu_net(builder: Builder, network: StuNet) -> tuple[list[int], int]:
    features: list[int] = []
    for index, stage in enumerate(network.conv_blocks_context):
        features.append(run(builder, f"conv_blocks_context.{index}", stage, features[-1:] or [0]))
    value = features[-1]
    parts = zip(network.upsample_layers, network.conv_blocks_localization, strict=True)
    for index, (upward, stage) in enumerate(parts):
        assert isinstance(upward, StuUpsampling)
        # Nearest upsampling of a pointwise convolution is a transposed one whose positions all have the same weights.
        weight = upward.conv.weight.detach().flatten(1).t()[:, :, None, None, None]
        repeated = weight.expand(-1, -1, *map(int, upward.stride))
        finer = builder.upsampling(f"upsample_layers.{index}", value, repeated, upward.conv.bias)
        value = run(builder, f"conv_blocks_localization.{index}", stage, [finer, features[-(index + 2)]])
    return features, value


def run(builder: Builder, name: str, module: Any, values: Sequence[int | Finer]) -> int:
    """Add a module's operations; several values are concatenated."""
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD, StackedResidualBlocks
    from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks

    if isinstance(module, ConvDropoutNormReLU):
        return _block(builder, name, module, values)
    if isinstance(module, (BasicBlockD, BottleneckD)):
        return _residual(builder, name, module, values)
    if isinstance(module, StuBlock):
        return _stu_block(builder, name, module, values)
    if isinstance(module, POOLINGS):
        return _pooling(builder, name, module, values)
    if isinstance(module, StackedConvBlocks):
        return run(builder, f"{name}.convs", module.convs, values)
    if isinstance(module, StackedResidualBlocks):
        return run(builder, f"{name}.blocks", module.blocks, values)
    if not isinstance(module, nn.Sequential) or len(module) == 0:
        raise _refused(f"{name} is a {type(module).__name__}")
    for index, child in enumerate(module):
        values = [run(builder, f"{name}.{index}", child, values)]
    return builder.together(name, values)


def _block(
    builder: Builder,
    name: str,
    module: Any,
    values: Sequence[int | Finer],
    activation: Any = None,
    residual: int | None = None,
) -> int:
    """Add a convolution with its norm and its activation, or the one after a residual was added."""
    convolution, *others = [step for step in module.all_modules if not isinstance(step, DROPOUTS)]
    if len(others) not in (1, 2) or (activation is not None and len(others) > 1):
        raise _refused(f"{name} is no convolution with norm and activation")
    norm, *own = others
    return _normed(builder, name, (convolution, norm, own[0] if own else activation), values, residual)


def _normed(
    builder: Builder, name: str, parts: tuple[Any, Any, Any], values: Sequence[int | Finer], residual: int | None
) -> int:
    convolution, norm, activation = parts
    _check_convolution(name, convolution)
    if not isinstance(norm, NORMS) or not norm.affine or norm.track_running_stats:
        raise _refused(f"{name} has no instance norm with weights")
    slope = 1.0 if activation is None else _slope(name, activation)
    return builder.convolution(name, convolution, values, builder.norm(f"{name}.norm", norm, slope, residual))


def _residual(builder: Builder, name: str, module: Any, values: Sequence[int | Finer]) -> int:
    """Add two or three convolutions, and a skip connection around them."""
    if module.apply_se:
        raise _refused(f"{name} has squeeze and excitation")
    value = builder.together(name, values)
    # An identity is a function there, a pooling or a convolution a module.
    residual = run(builder, f"{name}.skip", module.skip, [value]) if isinstance(module.skip, nn.Module) else value
    *names, last = ("conv1", "conv2", "conv3") if hasattr(module, "conv3") else ("conv1", "conv2")
    for part in names:
        value = _block(builder, f"{name}.{part}", getattr(module, part), [value])
    return _block(builder, f"{name}.{last}", getattr(module, last), [value], last_activation(module), residual)


def _stu_block(builder: Builder, name: str, module: StuBlock, values: Sequence[int | Finer]) -> int:
    value = residual = builder.together(name, values)
    if module.conv3 is not None:
        _check_convolution(name, module.conv3)
        residual = builder.convolution(f"{name}.conv3", module.conv3, [value], None)
    value = _normed(builder, f"{name}.conv1", (module.conv1, module.norm1, module.act1), [value], None)
    return _normed(builder, f"{name}.conv2", (module.conv2, module.norm2, module.act2), [value], residual)


def _pooling(builder: Builder, name: str, module: Any, values: Sequence[int | Finer]) -> int:
    value = builder.together(name, values)
    axes = 2 if isinstance(module, nn.AvgPool2d) else 3
    kernel, stride = ((each,) * axes if isinstance(each, int) else each for each in (module.kernel_size, module.stride))
    if tuple(kernel) != tuple(stride) or module.padding or module.ceil_mode:
        raise _refused(f"{name} pools over blocks that overlap")
    return builder.pooling(name, value, of_axes(stride))


def _check_convolution(name: str, module: Any) -> None:
    suits = (
        isinstance(module, CONVOLUTIONS)
        and module.groups == 1
        and set(module.dilation) == {1}
        and all(taps % 2 for taps in module.kernel_size)
        and tuple(module.padding) == tuple(taps // 2 for taps in module.kernel_size)
        and module.padding_mode == "zeros"
    )
    if not suits:
        raise _refused(f"{name} is no convolution with an odd number of taps and zeros around")


def _slope(name: str, activation: Any) -> float:
    if not isinstance(activation, ACTIVATIONS):
        raise _refused(f"{name} has no (leaky) ReLU")
    return negative_slope(activation)


def _refused(reason: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"the native backend is for networks of convolutions, instance norms and (leaky) ReLU, {reason}; use openvino "
        "or torch"
    )
