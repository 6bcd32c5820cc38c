"""ONNX: a file that ONNX Runtime runs on any machine, and from which TensorRT builds its engines."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..model.folder import Model
from ..model.folds import InferenceNetwork, inference_network
from ..model.runner import NetworkOutput

FILE = "network.onnx"
INPUT = "tiles"
OUTPUTS = ("seg_logits", "class_logits")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MOST_TILES = 64


class OnnxRunner:
    """Runs a network in ONNX Runtime; tiles and logits go through main memory."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32."""
        try:
            outputs = self._session.run(None, {INPUT: np.ascontiguousarray(tiles.cpu().numpy())})
        except Exception as error:  # ONNX Runtime's exceptions have no other common base
            raise RuntimeError(f"ONNX Runtime: {error}") from error
        return NetworkOutput(*map(torch.from_numpy, outputs))


class OnnxBackend:
    """Networks exported to ONNX, run by ONNX Runtime."""

    name = "onnx"
    compiles = True
    bound_to: tuple[str, ...] = ()

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why it cannot run in this precision on this device, or None."""
        if precision != "fp32":
            return f"it runs in fp32, not in {precision}"
        if device.type not in PROVIDERS:
            return f"it runs on CPUs and CUDA devices, not on {device.type}"
        if importlib.util.find_spec("onnxruntime") is None:
            return "ONNX Runtime is not installed: pip install 'nnturbo[onnx]'"
        import onnxruntime

        if PROVIDERS[device.type] not in onnxruntime.get_available_providers():
            return "the installed ONNX Runtime has no CUDA: pip install onnxruntime-gpu in its place"
        return None

    def cannot_build(self) -> str | None:
        """Return what is missing to export the network, or None."""
        return missing_exporters()

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Export to `network.onnx`."""
        export_onnx(inference_network(model).to(tiles.device), tiles, folder / FILE)

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> OnnxRunner:
        """Open a session with as many threads as torch has."""
        import onnxruntime

        assert folder is not None  # it compiles
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        provider = PROVIDERS[device.type]
        chosen = (provider, {"device_id": device.index or 0, "use_tf32": 0}) if device.type == "cuda" else provider
        return OnnxRunner(onnxruntime.InferenceSession(str(folder / FILE), options, providers=[chosen]))


def missing_exporters() -> str | None:
    """Return which packages that write ONNX are missing, in words, or None."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: pip install 'nnturbo[onnx]'" if missing else None


def export_onnx(network: InferenceNetwork, tiles: Tensor, path: Path) -> None:
    """Write a network as ONNX, for 1 to 64 tiles at once.

    Args:
        network: On the device of the tiles.
        tiles: (N, C, *patch), N at least 2.
        path: The file, written whole.

    Raises:
        BackendUnavailable: Where onnx or onnxscript are not installed.
    """
    if reason := missing_exporters():
        raise BackendUnavailable(reason)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (tiles,),
            input_names=[INPUT],
            output_names=list(OUTPUTS[: 2 if network.multi_task else 1]),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MOST_TILES)},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # dynamo gives one
    program.save(str(path), external_data=False)
