"""Programs of one or few operations, for tests of the kernels."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from nnturbo.engine.backends.buffers import Shape, plan_buffers
from nnturbo.engine.backends.native_builder import Builder
from nnturbo.kernels.program import Executor, Program


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(weight, bias=None, stride=(1, 1, 1)):
    """What a builder reads of a convolution."""
    return SimpleNamespace(
        weight=weight, bias=bias, stride=stride, kernel_size=weight.shape[2:], out_channels=len(weight)
    )


def norm_of(scale, shift):
    return SimpleNamespace(weight=scale, bias=shift, eps=1e-5)


def started(tile, *, in_int16=False):
    """A builder whose tile has the shape of these values."""
    return Builder([Shape(channels=tile.shape[1], size=tuple(tile.shape[2:]))], in_int16=in_int16)


def selected(builder, name, first, end):
    """Some channels of the tile, exactly: a value that may be read by fewer products."""
    channels = builder.shapes[0].channels
    return builder.convolution(name, layer(torch.eye(channels)[first:end, :, None, None, None]), [0], None)


def convolution_of_two(size, taps, images, *, in_int16=False):
    """A convolution by fewer products, of two parts of a tile with any number of channels.

    Returns:
        The tile, the builder, the convolution's value, and what it must give, in float64.
    """
    luck = np.random.default_rng(sum(size))
    one, other, outputs = (int(n) for n in luck.integers(1, 40, 3))
    inputs = one + other
    tile, bias = values(images, inputs, *size), values(outputs, seed=1)
    weight = values(outputs, inputs, taps, 3, 3, seed=2) / (inputs * 9 * taps) ** 0.5
    expected = F.conv3d(tile.double(), weight.double(), bias.double(), padding=(taps // 2, 1, 1))
    builder = started(tile, in_int16=in_int16)
    parts = [selected(builder, "one", 0, one), selected(builder, "other", one, inputs)]
    value = builder.convolution("both", layer(weight, bias), parts, None)
    assert builder.operations[-1].transformed
    return tile, builder, value, expected


def executor_of(kernels, builder, value, planned=plan_buffers):
    """Make a program that gives out a value, and the sum of its channels as logits."""
    logits = builder.projection("logits", value, torch.ones(1, builder.shapes[value].channels, 1, 1, 1), None)
    program = Program(
        values=planned(builder.shapes, builder.operations, logits, [value]),
        operations=tuple(builder.operations),
        logits=logits,
        head=None,
        features=(value,),
    )
    return Executor(kernels, program, builder.weights, 2)


def given_out(kernels, builder, value, tile, threads=2):
    """Run a program for one value."""
    outputs = executor_of(kernels, builder, value)(tile, threads)
    torch.testing.assert_close(outputs.logits[:, 0], outputs.features[0].sum(1), atol=1e-3, rtol=1e-3)
    return outputs.features[0]


def furthest(got, expected):
    """Largest difference, as a part of the expected values' standard deviation."""
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max() / expected.std())


def shapes(count):
    luck = np.random.default_rng(20261123)
    return [tuple(int(n) for n in luck.integers(1, 20, 3)) for _ in range(count)]
