"""TensorRT: engines built for one kind of NVIDIA GPU, from ONNX. Not yet run on hardware; building is tested."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, BundleError, EngineError, PredictionError
from ..files import sha256
from ..model.folder import Model
from ..model.folds import InferenceNetwork, inference_network
from ..model.runner import NetworkOutput
from .onnx import INPUT, OUTPUTS, export_onnx, missing_exporters
from .rewrites import with_low_convolutions, with_shuffles
from .tensorrt_library import EXTRAS, MOST_TILES, Library, cache_file, installed, keep
from .torch import exact_float32, on_device

logger = logging.getLogger(__name__)

TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2}
"""How far refitted engines may be from torch, as a fraction of the largest logit."""


class TensorRtRunner:
    """Runs one engine per fold and averages their logits; tiles and logits stay on the GPU.

    Args:
        library: TensorRT package that built the engines.
        engines: One per fold, all with the same inputs and outputs.
        device: GPU that holds the engines.
        kernels: File for the kernels that TensorRT-RTX compiles in the first run; None for `tensorrt`, which compiles
            earlier.

    Note:
        Scratch memory comes from torch, for the current number of tiles, and all folds share it. TensorRT itself would
        allocate it for the largest number of tiles, and once for each fold.
    """

    def __init__(self, library: Library, engines: Sequence[Any], device: torch.device, kernels: Path | None) -> None:
        self._library = library
        self._device = device
        self._kernels = kernels
        self._compiled_for: set[int] = set()
        self._contexts, self._cache = [], None
        for engine in engines:
            context, self._cache = self._context(engine, self._cache)
            self._contexts.append(context)
        names = [engines[0].get_tensor_name(index) for index in range(engines[0].num_io_tensors)]
        self._outputs = [name for name in OUTPUTS if name in names]
        # On the default stream TensorRT would wait for the whole device in every call.
        self._stream = torch.cuda.Stream(device)
        self._one_at_a_time = threading.Lock()  # a context holds the addresses of one run

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32; the logits come back on the GPU, in float32."""
        with torch.inference_mode(), torch.cuda.device(self._device):
            with self._one_at_a_time:
                parts = [
                    self._average(part.contiguous()) for part in tiles.to(self._device, torch.float32).split(MOST_TILES)
                ]
            return NetworkOutput(*(torch.cat(outputs) for outputs in zip(*parts, strict=True)))

    def _average(self, tiles: Tensor) -> list[Tensor]:
        folds = [self._run(context, tiles) for context in self._contexts]
        if len(tiles) not in self._compiled_for:
            self._compiled_for.add(len(tiles))
            if self._kernels is not None and self._cache is not None:
                keep(self._kernels, bytes(self._cache.serialize()))
        return [torch.stack(outputs).mean(0) if len(folds) > 1 else outputs[0] for outputs in zip(*folds, strict=True)]

    def _run(self, context: Any, tiles: Tensor) -> list[Tensor]:
        """Run one fold, in the order of torch's current stream."""
        with self._library.errors() as errors:
            fits = context.set_input_shape(INPUT, tuple(tiles.shape))
            if not fits:
                raise PredictionError(f"this engine does not take tiles of shape {tuple(tiles.shape)}: {errors}")
            outputs = [
                torch.empty(tuple(context.get_tensor_shape(name)), dtype=torch.float32, device=tiles.device)
                for name in self._outputs
            ]
            for name, tensor in zip((INPUT, *self._outputs), (tiles, *outputs), strict=True):
                context.set_tensor_address(name, tensor.data_ptr())
            scratch_bytes = context.update_device_memory_size_for_shapes()
            scratch = torch.empty(max(scratch_bytes, 1), dtype=torch.uint8, device=tiles.device)
            context.set_device_memory(scratch.data_ptr(), scratch_bytes)
            current = torch.cuda.current_stream(tiles.device)
            self._stream.wait_stream(current)
            started = context.execute_async_v3(self._stream.cuda_stream)
            # From here on, torch reuses freed memory only after the engine has run, on any stream.
            current.wait_stream(self._stream)
            for tensor in (tiles, *outputs, scratch):
                tensor.record_stream(self._stream)
            if not started:
                raise PredictionError(f"{self._library.name} could not run the network: {'; '.join(errors)}")
        return outputs

    def _context(self, engine: Any, cache: Any) -> tuple[Any, Any]:
        """Make the context of an engine and, for TensorRT-RTX, the cache of kernels that all engines share."""
        api = self._library.api
        managed = api.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._library.errors() as errors:
            if self._kernels is None:
                context = engine.create_execution_context(managed)
            else:
                config = engine.create_runtime_config()
                config.set_execution_context_allocation_strategy(managed)
                # Otherwise the first calls run other kernels than later ones, with other rounding.
                eager = api.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
                if cache is None:
                    cache = config.create_runtime_cache()
                    if self._kernels.is_file() and not cache.deserialize(self._kernels.read_bytes()):
                        logger.info("%s is from another machine or version: kernels are compiled again", self._kernels)
                config.set_runtime_cache(cache)
                context = engine.create_execution_context(config)
            if context is None:
                raise BackendUnavailable(f"{self._library.name} cannot run this engine here: {'; '.join(errors)}")
        return context, cache


class TensorRtBackend:
    """Networks compiled by TensorRT.

    Args:
        compute_capabilities: GPUs to build for, such as "8.6", if they are not in this machine; needs TensorRT-RTX. By
            default engines are built for this machine's GPU.
    """

    name = "tensorrt"
    compiles = True
    # An engine contains the version of the library that built it; versions of other packages do not matter.
    bound_to: tuple[str, ...] = ("architecture", "system", "compute_capability")

    def __init__(self, compute_capabilities: Sequence[str] = ()) -> None:
        self._compute_capabilities = tuple(compute_capabilities)

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why it cannot run in this precision on this device, or None.

        If compute capabilities are given, this is about building for them, on any device.
        """
        if precision not in TOLERANCES:
            return f"it runs in fp16, its default, or in fp32, not in {precision}"
        if device.type != "cuda" and not self._compute_capabilities:
            return f"it runs on CUDA devices, not on {device.type}"
        if not installed():
            return (
                f"TensorRT is not installed: pip install '{EXTRAS['tensorrt']}', on RTX GPUs '{EXTRAS['tensorrt_rtx']}'"
            )
        if self._compute_capabilities and "tensorrt_rtx" not in installed():
            return f"building for GPUs that are not here takes TensorRT-RTX: pip install '{EXTRAS['tensorrt_rtx']}'"
        try:
            known = Library(self._package()).compute_capabilities()
        except BackendUnavailable as error:
            return str(error)
        wanted = self._compute_capabilities or _compute_capability(device)
        if known and (unknown := [name for name in wanted if name not in known]):
            return (
                f"TensorRT-RTX is for compute capability {', '.join(known)}, not {', '.join(unknown)}: "
                f"pip install '{EXTRAS['tensorrt']}' on a machine with such a GPU"
            )
        return None

    def _package(self) -> str:
        """Which to build with; for GPUs that are not here, the one that can."""
        return "tensorrt_rtx" if self._compute_capabilities else installed()[0]

    def cannot_build(self) -> str | None:
        """Return what is missing to export the network for TensorRT, or None."""
        return missing_exporters()

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Build one engine for all folds, with the weights of each beside it, or one engine per fold.

        One engine serves several folds only if it can be tested here, which needs a GPU: TensorRT 11.3 is known to lose
        biases in such engines.

        Raises:
            ModelError: Where TensorRT does not support a part of the network.
            BackendUnavailable: Where it cannot build here.
        """
        with on_device(tiles.device):
            self._build_here(model, tiles, precision, folder)

    def _build_here(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        library = Library(self._package())
        folds = _networks(model, precision)
        views = len(model.views)
        with tempfile.TemporaryDirectory() as aside:
            exported = [Path(aside) / f"fold_{fold}.onnx" for fold in model.folds]
            for network, path in zip(folds, exported, strict=True):
                export_onnx(network.to(tiles.device), tiles, path)
            if len(folds) > 1 and tiles.device.type == "cuda" and not self._compute_capabilities:
                shared = folder / "shared"
                shared.mkdir()
                try:
                    self._build_shared(library, exported, views, shared)
                    self._compare(model, folds, tiles, precision, shared)
                    for path in shared.iterdir():
                        path.rename(folder / path.name)
                    return
                except EngineError as error:
                    logger.warning("one engine cannot serve all folds, so each gets its own: %s", error)
                finally:
                    shutil.rmtree(shared)
            for fold, path in zip(model.folds, exported, strict=True):
                plan = library.build(
                    path.read_bytes(), usual_tiles=views, compute_capabilities=self._compute_capabilities
                )
                (folder / f"fold_{fold}.{library.name}.plan").write_bytes(plan)

    def _build_shared(self, library: Library, exported: Sequence[Path], usual_tiles: int, folder: Path) -> None:
        """Build one engine without weights, and write the weights of each fold beside it."""
        plan = library.build(exported[0].read_bytes(), usual_tiles=usual_tiles, refittable=True)
        (folder / f"network.{library.name}.plan").write_bytes(plan)
        for path in exported:
            shutil.copy(path, folder / path.name)

    def _compare(
        self, model: Model, folds: Sequence[InferenceNetwork], tiles: Tensor, precision: str, folder: Path
    ) -> None:
        """Compare refitted engines with torch, on noise.

        Raises:
            BundleError: Where their logits differ.
        """
        tiles = torch.randn(tiles.shape, device=tiles.device)
        output = self.load(model, folder, tiles.device, precision)(tiles)
        with torch.inference_mode(), exact_float32():
            expected = [torch.stack(parts).mean(0) for parts in zip(*(fold(tiles) for fold in folds), strict=True)]
        given = [logits for logits in output if logits is not None]
        for name, logits, exact in zip(OUTPUTS, given, expected, strict=False):
            error = float((logits - exact).abs().max() / exact.abs().max())
            if not error <= TOLERANCES[precision]:
                raise BundleError(
                    f"{name} must be torch's to {TOLERANCES[precision]:g} of the largest, it errs by {error:.2g}"
                )

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> TensorRtRunner:
        """Open the engines on a GPU, and fill in the weights of each fold if one engine serves all.

        Raises:
            BackendUnavailable: Where TensorRT or a GPU is missing.
            BundleError: Where an engine cannot be opened here.
        """
        assert folder is not None  # it compiles
        if device.type != "cuda":
            raise BackendUnavailable(f"engines of TensorRT run on CUDA devices, not on {device.type}")
        library = Library(_built_by(folder))
        with torch.cuda.device(device):
            engines = []
            for fold in model.folds:
                own = folder / f"fold_{fold}.{library.name}.plan"
                engine = library.open(own if own.is_file() else folder / f"network.{library.name}.plan")
                if not own.is_file():
                    library.refit(engine, folder / f"fold_{fold}.onnx")
                engines.append(engine)
            kernels = None
            if library.name == "tensorrt_rtx":
                plans = sorted(folder.glob("*.plan"))
                kernels = cache_file(f"{library.name}-{library.version}-{sha256(plans[0])[:32]}.kernels")
            return TensorRtRunner(library, engines, device, kernels)


def _networks(model: Model, precision: str) -> list[InferenceNetwork]:
    """One network per fold, with convolutions in half precision for fp16."""
    folds = [InferenceNetwork([network]).eval() for network in with_shuffles(inference_network(model)).networks]
    return folds if precision == "fp32" else [with_low_convolutions(fold, torch.float16) for fold in folds]


def _built_by(folder: Path) -> str:
    """Name the package that built a bundle's engines.

    Raises:
        BundleError: Where there are no engines.
    """
    for name in EXTRAS:
        if any(folder.glob(f"*.{name}.plan")):
            return name
    raise BundleError(f"{folder} must hold engines of {' or '.join(EXTRAS)}; build the bundle again")


def _compute_capability(device: torch.device) -> tuple[str, ...]:
    """Compute capability of a GPU, if torch sees one."""
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    return (f"{major}.{minor}",)
