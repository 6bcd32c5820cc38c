"""Torch-TensorRT: TensorRT engines inside a TorchScript file. Written for 2.11 to 2.13; not run on hardware yet."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, BundleError
from ..model.folder import Model
from ..model.folds import inference_network
from ..model.runner import NetworkOutput
from .rewrites import with_low_convolutions, with_shuffles
from .tensorrt_library import MOST_TILES, cache_file, keep

FILE = "network.ts"
PRECISIONS = ("fp16", "fp32")
EXTRA = "nnturbo[torch-tensorrt]"


def _torch_tensorrt() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about optional parts
            import torch_tensorrt  # type: ignore[import-not-found]  # where there is no GPU, there is none
    except (ImportError, OSError) as error:  # OSError if libraries of TensorRT are missing
        raise BackendUnavailable(f"torch_tensorrt cannot be imported ({error}): pip install '{EXTRA}'") from error
    return torch_tensorrt


def _compile(torch_tensorrt: Any, exported: Any, tiles: Tensor, usual_tiles: int, timing_cache: Path) -> Any:
    """Compile an exported network for 1 to 8 tiles; it is fastest for the usual number."""
    shape = tiles.shape[1:]
    return torch_tensorrt.compile(
        exported,
        ir="dynamo",
        arg_inputs=[
            torch_tensorrt.Input(
                min_shape=(1, *shape),
                opt_shape=(usual_tiles, *shape),
                max_shape=(MOST_TILES, *shape),
                dtype=torch.float32,
            )
        ],
        device=tiles.device,
        disable_tf32=True,  # layers are left in fp32 because they need all its bits
        truncate_double=True,
        immutable_weights=True,
        # Otherwise the layers left to torch would be traced with the sizes of these tiles as constants.
        require_full_compilation=True,
        timing_cache_path=str(timing_cache),
    )


class TorchTensorRtRunner:
    """Runs the compiled network, up to eight tiles at once."""

    def __init__(self, script: torch.jit.ScriptModule, device: torch.device) -> None:
        self._script = script
        self._device = device

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32; the logits come back on the GPU, in float32."""
        with torch.inference_mode(), torch.cuda.device(self._device):
            parts = [
                self._script(part.contiguous()) for part in tiles.to(self._device, torch.float32).split(MOST_TILES)
            ]
            return NetworkOutput(*(torch.cat(outputs) for outputs in zip(*parts, strict=True)))


class TorchTensorRtBackend:
    """Networks compiled by Torch-TensorRT, for Python and C++ programs that already run torch."""

    name = "torch_tensorrt"
    compiles = True
    bound_to: tuple[str, ...] = ("architecture", "system", "compute_capability", "torch", "torch-tensorrt")

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why it cannot run in this precision on this device, or None."""
        if precision not in PRECISIONS:
            return f"it runs in fp16, its default, or in fp32, not in {precision}"
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device.type}"
        if importlib.util.find_spec("torch_tensorrt") is None:
            return f"Torch-TensorRT is not installed: pip install '{EXTRA}'"
        return None

    def cannot_build(self) -> str | None:
        """Return None: what runs it compiles it too."""
        return None

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Compile all folds and their average to `network.ts`, for 1 to 8 tiles.

        TensorRT keeps the precision of the network's weights and casts; it ignores `enabled_precisions` from 2.13 on.

        Raises:
            BackendUnavailable: Where Torch-TensorRT cannot be imported or cannot compile the network here.
        """
        torch_tensorrt = _torch_tensorrt()
        network = with_shuffles(inference_network(model))
        if precision == "fp16":
            network = with_low_convolutions(network, torch.float16)
        # It cannot use a cache of another GPU or version.
        gpu = torch.cuda.get_device_name(tiles.device).replace(" ", "-")
        kept = cache_file(f"torch_tensorrt-{torch_tensorrt.__version__}-{gpu}.timing")
        batch = torch.export.Dim("batch", min=1, max=MOST_TILES)
        with (
            tempfile.TemporaryDirectory() as aside,
            torch.no_grad(),
            warnings.catch_warnings(),
            torch.cuda.device(tiles.device),
        ):
            warnings.simplefilter("ignore")  # torch warns about TorchScript, and 2.11 about defaults
            timing_cache = Path(aside) / "timing"  # it writes this file in steps; the shared one is replaced at once
            if kept.is_file():
                shutil.copy(kept, timing_cache)
            exported = torch.export.export(
                network.to(tiles.device), (tiles,), dynamic_shapes=({0: batch},), strict=False
            )
            try:
                compiled = _compile(torch_tensorrt, exported, tiles, len(model.views), timing_cache)
                torch_tensorrt.save(compiled, str(folder / FILE), output_format="torchscript", arg_inputs=(tiles,))
            except Exception as error:  # without an engine an AssertionError, for a broken cache a TypeError
                kept.unlink(missing_ok=True)
                raise BackendUnavailable(f"torch_tensorrt could not compile this network here: {error}") from error
            if timing_cache.is_file():
                keep(kept, timing_cache.read_bytes())

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> TorchTensorRtRunner:
        """Load it onto the GPU.

        Raises:
            BackendUnavailable: Where Torch-TensorRT or a GPU is missing.
            BundleError: Where the file cannot be loaded here.
        """
        assert folder is not None  # it compiles
        if device.type != "cuda":
            raise BackendUnavailable(f"engines of TensorRT run on CUDA devices, not on {device.type}")
        _torch_tensorrt()  # registers the operator that runs engines
        with warnings.catch_warnings(), torch.cuda.device(device):
            warnings.simplefilter("ignore")  # that torch.jit is deprecated
            try:
                script = torch.jit.load(str(folder / FILE), map_location=device)
            except RuntimeError as error:
                raise BundleError(
                    f"{folder / FILE} must be a network that Torch-TensorRT compiled for this GPU; it cannot be "
                    f"loaded: {error}. Build the bundle again on that machine"
                ) from error
            return TorchTensorRtRunner(script, device)
