"""What docs/deployment.md says to do works as it stands."""

import re

import pytest
from nnturbo.engine import build

from tests.engine.factory import dataset_json, multi_task, plans_json, write_model
from tests.paths import ROOT

DOCUMENT = ROOT / "docs" / "deployment.md"

REGIONS = dataset_json(labels={"background": 0, "whole": [1, 2], "lesion": 2}, regions_class_order=[1, 2])


@pytest.mark.parametrize(
    ("plans", "dataset"),
    [
        pytest.param(plans_json(), dataset_json(), marks=pytest.mark.thorough),
        (multi_task(plans_json()), dataset_json()),
        pytest.param(plans_json(), REGIONS, marks=pytest.mark.thorough),
    ],
    ids=["single", "multi", "regions"],
)
def test_the_triton_repository_describes_the_network(tmp_path, monkeypatch, plans, dataset):
    onnx = pytest.importorskip("onnx", reason="exports ONNX")
    pytest.importorskip("onnxscript", reason="exports ONNX")
    pytest.importorskip("onnxruntime", reason="builds a bundle for it")
    monkeypatch.chdir(tmp_path)
    build(write_model(tmp_path / "m", plans=plans, dataset=dataset), "BUNDLE", backend="onnx", device="cpu")
    (program,) = re.findall(r"```python\n(import json.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(program, {})
    config = (tmp_path / "repository" / "pancreas" / "config.pbtxt").read_text()
    described = {
        name: [int(size) for size in sizes.split(",")]
        for name, sizes in re.findall(r'name: "(\w+)" data_type: TYPE_FP32 dims: \[([\d, ]+)\]', config)
    }
    graph = onnx.load(tmp_path / "repository" / "pancreas" / "1" / "model.onnx").graph
    real = {}
    for value in (*graph.input, *graph.output):
        sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert sizes[0] == 0  # any number of tiles
        real[value.name] = sizes[1:]
    assert described == real
    assert len(real) == (2 if plans == plans_json() else 3)
