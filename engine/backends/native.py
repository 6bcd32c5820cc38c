"""nnturbo's own kernels on CPUs: Winograd convolutions, which need fewer multiplications."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.library import lacking, load_library
from ...kernels.program import Executor, Program, multiplies_int16
from ..errors import BackendUnavailable, BundleError
from ..files import cache_root
from ..model.described_head import DescribedHead
from ..model.folder import Model
from ..model.folds import inference_network
from ..model.runner import NetworkOutput
from .native_files import read_programs, write_programs
from .native_head import ForeignHead, foreign_head, head_weights
from .native_program import network_program

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "int16")
"""In int16 are the products of all layers but the first ones and the logits; everything else is in float32."""

HEAD = "head/"
"""What names of weights of other programs' heads begin with in a bundle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A fold's network.

    Args:
        executor: Runs it.
        foreign: Its classification head, where the kernels do not run that.
    """

    executor: Executor
    foreign: ForeignHead | None

    def __call__(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """From (N, C, *patch) to logits (N, K, *patch) and, with a head, class logits (N, S)."""
        flat = tiles.ndim == len("NCYX")
        outputs = self.executor(tiles.unsqueeze(2) if flat else tiles, torch.get_num_threads())
        logits, *features = (part.squeeze(2) if flat else part for part in (outputs.logits, *outputs.features))
        if self.foreign is not None:
            return logits, self.foreign(features, logits)
        return (logits,) if outputs.class_logits is None else (logits, outputs.class_logits)


class NativeRunner:
    """Runs a network with nnturbo's kernels."""

    def __init__(self, folds: Sequence[Fold]) -> None:
        self._folds = folds

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        """Run a batch of tiles, (N, C, *patch) float32."""
        with torch.inference_mode():
            outputs = [fold(tiles.cpu()) for fold in self._folds]
            if len(outputs) == 1:
                return NetworkOutput(*outputs[0])
            return NetworkOutput(*(torch.stack(parts).mean(0) for parts in zip(*outputs, strict=True)))


@lru_cache(maxsize=1)
def compiled_kernels() -> ctypes.CDLL:
    """Load the kernels; where none came with nnturbo, compile them, or load those that were compiled before.

    Raises:
        BackendUnavailable: Where compiling fails.
    """
    try:
        with _kept() as folder:
            return load_library(folder)
    except OSError as error:
        logger.warning("nnturbo's kernels cannot be compiled here: %s", error)
        raise BackendUnavailable(f"the native backend cannot be compiled here: {error}") from error


@contextlib.contextmanager
def _kept() -> Iterator[Path]:
    """Give the folder where kernels are kept that are compiled here; one for a while, for a user without home."""
    root = cache_root()
    if root is not None:
        yield root / "kernels"
        return
    # Windows removes no library that is loaded.
    with tempfile.TemporaryDirectory(prefix="nnturbo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class NativeBackend:
    """nnturbo's kernels, which come with its wheels and are compiled on first use elsewhere."""

    name = "native"
    compiles = False
    bound_to: tuple[str, ...] = ()

    def unavailable(self, device: torch.device, precision: str) -> str | None:
        """Return why the kernels cannot run in this precision on this device, or None."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if precision not in PRECISIONS:
            return f"it runs in {' and '.join(PRECISIONS)}, not in {precision}"
        with _kept() as folder:
            reason = lacking(folder)
        if precision == "fp32" or reason is not None:
            return reason
        try:
            can = multiplies_int16(compiled_kernels())
        except BackendUnavailable as error:
            return str(error)
        return None if can else "this processor has no int16 products (AVX512-VNNI); use fp32"

    def cannot_build(self) -> str | None:
        """Return None: what runs it builds it too."""
        return None

    def build(self, model: Model, tiles: Tensor, precision: str, folder: Path) -> None:
        """Write the network as a program, if the kernels can run it, and each fold's weights."""
        made = list(_programs(model, precision))
        weights = {fold: dict(each.weights) for fold, each in zip(model.folds, made, strict=True)}
        if made[0].foreign is not None:
            for fold, given in zip(model.folds, model.weights, strict=True):
                weights[fold] |= {f"{HEAD}{name}": tensor for name, tensor in head_weights(given).items()}
        write_programs(folder, made[0].program, weights)

    def load(self, model: Model, folder: Path | None, device: torch.device, precision: str) -> NativeRunner:
        """Pack the network's weights, and compile the kernels if they are not there yet.

        Raises:
            BackendUnavailable: Where the kernels cannot run the network.
            BundleError: Where its files are damaged.
        """
        library, folds = compiled_kernels(), []
        for made in _programs(model, precision) if folder is None else _read(model, folder):
            try:
                executor = Executor(library, made.program, made.weights, torch.get_num_threads())
            except (KeyError, ValueError) as error:
                where = "the network" if folder is None else folder
                raise BundleError(f"{where} cannot be run by the kernels: {error!s:.200}; build it again") from error
            folds.append(Fold(executor=executor, foreign=made.foreign))
        return NativeRunner(folds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A fold's network before its weights are packed.

    Args:
        program, weights: Of the network.
        foreign: As in `Fold`.
    """

    program: Program
    weights: Mapping[str, Tensor]
    foreign: ForeignHead | None


def _programs(model: Model, precision: str) -> Iterator[Made]:
    """Make the programs of a model's folds."""
    for network in inference_network(model).networks:
        program, weights = network_program(
            network, model.plan.input_channels, model.plan.patch_size, in_int16=precision == "int16"
        )
        yield Made(program=program, weights=weights, foreign=foreign_head(network))


def _read(model: Model, folder: Path) -> Iterator[Made]:
    """Read them from a bundle."""
    program, folds = read_programs(folder)
    if list(folds) != list(model.folds):
        raise BundleError(f"{folder} must hold folds {', '.join(model.folds)}, it holds {', '.join(folds)}")
    plan = model.plan
    for weights in folds.values():
        foreign = None
        if program.features and plan.head is not None and plan.classification is not None:
            of_head = {name.removeprefix(HEAD): tensor for name, tensor in weights.items() if name.startswith(HEAD)}
            head = DescribedHead(plan.head, of_head, plan.architecture.encoder_channels, len(plan.patch_size))
            foreign = ForeignHead(head=head, regions=plan.classification.regions)
        yield Made(program=program, weights=weights, foreign=foreign)
