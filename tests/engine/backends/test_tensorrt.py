"""TensorRT without a GPU: networks as TensorRT reads them, engines as TensorRT-RTX builds them, and every refusal.

Running engines needs a GPU; that test is marked, and has not run yet.
"""

import ast
import contextlib
import ctypes
import importlib.util
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, BundleError, ModelError
from nnturbo.engine.backends import tensorrt, tensorrt_library
from nnturbo.engine.backends.choose import choose_backend
from nnturbo.engine.backends.onnx import export_onnx
from nnturbo.engine.backends.tensorrt import TensorRtBackend, TensorRtRunner
from nnturbo.engine.backends.tensorrt_library import MOST_TILES, Library, keep, profile
from nnturbo.engine.model.folder import read_model, with_classifier
from nnturbo.engine.model.folds import LowConvolution, inference_network, with_low_convolutions, with_shuffles
from torch import nn

from tests.engine.factory import multi_task, plans_2d, plans_json, write_model
from tests.paths import DEMO_MODEL

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13",
)
needs_export = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")),
    reason="onnx or onnxscript are not installed: pip install onnx onnxscript",
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


class Case:
    """A network, and what it is exported to."""

    def __init__(self, model, folder, precision):
        self.model = model
        self.network = with_shuffles(inference_network(model))
        if precision == "fp16":
            self.network = with_low_convolutions(self.network, torch.float16)
        self.tiles = torch.randn(2, model.plan.input_channels, *model.plan.patch_size)
        self.path = folder / "network.onnx"
        export_onnx(self.network, self.tiles, self.path)
        self.onnx = self.path.read_bytes()


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    plans = multi_task(plans_json(), kind="attention")
    return Case(read_model(write_model(folder / "m", plans=plans)), folder, "fp16")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return Case(read_model(write_model(folder / "m", plans=plans_2d())), folder, "fp32")


@pytest.fixture(scope="module")
def rtx():
    return Library("tensorrt_rtx")


def layers_of(network, api):
    """(type, data types of inputs and outputs) of every layer that computes with floating point numbers."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        tensors += [layer.get_output(i) for i in range(layer.num_outputs)]
        types = {tensor.dtype for tensor in tensors if tensor is not None} & {api.float16, api.float32, api.bfloat16}
        if types:
            found.append((layer.type.name, layer, types))
    return found


def check_half_network(network, api, case):
    """Convolutions in half but for the last, and nothing else but what casts between them."""
    layers = layers_of(network, api)
    convolutions = [(layer, types) for kind, layer, types in layers if kind == "CONVOLUTION"]
    low = [layer for layer, types in convolutions if types == {api.float16}]
    full = [layer for layer, types in convolutions if types == {api.float32}]
    assert len(low) == sum(isinstance(module, LowConvolution) for module in case.network.modules()) > 3
    assert [layer.get_output(0).name for layer in full] == ["seg_logits"]
    assert len(convolutions) == len(low) + len(full)
    rest = [(kind, types) for kind, _, types in layers if kind not in ("CONVOLUTION", "CAST")]
    assert {"NORMALIZATION", "SOFTMAX", "MATRIX_MULTIPLY", "ELEMENTWISE"} <= {kind for kind, _ in rest}
    assert [kind for kind, types in rest if types != {api.float32}] == []
    assert sum(kind == "NORMALIZATION" for kind, _ in rest) >= sum(
        isinstance(module, nn.InstanceNorm3d) for module in set(case.network.modules())
    )
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    assert [tensor.name for tensor in outputs] == ["seg_logits", "class_logits"]
    assert [tensor.dtype for tensor in outputs] == [api.float32, api.float32]
    plan = case.model.plan
    assert tuple(outputs[0].shape) == (-1, plan.labels.num_outputs, *plan.patch_size)
    assert tuple(outputs[1].shape) == (-1, len(plan.classification.class_names))


@needs_export
@needs_rtx
class TestNetworks:
    def test_convolutions_alone_are_in_half(self, half, rtx):
        _, network = rtx.parse(half.onnx)
        check_half_network(network, rtx.api, half)

    def test_an_activation_in_half_would_be_noticed(self, half, rtx):
        import onnx

        model = onnx.load_from_string(half.onnx)
        for node in model.graph.node:  # one activation, computed in half
            if node.op_type == "LeakyRelu":
                cast = onnx.helper.make_node("Cast", [node.output[0]], ["low"], to=onnx.TensorProto.FLOAT16)
                again = onnx.helper.make_node("LeakyRelu", ["low"], ["low_too"])
                back = onnx.helper.make_node("Cast", ["low_too"], ["back"], to=onnx.TensorProto.FLOAT)
                break
        for user in model.graph.node:
            user.input[:] = ["back" if name == node.output[0] else name for name in user.input]
        position = list(model.graph.node).index(node) + 1
        for offset, added in enumerate((cast, again, back)):
            model.graph.node.insert(position + offset, added)
        _, network = rtx.parse(model.SerializeToString())
        with pytest.raises(AssertionError, match="ACTIVATION"):
            check_half_network(network, rtx.api, half)

    def test_nothing_is_in_half_in_fp32(self, single, rtx):
        _, network = rtx.parse(single.onnx)
        layers = layers_of(network, rtx.api)
        assert {"CONVOLUTION", "NORMALIZATION"} <= {kind for kind, _, _ in layers}
        assert all(types == {rtx.api.float32} for _, _, types in layers)
        assert network.num_outputs == 1

    def test_profiles_are_for_one_to_eight_tiles(self, half, single, rtx):
        builder, network = rtx.parse(half.onnx)
        shapes = [tuple(shape) for shape in profile(builder, network, 4).get_shape("tiles")]
        assert shapes == [(1, 1, 8, 12, 16), (4, 1, 8, 12, 16), (8, 1, 8, 12, 16)]
        assert len(half.model.views) == MOST_TILES == 8
        assert len(single.model.views) == 4

    def test_every_weight_of_a_fold_can_be_filled_in_by_its_name(self, half, rtx):
        import onnx

        _, network = rtx.parse(half.onnx)
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        initializers = onnx.load_from_string(half.onnx).graph.initializer
        weights = {w.name for w in initializers if w.data_type in floats and w.dims}  # not bounds and divisors
        assert {name for name in weights if not network.mark_weights_refittable(name)} == set()
        assert not network.mark_weights_refittable("networks.0.no_such_weight")
        convolutions = [node.input[1] for node in onnx.load_from_string(half.onnx).graph.node if node.op_type == "Conv"]
        assert len(convolutions) == len([module for module in half.network.modules() if isinstance(module, nn.Conv3d)])
        assert set(convolutions) <= weights

    def test_what_is_no_model_is_refused(self, rtx):
        with pytest.raises(ModelError, match=r"tensorrt_rtx 1\.\S+ cannot take this network: .*Failed to parse"):
            rtx.parse(b"no model")

    def test_an_unknown_operator_is_named(self, rtx):
        from onnx import TensorProto, helper

        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("tiles", "seg_logits")]
        node = helper.make_node("Frobnicate", ["tiles"], ["seg_logits"], domain="nowhere")
        graph = helper.make_graph([node], "g", values[:1], values[1:])
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
        with pytest.raises(ModelError, match="Frobnicate"):
            rtx.parse(helper.make_model(graph, opset_imports=imports).SerializeToString())


@needs_export
@needs_rtx
class TestEngines:
    @pytest.mark.parametrize("kind", ["half", "single"])
    def test_they_are_built_without_a_gpu_for_the_ones_named(self, request, rtx, kind):
        onnx = request.getfixturevalue(kind).onnx
        wanted = [("8.6",), ("8.9",), ("12.0",), ("8.6", "12.0")]
        plans = [rtx.build(onnx, compute_capabilities=names) for names in wanted]
        # The header of an engine has its length, and one bit for each kind of GPU that it is for.
        assert [int.from_bytes(plan[16:24], "little") for plan in plans] == [len(plan) for plan in plans]
        ampere, ada, blackwell, both = [int.from_bytes(plan[32:40], "little") for plan in plans]
        assert [bits.bit_count() for bits in (ampere, ada, blackwell, both)] == [1, 1, 1, 2]
        assert len({ampere, ada, blackwell}) == 3
        assert both == ampere | blackwell

    def test_the_engine_itself_holds_convolutions_in_half_and_all_else_in_float(self, half, rtx):
        plan = rtx.build(half.onnx, compute_capabilities=("8.6",))

        def held(parameter):
            values = parameter.detach().float().numpy()
            return (values.astype(np.float16).tobytes() in plan, values.tobytes() in plan)

        modules = dict(half.network.named_modules())
        low = [module for module in modules.values() if isinstance(module, LowConvolution)]
        norms = [module for module in modules.values() if isinstance(module, nn.InstanceNorm3d)]
        assert len(low) > 3
        assert len(norms) == 3
        assert [held(module.convolution.bias) for module in low] == [(True, False)] * len(low)
        assert {held(norm.weight) for norm in norms} == {held(norm.bias) for norm in norms} == {(False, True)}
        assert held(modules["networks.0.decoder.seg_layers.0"].weight) == (False, True)
        assert held(modules["networks.0.head.layers.2"].bias) == (False, True)

    def test_turing_has_no_products_of_float_matrices(self, half, single, rtx):
        # So a head's linear layers, which are in float, keep a multi-task model from GPUs of compute capability 7.5.
        with pytest.raises(BackendUnavailable, match=r"Turing \(SM75\): FP32 GEMM is not supported"):
            rtx.build(half.onnx, compute_capabilities=("7.5",))
        assert rtx.build(single.onnx, compute_capabilities=("7.5",))

    @pytest.mark.parametrize("refittable", [False, True])
    def test_they_are_for_the_gpus_named_and_never_in_tf32(self, rtx, refittable):
        config = rtx.configure(rtx.api.Builder(rtx.log), ("8.9", "12.0"), refittable)
        flags, capabilities = rtx.api.BuilderFlag, rtx.api.ComputeCapability
        assert not config.get_flag(flags.TF32)
        assert config.get_flag(flags.REFIT) == config.get_flag(flags.STRIP_PLAN) == refittable
        targets = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
        assert targets == [capabilities.SM89, capabilities.SM120]
        config = rtx.configure(rtx.api.Builder(rtx.log))
        assert config.num_compute_capabilities == 1
        assert config.get_compute_capability(0) == capabilities.CURRENT

    def test_a_gpu_it_does_not_know_is_refused(self, single, rtx):
        with pytest.raises(BackendUnavailable, match=r"compute capability 9\.0, only for 7\.5, 8\.0, 8\.6"):
            rtx.build(single.onnx, compute_capabilities=("8.6", "9.0"))

    @without_gpu
    def test_the_gpu_that_is_here_is_missed(self, single, rtx):
        with pytest.raises(BackendUnavailable, match="could not build an engine here: .*cudaError"):
            rtx.build(single.onnx)

    @without_gpu
    def test_refittable_ones_take_a_gpu(self, single, rtx):
        # So refitting itself cannot be tested here; nnturbo tries such engines at once and else builds one per fold.
        with pytest.raises(BackendUnavailable, match="could not build an engine here: .*Myelin"):
            rtx.build(single.onnx, compute_capabilities=("8.6",), refittable=True)

    def test_a_damaged_one_is_refused(self, single, rtx, tmp_path):
        plan = rtx.build(single.onnx, compute_capabilities=("8.6",))
        path = tmp_path / "fold_0.tensorrt_rtx.plan"
        path.write_bytes(plan[:-1])
        with pytest.raises(BundleError, match="must be an engine of tensorrt_rtx .* for this GPU; .*Serialization"):
            rtx.open(path)
        path.write_bytes(b"")
        with pytest.raises(BundleError, match="empty memory buffer"):
            rtx.open(path)

    @without_gpu
    def test_a_whole_one_needs_a_gpu_to_open_and_says_so(self, single, rtx, tmp_path):
        path = tmp_path / "fold_0.tensorrt_rtx.plan"
        path.write_bytes(rtx.build(single.onnx, compute_capabilities=("8.6",)))
        with pytest.raises(BundleError, match="CUDA driver version") as caught:
            rtx.open(path)
        assert "Serialization" not in str(caught.value)  # up to there it is whole


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
    def test_one_engine_for_all_folds_takes_a_gpu(self, single, rtx, tmp_path):
        with pytest.raises(BackendUnavailable, match="could not build an engine here"):
            TensorRtBackend()._build_shared(rtx, [single.path, single.path], 8, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_the_demo_model_with_its_fitted_classifier_builds(self, tmp_path, rtx):
        case = Case(with_classifier(read_model(DEMO_MODEL), "auto"), tmp_path, "fp16")
        _, network = rtx.parse(case.onnx)
        check_half_network(network, rtx.api, case)
        assert len(rtx.build(case.onnx, compute_capabilities=("8.6", "8.9", "12.0"))) > case.model.num_parameters


@needs_export
def test_what_is_exported_gives_torchs_logits(half):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(half.onnx, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = half.network(half.tiles)
        exact = inference_network(half.model)(half.tiles)
    for logits, low, full in zip(session.run(None, {"tiles": half.tiles.numpy()}), expected, exact, strict=True):
        assert logits.dtype == np.float32
        largest = float(full.abs().max())
        assert np.abs(logits - low.numpy()).max() < 2e-3 * largest
        assert 0 < np.abs(logits - full.numpy()).max() < 1e-2 * largest  # it is in half indeed


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


class TestCaches:
    def test_what_cannot_be_kept_is_logged(self, tmp_path, caplog):
        (tmp_path / "file").write_bytes(b"")
        keep(tmp_path / "file" / "below" / "cache", b"measured")
        assert "cannot be kept" in caplog.text
        keep(tmp_path / "new" / "cache", b"measured")
        assert (tmp_path / "new" / "cache").read_bytes() == b"measured"

    @needs_rtx
    @pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
    def test_timings_are_kept_by_the_version_that_measured_them(self, rtx, monkeypatch, tmp_path):
        # TensorRT-RTX has the calls, though it measures nothing: this is about the file.
        monkeypatch.setenv("NNTURBO_CACHE", str(tmp_path))
        path = tmp_path / f"tensorrt-{rtx.version}.timing"
        config = rtx.api.Builder(rtx.log).create_builder_config()
        with rtx._timing_cache(config):
            pass
        assert not path.exists()
        monkeypatch.setattr(rtx, "name", "tensorrt")
        for _ in range(2):
            with rtx._timing_cache(config):
                pass
            assert path.stat().st_size > 0

    @needs_rtx
    def test_messages_go_to_the_log(self, rtx, caplog):
        with caplog.at_level(logging.DEBUG, logger=tensorrt_library.__name__), rtx.errors() as errors:
            rtx.log.log(rtx.api.ILogger.WARNING, "slow")
            rtx.log.log(rtx.api.ILogger.ERROR, "wrong")
        assert errors == ["wrong"]
        assert "tensorrt_rtx WARNING: slow" in caplog.text


@needs_rtx
def test_all_that_is_asked_of_tensorrt_is_there(rtx):
    # What runs on GPUs alone is at least called by names that exist.
    kinds = {
        "builder": ["Builder"],
        "config": ["IBuilderConfig", "IRuntimeConfig"],
        "parser": ["OnnxParser", "OnnxParserRefitter"],
        "refitter": ["Refitter"],
        "engine": ["ICudaEngine"],
        "context": ["IExecutionContext"],
        "cache": ["IRuntimeCache"],
        "made": ["IOptimizationProfile"],
        "error": ["ParserError"],
    }
    asked = set()
    for module in (tensorrt, tensorrt_library):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Attribute):
                asked.add(ast.unparse(node).replace("self._library.api.", "api.").replace("self.api.", "api."))
    used = {name.split(".")[0]: 0 for name in asked}
    for name in sorted(asked):
        owner, *path = name.split(".")
        if owner in kinds and len(path) == 1:
            assert any(hasattr(getattr(rtx.api, kind), path[0]) for kind in kinds[owner]), name
            used[owner] += 1
        elif owner == "api" and all(part.isidentifier() for part in path):
            found = rtx.api
            for part in path:
                found = getattr(found, part)
            used[owner] += 1
    assert all(used[owner] > 0 for owner in (*kinds, "api"))
    assert used["context"] >= 6


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
