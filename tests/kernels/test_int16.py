"""Convolutions in int16: against a twin with the same rounding, and against float64 within what the rounding allows."""

import ctypes
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine.backends import native_builder
from nnturbo.engine.files import cache_root
from nnturbo.kernels import library
from nnturbo.kernels.library import lacking, load_library
from nnturbo.kernels.program import Executor, multiplies_int16, use
from torch.nn import functional as F

from tests.kernels.programs import (
    convolution_of_two,
    executor_of,
    given_out,
    layer,
    norm_of,
    selected,
    shapes,
    started,
    values,
)

KEPT = (cache_root() or Path.cwd()) / "kernels"
MOST, CHUNK = 16383, 96  # of products.h
WIDE = 24  # outputs along x from which on lines are rounded by themselves


def reason():
    """Say why there are no such products here, or return an empty text."""
    missing = lacking(KEPT)
    return missing or ("" if multiplies_int16(load_library(KEPT)) else "this processor has no AVX512-VNNI")


pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())


@pytest.fixture(scope="module")
def kernels():
    return load_library(KEPT)


@pytest.fixture(autouse=True)
def least_voxels(monkeypatch):
    """Transforms convolutions of any size."""
    monkeypatch.setattr(native_builder, "LEAST_VOXELS", 1)
    monkeypatch.setattr(native_builder, "LEAST_VOXELS_OF_PLANES", 1)


def rounded_lines(tile):
    """Each line along x, with all its channels, in whole numbers up to MOST, (1, C, Z, Y, X)."""
    largest = tile.abs().amax(dim=(1, 4), keepdim=True)
    factor = (torch.tensor(float(MOST)) / largest).double()  # a number divided by a tensor is rounded twice
    return torch.round(tile.double() * factor), (largest / MOST).double()


def rounded_weights(weight):
    """Each column of (inputs, outputs) in whole numbers that are as small as sums of 32 bits need."""
    sums = torch.stack([part.abs().sum(0) for part in weight.double().split(CHUNK)]).amax(0)
    room = (2**31 - 1) / MOST - CHUNK / 2
    factor = torch.minimum(room / sums, 32767 / weight.double().abs().amax(0))
    return torch.round(weight.double() * factor), (1 / factor).float().double()


def twin(tile, weight, bias):
    """Products of each voxel (1, C, Z, Y, X) with a weight (C, outputs)."""
    whole, of_lines = rounded_lines(tile)
    columns, of_columns = rounded_weights(weight)
    sums = torch.einsum("nczyx,co->nozyx", whole, columns)
    return sums * of_lines * of_columns[None, :, None, None, None] + bias.double()[None, :, None, None, None]


def chosen(tile):
    """A builder in int16 and the tile's channels as a value that is not the tile."""
    builder = started(tile, in_int16=True)
    return builder, selected(builder, "same", 0, tile.shape[1])


def error(got, expected):
    """Root mean square difference, as a part of the expected values' spread."""
    assert got.shape == expected.shape
    return float((got.double() - expected).square().mean().sqrt() / expected.std())


# Channels that fill vectors are zeros, and so leave the chunks of the twin as they are.
@pytest.mark.parametrize("inputs", [3, 16, 96, 97, 320])
@pytest.mark.parametrize("outputs", [5, 16, 37, 70])
def test_pointwise_convolutions_are_those_of_the_twin(kernels, inputs, outputs):
    tile = values(1, inputs, 2, 3, WIDE + 5) * torch.linspace(0.1, 30, 3)[:, None]
    weight, bias = values(outputs, inputs, 1, 1, 1, seed=1), values(outputs, seed=2)
    builder, same = chosen(tile)
    value = builder.convolution("c", layer(weight, bias), [same], None)
    assert builder.operations[-1].in_int16
    got = given_out(kernels, builder, value, tile)
    expected = twin(tile, weight[:, :, 0, 0, 0].t(), bias)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.std()))
    exact = F.conv3d(tile.double(), weight.double(), bias.double())
    assert 0 < error(got, exact) < 5e-4


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("outputs", [5, 37])
def test_transposed_convolutions_are_those_of_the_twin(kernels, stride, outputs):
    tile, weight, bias = values(1, 40, 3, 4, 7), values(40, outputs, *stride, seed=1), values(outputs, seed=2)
    builder, same = chosen(tile)
    got = given_out(kernels, builder, builder.there(builder.upsampling("up", same, weight, bias)), tile)
    for z, y, x in np.ndindex(*stride):
        expected = twin(tile, weight[:, :, z, y, x], bias)
        part = got[:, :, z :: stride[0], y :: stride[1], x :: stride[2]]
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


@pytest.mark.parametrize("size", [*shapes(20), (4, 4, 200), (1, 40, 40)])
@pytest.mark.parametrize("taps", [1, 3])
def test_convolutions_by_fewer_products(kernels, size, taps):
    tile, builder, value, expected = convolution_of_two(size, taps, 1, in_int16=True)
    assert builder.operations[-1].in_int16
    got = given_out(kernels, builder, value, tile)
    assert (got.double() - expected).square().mean().sqrt() < 4e-3


@pytest.mark.parametrize("size", [*shapes(30), (3, 5, 60), (2, 3, 90)])
def test_convolutions_with_any_taps_and_strides(kernels, size):
    luck = np.random.default_rng(sum(size))
    inputs, outputs = int(luck.integers(1, 40)), int(luck.integers(1, 70))
    taps, stride = (
        tuple(int(n) for n in luck.choice([1, 3, 5], 3)), tuple(int(n) for n in luck.integers(1, 4, 3))
    )  # fmt: skip
    tile, bias = values(1, inputs, *size), values(outputs, seed=1)
    weight = values(outputs, inputs, *taps, seed=2) / (inputs * np.prod(taps)) ** 0.5
    padding = tuple(n // 2 for n in taps)
    expected = F.conv3d(tile.double(), weight.double(), bias.double(), stride=stride, padding=padding)
    builder, same = chosen(tile)
    got = given_out(kernels, builder, builder.convolution("c", layer(weight, bias, stride), [same], None), tile)
    assert (got.double() - expected).square().mean().sqrt() < 6e-4


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_upsampled_as_needed_and_overwritten_is_the_same(kernels, stride, threads):
    fine = tuple(n * s for n, s in zip((24, 4, 6), stride, strict=True))
    tile, upward = values(1, 30, *fine), values(12, 19, *stride, seed=2)

    def result(as_needed, overwrites):
        builder, same = chosen(tile)
        skip = builder.convolution("skip", layer(values(21, 30, 1, 1, 1, seed=6)), [same], None)
        odd = [n + 1 - n % 2 for n in stride]
        low = builder.convolution("low", layer(values(12, 30, *odd, seed=1), None, stride), [same], None)
        finer = builder.upsampling("up", low, upward, values(19, seed=3))
        weight = values(21, 40, 3, 3, 3, seed=5)
        inputs = [finer if as_needed else builder.there(finer), skip]
        value = builder.convolution("c", layer(weight, values(21, seed=4)), inputs, None)
        if not overwrites:
            builder.pooling("reads it again", skip, (1, 1, 1))
        return executor_of(kernels, builder, value)(tile, threads).features[0]

    expected = result(False, False)
    assert all(torch.equal(result(as_needed, True), expected) for as_needed in (True, False))


def network(tile):
    """Every way in which convolutions go."""
    builder, value = chosen(tile)
    channels = tile.shape[1]
    norm = builder.norm("n", norm_of(torch.ones(channels), torch.zeros(channels)), 0.01, None)
    for name, taps, stride in (("a", (3, 3, 3), 1), ("b", (1, 3, 3), 1), ("c", (5, 3, 3), 1), ("d", (3, 3, 3), 2)):
        weight = values(channels, channels, *taps, seed=len(builder.operations))
        value = builder.convolution(name, layer(weight, None, (1, stride, stride)), [value], norm)
    return builder, value


@pytest.mark.parametrize("size", [(9, 18, 50), (5, 30, 14), (1, 40, 60)])
def test_results_do_not_depend_on_threads_and_on_other_tiles(kernels, size):
    tiles = values(3, 33, *size)
    executor = executor_of(kernels, *network(tiles))
    expected = torch.cat([executor(tile, 1).features[0] for tile in tiles.split(1)])
    for threads in (2, 5, 3):
        assert torch.equal(executor(tiles, threads).features[0], expected)


@pytest.mark.parametrize("taps", [(3, 3, 3), (1, 3, 3), (5, 5, 5), (1, 1, 1)])
@pytest.mark.parametrize("large", [1e-20, 1.0, 1e20])
def test_sums_of_the_largest_values_stay_exact(kernels, taps, large):
    tile = torch.full((1, 320, 5, 6, 30), large)
    weight = torch.full((32, 320, *taps), -large)
    builder, same = chosen(tile)
    got = given_out(kernels, builder, builder.convolution("c", layer(weight), [same], None), tile / large)
    padding = tuple(n // 2 for n in taps)
    expected = F.conv3d(tile.double() / large, weight.double(), padding=padding)
    assert float((got.double() / expected - 1).abs().max()) < 2e-3


@pytest.mark.parametrize("taps", [(3, 3, 3), (1, 3, 3), (3, 3, 5), (1, 1, 1)])
def test_zeros_stay_zeros_and_what_is_no_number_is_none(kernels, taps):
    tile, weight, bias = torch.zeros(1, 20, 4, 5, 30), values(40, 20, *taps), values(40, seed=1)
    weight[7] = 0
    builder, same = chosen(tile)
    executor = executor_of(kernels, builder, builder.convolution("c", layer(weight, bias), [same], None))
    assert torch.equal(executor(tile, 2).features[0], bias[None, :, None, None, None].expand(1, 40, 4, 5, 30))
    for spoilt in (torch.nan, torch.inf):
        tile[0, 3, 2, 2, 15] = spoilt
        assert executor(tile, 2).features[0][0, :, 2, 2, 15].isnan().all()


def test_weights_that_are_no_numbers_give_none(kernels):
    tile, weight = values(1, 20, 4, 5, 30), values(40, 20, 3, 3, 3)
    weight[7, 2, 1, 1, 1], weight[9, 2, 1, 1, 1] = torch.nan, torch.inf
    builder, same = chosen(tile)
    got = given_out_without_sum(kernels, builder, builder.convolution("c", layer(weight), [same], None), tile)
    assert got.isnan().flatten(2).any(2)[0].nonzero().flatten().tolist() == [7, 9]


def given_out_without_sum(kernels, builder, value, tile):
    return executor_of(kernels, builder, value)(tile, 2).features[0]


class TestErrors:
    def test_what_goes_by_fewer_products_along_z_alone(self, kernels):
        builder, value = chosen(values(1, 32, 9, 9, 9))
        value = builder.convolution("c", layer(values(32, 32, 3, 3, 3), None, (1, 2, 2)), [value], None)
        assert not builder.operations[-1].transformed
        builder.operations[-1] = replace(builder.operations[-1], transformed=True)
        with pytest.raises(ValueError, match="or in float32 with 3 taps and stride 1 along z"):
            executor_of(kernels, builder, value)

    def test_what_multiplies_the_tile(self, kernels):
        builder = started(values(1, 3, 4, 5, 6))
        value = builder.convolution("c", layer(values(8, 3, 3, 3, 3)), [0], None)
        builder.operations[0] = replace(builder.operations[0], in_int16=True)
        with pytest.raises(ValueError, match="operation 0: only convolutions multiply in int16, transposed or not"):
            executor_of(kernels, builder, value)

    def test_other_operations(self, kernels):
        builder = started(values(1, 3, 4, 5, 6))
        value = builder.pooling("p", selected(builder, "same", 0, 3), (1, 1, 1))
        builder.operations[1] = replace(builder.operations[1], in_int16=True)
        with pytest.raises(ValueError, match="operation 1: only convolutions multiply in int16"):
            executor_of(kernels, builder, value)

    def test_instructions_without_such_products(self, kernels, tmp_path):
        copy = library._declared(ctypes.CDLL(shutil.copy(kernels._name, tmp_path)))
        use(copy, "avx2")
        assert not multiplies_int16(copy)
        builder, same = chosen(values(1, 3, 4, 5, 6))
        value = builder.convolution("c", layer(values(8, 3, 3, 3, 3)), [same], None)
        with pytest.raises(ValueError, match="operation 1: it multiplies in int16, which needs a processor with AVX"):
            executor_of(copy, builder, value)


def test_weights_take_half_the_memory(kernels):
    def bytes_of(in_int16):
        builder = started(values(1, 64, 8, 8, 8), in_int16=in_int16)
        same = selected(builder, "same", 0, 64)
        executor = executor_of(kernels, builder, builder.convolution("c", layer(values(64, 64, 3, 3, 3)), [same], None))
        return weight_bytes(kernels, executor)

    assert bytes_of(True) < 0.6 * bytes_of(False)


class Shapes(ctypes.Structure):
    """`nnturbo_shapes`."""

    _fields_ = (
        ("channels", ctypes.c_int64),
        ("size", ctypes.c_int64 * 3),
        ("outputs", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("weight_bytes", ctypes.c_int64),
        ("buffer_bytes", ctypes.c_int64),
    )


def weight_bytes(kernels, executor: Executor):
    """What a program keeps for its weights."""
    shapes_of = Shapes()
    kernels.nnturbo_program_shapes(executor._made, ctypes.byref(shapes_of))
    return shapes_of.weight_bytes
