"""Networks exported for TensorRT, and what tests of them need."""

import importlib.util

import pytest
import torch
from nnturbo.engine.backends.onnx import export_onnx
from nnturbo.engine.backends.rewrites import LowConvolution, with_low_convolutions, with_shuffles
from nnturbo.engine.model.folds import inference_network
from torch import nn

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
    others = [kind for kind, types in rest if types != {api.float32}]
    assert not others, f"not in float32: {', '.join(others)}"
    assert sum(kind == "NORMALIZATION" for kind, _ in rest) >= sum(
        isinstance(module, nn.InstanceNorm3d) for module in set(case.network.modules())
    )
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    assert [tensor.name for tensor in outputs] == ["seg_logits", "class_logits"]
    assert [tensor.dtype for tensor in outputs] == [api.float32, api.float32]
    plan = case.model.plan
    assert tuple(outputs[0].shape) == (-1, plan.labels.num_outputs, *plan.patch_size)
    assert tuple(outputs[1].shape) == (-1, len(plan.classification.class_names))
