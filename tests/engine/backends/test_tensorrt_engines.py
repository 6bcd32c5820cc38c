"""TensorRT without a GPU: networks as TensorRT reads them, and engines as TensorRT-RTX builds them."""

import ast
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, BundleError, ModelError
from nnturbo.engine.backends import tensorrt, tensorrt_library
from nnturbo.engine.backends.rewrites import LowConvolution
from nnturbo.engine.backends.tensorrt_library import MOST_TILES, keep, profile
from nnturbo.engine.model.folds import inference_network
from torch import nn

from tests.engine.backends.tensorrt_cases import check_half_network, layers_of, needs_export, needs_rtx, without_gpu


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

    @pytest.mark.thorough
    def test_nothing_is_in_half_in_fp32(self, single, rtx):
        _, network = rtx.parse(single.onnx)
        layers = layers_of(network, rtx.api)
        assert {"CONVOLUTION", "NORMALIZATION"} <= {kind for kind, _, _ in layers}
        assert all(types == {rtx.api.float32} for _, _, types in layers)
        assert network.num_outputs == 1

    @pytest.mark.thorough
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
    @pytest.mark.parametrize("kind", ["half", pytest.param("single", marks=pytest.mark.thorough)])
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

    @pytest.mark.thorough
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
