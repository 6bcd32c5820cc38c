"""Torch-TensorRT cannot be installed without TensorRT's libraries: what is tested is what needs none of them.

That is every refusal, the network that it would be given, and, against the source in Torch-TensorRT's own wheels, each
argument that it is called with. For the last, name a folder with such wheels in NNTURBO_WHEELS, as
`pip download torch-tensorrt --no-deps -d FOLDER` fills one.
"""

import ast
import importlib.util
import os
import zipfile
from pathlib import Path

import pytest
import torch
from nnturbo.engine import BackendUnavailable, BundleError
from nnturbo.engine.backends import torch_tensorrt
from nnturbo.engine.backends.choose import choose_backend
from nnturbo.engine.backends.rewrites import with_low_convolutions, with_shuffles
from nnturbo.engine.backends.torch_tensorrt import TorchTensorRtBackend
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network

from tests.engine.factory import multi_task, plans_json, write_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WHEELS = sorted(Path(os.environ.get("NNTURBO_WHEELS", "/nowhere")).glob("torch_tensorrt-*.whl"))

needs_wheel = pytest.mark.skipif(
    not WHEELS, reason="no wheel of torch-tensorrt in the folder that NNTURBO_WHEELS names"
)
not_installed = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is not None, reason="is about a machine without Torch-TensorRT"
)


def calls_to(name):
    """The keyword arguments of every call to a function of the package, as the backend's source has them."""
    tree = ast.parse(Path(torch_tensorrt.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    assert calls
    return {keyword.arg: keyword.value for call in calls for keyword in call.keywords}


class Wheel:
    """The source of a package, not imported."""

    def __init__(self, path):
        self.version = tuple(map(int, path.name.split("-")[1].split(".")[:2]))
        with zipfile.ZipFile(path) as archive:
            self.modules = {name: ast.parse(archive.read(name)) for name in archive.namelist() if name.endswith(".py")}

    def function(self, module, name):
        """A function at the top of a module, its overloads left out."""
        body = self.modules[f"torch_tensorrt/{module}.py"].body
        return [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name][-1]

    def fields(self, module, name):
        body = self.modules[f"torch_tensorrt/{module}.py"].body
        found = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
        return {node.target.id for node in found.body if isinstance(node, ast.AnnAssign)}

    def reads_setting(self, name):
        """Whether something that compiles looks at a setting."""
        return any(
            isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load)
            for module, tree in self.modules.items()
            if module.startswith(
                tuple(f"torch_tensorrt/dynamo/{part}" for part in ("conversion", "lowering", "_compiler"))
            )
            for node in ast.walk(tree)
        )


@pytest.fixture(scope="module", params=WHEELS, ids=lambda path: path.name.split("-")[1])
def wheel(request):
    return Wheel(request.param)


def called(call):
    return ast.unparse(call.func)


def parameters_of(function):
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


def names_read(function):
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


@needs_wheel
class TestWheel:
    def test_every_argument_of_compile_is_known_and_used(self, wheel):
        given = set(calls_to("torch_tensorrt.compile")) - {"ir"}
        compiler = wheel.function("dynamo/_compiler", "compile")
        assert given <= parameters_of(compiler)
        assert given <= names_read(compiler)
        # Those that say how, and not what, go on into the settings, and something reads them there.
        how = given - {"arg_inputs", "device"}
        assert {"disable_tf32", "immutable_weights", "timing_cache_path"} <= how
        assert how <= wheel.fields("dynamo/_settings", "CompilationSettings")
        assert [name for name in how if not wheel.reads_setting(name)] == []

    def test_precisions_are_not_passed_since_they_are_not_read(self, wheel):
        assert "enabled_precisions" not in calls_to("torch_tensorrt.compile")
        front = wheel.function("_compile", "compile")
        assert "enabled_precisions" in parameters_of(front)
        if wheel.version >= (2, 13):  # before, other than fp32 is an error where the network has its own types
            (onward,) = [
                node for node in ast.walk(front) if isinstance(node, ast.Call) and called(node) == "dynamo_compile"
            ]
            assert "enabled_precisions" not in {keyword.arg for keyword in onward.keywords}
            assert "enabled_precisions" not in names_read(wheel.function("dynamo/_compiler", "compile"))

    def test_dynamo_is_a_way_to_compile_exported_programs(self, wheel):
        front = wheel.function("_compile", "compile")
        assert parameters_of(front) >= {"module", "ir", "arg_inputs"}
        assert front.args.kwarg.arg == "kwargs"  # the rest goes on to dynamo
        (onward,) = [
            node for node in ast.walk(front) if isinstance(node, ast.Call) and called(node) == "dynamo_compile"
        ]
        assert "**kwargs" in ast.unparse(onward)
        assert ast.literal_eval(calls_to("torch_tensorrt.compile")["ir"]) == "dynamo"
        chooser = wheel.function("_compile", "_get_target_fe")
        assert "dynamo" in {node.value for node in ast.walk(chooser) if isinstance(node, ast.Constant)}

    def test_inputs_have_the_shapes_that_are_given(self, wheel):
        given = calls_to("torch_tensorrt.Input")
        (kind,) = [
            node
            for node in wheel.modules["torch_tensorrt/_Input.py"].body
            if isinstance(node, ast.ClassDef) and node.name == "Input"
        ]
        (init,) = [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        read = {
            node.slice.value
            for node in ast.walk(init)
            if isinstance(node, ast.Subscript)
            and ast.unparse(node.value) == "kwargs"
            and isinstance(node.slice, ast.Constant)
        }
        assert set(given) == {"min_shape", "opt_shape", "max_shape", "dtype"}
        assert set(given) <= read

    def test_the_format_is_one_that_save_knows(self, wheel):
        given = calls_to("torch_tensorrt.save")
        save = wheel.function("_compile", "save")
        assert set(given) <= parameters_of(save)
        assert set(given) <= names_read(save)
        formats = [
            ast.literal_eval(node.value)
            for node in ast.walk(save)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "accepted_formats"
        ]
        assert ast.literal_eval(given["output_format"]) in formats[0]
        assert "torch.jit.trace" in ast.unparse(save)  # what such a file is made with, and torch.jit.load reads


def test_the_network_that_is_compiled_has_its_precisions_in_the_graph(tmp_path):
    # What `build` does up to Torch-TensorRT, which keeps the types it finds.
    network = with_shuffles(inference_network(read_model(write_model(tmp_path / "m", plans=multi_task(plans_json())))))
    network = with_low_convolutions(network, torch.float16)
    batch = torch.export.Dim("batch", min=1, max=8)
    tiles = torch.zeros(2, 1, 8, 12, 16)
    graph = torch.export.export(network, (tiles,), dynamic_shapes=({0: batch},), strict=False).graph
    kinds = {}
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            kinds.setdefault(node.target.__name__.split(".")[0], []).append(node.meta["val"].dtype)
    assert kinds["conv3d"].count(torch.float16) == 4
    assert kinds["conv3d"].count(torch.float32) == 1
    assert {kind for kind, types in kinds.items() if torch.float16 in types} == {"conv3d", "to"}
    assert kinds["instance_norm"] == [torch.float32] * 3
    (output,) = [node for node in graph.nodes if node.op == "output"]
    assert [logits.meta["val"].dtype for logits in output.args[0]] == [torch.float32] * 2
    assert output.args[0][0].meta["val"].shape[1:] == (3, 8, 12, 16)


class TestRefusals:
    def test_say_what_is_missing(self, monkeypatch):
        backend = TorchTensorRtBackend()
        assert backend.unavailable(CPU, "fp16") == "it runs on CUDA devices, not on cpu"
        assert "not in int8" in backend.unavailable(CUDA, "int8")
        monkeypatch.setattr(torch_tensorrt.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'nnturbo[torch-tensorrt]'" in backend.unavailable(CUDA, "fp16")
        monkeypatch.setattr(torch_tensorrt.importlib.util, "find_spec", lambda name: name)
        assert backend.unavailable(CUDA, "fp16") is None
        assert backend.unavailable(CUDA, "fp32") is None

    def test_are_the_choosers_too(self):
        with pytest.raises(BackendUnavailable, match="torch_tensorrt cannot run here: it runs on CUDA devices"):
            choose_backend("torch_tensorrt", CPU, "fp16")

    @not_installed
    def test_a_package_that_cannot_be_imported_is_named(self, tmp_path):
        model = read_model(write_model(tmp_path / "m"))
        reason = r"torch_tensorrt cannot be imported .*pip install 'nnturbo\[torch-tensorrt\]'"
        with pytest.raises(BackendUnavailable, match=reason):
            TorchTensorRtBackend().build(model, torch.zeros(2, 1, 8, 12, 16), "fp16", tmp_path)
        with pytest.raises(BackendUnavailable, match=reason):
            TorchTensorRtBackend().load(model, tmp_path, CUDA, "fp16")

    def test_loading_takes_a_gpu(self, tmp_path):
        model = read_model(write_model(tmp_path / "m"))
        with pytest.raises(BackendUnavailable, match="run on CUDA devices, not on cpu"):
            TorchTensorRtBackend().load(model, tmp_path, CPU, "fp16")


@pytest.mark.gpu
@pytest.mark.skipif(TorchTensorRtBackend().unavailable(CUDA, "fp16") is not None, reason="no Torch-TensorRT here")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs engines, which takes a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_give_torchs_logits_for_any_number_of_tiles(tmp_path, precision):
    model = read_model(write_model(tmp_path / "m", plans=multi_task(plans_json()), folds=("0", "1")))
    backend = TorchTensorRtBackend()
    backend.build(model, torch.zeros(2, 1, 8, 12, 16, device="cuda"), precision, tmp_path)
    runner = backend.load(model, tmp_path, CUDA, precision)
    network = with_shuffles(inference_network(model))
    for count in (1, 2, 8, 11):
        tiles = torch.randn(count, 1, 8, 12, 16)
        output, expected = runner(tiles), network(tiles)
        for logits, exact in zip(output, expected, strict=True):
            assert logits.dtype == torch.float32
            tolerance = {"fp32": 1e-4, "fp16": 2e-2}[precision]
            assert (logits.cpu() - exact).abs().max() < tolerance * exact.abs().max()
    (tmp_path / torch_tensorrt.FILE).write_bytes(b"damaged")
    with pytest.raises(BundleError, match="it cannot be loaded"):
        backend.load(model, tmp_path, CUDA, precision)
