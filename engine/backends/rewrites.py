"""Changes to a network that several backends make before they run or compile it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.folds import InferenceNetwork
from ..model.network import is_known

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d

ACTIVATIONS = (nn.LeakyReLU, nn.ReLU)
"""Activations that have a slope, see `negative_slope`."""


def with_shuffles(network: InferenceNetwork) -> InferenceNetwork:
    """Replace transposed convolutions whose kernel equals their stride by `Upsampling`, in place.

    For eager torch and TorchScript, whose transposed 3D convolutions are slow on CPUs (pytorch #194496), and for
    TensorRT (as in NVIDIA's MLPerf 3D-UNet). OpenVINO, inductor and ONNX Runtime were faster with the original layers.
    A given network stays as it is, because its code may use its layers in other ways.
    """
    if not network.given:
        replace_modules(network, lambda module: Upsampling(module) if only_spreads(module) else None)
    return network


def with_low_convolutions(network: InferenceNetwork, dtype: torch.dtype) -> InferenceNetwork:
    """Let a network run its convolutions in bfloat16 or float16 and all other layers in float32; changes it in place.

    Norms, sums, activations and classification heads stay in float32. So do the last convolutions, because their
    outputs are the logits, and rounded logits change labels.
    """
    last = {id(layer) for fold in network.networks for layer in _logit_layers(fold)}
    replace_modules(
        network,
        lambda module: (
            LowConvolution(module, dtype) if isinstance(module, Convolution) and id(module) not in last else None
        ),
    )
    return network


def _logit_layers(fold: nn.Module) -> list[nn.Module]:
    """Find the layers whose outputs are the logits."""
    layers: Any = getattr(fold, "logit_layers", None)
    if layers is None and is_known(fold):
        layers = fold.get_submodule("decoder.seg_layers").children()
    if layers is None:  # Primus, which ends with its last convolution
        layers = [module for module in fold.modules() if isinstance(module, Convolution)][-1:]
    return [module for layer in layers for module in layer.modules()]


def with_exact_norms(network: InferenceNetwork) -> InferenceNetwork:
    """Replace instance norms by `ExactInstanceNorm`, in place.

    For OpenVINO in float32, whose own norm sums a whole plane in one float32 (docs/parity.md shows the effect).
    """
    norms = (nn.InstanceNorm2d, nn.InstanceNorm3d)
    replace_modules(
        network,
        lambda module: (
            ExactInstanceNorm(module) if isinstance(module, norms) and not module.track_running_stats else None
        ),
    )
    return network


def replace_modules(network: nn.Module, choose: Any) -> None:
    """Replace each module for which `choose` gives another one, under all of its names."""
    chosen: dict[int, nn.Module | None] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if id(module) not in chosen:
            chosen[id(module)] = choose(module)
        if (replacement := chosen[id(module)]) is not None:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, replacement)


class LowConvolution(nn.Module):
    """A convolution in lower precision, whose input and output are float32."""

    def __init__(self, convolution: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolution = convolution.to(dtype)
        self.dtype = dtype

    def forward(self, values: Tensor) -> Tensor:
        """Convolve."""
        return self.convolution(values.to(self.dtype)).float()


class ExactInstanceNorm(nn.Module):
    """An instance norm in float32 that is nearly as exact as torch's, which sums in float64.

    Note:
        A float32 sum of n numbers, one by one, has an error of up to n / 2 of its last digits. In a blank tile, whose
        features are constant except at a rim, this is more than their deviation. A mean of means of few numbers has no
        such error. Average pooling computes it in the layout of the convolutions, so nothing is copied.
        First the mean of some values is subtracted. The mean of the rest is then about as large as the deviation, so
        its square can be subtracted from the mean square, and the values are not read a third time.
    """

    MOST = (11, 4)
    """Most numbers along an axis that are summed one by one, in 2D and in 3D: about a hundred in total."""
    EVERY = 8
    """Step along an axis between the values of the first, rough mean."""

    def __init__(self, norm: nn.InstanceNorm2d | nn.InstanceNorm3d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, values: Tensor) -> Tensor:
        """Normalise (N, C, *grid)."""
        shape = (1, -1, *[1] * (values.ndim - 2))
        values = values - self._rough_mean(values)
        mean = self._mean(values)
        scale = torch.rsqrt(self._mean(values * values) - mean * mean + self.eps)
        if self.weight is None or self.bias is None:
            return values * scale - mean * scale
        scale = scale * self.weight.view(shape)
        return values * scale + (self.bias.view(shape) - mean * scale)

    def _rough_mean(self, values: Tensor) -> Tensor:
        """(N, C, 1, 1, 1), the mean of some values along each axis, at least four if the axis is as long."""
        steps = [min(self.EVERY, max(1, n // 4)) for n in values.shape[2:]]
        some = values[(..., *(slice(step // 2, None, step) for step in steps))]
        return some.mean(tuple(range(2, values.ndim)), keepdim=True)

    def _mean(self, values: Tensor) -> Tensor:
        """(N, C, 1, 1, 1), the mean of all values."""
        grid = values.shape[2:]
        pool = F.avg_pool2d if len(grid) == 2 else F.avg_pool3d
        together = 1
        while max(values.shape[2:]) > 1:
            kernel = [min(n, self.MOST[len(grid) - 2]) for n in values.shape[2:]]
            fill = [-n % k for n, k in zip(values.shape[2:], kernel, strict=True)]
            if any(fill):  # with zeros, which do not change sums
                values = F.pad(values, [part for n in reversed(fill) for part in (0, n)])
            values = pool(values, kernel, kernel)
            together *= math.prod(kernel)
        return values * (together / math.prod(grid))


def only_spreads(module: nn.Module) -> bool:
    """Whether a module is a transposed convolution in which each output voxel depends on one input voxel."""
    return (
        isinstance(module, (nn.ConvTranspose3d, nn.ConvTranspose2d))
        and module.kernel_size == module.stride
        and set(module.padding) == {0}
        and set(module.output_padding) == {0}
        and set(module.dilation) == {1}
        and module.groups == 1
    )


class Upsampling(nn.Module):
    """A transposed convolution whose kernel equals its stride, as a pointwise convolution and a shuffle of voxels.

    Note:
        Each output voxel is a product of one input voxel's channels and one position of the kernel. A pointwise
        convolution to channels times positions computes all of them; then the positions are moved into place.
    """

    def __init__(self, convolution: nn.ConvTranspose3d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.stride = tuple(convolution.stride)
        self.channels = convolution.out_channels
        positions = math.prod(self.stride)
        pointwise = nn.Conv3d if len(self.stride) == 3 else nn.Conv2d
        self.convolution = pointwise(
            convolution.in_channels, self.channels * positions, 1, bias=convolution.bias is not None
        )
        with torch.no_grad():
            weight = convolution.weight  # (in, out, *stride)
            self.convolution.weight.copy_(weight.flatten(1).t().reshape(self.convolution.weight.shape))
            if convolution.bias is not None and self.convolution.bias is not None:
                self.convolution.bias.copy_(convolution.bias.repeat_interleave(positions))
        self.requires_grad_(False)

    def forward(self, coarse: Tensor) -> Tensor:
        """From (N, in, *grid) to (N, out, *finer grid)."""
        grid = coarse.shape[2:]
        fine = self.convolution(coarse).reshape(-1, self.channels, *self.stride, *grid)
        axes = range(2, 2 + len(grid))
        # (N, out, sz, sy, sx, z, y, x) to (N, out, z, sz, y, sy, x, sx)
        fine = fine.permute(0, 1, *(axis for position in axes for axis in (position + len(grid), position)))
        return fine.reshape(-1, self.channels, *(n * s for n, s in zip(grid, self.stride, strict=True)))


def last_activation(block: Any) -> nn.Module:
    """Find the activation at the end of a residual block of nnU-Net."""
    return block.nonlin3 if hasattr(block, "conv3") else block.nonlin2


def negative_slope(activation: Any) -> float:
    """Number by which one of `ACTIVATIONS` multiplies negative values."""
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
