"""Makes a model folder, or a bundle, ready to run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..backends import Backend
from ..backends.choose import AUTOMATIC, choose_backend, choose_device, choose_precision, usable_backends
from ..errors import BackendUnavailable, BundleError, EngineError, ModelError
from ..model.agreement import Agreement
from ..model.folder import Model
from ..model.runner import Runner
from ..options import DEFAULT_CHECKPOINT, ModelChoice
from .manifest import Manifest, bundle_model, check_machine, describe_machine, plan_bundle, read_manifest, source_hashes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model that is ready to run.

    Args:
        model: Without weights.
        runner: Its network.
        device: Where it runs.
        source: SHA-256 of the model's files, by name.
        checkpoint: File name in each fold; None for a bundle.
        backend: What runs the network.
        precision: Of the network.
        classifier: "head" or "lda"; None for models without a classification head.
        agreement: Of a bundle with fp32, where it was measured.
    """

    model: Model
    runner: Runner
    device: torch.device
    source: Mapping[str, str]
    checkpoint: str | None
    backend: str
    precision: str
    classifier: str | None
    agreement: Agreement | None


def open_model(model: Model, choice: ModelChoice, device: str) -> Opened:
    """Choose how a model runs here, and compile it if need be, or take what was compiled before.

    With "auto", the next best backend runs what the best one cannot compile.

    Args:
        model: As `read_chosen` reads it.
        choice: Its checkpoint, backend and precision count.
        device: Where to run.
    """
    target = choose_device(device)
    precision = choose_precision(choice.precision, target)
    candidates, missing = usable_backends(choice.backend, target, precision)
    if model.given is not None and choice.backend == "auto":  # it would be compiled for each engine
        candidates = [candidate for candidate in candidates if not candidate.compiles]
    *others, last = candidates
    for candidate in others:
        try:
            opened = _opened_by(candidate, model, choice.checkpoint_file, precision, target)
            break
        except BackendUnavailable as error:
            # That a model is not one for the kernels is expected; that a compiler fails is not.
            if candidate.compiles:
                logger.warning("%s; going on without it", error)
            missing[candidate.name] = str(error)
    else:
        opened = _opened_by(last, model, choice.checkpoint_file, precision, target)
    _say_choice(opened, missing)
    return opened


def _say_choice(opened: Opened, missing: Mapping[str, str]) -> None:
    """Log what runs the network, and what would bring each backend that is faster."""
    order = AUTOMATIC[opened.device.type]
    faster = (
        [name for name in order[: order.index(opened.backend)] if name in missing] if opened.backend in order else []
    )
    more = "; ".join(f"{name}: {missing[name]}" for name in faster)
    where = f"{opened.device} in {opened.precision}"
    logger.info("%s runs the network on %s%s", opened.backend, where, f"; faster would be {more}" if more else "")


def _opened_by(chosen: Backend, model: Model, checkpoint: str, precision: str, target: torch.device) -> Opened:
    source = source_hashes(model, checkpoint)
    runner = _runner_of(chosen, model, source, precision, target)
    return Opened(
        model=replace(model, weights=()),
        runner=runner,
        device=target,
        source=source,
        checkpoint=checkpoint if model.folds else None,
        backend=chosen.name,
        precision=precision,
        classifier=model.classifier,
        agreement=None,
    )


def check_given(opened: Opened) -> None:
    """Run a given network, if there is one, on a blank tile.

    Raises:
        ModelError: Where it fails, or gives anything else than logits of the plan's labels.
    """
    plan, given = opened.model.plan, opened.model.given
    if given is None:
        return
    wanted = (1, plan.labels.num_outputs, *plan.patch_size)
    tile = torch.zeros(1, plan.input_channels, *plan.patch_size)
    try:
        got: Any = tuple(opened.runner(tile).seg_logits.shape)
    except Exception as error:  # whatever the caller's code raises
        got = str(error).partition("\n")[0] or type(error).__name__
    if got != wanted:
        raise ModelError(
            f"the given network {given.name} must turn a tile {tuple(tile.shape)} into logits {wanted}, as "
            f"plans.json and dataset.json say; it gives {got!s:.200}"
        )


def _runner_of(
    chosen: Backend, model: Model, source: Mapping[str, str], precision: str, target: torch.device
) -> Runner:
    if not chosen.compiles:
        return chosen.load(model, None, target, precision)
    if precision == "int8":
        raise ValueError("int8 needs scans to calibrate with: build a bundle with nnturbo build --calibration")
    from .cache import cached_bundle, temporary_bundle

    manifest = plan_bundle(model, source, chosen, precision, describe_machine(target))
    # The code of a given network may change while its name and weights stay: nothing tells an old compiled one.
    compiled = cached_bundle if model.given is None else temporary_bundle
    with compiled(model, manifest, chosen, target) as folder:
        return chosen.load(model, folder, target, precision)


def open_bundle(folder: Path, choice: ModelChoice, device: str) -> Opened:
    """Verify a bundle and load what was compiled.

    Args:
        folder: The bundle.
        choice: What is chosen may only repeat what the bundle was built for.
        device: Where to run.
    """
    manifest = read_manifest(folder)
    model = bundle_model(manifest, folder)
    _check_choice(choice, manifest, folder)
    target = choose_device(manifest.machine.get("device", "cpu") if device == "auto" else device)
    chosen = choose_backend(manifest.backend, target, manifest.precision)
    check_machine(manifest, chosen, target, folder)
    try:
        runner = chosen.load(model, folder, target, manifest.precision)
    except EngineError:
        raise
    except Exception as error:  # whatever a runtime raises for files it cannot read
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"{chosen.name} cannot load {folder}: {reason:.200}. Build it again, with the versions installed here"
        ) from error
    return Opened(
        model=model,
        runner=runner,
        device=target,
        source=manifest.source,
        checkpoint=None,
        backend=manifest.backend,
        precision=manifest.precision,
        classifier=manifest.classifier,
        agreement=manifest.agreement,
    )


def _check_choice(choice: ModelChoice, manifest: Manifest, folder: Path) -> None:
    """Refuse what a bundle was not built for."""
    weights = next(iter(manifest.source), "")
    checkpoint = choice.checkpoint
    if "/" not in weights and checkpoint == DEFAULT_CHECKPOINT:  # a zip's name does not tell its checkpoint
        checkpoint = None
    asked_and_built = {
        "folds": (None if choice.folds is None else sorted(map(str, choice.folds)), sorted(manifest.folds)),
        "checkpoint": (checkpoint, Path(weights).name),
        "configuration": (choice.configuration, manifest.configuration),
        "backend": (choice.backend, manifest.backend),
        "precision": (choice.precision, manifest.precision),
        "classifier": (choice.options.classifier, manifest.classifier or choice.options.classifier),
    }
    for name, (asked, built) in asked_and_built.items():
        if asked not in (None, "auto", built):
            raise BundleError(
                f"{folder} was built with {name} {_in_words(built)}, not {_in_words(asked)}: build another bundle for "
                "that"
            )


def _in_words(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)
