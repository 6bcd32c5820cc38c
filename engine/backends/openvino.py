"""OpenVINO: networks on a CPU in fp32, bf16 or int8."""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..model.folder import Model
from ..model.folds import InferenceNetwork, inference_network
from ..model.runner import NetworkOutput
from .quantization import INT8_FLOOR, quantize
from .rewrites import with_exact_norms

FILE = "network.xml"
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Precision of OpenVINO; the parts of an int8 network that are not quantised run in float32."""


def _openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report a model's operations and origin."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO and NNCF work without it
    try:
        import openvino
    except ImportError as error:
        raise BackendUnavailable(f"OpenVINO is not installed ({error}): pip install 'nnturbo[openvino]'") from error
    return openvino


class OpenVinoRunner:
    """Runs a compiled network one tile at a time: a CPU takes no less time per tile for several at once."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._one_at_a_time = threading.Lock()  # a request holds input and output of one tile
        self._outputs = len(request.model_outputs)

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32."""
        outputs = [self._run(tile) for tile in tiles.cpu().numpy()]
        return NetworkOutput(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*outputs, strict=True)))

    def _run(self, tile: np.ndarray) -> list[np.ndarray]:
        with self._one_at_a_time:
            self._request.infer([np.ascontiguousarray(tile[None])], share_inputs=True)
            # Copies: the next call writes to the same memory.
            return [self._request.get_output_tensor(index).data.copy() for index in range(self._outputs)]


class OpenVinoBackend:
    """Networks compiled by OpenVINO, for CPUs.

    Args:
        floor: Least Dice with float32 for every label, which int8 keeps where it can.
    """

    name = "openvino"
    compiles = True
    bound_to: tuple[str, ...] = ()

    def __init__(self, floor: float = INT8_FLOOR) -> None:
        self._floor = floor

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why OpenVINO cannot run in this precision on this device, or None."""
        if device.type != "cpu":
            return f"it runs on CPUs here, not on {device.type}"
        if precision not in HINTS:
            return f"it runs in {', '.join(HINTS)}, not in {precision}"
        if importlib.util.find_spec("openvino") is None:
            return "OpenVINO is not installed: pip install 'nnturbo[openvino]'"
        if precision == "bf16" and "BF16" not in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "this CPU has no bf16 instructions (AVX512_BF16 or AMX); use fp32"
        return None

    def cannot_build(self) -> str | None:
        """Return None: what runs it compiles it too."""
        return None

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Convert to `network.xml` and `network.bin`, for one tile; weights in fp32, or quantised with the tiles."""
        openvino = _openvino()
        network = inference_network(model)
        converted = _convert(with_exact_norms(network) if precision == "fp32" else network, tiles[:1])
        if precision == "int8":
            converted = quantize(
                converted,
                [tile[None] for tile in tiles.cpu().numpy()],
                _segmentation,
                floor=self._floor,
                of_regions=model.plan.labels.regions_class_order is not None,
            )
        openvino.save_model(converted, str(folder / FILE), compress_to_fp16=False)

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> OpenVinoRunner:
        """Compile for this CPU, with as many threads as torch has."""
        assert folder is not None  # it compiles
        return OpenVinoRunner(_compiled(folder / FILE, precision).create_infer_request())


def _convert(network: InferenceNetwork, tile: Tensor) -> Any:
    """Turn a network into an OpenVINO model for one tile, (1, C, *patch).

    Note:
        `convert_model` by default splits an instance norm into a dozen operations and three passes over its input. In
        bf16 and int8 the norm is kept whole here: it becomes one MVN with scale, shift and activation, which takes
        0.19 s in place of 0.22 s for a tile of the demo model.
    """
    openvino = _openvino()
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about itself
        exported = torch.export.export(network, (tile,), strict=False)
        operations = torch.export.default_decompositions()
        for kept in (torch.ops.aten.instance_norm.default, torch.ops.aten.linear.default):
            del operations[kept]
        decoder = TorchFXPythonDecoder(exported.run_decompositions(operations).module(), dynamic_shapes=True)
        converted = openvino.convert_model(decoder)
    converted.reshape(list(tile.shape))
    return converted


def _compiled(model: Any, precision: str) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
    }
    return _openvino().Core().compile_model(str(model) if isinstance(model, Path) else model, "CPU", options)


def _segmentation(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Make a function that runs a model on one tile and gives its segmentation logits."""
    runner = OpenVinoRunner(_compiled(model, "int8").create_infer_request())
    return lambda tile: runner(torch.from_numpy(tile)).seg_logits.numpy()
