"""nnturbo's convolutions on CPUs against torch's in float64."""

import ctypes
import multiprocessing
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine.files import cache_root
from nnturbo.kernels import convolution
from nnturbo.kernels.convolution import Kernels, PendingUpsampling, channels_last, compile_library, compiler
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


NARROW = ("-mno-avx512f",)  # eight lanes where there could be sixteen


@pytest.fixture(scope="module", params=[(), NARROW], ids=["native", "eight lanes"])
def kernels(request, tmp_path_factory):
    folder = (cache_root() or tmp_path_factory.mktemp("kernels")) / "kernels"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(convolution, "FLAGS", (*convolution.FLAGS, *request.param))
        made = Kernels(compile_library(folder))
    if request.param and Kernels(compile_library(folder)).lanes == made.lanes:
        pytest.skip("this processor has eight lanes anyway")
    made.set_threads(2)
    return made


def values(*shape, seed=0):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def furthest(got, expected):
    """Largest difference, as a part of the expected values' standard deviation."""
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max() / expected.std())


def shapes(count):
    luck = np.random.default_rng(20261123)
    return [tuple(int(n) for n in luck.integers(1, 20, 3)) for _ in range(count)]


@pytest.mark.parametrize("size", [*shapes(40), (4, 4, 200), (9, 33, 7), (64, 8, 8)])
@pytest.mark.parametrize("taps", [1, 3])
def test_convolutions_by_fewer_products(kernels, size, taps):
    luck = np.random.default_rng(sum(size))
    inputs, outputs = kernels.lanes * int(luck.integers(1, 4)), kernels.lanes * int(luck.integers(1, 5))
    given, bias = values(inputs, *size), values(outputs, seed=1)[0]
    weight = values(outputs, inputs, taps, 3, 3, seed=2)[0] / (inputs * 9 * taps) ** 0.5
    expected = F.conv3d(given.double(), weight.double(), bias.double(), padding=(taps // 2, 1, 1))
    transformed = kernels.transform_weights(weight)
    parts = [given] if inputs == kernels.lanes else list(given.split([kernels.lanes, inputs - kernels.lanes], 1))
    got = kernels.convolve([channels_last(part) for part in parts], taps, transformed, bias)
    assert furthest(got, expected) < 5e-5 * max(1.0, 1 / float(expected.std()))


@pytest.mark.parametrize("size", [(24, 4, 6), (9, 6, 4), (1, 8, 10), (40, 2, 14), (3, 30, 2)])
@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_spread_as_needed_and_overwritten_is_the_same(kernels, size, stride, taps, threads):
    kernels.set_threads(threads)
    outputs, fine = kernels.columns, tuple(n * s for n, s in zip(size, stride, strict=True))
    coarse = PendingUpsampling(
        channels_last(values(24, *size)),
        stride,
        kernels.pack_spread(values(24, kernels.lanes, *stride, seed=1)[0]),
        values(kernels.lanes, seed=2)[0],
    )
    skip, bias = channels_last(values(outputs, *fine, seed=3)), values(outputs, seed=4)[0]
    weight = values(outputs, kernels.lanes + outputs, taps, 3, 3, seed=5)[0]
    transformed = kernels.transform_weights(weight)
    there = kernels.spread(coarse)
    assert coarse.shape == tuple(there.shape)
    expected = kernels.convolve([there, skip], taps, transformed, bias)
    assert torch.equal(kernels.convolve([coarse, skip], taps, transformed, bias), expected)
    for first in (coarse, there):
        overwritten = channels_last(skip.clone())
        got = kernels.convolve([first, overwritten], taps, transformed, bias, overwrite=True)
        assert got is overwritten
        assert torch.equal(got, expected)
    again = kernels.transform_weights(values(outputs, outputs, taps, 3, 3, seed=6)[0])
    expected = kernels.convolve([skip], taps, again, bias)
    assert torch.equal(kernels.convolve([skip], taps, again, bias, overwrite=True), expected)
    kernels.set_threads(2)


def test_what_does_not_fit_is_not_overwritten(kernels):
    given = channels_last(values(kernels.lanes, 4, 5, 6))
    weight = kernels.transform_weights(values(kernels.columns, kernels.lanes, 3, 3, 3, seed=1)[0])
    with pytest.raises(ValueError, match="cannot overwrite"):
        kernels.convolve([given], 3, weight, torch.zeros(kernels.columns), overwrite=True)


@pytest.mark.parametrize("size", shapes(40))
def test_convolutions_with_any_taps_and_strides(kernels, size):
    luck = np.random.default_rng(sum(size))
    inputs, outputs = int(luck.integers(1, 40)), kernels.lanes * int(luck.integers(1, 5))
    taps = tuple(int(n) for n in luck.choice([1, 3, 5], 3))
    stride = tuple(int(n) for n in luck.integers(1, 4, 3))
    given, bias = values(inputs, *size), values(outputs, seed=1)[0]
    weight = values(outputs, inputs, *taps, seed=2)[0]
    padding = tuple(n // 2 for n in taps)
    expected = F.conv3d(given.double(), weight.double(), bias.double(), stride=stride, padding=padding)
    got = kernels.convolve_directly(channels_last(given), taps, stride, kernels.pack_weights(weight), bias)
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_transposed_convolutions(kernels, stride):
    given, weight = values(24, 5, 6, 7), values(24, 3 * kernels.lanes, *stride, seed=1)[0]
    bias = values(3 * kernels.lanes, seed=2)[0]
    expected = F.conv_transpose3d(given.double(), weight.double(), bias.double(), stride=stride)
    got = kernels.spread(PendingUpsampling(channels_last(given), stride, kernels.pack_spread(weight), bias))
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("outputs", [1, 3, 16, 37])
def test_logits_of_single_voxels(kernels, outputs):
    given, missing = values(24, 9, 14, 13), -outputs % kernels.columns
    weight, bias = values(outputs, 24, 1, 1, 1, seed=1)[0], values(outputs, seed=2)[0]
    packed = kernels.pack_weights(weight)
    got = kernels.project(channels_last(given), outputs, packed, F.pad(bias, (0, missing)))
    assert got.is_contiguous()
    torch.testing.assert_close(
        got.double(), F.conv3d(given.double(), weight.double(), bias.double()), atol=1e-4, rtol=1e-5
    )


class TestNorm:
    @pytest.mark.parametrize(("mean", "spread"), [(0, 1), (1000, 1), (0, 1e-4), (3, 50)])
    @pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
    def test_of_all_voxels(self, kernels, mean, spread, slope):
        given = values(2 * kernels.columns, 12, 31, 17) * spread + mean
        scale, shift = values(2 * kernels.columns, seed=1)[0], values(2 * kernels.columns, seed=2)[0]
        expected = F.leaky_relu(F.instance_norm(given.double(), weight=scale.double(), bias=shift.double()), slope)
        got = kernels.normalise(channels_last(given.clone()), scale, shift, 1e-5, slope)
        # What float32 keeps of a value next to its mean.
        torch.testing.assert_close(got.double(), expected, atol=2e-5 + 3e-7 * mean / spread, rtol=1e-5)

    def test_with_a_residual(self, kernels):
        given, residual = values(kernels.columns, 3, 4, 5), values(kernels.columns, 3, 4, 5, seed=3)
        one = torch.ones(kernels.columns)
        expected = F.leaky_relu(F.instance_norm(given) + residual, 0.01)
        got = kernels.normalise(channels_last(given), one, 0 * one, 1e-5, 0.01, channels_last(residual))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def convolved(kernels, threads):
    kernels.set_threads(threads)
    given, weight = values(2 * kernels.lanes, 9, 10, 11), values(kernels.columns, 2 * kernels.lanes, 3, 3, 3, seed=1)[0]
    out = kernels.convolve([channels_last(given)], 3, kernels.transform_weights(weight), torch.zeros(kernels.columns))
    one = torch.ones(kernels.columns)
    return kernels.normalise(out, one, 0 * one, 1e-5)


def test_results_do_not_depend_on_the_number_of_threads(kernels):
    expected = convolved(kernels, 1)
    for threads in (2, 5, 3, 2):
        for _ in range(20):
            assert torch.equal(convolved(kernels, threads), expected)


@pytest.mark.posix("forks")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_process_that_was_forked_has_threads_of_its_own(kernels):
    expected = convolved(kernels, 2).sum().item()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(convolved(kernels, 2).sum().item()))
    child.start()
    assert here.poll(60)
    assert here.recv() == expected
    child.join()


def test_too_little_memory_is_an_error_after_which_work_goes_on(kernels):
    expected = convolved(kernels, 2)
    widest = [ctypes.c_int64(n) for n in (3, 8, 8, 2**36)]
    channels = ctypes.c_int64(kernels.lanes)
    nothing = (None, ctypes.c_int64(0))
    with pytest.raises(MemoryError, match="nnturbo_convolve needs more memory"):
        kernels.library.nnturbo_convolve(
            *widest, *nothing, None, channels, channels, None, None, None, *nothing, None, None, None
        )
    assert torch.equal(convolved(kernels, 2), expected)


class TestCompiling:
    def test_is_done_once(self, tmp_path, monkeypatch):
        compile_library(tmp_path)
        (made,) = tmp_path.iterdir()
        before = made.stat().st_mtime_ns
        compile_library(tmp_path)
        assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]

    def test_is_done_again_where_the_file_cannot_be_loaded(self, tmp_path):
        compile_library(tmp_path / "whole")
        (made,) = (tmp_path / "whole").iterdir()
        foreign = tmp_path / "foreign" / made.name
        foreign.parent.mkdir()
        foreign.write_bytes(b"of another system")
        assert Kernels(compile_library(foreign.parent)).lanes in (8, 16)
        assert foreign.stat().st_size == made.stat().st_size

    def test_without_a_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(OSError, match="no C\\+\\+ compiler"):
            compile_library(tmp_path)

    def test_with_one_that_fails(self, tmp_path, monkeypatch):
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\necho 'fatal error: no such header' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        with pytest.raises(OSError, match="fatal error: no such header"):
            compile_library(tmp_path / "kernels")
        assert list((tmp_path / "kernels").glob("*")) == []


def test_the_source_is_installed_beside_the_package():
    assert convolution.SOURCE.is_file()
    assert os.access(convolution.SOURCE, os.R_OK)


@pytest.mark.parametrize("watched", ["address,undefined", "thread"])
@pytest.mark.parametrize("narrow", [(), NARROW], ids=["native", "eight lanes"])
def test_memory_and_threads_are_clean(tmp_path, watched, narrow):
    source, program = Path(__file__).with_name("convolution_bounds.cpp"), tmp_path / "bounds"
    command = [str(compiler()), "-std=c++17", "-O1", "-march=native", *narrow, "-pthread", f"-fsanitize={watched}"]
    subprocess.run([*command, "-fno-sanitize-recover=all", "-o", program, source], check=True)
    # Leaks are not looked for: the crew is never ended, on purpose.
    done = subprocess.run(
        [program], capture_output=True, text=True, check=False, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
