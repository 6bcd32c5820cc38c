"""Calls of TensorRT: parse networks from ONNX; build, open and refit engines.

Parsing and building are tested with TensorRT-RTX 1.7. Opening, refitting and running have not run on hardware yet.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailable, BundleError, ModelError, OutputError
from ..files import cache_root, written_atomically
from .onnx import INPUT

logger = logging.getLogger(__name__)

EXTRAS = {"tensorrt": "nnturbo[tensorrt]", "tensorrt_rtx": "nnturbo[tensorrt-rtx]"}
"""Packages with TensorRT's interface, the one for data-centre GPUs first, and the extra that installs each."""

MOST_TILES = 8
"""Tiles that an engine takes at once: all mirror views of one 3D tile."""


def installed() -> tuple[str, ...]:
    """Names of the installed TensorRT packages."""
    return tuple(name for name in EXTRAS if importlib.util.find_spec(name) is not None)


class Library:
    """One of the two TensorRT packages.

    Args:
        name: "tensorrt" or "tensorrt_rtx".

    Raises:
        BackendUnavailable: Where it is not installed or cannot be imported.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.api: Any = importlib.import_module(name)
        except ImportError as error:
            raise BackendUnavailable(f"{name} cannot be imported ({error}): pip install '{EXTRAS[name]}'") from error
        self.log: Any = _log(name)

    @property
    def version(self) -> str:
        """Version of the installed package."""
        return str(self.api.__version__)

    def compute_capabilities(self) -> dict[str, Any]:
        """Compute capabilities such as "8.6" for which TensorRT-RTX builds without a GPU; none for `tensorrt`."""
        members = self.api.ComputeCapability.__members__ if self.name == "tensorrt_rtx" else {}
        return {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}

    @contextmanager
    def errors(self) -> Iterator[list[str]]:
        """Collect what TensorRT logs as errors."""
        errors: list[str] = []
        self.log.listening.append(errors)
        try:
            yield errors
        finally:
            self.log.listening.remove(errors)

    def parse(self, onnx: bytes) -> tuple[Any, Any]:
        """Read a model into a strongly typed network: the engine keeps the precision of each operation in the file.

        Returns:
            The builder and the network. Keep the builder as long as the network is used.

        Raises:
            ModelError: Where TensorRT does not support something; the text has its message.
        """
        with self.errors() as errors:
            builder = self.api.Builder(self.log)
            network = builder.create_network(1 << int(self.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = self.api.OnnxParser(network, self.log)
            if not parser.parse(onnx):
                raise ModelError(
                    f"{self.name} {self.version} cannot take this network: {_sentence(_found_by(parser) or errors)}. "
                    "Use another backend, or report the network"
                )
        return builder, network

    def build(
        self,
        onnx: bytes,
        *,
        usual_tiles: int = MOST_TILES,
        compute_capabilities: Sequence[str] = (),
        refittable: bool = False,
    ) -> bytes:
        """Build an engine for 1 to 8 tiles.

        Args:
            onnx: Content of the file from `export_onnx`.
            usual_tiles: Number of tiles for which the engine is optimised.
            compute_capabilities: GPUs to build for, such as "8.6"; by default this machine's GPU.
            refittable: Build without weights; `refit` fills them in.

        Returns:
            The engine, serialised.

        Raises:
            ModelError: Where TensorRT cannot parse the model.
            BackendUnavailable: Where it cannot build the engine here, for example because memory is short.
        """
        builder, network = self.parse(onnx)
        config = self.configure(builder, compute_capabilities, refittable)
        config.add_optimization_profile(profile(builder, network, usual_tiles))
        with self.errors() as errors, self._timing_cache(config):
            serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise BackendUnavailable(
                f"{self.name} {self.version} could not build an engine here: {_sentence(errors)}. Free memory on the "
                "GPU if that is what it lacks, else use another backend"
            )
        return bytes(serialized)

    def configure(self, builder: Any, compute_capabilities: Sequence[str] = (), refittable: bool = False) -> Any:
        """Make the configuration of a build; arguments as in `build`.

        Raises:
            BackendUnavailable: For compute capabilities that the package does not support.
        """
        known = self.compute_capabilities()
        if unknown := set(compute_capabilities) - set(known):
            raise BackendUnavailable(
                f"{self.name} {self.version} cannot build for compute capability {', '.join(sorted(unknown))}, "
                f"only for {', '.join(known) or 'the GPU that is here'}"
            )
        config = builder.create_builder_config()
        config.clear_flag(self.api.BuilderFlag.TF32)  # operations are in fp32 because they need all its bits
        config.profiling_verbosity = self.api.ProfilingVerbosity.DETAILED
        if refittable:
            config.set_flag(self.api.BuilderFlag.REFIT)
            config.set_flag(self.api.BuilderFlag.STRIP_PLAN)
        if known:
            wanted = [known[name] for name in compute_capabilities] or [self.api.ComputeCapability.CURRENT]
            config.num_compute_capabilities = len(wanted)
            for index, capability in enumerate(wanted):
                config.set_compute_capability(capability, index)
        return config

    @contextmanager
    def _timing_cache(self, config: Any) -> Iterator[None]:
        """Let a build use the timings of earlier builds. TensorRT-RTX times nothing, and its cache would need a GPU."""
        if self.name != "tensorrt":
            yield
            return
        path = cache_file(f"tensorrt-{self.version}.timing")
        cache = config.create_timing_cache(_read_or_empty(path))
        if cache is None or not config.set_timing_cache(cache, False):  # the cache is from another GPU
            config.set_timing_cache(config.create_timing_cache(b""), False)
        yield
        keep(path, bytes(config.get_timing_cache().serialize()))

    def open(self, path: Path) -> Any:
        """Deserialise an engine on the current device.

        Raises:
            BundleError: Where TensorRT cannot open it; the text has its message.
        """
        with self.errors() as errors:
            engine = self.api.Runtime(self.log).deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise BundleError(
                    f"{path} must be an engine of {self.name} {self.version} for this GPU; it cannot be opened: "
                    f"{_sentence(errors)}. Build the bundle again on that machine"
                )
        return engine

    def refit(self, engine: Any, onnx: Path) -> None:
        """Fill in an engine's weights from a model of the same shape.

        Raises:
            BundleError: Where weights are missing or do not fit.
        """
        with self.errors() as errors:
            refitter = self.api.Refitter(engine, self.log)
            parser = self.api.OnnxParserRefitter(refitter, self.log)
            whole = parser.refit_from_file(str(onnx)) and not refitter.get_missing_weights()
            if not (whole and refitter.refit_cuda_engine()):
                raise BundleError(
                    f"{onnx} must hold every weight of the engine beside it: {_sentence(_found_by(parser) + errors)}. "
                    "Build the bundle again"
                )


def profile(builder: Any, network: Any, usual_tiles: int) -> Any:
    """Describe the tiles that an engine takes: from 1 to 8, optimised for `usual_tiles`."""
    made = builder.create_optimization_profile()
    _, *sizes = network.get_input(0).shape
    made.set_shape(INPUT, (1, *sizes), (usual_tiles, *sizes), (MOST_TILES, *sizes))
    return made


def _found_by(parser: Any) -> list[str]:
    """Errors of a parser, with the operator of each."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_operator()} {error.node_name()} {error.desc()}".strip() for error in errors]


def _sentence(messages: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(messages)) or "it does not say why"


@functools.cache
def _log(name: str) -> Any:
    """Make TensorRT's logger; one for each package and process, because TensorRT keeps the first one."""
    base: Any = importlib.import_module(name).ILogger

    class Log(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.listening: list[list[str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.INTERNAL_ERROR, base.ERROR):
                for errors in self.listening:
                    errors.append(message)
            logger.debug("%s %s: %s", name, severity.name, message)

    return Log()


def cache_file(name: str) -> Path:
    """Path of a cache file that only saves time, beside the compiled models."""
    return (cache_root() or Path(tempfile.gettempdir())) / name


def _read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def keep(path: Path, content: bytes) -> None:
    """Write a cache file; if that fails, the next run takes longer, and the log says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as temporary:
            temporary.write_bytes(content)
    except (OSError, OutputError) as error:
        logger.warning("%s cannot be kept, so the next start takes as long: %s", path, error)
