"""Programs of one or few operations against torch in float64, with each set of instructions that runs here."""

import ctypes
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine.backends import native_builder
from nnturbo.engine.backends.buffers import Shape, overwritten, plan_buffers
from nnturbo.engine.backends.native_builder import Builder
from nnturbo.engine.files import cache_root
from nnturbo.kernels import library
from nnturbo.kernels.compilation import VARIANTS, here
from nnturbo.kernels.library import lacking, load_library
from nnturbo.kernels.program import Executor, Program, Upsampling, use, variant
from torch.nn import functional as F

from tests.kernels.programs import (
    convolution_of_two,
    executor_of,
    furthest,
    given_out,
    layer,
    norm_of,
    selected,
    shapes,
    started,
    values,
)

KEPT = (cache_root() or Path.cwd()) / "kernels"
pytestmark = pytest.mark.skipif(lacking(KEPT) is not None, reason=str(lacking(KEPT)))


@pytest.fixture(scope="module", params=list(VARIANTS.get(here()[1], {})))
def kernels(request, tmp_path_factory):
    folder = (cache_root() or tmp_path_factory.mktemp("kernels")) / "kernels"
    # A copy for each, since a library uses one set of instructions at a time.
    copy = shutil.copy(load_library(folder)._name, tmp_path_factory.mktemp(request.param))
    made = library._declared(ctypes.CDLL(str(copy)))
    try:
        use(made, request.param)
    except ValueError as error:
        pytest.skip(str(error))
    assert variant(made) == request.param
    return made


@pytest.fixture(autouse=True)
def least_voxels(monkeypatch):
    """Transforms convolutions of any size."""
    monkeypatch.setattr(native_builder, "LEAST_VOXELS", 1)
    monkeypatch.setattr(native_builder, "LEAST_VOXELS_OF_PLANES", 1)


@pytest.mark.parametrize("size", [*shapes(40), (4, 4, 200), (9, 33, 7), (64, 8, 8), (1, 40, 40)])
@pytest.mark.parametrize("taps", [1, 3])
def test_convolutions_by_fewer_products_of_any_number_of_channels(kernels, size, taps):
    tile, builder, value, expected = convolution_of_two(size, taps, 2)
    got = given_out(kernels, builder, value, tile)
    assert furthest(got, expected) < 5e-5 * max(1.0, 1 / float(expected.std()))


@pytest.mark.parametrize("size", shapes(40))
@pytest.mark.parametrize("of_tile", [True, False])  # of which none go by fewer products
def test_convolutions_with_any_taps_and_strides(kernels, size, of_tile):
    luck = np.random.default_rng(sum(size))
    inputs, outputs = int(luck.integers(1, 40)), int(luck.integers(1, 70))
    taps, stride = (
        tuple(int(n) for n in luck.choice([1, 3, 5], 3)), tuple(int(n) for n in luck.integers(1, 4, 3))
    )  # fmt: skip
    tile, bias = values(2, inputs, *size), values(outputs, seed=1)
    weight = values(outputs, inputs, *taps, seed=2)
    padding = tuple(n // 2 for n in taps)
    expected = F.conv3d(tile.double(), weight.double(), bias.double(), stride=stride, padding=padding)
    builder = started(tile)
    value = 0 if of_tile else selected(builder, "same", 0, inputs)
    got = given_out(kernels, builder, builder.convolution("c", layer(weight, bias, stride), [value], None), tile)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("taps", [(3, 3, 3), (3, 1, 1), (3, 5, 3)])
@pytest.mark.parametrize("stride", [(1, 2, 2), (1, 1, 1), (1, 1, 3)])
def test_convolutions_by_fewer_products_along_z_alone(kernels, taps, stride):
    tile, outputs = values(2, 37, 9, 10, 149), 37  # of several parts along x, with stride 2 too
    weight, bias = values(outputs, 37, *taps, seed=1) / (37 * np.prod(taps)) ** 0.5, values(outputs, seed=2)
    builder = started(tile)
    parts = [selected(builder, "one", 0, 20), selected(builder, "other", 20, 37)]
    value = builder.convolution("c", layer(weight, bias, stride), parts, None)
    operation = builder.operations[-1]
    skips = any(step > of_axis for step, of_axis in zip(stride, taps, strict=True))
    assert operation.transformed != skips
    assert operation.along_z == (not skips and (taps != (3, 3, 3) or stride != (1, 1, 1)))
    assert overwritten(operation, builder.shapes) is None
    padding = tuple(n // 2 for n in taps)
    expected = F.conv3d(tile.double(), weight.double(), bias.double(), stride=stride, padding=padding)
    assert furthest(given_out(kernels, builder, value, tile), expected) < 5e-5


@pytest.mark.parametrize(
    ("taps", "stride", "most"),
    [
        ((3, 3, 3), (1, 1, 1), 3e-6),
        ((1, 3, 3), (1, 1, 1), 3e-6),
        ((3, 3, 3), (1, 2, 2), 3e-6),
        ((5, 3, 3), (1, 1, 1), 2e-6),
    ],
)
def test_rounding_stays_far_below_what_labels_depend_on(kernels, taps, stride, most):
    tile = F.leaky_relu(values(1, 128, 12, 12, 24), 0.01)
    weight = values(64, 128, *taps, seed=1) / (128 * np.prod(taps)) ** 0.5
    builder = started(tile)
    same = selected(builder, "same", 0, 128)
    got = given_out(kernels, builder, builder.convolution("c", layer(weight, None, stride), [same], None), tile)
    expected = F.conv3d(tile.double(), weight.double(), stride=stride, padding=tuple(n // 2 for n in taps))
    assert (got.double() - expected).square().mean().sqrt() < most * expected.std()


@pytest.mark.parametrize("planes", [2, 3])
def test_few_planes_go_along_z_where_that_needs_fewer_products(planes):
    builder = started(values(1, 20, planes, 40, 40))
    same = selected(builder, "same", 0, 20)
    builder.convolution("c", layer(values(20, 20, 3, 3, 3), None, (1, 2, 2)), [same], None)
    assert builder.operations[-1].along_z == (planes == 3)


class TestConvolutionsThatCannotGoByFewerProducts:
    def along_z(self, stride=(1, 2, 2), taps=(3, 3, 3)):
        builder = started(values(1, 20, 9, 9, 9))
        same = selected(builder, "same", 0, 20)
        value = builder.convolution("c", layer(values(20, 20, *taps), None, stride), [same], None)
        return builder, value

    @pytest.mark.parametrize("options", [{"taps": (1, 5, 5)}, {"stride": (2, 1, 1)}, {"stride": (1, 4, 1)}])
    def test_other_taps_and_strides(self, kernels, options):
        builder, value = self.along_z(**options)
        builder.operations[-1] = replace(builder.operations[-1], transformed=True)
        with pytest.raises(
            ValueError, match="operation 1: it can only be transformed with 1 or 3 x 3 x 3 taps and stri"
        ):
            executor_of(kernels, builder, value)

    def test_the_tile(self, kernels):
        builder, value = self.along_z()
        builder.operations[-1] = replace(builder.operations[-1], inputs=(0,))
        with pytest.raises(ValueError, match="operation 1: it can only be transformed .* and not from the tile"):
            executor_of(kernels, builder, value)

    def test_two_inputs(self, kernels):
        builder, value = self.along_z()
        builder.operations[-1] = replace(builder.operations[-1], inputs=(1, 1))
        with pytest.raises(ValueError, match="operation 1: it must have one input"):
            executor_of(kernels, builder, value)

    def test_what_is_upsampled(self, kernels):
        builder, value = self.along_z()
        weight = builder.weight("up", values(20, 20, 1, 1, 1))
        upsampling = Upsampling(stride=(1, 1, 1), weight=weight, bias=None)
        builder.operations[-1] = replace(builder.operations[-1], upsampling=upsampling)
        with pytest.raises(ValueError, match="but not along z alone, take what is upsampled"):
            executor_of(kernels, builder, value)

    def test_what_it_reads(self, kernels):
        builder, value = self.along_z(stride=(1, 1, 1), taps=(3, 1, 1))

        def in_one_buffer(*of):
            planned = list(plan_buffers(*of))
            planned[value] = replace(planned[value], buffer=planned[value - 1].buffer)
            return tuple(planned)

        with pytest.raises(ValueError, match="operation 1: it may not write over its input"):
            executor_of(kernels, builder, value, in_one_buffer)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (2, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize("outputs", [3, 16, 37])
def test_transposed_convolutions(kernels, stride, outputs):
    tile, weight, bias = values(2, 24, 5, 6, 7), values(24, outputs, *stride, seed=1), values(outputs, seed=2)
    expected = F.conv_transpose3d(tile.double(), weight.double(), bias.double(), stride=stride)
    builder = started(tile)
    got = given_out(kernels, builder, builder.there(builder.upsampling("up", 0, weight, bias)), tile)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", [(24, 4, 6), (9, 6, 4), (1, 8, 10), (40, 2, 14), (3, 30, 2)])
@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_upsampled_as_needed_and_overwritten_is_the_same(kernels, size, stride, taps, threads):
    fine, outputs = tuple(n * s for n, s in zip(size, stride, strict=True)), 21
    tile, upward = values(1, outputs + 9, *fine), values(12, 19, *stride, seed=2)

    def result(as_needed, overwrites):
        builder = started(tile)
        skip = selected(builder, "skip", 0, outputs)
        odd = [n + 1 - n % 2 for n in stride]
        low = builder.convolution("low", layer(values(12, outputs + 9, *odd, seed=1), None, stride), [0], None)
        finer = builder.upsampling("up", low, upward, values(19, seed=3))
        first = finer if as_needed else builder.there(finer)
        weight = values(outputs, 19 + outputs, taps, 3, 3, seed=5)
        value = builder.convolution("c", layer(weight, values(outputs, seed=4)), [first, skip], None)
        if not overwrites:
            builder.pooling("reads it again", skip, (1, 1, 1))
        executor = executor_of(kernels, builder, value)
        same = executor.program.values[value].buffer == executor.program.values[skip].buffer
        assert same == (overwrites and fine[0] > 1)
        return executor(tile, threads).features[0]

    expected = result(False, False)
    assert all(
        torch.equal(result(as_needed, overwrites), expected)
        for as_needed in (True, False)
        for overwrites in (True, False)
    )


@pytest.mark.parametrize("size", [(8, 6, 9), (5, 7, 4)])
@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (3, 1, 2)])
def test_pooling_and_concatenation(kernels, size, stride):
    tile = values(2, 21, *size)
    builder = started(tile)
    both = builder.together("both", [selected(builder, "end", 5, 21), selected(builder, "start", 0, 5)])
    got = given_out(kernels, builder, builder.pooling("pool", both, stride), tile)
    expected = F.avg_pool3d(torch.cat([tile[:, 5:], tile[:, :5]], 1), stride, stride)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("outputs", [1, 3, 16, 37])
def test_logits_of_single_voxels(kernels, outputs):
    tile, weight, bias = values(2, 24, 9, 14, 13), values(outputs, 24, 1, 1, 1, seed=1), values(outputs, seed=2)
    builder = started(tile)
    logits = builder.projection("logits", 0, weight, bias)
    planned = plan_buffers(builder.shapes, builder.operations, logits, [])
    program = Program(values=planned, operations=tuple(builder.operations), logits=logits, head=None, features=())
    got = Executor(kernels, program, builder.weights, 1)(tile, 2).logits
    assert got.is_contiguous()
    expected = F.conv3d(tile.double(), weight.double(), bias.double())
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


class TestNorm:
    @pytest.mark.parametrize(("mean", "spread"), [(0, 1), (1000, 1), (0, 1e-4), (3, 50)])
    @pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
    @pytest.mark.parametrize("channels", [5, 64])
    def test_of_all_voxels_of_each_tile(self, kernels, mean, spread, slope, channels):
        tile = values(2, channels, 12, 31, 17) * spread + mean
        scale, shift = values(channels, seed=1), values(channels, seed=2)
        expected = F.leaky_relu(F.instance_norm(tile.double(), weight=scale.double(), bias=shift.double()), slope)
        builder = started(tile)
        norm = builder.norm("n", norm_of(scale, shift), slope, None)
        same = layer(torch.eye(channels)[:, :, None, None, None])
        got = given_out(kernels, builder, builder.convolution("same", same, [0], norm), tile)
        # What float32 keeps of a value next to its mean.
        torch.testing.assert_close(got.double(), expected, atol=2e-5 + 3e-7 * mean / spread, rtol=1e-5)

    def test_of_each_plane_of_a_2d_network_with_a_residual(self, kernels):
        tile, weight = values(11, 6, 1, 24, 20), values(6, 6, 1, 3, 3, seed=1)
        builder = started(tile)
        first = selected(builder, "same", 0, 6)
        norm = builder.norm("n", norm_of(torch.ones(6), torch.zeros(6)), 0.01, first)
        got = given_out(kernels, builder, builder.convolution("c", layer(weight), [first], norm), tile)
        expected = F.leaky_relu(F.instance_norm(F.conv3d(tile, weight, padding=(0, 1, 1))) + tile, 0.01)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def convolution_executor(kernels, tile):
    builder = started(tile)
    channels = tile.shape[1]
    norm = builder.norm("n", norm_of(torch.ones(channels), torch.zeros(channels)), 0.01, None)
    weight = values(channels, channels, 3, 3, 3, seed=1)
    value = builder.convolution("c", layer(weight), [selected(builder, "same", 0, channels)], norm)
    return executor_of(kernels, builder, value)


def test_results_do_not_depend_on_the_number_of_threads(kernels):
    tile = values(1, 33, 9, 10, 11)
    executor = convolution_executor(kernels, tile)
    expected = executor(tile, 1).features[0]
    for threads in (2, 5, 3, 2):
        for _ in range(20):
            assert torch.equal(executor(tile, threads).features[0], expected)


def test_each_operation_and_its_norm_are_timed(kernels):
    tile = values(1, 33, 9, 10, 11)
    (same, no_norm), (convolution, norm), (logits, _) = convolution_executor(kernels, tile).measure(tile, 2)
    assert min(same, convolution, norm, logits) > 0
    assert no_norm < norm


@pytest.mark.posix("forks")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_process_that_was_forked_has_threads_of_its_own(kernels):
    tile = values(1, 33, 9, 10, 11)
    executor = convolution_executor(kernels, tile)
    expected = executor(tile, 2).logits.sum().item()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(executor(tile, 2).logits.sum().item()))
    child.start()
    try:
        assert here.poll(60)
        assert here.recv() == expected
    finally:
        child.kill()  # what it ends with is pytest's, which other threads of its parent may have locked
        child.join()


class TestErrors:
    def test_too_little_memory_after_which_work_goes_on(self, kernels):
        tile = values(1, 33, 9, 10, 11)
        executor = convolution_executor(kernels, tile)
        expected = executor(tile, 2).logits
        builder = Builder([Shape(channels=1, size=(2**12, 2**12, 2**12))])
        value = builder.convolution("c", layer(values(16, 1, 1, 1, 1)), [0], None)
        huge = executor_of(kernels, builder, value)
        failed = kernels.nnturbo_program_run(huge._made, ctypes.c_int64(1), None, None, None, None, ctypes.c_int(2))
        assert failed == 1
        assert torch.equal(executor(tile, 2).logits, expected)

    @pytest.mark.skipif(not hasattr(os, "sysconf"), reason="needs a system that tells how much memory there is")
    def test_buffers_that_fit_one_by_one_but_not_together(self, kernels):
        """The system promises each of them, and would end a process that uses them all."""
        pages, lanes = os.sysconf("SC_PHYS_PAGES"), 16
        planes = int(0.6 * pages * os.sysconf("SC_PAGESIZE") / (4 * lanes * 2**16))
        builder = Builder([Shape(channels=1, size=(planes, 2**8, 2**8))])
        value = builder.convolution("a", layer(values(lanes, 1, 1, 1, 1)), [0], None)
        value = builder.convolution("b", layer(values(lanes, lanes, 5, 1, 1)), [value], None)
        huge = executor_of(kernels, builder, value)
        assert kernels.nnturbo_program_run(huge._made, ctypes.c_int64(1), None, None, None, None, ctypes.c_int(2)) == 1

    def test_values_whose_bytes_are_no_number_that_fits(self, kernels):
        builder = Builder([Shape(channels=2, size=(2**16, 2**16, 2**8))])
        with pytest.raises(ValueError, match=r"value 0 must have .* and at most 2\^40 numbers"):
            executor_of(kernels, builder, builder.convolution("c", layer(values(1, 2, 1, 1, 1)), [0], None))

    def test_tiles_of_another_shape(self, kernels):
        executor = convolution_executor(kernels, values(1, 3, 4, 5, 6))
        with pytest.raises(ValueError, match=r"tiles must be \(N, 3, 4, 5, 6\) float32, got \(1, 3, 4, 5, 7\)"):
            executor(values(1, 3, 4, 5, 7), 1)

    def test_weights_that_do_not_fit(self, kernels):
        builder = started(values(1, 3, 4, 5, 6))
        value = builder.convolution("c", layer(values(8, 3, 3, 3, 3)), [0], None)
        builder.weights["c.weight"] = values(8, 4, 3, 3, 3)
        with pytest.raises(ValueError, match="operation 0: its weights do not fit inputs and outputs"):
            executor_of(kernels, builder, value)
        builder.weights["c.weight"] = values(8, 3, 3, 3, 3).double()
        with pytest.raises(ValueError, match="weights must be float32, c.weight is torch.float64"):
            executor_of(kernels, builder, value)

    def test_a_value_that_was_overwritten(self, kernels):
        builder = started(values(1, 3, 4, 5, 6))
        first = builder.convolution("a", layer(values(3, 3, 3, 3, 3)), [0], None)
        second = builder.convolution("b", layer(values(3, 3, 1, 1, 1)), [first], None)
        value = builder.together("c", [first, second])

        def in_one_buffer(*of):
            planned = plan_buffers(*of)
            return (*planned[:second], replace(planned[second], buffer=planned[first].buffer), *planned[second + 1 :])

        with pytest.raises(ValueError, match="operation 1: it may not write over its input"):
            executor_of(kernels, builder, value, in_one_buffer)
