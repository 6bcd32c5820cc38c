"""The CUDA kernels: compiled for every architecture, and run on the CPU against their twins."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nnturbo.kernels
import numpy as np
import pytest
import torch
from nnturbo.benchmarks.kernels import ARCHITECTURES, VARIANTS, architectures_of, compile_variant
from nnturbo.engine import Engine, Volume
from nnturbo.engine.pipeline import preprocessing
from nnturbo.kernels import AxisOperator, device, device_layers, loader, reference, reference_layers

from tests.engine.factory import multi_task, plans_json, smooth_scan, write_model
from tests.kernels import checks, host, nvrtc
from tests.kernels.random_arguments import random_operator
from tests.paths import ROOT

CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(host.compiler is None, reason="g++ is not installed")


@pytest.fixture
def kernels(monkeypatch):
    """Kernels launched on the CPU."""
    launched = host.host_kernels()
    monkeypatch.setattr(loader, "launch", launched)
    return launched


@needs_compiler
@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_kernel_gives_what_its_twin_gives(kernels, name):
    count = max(3, round(12 * checks.SHARE.get(name, 1)))  # with sanitizers many more are run
    before = kernels.launches
    checks.run(name, count, CPU)
    assert kernels.launches == before + count * checks.LAUNCHES[name]


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "array_type"),
    [
        ({}, np.int16),
        pytest.param({}, np.float64, marks=pytest.mark.thorough),
        ({"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [True]}, np.int32),
        pytest.param({"spacing": [6.0, 1.5, 1.5]}, np.uint8, marks=pytest.mark.thorough),
    ],
)
def test_a_whole_prediction_through_the_kernels_is_that_of_their_twins(
    kernels, monkeypatch, tmp_path, changes, array_type
):
    folder = write_model(tmp_path / "m", plans=multi_task(plans_json(**changes)))
    scan = np.abs(smooth_scan((12, 30, 34))).clip(0, 255).astype(array_type)
    volume = Volume.from_array(scan, (3.0, 1.2, 1.2))
    engine = Engine.load(folder, device="cpu", backend="torch")
    expected = engine.predict(volume)
    before = kernels.launches
    monkeypatch.setattr(nnturbo.kernels, "_launches", lambda tensor: True)
    # What a GPU's kernels can read is what comes there.
    to_device = preprocessing.to_device
    monkeypatch.setattr(
        preprocessing, "_readable_type", lambda dtype, device: dtype if dtype in loader.TYPES else torch.float32
    )
    monkeypatch.setattr(
        preprocessing, "to_device",
        lambda image, where: (made := to_device(image, where)).to(preprocessing._readable_type(made.dtype, where)),
    )  # fmt: skip
    found = engine.predict(volume)
    assert kernels.launches > before + 20
    assert np.count_nonzero(found.segmentation != expected.segmentation) <= 2
    assert found.classification.logits == pytest.approx(expected.classification.logits, abs=1e-4)


def sanitized(folder, count, *replacement):
    """Run the checks in a process that watches memory."""
    libraries = [
        subprocess.run([host.compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library.strip()).is_absolute() for library in libraries):
        pytest.skip("g++ has no sanitizers")
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.sanitized", str(count), str(folder), *replacement],
        cwd=ROOT, capture_output=True, text=True, check=False,
        # Python and torch leave much behind at the end; what matters here is who reads and writes where.
        env={**os.environ, "LD_PRELOAD": " ".join(map(str.strip, libraries)), "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip


@needs_compiler
@pytest.mark.thorough
def test_sanitizers_stay_silent(tmp_path):
    count = 200
    done = sanitized(tmp_path, count)
    assert (done.returncode, done.stderr) == (0, "")
    told = dict(line.split(": ") for line in done.stdout.splitlines())
    counts = {name: round(count * checks.SHARE.get(name, 1)) * checks.LAUNCHES[name] for name in checks.CHECKS}
    assert told == {name: f"{launches} launches" for name, launches in counts.items()}


@pytest.mark.thorough
@needs_compiler
def test_sanitizers_speak_where_a_kernel_writes_beyond_its_output(tmp_path):
    done = sanitized(tmp_path, 20, "if (x >= tx) break;", "if (x > tx) break;")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize(
    "architecture",
    [90, *(pytest.param(other, marks=pytest.mark.thorough) for other in ARCHITECTURES if other != 90)],
)
def test_the_runtime_compiler_takes_every_kernel_without_a_word(architecture):
    compiler = nvrtc.find()
    if compiler is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    for kernel, dtype, lines in VARIANTS:
        if architecture not in architectures_of(kernel):
            continue
        code, said = nvrtc.compile_kernel(compiler, loader.source(kernel, dtype, lines), kernel, architecture)
        assert said == ""
        assert code[:4] == b"\x7fELF"


def test_the_runtime_compiler_says_what_is_wrong():
    compiler = nvrtc.find()
    if compiler is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    code, said = nvrtc.compile_kernel(compiler, loader.source("gather_tiles", torch.float32) + "nonsense", "k", 90)
    assert code == b""
    assert "nonsense" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.thorough
def test_nvcc_takes_a_kernel_for_all_architectures_and_nothing_is_spilled():
    rows = compile_variant("resample_labels", torch.uint8, None)
    assert [row["sm"] for row in rows] == list(ARCHITECTURES)
    assert all(16 <= row["registers"] <= 128 for row in rows)
    assert all(row["spill_bytes"] == 0 for row in rows)


@needs_compiler
class TestWhatCannotBeLaunched:
    def test_a_volume_that_is_not_contiguous_along_x(self, kernels):
        volume = torch.zeros(1, 4, 4, 4).transpose(-1, -2)
        with pytest.raises(ValueError, match="volume must be contiguous along x, got strides"):
            device.gather_tiles(volume, (0, 0, 0), (4, 4, 4), [()], torch.zeros(1, 1, 4, 4, 4))

    def test_more_views_than_there_are(self, kernels):
        with pytest.raises(ValueError, match="there are 8 views of a tile, got 9"):
            device.gather_tiles(torch.zeros(1, 4, 4, 4), (0, 0, 0), (4, 4, 4), [()] * 9, torch.zeros(9, 1, 4, 4, 4))

    def test_more_logits_in_a_view_than_an_integer_counts(self, kernels):
        logits = torch.zeros(1).expand(1, 2, 1024, 1024, 1024)
        with pytest.raises(ValueError, match=r"fewer than 2\^31 logits, got 2 x \(1024, 1024, 1024\)"):
            device.accumulate_views(logits, [()], (torch.ones(1),) * 3, torch.zeros(2, 1, 1, 1))

    def test_channels_that_do_not_lie_side_by_side_or_come_in_no_packs(self, kernels):
        with pytest.raises(ValueError, match="channels must come in multiples of 4 in torch.float32, got 6"):
            device_layers.instance_norm(torch.zeros(1, 6, 2, 2, 2), None, None, 1e-5)
        with pytest.raises(ValueError, match="values must be torch.float32 of shape"):
            device_layers.instance_norm(torch.zeros(1, 8, 2, 2, 2), None, None, 1e-5)
        last = torch.zeros(1, 2, 2, 2, 8).movedim(-1, 1)
        with pytest.raises(ValueError, match="the residual must be torch.float32 of shape"):
            device_layers.instance_norm(last, None, None, 1e-5, 1.0, torch.zeros(1, 8, 2, 2, 2))
        other = torch.zeros(1, 2, 2, 2, 16, dtype=torch.float16).movedim(-1, 1)[:, 8:]
        with pytest.raises(ValueError, match=r"the copy must be torch.float32 .* got torch.float16"):
            device_layers.instance_norm(last, None, None, 1e-5, 1.0, None, other)

    def test_blocks_that_come_in_no_packs_or_for_another_grid(self, kernels):
        place = torch.zeros(1, 4, 6, 16, dtype=torch.float16).movedim(-1, 1)[:, 8:]
        with pytest.raises(ValueError, match="channels in multiples of 8 in torch.float16; got 4 channels of 16"):
            device_layers.spread_blocks(torch.zeros(1, 2, 3, 2, 2, 4, dtype=torch.float16), place)
        with pytest.raises(ValueError, match="blocks must be contiguous"):
            device_layers.spread_blocks(torch.zeros(1, 2, 3, 2, 2, 16, dtype=torch.float16)[..., 8:], place)
        with pytest.raises(ValueError, match=r"the output must be torch.float16 of shape \(1, 8, 4, 3\) with strides"):
            device_layers.spread_blocks(torch.zeros(1, 2, 3, 2, 1, 8, dtype=torch.float16), place)

    def test_upsamplings_that_the_kernel_is_not_for(self, kernels):
        def upsample(channels, outputs, stride, pitch, grid=(2, 3)):
            values = torch.empty(1, *grid, channels, dtype=torch.float16, device="meta").movedim(-1, 1)
            weight = torch.empty(channels, outputs, *stride, dtype=torch.float16, device="meta")
            place = torch.empty(1, *(2 * n for n in grid), pitch, dtype=torch.float16, device="meta").movedim(-1, 1)
            device_layers.upsample(values, weight, weight, None, place[:, :outputs])

        for sizes in ((48, 32, (2, 2), 32), (64, 24, (2, 2), 32), (64, 32, (2, 2), 36)):
            with pytest.raises(
                ValueError, match=r"channels and outputs in multiples of 32, and voxels a multiple of 8"
            ):
                upsample(*sizes)
        with pytest.raises(ValueError, match=r"the output must be torch.float16 of shape \(1, 32, 4, 3\) with strides"):
            upsample(64, 32, (2, 1), 64)
        with pytest.raises(ValueError, match=r"fewer than 2\^31 voxels, got 1 times \[65536, 32768\]"):
            upsample(64, 32, (2, 2), 64, (32768, 16384))

    def test_a_convolutions_blocks_fill_the_device_evenly(self):
        tiles_of_block = device_layers._tiles_of_block
        assert tiles_of_block(6144, 1, 528, 16) == 12  # 512 blocks, where 16 tiles each would be 384
        assert tiles_of_block(6144, 8, 528, 16) == 16
        assert tiles_of_block(100, 1, 528, 16) == 1

    @pytest.mark.parametrize(
        ("channels", "pitch", "dtype", "of_weight"),
        [(32, 32, torch.float32, 32), (32, 32, torch.float16, 64), (32, 36, torch.float16, 32)],
    )
    def test_values_that_kernels_on_tensor_cores_do_not_take(self, kernels, channels, pitch, dtype, of_weight):
        values = torch.zeros(1, 4, 4, pitch, dtype=dtype).movedim(-1, 1)[:, :channels]
        weight = torch.zeros(32, of_weight, 1, 1, dtype=dtype)
        with pytest.raises(ValueError, match="values must be float16 or bfloat16 in the weight's"):
            device_layers.convolve(values, weight, weight)
        with pytest.raises(ValueError, match="values must be float16 or bfloat16 in the weight's"):
            device_layers.upsample(values, weight.movedim(0, 1), weight, None, values)

    @pytest.mark.parametrize(
        ("weight", "slope"),
        [((32, 32, 1, 5, 5), 1.0), ((24, 32, 1, 3, 3), 1.0), ((32, 4, 1, 3, 3), 1.0), ((32, 32, 1, 3, 3), -0.5)],
    )
    def test_convolutions_that_the_kernel_is_not_for(self, kernels, weight, slope):
        channels = weight[1]
        values = torch.zeros(1, 2, 4, 4, channels, dtype=torch.float16).movedim(-1, 1)
        norm = reference_layers.Norm(torch.zeros(1, 2, channels), None, slope)
        weight = torch.zeros(weight, dtype=torch.float16)
        with pytest.raises(
            ValueError, match="a convolution must have kernels of 1 or 3 voxels, and outputs in multiples"
        ):
            device_layers.convolve(values, weight, device_layers.factors_of(weight), norm)

    def test_a_plane_of_more_numbers_than_an_integer_counts(self, kernels):
        values = torch.empty(1, 1, 8192, 8192, 32, dtype=torch.float16).movedim(-1, 1)  # never touched
        weight = torch.zeros(32, 32, 1, 3, 3, dtype=torch.float16)
        with pytest.raises(
            ValueError, match=r"a plane must have fewer than 2\^31 numbers, got \[8192, 8192\] times 32"
        ):
            device_layers.convolve(values, weight, device_layers.factors_of(weight))

    def test_sums_that_are_no_counts_means_and_squares(self, kernels):
        with pytest.raises(ValueError, match=r"sums must be .* shape \(N, parts, 3, C\), got torch.float32 of shape"):
            device_layers.norm_scales(torch.zeros(1, 4, 2, 8), None, 1e-5)

    def test_data_that_lack_inputs(self, kernels):
        operator = AxisOperator(6, torch.arange(5), torch.full((5, 2), 0.5))
        with pytest.raises(ValueError, match=r"read inputs \[2, 6\), data holds \[3, 6\)"):
            device.resample_axis(torch.zeros(1, 3, 2, 2), operator, -3, rows=(2, 5), offset=3)
        operators = (AxisOperator.identity(2), operator, AxisOperator.identity(2))
        with pytest.raises(ValueError, match=r"read inputs \[0, 6\), data holds \[0, 5\)"):
            device.resample_labels(torch.zeros(1, 2, 5, 2), operators, torch.zeros(2, 5, 2), rows=(0, 2))

    def test_labels_from_more_than_two_taps(self, kernels):
        cubic = AxisOperator(6, torch.arange(4), torch.full((4, 3), 1 / 3))
        same = AxisOperator.identity(6)
        with pytest.raises(ValueError, match="labels take one or two taps along each axis, got 3 along x"):
            device.resample_labels(
                torch.zeros(1, 6, 6, 6), (same, same, cubic), torch.zeros(6, 6, 4, dtype=torch.uint8), rows=(0, 6)
            )


@needs_compiler
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (1, 1), (3, 1)])
def test_grids_with_axes_of_one_voxel_whose_strides_may_be_anything(kernels, images, grid):
    last = torch.channels_last if len(grid) == 2 else torch.channels_last_3d
    values = torch.randn(images, 32, *grid).half().contiguous(memory_format=last)
    strides = [1 if length == 1 else stride for length, stride in zip(values.shape, values.stride(), strict=True)]
    values = values.as_strided(values.shape, strides)
    weight = torch.randn(32, 32, *[1] * len(grid)).div(6).half()
    factors, upsampling = device_layers.factors_of(weight), device_layers.factors_of_upsampling(weight)
    out = torch.empty_like(values)
    twin, _ = reference_layers.convolve(values, weight, factors)
    upsampled = reference_layers.upsample(values, weight, upsampling, None, torch.empty(values.shape))
    assert torch.allclose(device_layers.convolve(values, weight, factors)[0].float(), twin.float(), atol=4e-3)
    made, _ = device_layers.convolve(values, weight, factors, bias=torch.zeros(32))
    assert torch.allclose(made.float(), twin.float(), atol=4e-3)
    assert device_layers.upsample(values, weight, upsampling, None, out) is out
    assert torch.allclose(out.float(), upsampled, atol=4e-3)
    scales = torch.stack([torch.zeros(images, 32), torch.full((images, 32), 2.0)], 1)
    device_layers.norm_apply(values, reference_layers.Norm(scales, None, 1.0), copy=out)
    assert torch.equal(out, values)


@needs_compiler
@pytest.mark.parametrize("axis", [-3, -2, -1])
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_reaches_only_the_outputs_that_take_it(kernels, monkeypatch, axis, spoilt):
    torch.manual_seed(1)
    monkeypatch.setattr(device, "RUN_WARPS", 2)
    operator = random_operator(40, 50, 5)
    shape = [1, 3, 3, 3]
    shape[axis] = 40
    data = torch.randn(shape)
    expected = device.resample_axis(data, operator, axis)
    data.select(axis, 17).fill_(spoilt)
    found = device.resample_axis(data, operator, axis)
    takes = (operator.first <= 17) & (operator.first + operator.taps > 17)
    assert 0 < takes.sum() < 50
    assert not found.movedim(axis, 0)[takes].isfinite().any()
    # Added up in another way, without tensor cores.
    assert torch.allclose(found.movedim(axis, 0)[~takes], expected.movedim(axis, 0)[~takes], rtol=0, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("axis", [-3, -2, -1])
def test_inputs_of_which_a_block_holds_a_part_at_once(kernels, monkeypatch, axis):
    monkeypatch.setattr(device, "RUN_WARPS", 2)
    operator = random_operator(900, 9, 400)
    shape = [2, 5, 6, 7]
    shape[axis] = 900
    data = torch.randn(shape)
    found, expected = (of.resample_axis(data, operator, axis) for of in (device, reference))
    assert torch.allclose(found, expected, rtol=0, atol=1e-3)


@needs_compiler
def test_a_volume_of_more_than_2_31_elements(kernels):
    """Only what a launch touches is in memory: the rest of 8 GiB is never written."""
    planes = 2**31 // (64 * 64) + 8
    volume = torch.empty(1, planes, 64, 64)
    expected = torch.randn(1, 1, 3, 4, 5)
    volume[0, planes - 4 : planes - 1, 7:11, 20:25] = expected[0, 0]
    out = torch.zeros(1, 1, 3, 4, 5)
    device.gather_tiles(volume, (planes - 4, 7, 20), (3, 4, 5), [()], out)
    assert torch.equal(out, expected)
    weights = (torch.ones(3), torch.ones(4), torch.ones(5))
    device.accumulate_views(out, [()], weights, volume[:, planes - 4 : planes - 1, 7:11, 20:25])
    assert torch.equal(volume[:, planes - 4 : planes - 1, 7:11, 20:25], 2 * expected[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_kernel_gives_what_its_twin_gives_on_a_gpu(name):
    pytest.importorskip("cupy")
    checks.run(name, 100, torch.device("cuda:0"))


def test_types_have_the_sizes_that_the_kernels_think():
    sizes = {"float": 4, "Half": 2, "Bfloat": 2, "short": 2, "unsigned char": 1, "unsigned short": 2}
    assert {loader.TYPES[dtype]: torch.empty(0, dtype=dtype).element_size() for dtype in loader.TYPES} == sizes
    assert ctypes.sizeof(ctypes.c_longlong) == 8
