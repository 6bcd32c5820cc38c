"""nnturbo's convolutions on CPUs against torch's in float64, with each set of instructions that runs here."""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine.files import cache_root
from nnturbo.kernels import compilation, convolution
from nnturbo.kernels.compilation import FLAGS, FOLDER, VARIANTS, compiler, here
from nnturbo.kernels.convolution import (
    Kernels,
    PendingUpsampling,
    channels_last,
    find_library,
    lacking,
    load_library,
)
from torch.nn import functional as F

KEPT = (cache_root() or Path.cwd()) / "kernels"
pytestmark = pytest.mark.skipif(lacking(KEPT) is not None, reason=str(lacking(KEPT)))


@pytest.fixture(scope="module", params=list(VARIANTS.get(here()[1], {})))
def kernels(request, tmp_path_factory):
    folder = (cache_root() or tmp_path_factory.mktemp("kernels")) / "kernels"
    # A copy for each, since a library uses one set of instructions at a time.
    copy = shutil.copy(load_library(folder)._name, tmp_path_factory.mktemp(request.param))
    made = Kernels(convolution._declared(ctypes.CDLL(str(copy))))
    try:
        made.use(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    assert made.variant == request.param
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


needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


class TestLibrary:
    """Where it comes from."""

    @pytest.fixture(autouse=True)
    def clone(self, tmp_path, monkeypatch):
        """A place where no library came with nnturbo."""
        monkeypatch.setattr(convolution, "INSTALLED", tmp_path / "installed.so")

    @pytest.fixture
    def made(self, tmp_path):
        """A library that was compiled before."""
        load_library(tmp_path / "kept")
        (made,) = (tmp_path / "kept").iterdir()
        return made

    @needs_compiler
    def test_is_compiled_once_and_needed_no_more_compiler_from_then_on(self, made, monkeypatch):
        before = made.stat().st_mtime_ns
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        assert lacking(made.parent) is None
        load_library(made.parent)
        assert [path.stat().st_mtime_ns for path in made.parent.iterdir()] == [before]

    @needs_compiler
    @pytest.mark.thorough
    def test_is_compiled_again_where_the_file_cannot_be_loaded(self, made, tmp_path):
        foreign = tmp_path / "foreign" / made.name
        foreign.parent.mkdir()
        foreign.write_bytes(b"of another system")
        assert Kernels(load_library(foreign.parent)).variant in VARIANTS[here()[1]]
        assert foreign.stat().st_size == made.stat().st_size

    @needs_compiler
    def test_is_that_which_came_with_nnturbo(self, made, tmp_path):
        made.rename(convolution.INSTALLED)
        library = find_library(tmp_path / "none")
        assert library is not None
        assert library._name == str(convolution.INSTALLED)
        assert not (tmp_path / "none").exists()

    def test_cannot_be_had_without_a_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        assert "one of nnturbo's wheels" in str(lacking(tmp_path))
        with pytest.raises(OSError, match="no C\\+\\+ compiler"):
            load_library(tmp_path)

    def test_a_compiler_that_only_offers_to_install_itself_is_none(self, tmp_path, monkeypatch):
        for name in ("c++", "g++", "clang++"):
            stub = tmp_path / name
            stub.write_text("#!/bin/sh\necho 'no developer tools were found, requesting install' >&2\nexit 1\n")
            stub.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        assert compiler() is None

    def test_with_a_compiler_that_fails(self, tmp_path, monkeypatch):
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho 'fatal error: no such header' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        with pytest.raises(OSError, match="fatal error: no such header"):
            load_library(tmp_path / "kernels")
        assert list((tmp_path / "kernels").glob("*")) == []

    def test_other_processors_are_named(self, tmp_path):
        with pytest.raises(OSError, match="for x86_64 and aarch64, not for riscv64"):
            compilation.compile_kernels(["c++"], tmp_path / "l", system="linux", processor="riscv64")


def compiled(folder, *flags, sources=("threads.cpp",)):
    """Compile sources, and the kernels for each set of instructions; gives the objects."""
    command, objects = [*(compiler() or []), *FLAGS, *flags, "-c"], []
    for source in sources:
        objects.append(folder / f"{Path(source).name}.o")
        subprocess.run([*command, FOLDER / source, "-o", objects[-1]], check=True)
    for variant, instructions in VARIANTS[here()[1]].items():
        objects.append(folder / f"{variant}.o")
        source = FOLDER / compilation.VARIED
        subprocess.run([*command, *instructions, f"-DVARIANT={variant}", source, "-o", objects[-1]], check=True)
    return objects


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("optimised", ["-O3", "-O1"])
def test_nothing_compiled_for_some_processors_can_stand_in_for_what_runs_on_all(tmp_path, optimised):
    """A linker keeps one of several copies of an inline function: that of the wrong instructions would end others."""
    for path in compiled(tmp_path, optimised, sources=()):
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shared = [line.split()[2] for line in symbols.splitlines() if line.split()[1] in "WT"]
        assert not set(shared) - {"__clang_call_terminate"}


@pytest.mark.thorough
@needs_compiler
@pytest.mark.parametrize("watched", ["address,undefined", "thread"])
def test_memory_and_threads_are_clean(tmp_path, watched):
    flags = ["-O1", f"-fsanitize={watched}", "-fno-sanitize-recover=all"]
    program, source = tmp_path / "bounds", Path(__file__).with_name("convolution_bounds.cpp")
    objects = compiled(tmp_path, *flags, sources=("threads.cpp", source))
    subprocess.run([*(compiler() or []), *flags, "-pthread", *objects, "-o", program], check=True)
    for variant in VARIANTS[here()[1]]:
        # Leaks are not looked for: the crew is never ended, on purpose.
        given = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run([program, variant], capture_output=True, text=True, check=False, env=given)
        if done.returncode != 77:  # this processor lacks the instructions
            assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
