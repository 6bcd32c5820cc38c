"""The backend for TensorRT without a GPU: what it builds, what it refuses, and how threads share it.

Running engines needs a GPU; that test is marked, and has not run yet.
"""

import contextlib
import ctypes
import importlib.util
import math
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from nnturbo.engine import BackendUnavailable, BundleError
from nnturbo.engine.backends import tensorrt
from nnturbo.engine.backends.choose import choose_backend
from nnturbo.engine.backends.rewrites import with_shuffles
from nnturbo.engine.backends.tensorrt import TensorRtBackend, TensorRtRunner
from nnturbo.engine.model.folder import read_model, with_classifier
from nnturbo.engine.model.folds import inference_network

from tests.engine.backends.tensorrt_cases import (
    CPU,
    CUDA,
    Case,
    check_half_network,
    needs_export,
    needs_rtx,
    without_gpu,
)
from tests.engine.factory import multi_task, plans_2d, plans_json, write_model
from tests.paths import DEMO_MODEL


@needs_export
@needs_rtx
class TestBackend:
    def test_each_fold_gets_an_engine_with_its_own_weights(self, tmp_path):
        model = read_model(write_model(tmp_path / "m", plans=plans_2d(), folds=("0", "1")))
        folder = tmp_path / "bundle"
        folder.mkdir()
        TensorRtBackend(("8.9", "12.0")).build(model, torch.zeros(2, 1, 12, 16), "fp16", folder)
        names = ["fold_0.tensorrt_rtx.plan", "fold_1.tensorrt_rtx.plan"]
        assert sorted(path.name for path in folder.iterdir()) == names
        plans = [(folder / name).read_bytes() for name in names]
        for fold, weights in enumerate(model.weights):
            scale = weights["encoder.stages.1.0.convs.0.norm.weight"].numpy().tobytes()
            assert [scale in plan for plan in plans] == [fold == 0, fold == 1]

    @without_gpu
    @pytest.mark.thorough
    def test_one_engine_for_all_folds_takes_a_gpu(self, single, rtx, tmp_path):
        with pytest.raises(BackendUnavailable, match="could not build an engine here"):
            TensorRtBackend()._build_shared(rtx, [single.path, single.path], 8, tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.thorough
    def test_the_demo_model_with_its_fitted_classifier_builds(self, tmp_path, rtx):
        case = Case(with_classifier(read_model(DEMO_MODEL), "auto"), tmp_path, "fp16")
        _, network = rtx.parse(case.onnx)
        check_half_network(network, rtx.api, case)
        assert len(rtx.build(case.onnx, compute_capabilities=("8.6", "8.9", "12.0"))) > case.model.num_parameters


class TestRefusals:
    @pytest.mark.parametrize(
        ("packages", "capabilities", "device", "precision", "reason"),
        [
            (("tensorrt",), (), CPU, "fp16", "it runs on CUDA devices, not on cpu"),
            (("tensorrt",), (), CUDA, "bf16", "fp16, its default, or in fp32, not in bf16"),
            ((), (), CUDA, "fp16", r"pip install 'nnturbo\[tensorrt\]', on RTX GPUs 'nnturbo\[tensorrt-rtx\]'"),
            (("tensorrt",), ("8.6",), CPU, "fp16", r"takes TensorRT-RTX: pip install 'nnturbo\[tensorrt-rtx\]'"),
        ],
    )
    def test_say_what_is_missing(self, monkeypatch, packages, capabilities, device, precision, reason):
        monkeypatch.setattr(tensorrt, "installed", lambda: packages)
        said = TensorRtBackend(capabilities).unavailable(device, precision)
        with pytest.raises(BackendUnavailable, match=reason):
            raise BackendUnavailable(said)

    @needs_rtx
    def test_name_the_gpus_that_can_be_built_for(self):
        assert TensorRtBackend(("8.6", "12.0")).unavailable(CPU, "fp16") is None
        assert TensorRtBackend(("8.6",)).unavailable(CPU, "fp32") is None
        reason = TensorRtBackend(("8.6", "9.0")).unavailable(CPU, "fp16")
        assert "for compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not 9.0" in reason
        assert "nnturbo[tensorrt]" in reason

    @needs_rtx
    def test_tell_a_data_centre_gpu_from_one_that_rtx_is_for(self, monkeypatch):
        monkeypatch.setattr(tensorrt, "installed", lambda: ("tensorrt_rtx",))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        assert TensorRtBackend().unavailable(CUDA, "fp16") is None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert "not 9.0: pip install 'nnturbo[tensorrt]'" in TensorRtBackend().unavailable(CUDA, "fp16")

    def test_are_the_choosers_too(self):
        with pytest.raises(BackendUnavailable, match="tensorrt cannot run here: it runs on CUDA devices, not on cpu"):
            choose_backend("tensorrt", CPU, "fp16")

    @pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="is about a machine without tensorrt")
    def test_a_package_that_cannot_be_imported_is_named(self, monkeypatch, tmp_path):
        (tmp_path / "fold_0.tensorrt.plan").write_bytes(b"")
        model = read_model(write_model(tmp_path / "m"))
        with pytest.raises(BackendUnavailable, match=r"tensorrt cannot be imported .*'nnturbo\[tensorrt\]'"):
            TensorRtBackend().load(model, tmp_path, CUDA, "fp16")
        monkeypatch.setattr(tensorrt, "installed", lambda: ("tensorrt",))
        assert "tensorrt cannot be imported" in TensorRtBackend().unavailable(CUDA, "fp16")

    def test_loading_takes_engines_and_a_gpu(self, tmp_path):
        model = read_model(write_model(tmp_path / "m"))
        with pytest.raises(BackendUnavailable, match="run on CUDA devices, not on cpu"):
            TensorRtBackend().load(model, tmp_path, CPU, "fp16")
        with pytest.raises(BundleError, match="must hold engines of tensorrt or tensorrt_rtx"):
            TensorRtBackend().load(model, tmp_path, CUDA, "fp16")


class SlowContext:
    """Writes the first voxel of the tiles everywhere in the logits, after a moment in which others may run."""

    def set_input_shape(self, name, shape):
        self.shape, self.addresses = shape, {}
        return True

    def get_tensor_shape(self, name):
        return (self.shape[0], 3, *self.shape[2:])

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        time.sleep(0.001)

    def update_device_memory_size_for_shapes(self):
        return 16

    def set_device_memory(self, address, size):
        pass

    def execute_async_v3(self, stream):
        value = ctypes.c_float.from_address(self.addresses["tiles"]).value
        count = math.prod(self.get_tensor_shape("seg_logits"))
        place = (ctypes.c_float * count).from_address(self.addresses["seg_logits"])
        place[:] = [value] * count
        return True


def test_threads_do_not_mix_their_tiles(monkeypatch):
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, of: None)
    library = SimpleNamespace(
        api=SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=0)),
        name="tensorrt",
        errors=lambda: contextlib.nullcontext([]),
    )
    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda index: ("tiles", "seg_logits")[index],
        create_execution_context=lambda strategy: SlowContext(),
    )
    runner = TensorRtRunner(library, [engine], CPU, None)
    tiles = [torch.full((1, 1, 2, 4, 4), float(index)) for index in range(24)]
    with ThreadPoolExecutor(4) as threads:
        for tile, output in zip(tiles, threads.map(runner, tiles), strict=True):
            assert output.seg_logits.dtype == torch.float32
            assert torch.equal(output.seg_logits, tile.expand(1, 3, 2, 4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(TensorRtBackend().unavailable(CUDA, "fp16") is not None, reason="TensorRT is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs engines, which takes a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("folds", [("0",), ("0", "1")])
def test_engines_give_torchs_logits_for_any_number_of_tiles(tmp_path, precision, folds):
    model = read_model(write_model(tmp_path / "m", plans=multi_task(plans_json(), kind="attention"), folds=folds))
    folder = tmp_path / "bundle"
    folder.mkdir()
    TensorRtBackend().build(model, torch.zeros(2, 1, 8, 12, 16, device="cuda"), precision, folder)
    runner = TensorRtBackend().load(model, folder, CUDA, precision)
    network = with_shuffles(inference_network(model))
    for count in (1, 2, 8, 11):
        tiles = torch.randn(count, 1, 8, 12, 16)
        output, expected = runner(tiles), network(tiles)
        for logits, exact in zip(output, expected, strict=True):
            assert logits.dtype == torch.float32
            tolerance = {"fp32": 1e-4, "fp16": 2e-2}[precision]
            assert (logits.cpu() - exact).abs().max() < tolerance * exact.abs().max()
