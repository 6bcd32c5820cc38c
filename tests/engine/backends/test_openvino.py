import importlib.util
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, Engine, Volume, build
from nnturbo.engine.backends import choose, quantization
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.backends.openvino import OpenVinoBackend
from nnturbo.engine.bundles.manifest import read_manifest
from nnturbo.engine.export import build as compilation
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network

from tests.engine.factory import multi_task, plans_2d, plans_json, smooth_scan, write_model
from tests.paths import ROOT

openvino = pytest.importorskip("openvino", reason="pip install 'nnturbo[openvino]'")

CPU = torch.device("cpu")
THOROUGH = pytest.mark.thorough  # compiles or quantises again and again, for seconds each time
needs_nncf = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="pip install 'nnturbo[openvino]'")


def runner_of(model, folder, precision="fp32", tiles=None, floor=quantization.INT8_FLOOR):
    backend = OpenVinoBackend(floor)
    tiles = torch.zeros(2, 1, *model.plan.patch_size) if tiles is None else tiles
    backend.build(model, tiles, precision, folder)
    return backend.load(model, folder, CPU, precision)


@pytest.mark.parametrize(
    "plans",
    [
        plans_json(),
        pytest.param(multi_task(plans_json(), kind="attention"), marks=pytest.mark.thorough),
        pytest.param(multi_task(plans_2d()), marks=THOROUGH),
    ],
    ids=["single", "multi", "2d"],
)
def test_logits_are_those_of_torch_for_any_number_of_tiles(tmp_path, plans):
    model = read_model(write_model(tmp_path / "m", plans=plans, folds=("0", "1")))
    runner, network = runner_of(model, tmp_path), inference_network(model)
    first = None
    for count in (1, 3):
        tiles = torch.randn(count, 1, *model.plan.patch_size)
        output, expected = runner(tiles), network(tiles)
        assert torch.allclose(output.seg_logits, expected[0], atol=1e-4)
        assert output.seg_logits.std() > 0.01
        if model.plan.classification is None:
            assert output.class_logits is None
        else:
            assert torch.allclose(output.class_logits, expected[1], atol=1e-4)
        if first is None:
            first, copy = output.seg_logits, output.seg_logits.clone()
    assert torch.equal(first, copy)  # later calls leave it alone


def test_a_model_is_compiled_on_the_fly_and_labels_are_torchs(tmp_path):
    model = write_model(tmp_path / "m")
    scan = Volume.from_array(smooth_scan((9, 24, 26)), (3.0, 1.2, 1.2), name="scan")
    expected = Engine.load(model, device="cpu", backend="torch").predict(scan).segmentation
    prediction = Engine.load(model, device="cpu", backend="openvino").predict(scan)
    assert prediction.provenance[0].backend == "openvino"
    assert np.count_nonzero(prediction.segmentation != expected) <= 1


@pytest.mark.parametrize(
    ("device", "precision", "reason"),
    [
        ("cuda", "fp32", "it runs on CPUs here, not on cuda"),
        ("cpu", "fp16", "it runs in fp32, bf16, int8, not in fp16"),
    ],
)
def test_where_it_cannot_run(device, precision, reason):
    assert OpenVinoBackend().unavailable(torch.device(device), precision) == reason


def test_bf16_needs_a_cpu_that_has_it():
    capable = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    reason = OpenVinoBackend().unavailable(CPU, "bf16")
    assert reason is None if capable else "has no bf16 instructions" in reason


def test_a_broken_openvino_is_named(monkeypatch, tmp_path):
    model = read_model(write_model(tmp_path / "m"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailable, match="OpenVINO is not installed"):
        runner_of(model, tmp_path)


@pytest.mark.thorough
def test_two_threads_do_not_mix_their_tiles(tmp_path):
    model = read_model(write_model(tmp_path / "m"))
    runner = runner_of(model, tmp_path)
    tiles = torch.randn(40, 1, 8, 12, 16)
    expected = runner(tiles).seg_logits
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda tile: runner(tile[None]).seg_logits, tiles))
    assert torch.equal(torch.cat(outputs), expected)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("int8") / "m", plans=multi_task(plans_json()))


@needs_nncf
class TestInt8:
    def operations(self, folder):
        """Names and types of what computes; of its convolutions, whether they read values that int8 can hold."""
        network = openvino.Core().read_model(folder / "network.xml")

        def is_int8(value):
            node = value.get_node()
            if node.get_type_name() == "Concat":
                return all(is_int8(node.input_value(n)) for n in range(node.get_input_size()))
            return node.get_type_name() == "FakeQuantize"

        return [
            (node.get_type_name(), is_int8(node.input_value(0)))
            for node in network.get_ordered_ops()
            if node.get_type_name() in ("MVN", "MatMul", "ReduceMean", "Add", *quantization.CONVOLUTIONS)
        ]

    @pytest.mark.thorough
    def test_convolutions_are_quantised_but_the_first_and_the_last(self, model, tmp_path):
        tiles = torch.randn(6, 1, 8, 12, 16)
        loaded = read_model(model)
        output = runner_of(loaded, tmp_path, "int8", tiles, floor=0)(tiles)
        operations = self.operations(tmp_path)
        assert not any(quantised for kind, quantised in operations if kind not in quantization.CONVOLUTIONS)
        convolutions = [quantised for kind, quantised in operations if kind in quantization.CONVOLUTIONS]
        assert convolutions == [False, *[True] * (len(convolutions) - 2), False]
        seg_logits, _ = inference_network(loaded)(tiles)
        same = (output.seg_logits.argmax(1) == seg_logits.argmax(1)).float().mean()
        assert 0.9 < same < 1

    @pytest.mark.thorough
    def test_in_every_fold(self, tmp_path):
        folds = read_model(write_model(tmp_path / "m", plans=multi_task(plans_json()), folds=("0", "1", "2")))
        runner_of(folds, tmp_path, "int8", torch.randn(2, 1, 8, 12, 16), floor=0)
        network = openvino.Core().read_model(tmp_path / "network.xml")
        first, last = quantization._first_convolutions(network), quantization._last_convolutions(network)
        assert len(first) == len(last) == 3
        quantised = sum(quantised for kind, quantised in self.operations(tmp_path) if kind in quantization.CONVOLUTIONS)
        convolutions = sum(kind in quantization.CONVOLUTIONS for kind, _ in self.operations(tmp_path))
        assert quantised == convolutions - 6 > 0

    @pytest.mark.thorough
    def test_more_stay_in_float_where_labels_need_it(self, model, tmp_path, caplog):
        counts = {}
        tiles = torch.randn(4, 1, 8, 12, 16)
        for floor in (0.0, 2.0):
            (folder := tmp_path / str(floor)).mkdir()
            caplog.clear()
            with caplog.at_level(logging.INFO):
                runner_of(read_model(model), folder, "int8", tiles, floor)
            counts[floor] = caplog.text.count("Dice")
            dice = [float(line.split("Dice ")[1].split()[0]) for line in caplog.messages]
            assert all(0 < value <= 1 for value in dice)
        assert counts == {0.0: 1, 2.0: len(quantization.RECIPES)}  # the first will do; none will

    @THOROUGH
    def test_tiles_that_show_nothing_call_for_the_most_careful_recipe(self, model, tmp_path, monkeypatch, caplog):
        runner_of(read_model(model), tmp_path)
        network = openvino.Core().read_model(tmp_path / "network.xml")
        background = np.zeros((1, 3, 8, 12, 16), np.float32)
        background[:, 0] = 1
        tiles = [np.random.default_rng(0).normal(size=(1, 1, 8, 12, 16)).astype(np.float32)]
        with caplog.at_level(logging.INFO):
            quantization.quantize(network, tiles, lambda compiled: lambda tile: background)
        assert caplog.text.count("Dice") == 1
        assert str(quantization.RECIPES[-1]) in caplog.text

    @THOROUGH
    def test_int8_is_tried_again_where_other_scans_agree_less(self, model, tmp_path, monkeypatch):
        scan = Volume.from_array(smooth_scan((9, 24, 26)), (3.0, 1.2, 1.2), name="scan")
        floors, original = [], compilation.measure_agreement
        monkeypatch.setattr(
            compilation, "OpenVinoBackend", lambda floor: floors.append(floor) or OpenVinoBackend(min(floor, 0.0))
        )

        worst = iter([0.5, 0.95])
        monkeypatch.setattr(
            compilation,
            "measure_agreement",
            lambda *arguments: replace(original(*arguments), dice={"a": next(worst)}),
        )
        out = build(
            model, tmp_path / "b", backend="openvino", precision="int8", device="cpu", calibration=[scan], floor=0.9
        )
        assert floors == [0.9, 1.0]
        assert read_manifest(out).agreement.dice == {"a": 0.95}

    @THOROUGH
    def test_whole_resolutions_stay_in_float_but_never_all(self, model, tmp_path):
        runner_of(read_model(model), tmp_path)
        network = openvino.Core().read_model(tmp_path / "network.xml")
        operations = network.get_ordered_ops()
        names = [n.get_friendly_name() for n in operations if n.get_type_name() in quantization.CONVOLUTIONS]
        quantised = [set(names) - set(quantization._kept_in_float(network, levels)) for levels in (0, 1, 2)]
        assert quantised[0] == set(names[1:-1])
        assert quantised[1] == quantised[2] == {names[1]}  # the only one at the coarser of two resolutions

    @THOROUGH
    def test_the_best_is_kept_where_none_is_good_enough(self, model, tmp_path, monkeypatch):
        worth = iter([0.3, 0.9, 0.5, 0.6])
        monkeypatch.setattr(quantization, "_lowest_dice", lambda exact, other: next(worth))
        import nncf

        made = []

        def quantize(*arguments, **options):
            made.append(original(*arguments, **options))
            return made[-1]

        original = nncf.quantize
        monkeypatch.setattr(nncf, "quantize", quantize)
        tiles = [np.random.default_rng(0).normal(size=(1, 1, 8, 12, 16)).astype(np.float32)]
        runner_of(read_model(model), tmp_path)
        network = openvino.Core().read_model(tmp_path / "network.xml")
        logits = np.zeros((1, 3, 2, 2, 2))
        logits[:, 1] = 1
        best = quantization.quantize(network, tiles, lambda compiled: lambda tile: logits)
        assert best is made[1]

    def test_the_bundle_says_what_it_costs_and_says_nothing_to_the_terminal(self, model, tmp_path, capsys):
        scan = Volume.from_array(smooth_scan((9, 24, 26)), (3.0, 1.2, 1.2), name="scan")
        out = build(
            model, tmp_path / "b", backend="openvino", precision="int8", device="cpu", calibration=[scan], floor=0.1
        )
        assert capsys.readouterr() == ("", "")
        agreement = read_manifest(out).agreement
        assert agreement.different > 0
        assert Engine.load(out, mirror=False).predict(scan).provenance[0].precision == "int8"

    @pytest.mark.thorough
    def test_without_nncf_it_cannot_be_built_but_run(self, model, tmp_path, monkeypatch):
        tiles = torch.randn(2, 1, 8, 12, 16)
        runner_of(read_model(model), tmp_path, "int8", tiles)
        monkeypatch.setitem(sys.modules, "nncf", None)
        assert OpenVinoBackend().load(read_model(model), tmp_path, CPU, "int8")(tiles).seg_logits.shape[1] == 3
        with pytest.raises(BackendUnavailable, match="int8 needs NNCF to build"):
            runner_of(read_model(model), tmp_path, "int8", tiles)

    def masks(self, *labels, of_regions=False):
        """What logits say whose greatest, or positive ones, are these."""
        logits = np.stack([np.isin(labels, label) for label in range(3)]).astype(np.float32) - 0.5
        return quantization._masks(lambda tile: logits[None], [None], of_regions)

    def test_the_lowest_dice_counts_labels_of_either(self):
        exact, other = self.masks(0, 1, 1, 2), self.masks(0, 1, 2, 0)
        assert quantization._lowest_dice(exact, exact) == 1
        assert quantization._lowest_dice(exact, other) == 0  # of label 2
        assert quantization._lowest_dice(self.masks(0, 1, 1), self.masks(0, 1, 0)) == pytest.approx(2 / 3)
        assert quantization._lowest_dice(self.masks(0, 0), self.masks(0, 0)) == 1

    def test_regions_have_no_background(self):
        exact, other = (self.masks(*labels, of_regions=True) for labels in ((0, 1, 1), (1, 1, 1)))
        assert exact[0].shape == (3, 3)
        assert quantization._lowest_dice(exact, other) == 0  # of the first region
        assert quantization._lowest_dice(*(self.masks(*labels) for labels in ((0, 1, 1), (1, 1, 1)))) == 0.8


WATCHED = """
import sys, time, urllib.request
from pathlib import Path
called = []
urllib.request.urlopen = lambda *arguments, **options: called.append(arguments)
from nnturbo.engine import Engine, Volume, build
from tests.engine.factory import smooth_scan, write_model
folder = Path(sys.argv[1])
scan = Volume.from_array(smooth_scan((9, 24, 26)), (3.0, 1.2, 1.2))
model = write_model(folder / "m")
Engine.load(model, backend="openvino", device="cpu").predict(scan)
out = build(model, folder / "b", backend="openvino", precision="int8", device="cpu", calibration=[scan], floor=0)
Engine.load(out).predict(scan)
time.sleep(1)  # reports are sent by a thread
sys.exit(len(called))
"""


@pytest.mark.thorough
@needs_nncf
def test_nothing_is_reported_over_the_network(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "NNTURBO_CACHE": str(tmp_path / "cache")}
    # A process of its own: NNCF reports nothing under pytest.
    environment.pop("PYTEST_CURRENT_TEST", None)
    done = subprocess.run([sys.executable, "-c", WATCHED, str(tmp_path)], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "intel").exists()


def test_auto_goes_on_with_torch_where_openvino_does_not_know_an_operation(tmp_path, monkeypatch, caplog):
    def fails(*arguments):
        raise LookupError("no conversion rule for aten::strange\nand much more")

    monkeypatch.setattr(OpenVinoBackend, "build", fails)
    monkeypatch.setattr(choose, "AUTOMATIC", {"cpu": ("openvino", "torch")})
    monkeypatch.setenv("NNTURBO_CACHE", str(tmp_path / "cache"))  # where none has compiled this model
    model = write_model(tmp_path / "m")
    with pytest.raises(BackendUnavailable, match="openvino could not compile this model in fp32: no conversion rule"):
        Engine.load(model, device="cpu", backend="openvino")
    engine = Engine.load(model, device="cpu")
    assert engine.provenance[0].backend == "torch"
    assert "no conversion rule for aten::strange" in caplog.text
    assert "and much more" not in caplog.text


def test_it_is_among_the_backends():
    assert isinstance(backends()["openvino"], OpenVinoBackend)


@pytest.mark.parametrize("plans", [plans_json(), pytest.param(plans_2d(), marks=THOROUGH)], ids=["3d", "2d"])
def test_below_fp32_a_norm_is_one_operation(tmp_path, plans):
    model = read_model(write_model(tmp_path / "m", plans=plans))
    runner_of(model, tmp_path, "bf16")
    compiled = openvino.Core().compile_model(tmp_path / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("MVN") == 3
    assert not {"Reduce", "Subgraph", "Eltwise"} & set(kinds)  # scale, shift and activation are part of it


@THOROUGH
@pytest.mark.parametrize("plans", [plans_json(patch_size=[48, 64, 64]), plans_2d(512, 512)], ids=["3d", "2d"])
@pytest.mark.parametrize("content", ["blank", "boxed"])
def test_norms_over_many_equal_voxels_are_as_exact_as_torchs(tmp_path, plans, content):
    model = read_model(write_model(tmp_path / "m", plans=plans))
    tile = torch.zeros(1, 1, *model.plan.patch_size)
    if content == "boxed":
        middle = tile[..., 20:40, 20:40]
        middle += torch.randn(middle.shape, generator=torch.Generator().manual_seed(0))
    exact = inference_network(model).double()(tile.double())[0]
    of_torch = (inference_network(model)(tile)[0] - exact).abs().max()
    of_openvino = (runner_of(model, tmp_path)(tile).seg_logits - exact).abs().max()
    assert of_openvino <= 5 * of_torch + 1e-5 * exact.abs().max()
