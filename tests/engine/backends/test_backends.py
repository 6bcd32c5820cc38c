import contextlib
import importlib.util
import logging

import pytest
import torch
from nnturbo.engine import BackendUnavailable
from nnturbo.engine.backends import choose, inductor, onnx
from nnturbo.engine.backends.choose import AUTOMATIC, PRECISIONS, backends, choose_backend
from nnturbo.engine.cli import main
from nnturbo.engine.cli.inspect import describe
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network

from tests.engine.factory import multi_task, plans_2d, plans_json, write_model

CPU = torch.device("cpu")


def model_of(folder, plans, **arguments):
    return read_model(write_model(folder / "m", plans=plans, **arguments))


def built(name, model, folder, precision="fp32"):
    backend = backends()[name]
    if reason := backend.unavailable(CPU, precision):
        pytest.skip(f"{name}: {reason}")
    tiles = torch.zeros(2, model.plan.input_channels, *model.plan.patch_size)
    backend.build(model, tiles, precision, folder)
    return backend.load(model, folder, CPU, precision)


PLANS = {"single": plans_json(), "multi": multi_task(plans_json(), kind="attention"), "2d": plans_2d()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("torch", "torchscript") for kind in PLANS),
        ("onnx", "multi"),
        *(pytest.param("onnx", kind, marks=pytest.mark.thorough) for kind in ("single", "2d")),
    ],
)
def test_logits_are_those_of_torch_for_any_number_of_tiles(tmp_path, name, kind):
    model = model_of(tmp_path, PLANS[kind], folds=("0", "1"))
    runner = built(name, model, tmp_path)
    network = inference_network(model)
    for count in (1, 2, 5):
        tiles = torch.randn(count, 1, *model.plan.patch_size)
        output, expected = runner(tiles), network(tiles)
        assert torch.allclose(output.seg_logits, expected[0], atol=1e-4)
        assert output.seg_logits.std() > 0.01
        if model.plan.classification is None:
            assert output.class_logits is None
        else:
            assert torch.allclose(output.class_logits, expected[1], atol=1e-4)


@pytest.mark.thorough
def test_inductor_gives_torchs_logits(tmp_path):
    model = model_of(tmp_path, multi_task(plans_json()), folds=("0", "1"))
    runner = built("inductor", model, tmp_path)
    tiles = torch.randn(3, 1, 8, 12, 16)
    output, expected = runner(tiles), inference_network(model)(tiles)
    assert torch.allclose(output.seg_logits, expected[0], atol=1e-4)
    assert torch.allclose(output.class_logits, expected[1], atol=1e-4)
    first = output.seg_logits.clone()
    runner(torch.zeros(3, 1, 8, 12, 16))
    assert torch.equal(output.seg_logits, first)  # it is the caller's own


def test_inductor_loads_with_the_arguments_that_torch_2_6_has(tmp_path, monkeypatch):
    def aoti_load_package(path, run_single_threaded=False):
        return path

    monkeypatch.setattr("torch._inductor.aoti_load_package", aoti_load_package)
    model = model_of(tmp_path, plans_json())
    assert backends()["inductor"].load(model, tmp_path, CPU, "fp32")._compiled == str(tmp_path / "network.pt2")


def test_torchscript_in_bf16_is_close(tmp_path):
    model = model_of(tmp_path, multi_task(plans_json()))
    runner = built("torchscript", model, tmp_path, "bf16")
    tiles = torch.randn(2, 1, 8, 12, 16)
    output, (seg_logits, class_logits) = runner(tiles), inference_network(model)(tiles)
    assert output.seg_logits.dtype == output.class_logits.dtype == torch.float32
    assert 0 < (output.seg_logits - seg_logits).abs().max() < 0.05 * seg_logits.abs().max()
    assert (output.class_logits - class_logits).abs().max() < 0.1


def test_a_torch_bundle_holds_weights_and_the_fitted_classifiers_alone(tmp_path):
    from tests.engine.factory import pooled_classifier

    model = model_of(tmp_path, multi_task(plans_json()), checkpoint={"pooled_classifier": pooled_classifier()})
    built("torch", model, tmp_path)
    content = torch.load(tmp_path / "fold_0.pth", weights_only=True)
    assert set(content["pooled_classifier"]) == {"kind", "stages", "weight", "bias", "preferred", "temperature"}
    assert set(content) == {
        "network_weights",
        "init_args",
        "inference_allowed_mirroring_axes",
        "trainer_name",
        "pooled_classifier",
    }


@contextlib.contextmanager
def own_console():
    """Let `logging.basicConfig` set the console up, as in a process of its own."""
    handlers, logging.root.handlers = logging.root.handlers, []
    try:
        yield
    finally:
        logging.root.handlers = handlers


class TestChoice:
    def test_auto_takes_openvino_on_a_cpu_where_it_is_installed(self, monkeypatch):
        monkeypatch.setitem(AUTOMATIC, "cpu", ("openvino", "torch"))
        expected = "openvino" if importlib.util.find_spec("openvino") else "torch"
        assert choose_backend("auto", CPU, "fp32").name == expected

    def test_auto_says_in_one_line_what_runs_and_what_would_bring_a_faster_one(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(AUTOMATIC, "cpu", ("openvino", "torch", "native"))
        monkeypatch.setattr("nnturbo.engine.backends.openvino.importlib.util.find_spec", lambda name: None)
        model = write_model(tmp_path / "m", plans=plans_json())
        (tmp_path / "in").mkdir()
        with own_console():
            assert main(["predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(model)]) == 2
        (said,) = [line for line in capsys.readouterr().err.splitlines() if "runs the network" in line]
        assert said == (
            "torch runs the network on cpu in fp32; faster would be openvino: OpenVINO is not installed: pip install "
            "'nnturbo[openvino]'"
        )

    def test_what_none_can_do_is_refused_with_every_reason(self):
        with pytest.raises(BackendUnavailable, match="torch cannot run here: fp16 needs a GPU"):
            choose_backend("auto", CPU, "fp16")

    def test_a_backend_has_the_name_that_it_is_asked_for_by(self):
        assert [backend.name for backend in backends().values()] == list(backends())

    @pytest.mark.parametrize("name", list(backends()))
    def test_every_backend_answers_for_every_device_and_precision(self, name):
        answers = {
            (device, precision): backends()[name].unavailable(torch.device(device), precision)
            for device in ("cpu", "cuda", "mps")
            for precision in PRECISIONS
        }
        assert all(answer is None or (isinstance(answer, str) and len(answer) > 10) for answer in answers.values())
        assert any(answer is not None for answer in answers.values())  # none does everything

    def test_inductor_needs_a_compiler_to_build_and_not_to_run(self, monkeypatch, tmp_path):
        monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
        model = model_of(tmp_path, plans_json())
        assert backends()["inductor"].unavailable(CPU, "fp32") is None
        rows = dict(describe(write_model(tmp_path / "inspected", plans=plans_json()), None))
        assert "install a C++ compiler" in rows["inductor cpu fp32"]
        with pytest.raises(BackendUnavailable, match=r"there is none: install a C\+\+ compiler"):
            backends()["inductor"].build(model, torch.zeros(2, 1, 8, 12, 16), "fp32", tmp_path)

    def test_onnx_names_the_packages_that_are_missing(self, monkeypatch, tmp_path):
        monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(BackendUnavailable, match=r"ONNX Runtime is not installed: pip install 'nnturbo\[onnx\]'"):
            choose.choose_backend("onnx", CPU, "fp32")
        model = model_of(tmp_path, plans_json())
        assert "onnx, onnxscript not installed" in str(backends()["tensorrt"].cannot_build())
        with pytest.raises(BackendUnavailable, match="onnx, onnxscript not installed"):
            onnx.export_onnx(inference_network(model), torch.zeros(2, 1, 8, 12, 16), tmp_path / "network.onnx")
