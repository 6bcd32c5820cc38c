"""Reads a trained nnU-Net v2 model from its folder or export zip, and runs nothing that it contains."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ModelError
from ..options import DEFAULT_CHECKPOINT, ModelChoice
from .checkpoint import Checkpoint, read_checkpoint
from .export_zip import model_folder
from .foreign_head import find_head
from .given_network import GivenNetwork
from .head_description import HEAD_KEY
from .heads import PooledClassifier, divide_class_logits
from .mirroring import View, mirror_views
from .plan_classes import is_unet, remarks_on
from .plans import DATASET, PLANS, Plan, parse_plan

logger = logging.getLogger(__name__)

LARGEST_JSON_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One configuration of a trained model.

    Args:
        plan: Checked content of plans.json and dataset.json.
        weights: Parameters by name, one mapping per fold; empty after a backend has taken them, as in `Engine.model`.
        folds: Names of the folds, such as "0" or "all".
        mirror_axes: Spatial axes of the patch along which mirroring is allowed, counted from 0.
        trainer: Name of the trainer class.
        source: Folder or zip of the model.
        plans, dataset: Content of the two JSON files.
        pooled_classifiers: Classifiers that were fitted after training and replace the network's classification head:
            one per fold, None for a fold without. Empty if the head classifies in all folds.
        given: Replaces the plan's network. If it is a module, there are no folds, and no weights beside its own.
        temperatures: By fold, what the class logits of the network's own head were divided by; `weights` have it.
        weights_remark: Says which weights of the checkpoints nothing uses, or that a head was recognised by its keys.
    """

    plan: Plan
    weights: tuple[Mapping[str, Tensor], ...]
    folds: tuple[str, ...]
    mirror_axes: tuple[int, ...]
    trainer: str
    source: Path
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    pooled_classifiers: tuple[PooledClassifier | None, ...] = ()
    given: GivenNetwork | None = None
    temperatures: tuple[float, ...] = ()
    weights_remark: str | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Say what is unusual about the model, and how it is used all the same."""
        of_network = remarks_on(self.plan.architecture) if self.given is None else ()
        return (
            *of_network,
            *self.plan.labels.remarks,
            *(() if self.weights_remark is None else (self.weights_remark,)),
        )

    @property
    def classifier(self) -> str | None:
        """What classifies a case, "head" or "lda"; None without classification."""
        if self.plan.classification is None:
            return None
        return "lda" if self.pooled_classifiers else "head"

    @property
    def views(self) -> tuple[View, ...]:
        """Every mirror view that the model was trained for."""
        return mirror_views(self.mirror_axes, len(self.plan.patch_size))

    @property
    def fitted_folds(self) -> tuple[str, ...]:
        """Folds that have a fitted classifier."""
        return tuple(name for name, fitted in zip(self.folds, self.pooled_classifiers, strict=False) if fitted)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of one fold; a parameter with several names counts once."""
        return sum({tensor.data_ptr(): tensor.numel() for tensor in self.weights[0].values()}.values())

    def example_tiles(self, device: torch.device) -> Tensor:
        """Make tiles for tracing, (2, C, *patch); two, because the batch size 1 would become a constant."""
        return torch.zeros(2, self.plan.input_channels, *self.plan.patch_size, device=device)


def read_chosen(path: str | os.PathLike[str], choice: ModelChoice, *, given: GivenNetwork | None = None) -> Model:
    """Read the folds of a model that are chosen, with the chosen classifier.

    Args:
        path: As for `read_model`.
        choice: Its folds, checkpoint, configuration and classifier count.
        given: A network to run in place of the plan's.

    Raises:
        ModelError: Where something is missing or not supported.
        CheckpointError: As for `read_model`.
    """
    read = read_model(
        path, folds=choice.folds, checkpoint=choice.checkpoint_file, configuration=choice.configuration, given=given
    )
    return with_classifier(read, choice.options.classifier)


def read_model(
    path: str | os.PathLike[str],
    *,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    configuration: str | None = None,
    given: GivenNetwork | None = None,
) -> Model:
    """Read a model folder (`plans.json`, `dataset.json`, `fold_*/`) or an nnU-Net export zip.

    Args:
        path: The folder or zip.
        folds: Folds to average, such as (0, 1) or ("all",). By default every numbered fold that has the checkpoint; if
            there is none, fold "all".
        checkpoint: File name of the checkpoint in each fold.
        configuration: Name of the configuration; needed for a zip that holds several.
        given: A network to run in place of the plan's.

    Raises:
        ModelError: Where something is missing or not supported.
        CheckpointError: For a checkpoint that is damaged or holds more than weights and plain values.
    """
    path = Path(path)
    with model_folder(path, configuration) as folder:
        if not folder.is_dir():
            found = "is a file, and no whole zip" if path.is_file() else "does not exist"
            if path.suffix == ".pth":
                found = "is a checkpoint: give the folder with plans.json, two above it"
            raise ModelError(f"a model must be a folder or an nnU-Net export zip; {path} {found}")
        plans, dataset = _read_json(folder / PLANS), _read_json(folder / DATASET)
        names, checkpoints = _read_folds(folder, folds, checkpoint, plans, configuration, given)
        first = checkpoints[0]
        if configuration not in (None, first.configuration):
            raise ModelError(f"{path} must be of configuration {configuration!r}, it is of {first.configuration!r}")
        plan = parse_plan(plans, dataset, first.configuration)
        if given is not None:
            checkpoints, plan = _for_given_network(checkpoints, plan, given)
        weights, plans, plan, remark = _with_foreign_head(folder, checkpoints, plans, dataset, plan, given)
        for name, loaded in zip(names, checkpoints, strict=True):
            _check_classes(loaded.pooled_classifier, plan, f"{path}, fold {name}")
        if given is None:
            weights = tuple(map(_calibrated, weights, checkpoints))
        temperatures = tuple(loaded.temperature for loaded in checkpoints)
        has_weights = given is not None and given.has_weights
        model = Model(
            plan=plan,
            weights=() if has_weights else weights,
            folds=() if has_weights else names,
            mirror_axes=first.mirror_axes,
            trainer=first.trainer,
            source=path,
            plans=plans,
            dataset=dataset,
            pooled_classifiers=() if has_weights else tuple(loaded.pooled_classifier for loaded in checkpoints),
            given=given,
            temperatures=() if has_weights else temperatures,
            weights_remark=remark,
        )
        for remark in model.remarks:
            logger.warning("%s: %s", path, remark)
        return model


def _read_folds(
    folder: Path,
    folds: Sequence[int | str] | None,
    checkpoint: str,
    plans: Mapping[str, Any],
    configuration: str | None,
    given: GivenNetwork | None,
) -> tuple[tuple[str, ...], list[Checkpoint]]:
    """Read the checkpoint of each fold; for a network with weights of its own the first one, if there is any.

    Without a checkpoint, the configuration is the one that is named or the only one, and nothing is mirrored.
    """
    if given is None or not given.has_weights:
        names = _find_folds(folder, folds, checkpoint)
    elif folds is not None:
        raise ValueError(f"folds must be left out with a network that has its own weights, got {list(folds)}")
    elif any(folder.glob(f"fold_*/{checkpoint}")):
        names = _find_folds(folder, None, checkpoint)[:1]
    else:
        known = list(plans.get("configurations", ()))
        if configuration is None and len(known) != 1:
            raise ModelError(f"{folder} has no checkpoint that names its configuration: name one of {', '.join(known)}")
        nothing = Checkpoint(
            weights={},
            configuration=configuration or str(known[0]),
            mirror_axes=(),
            trainer="unknown",
            pooled_classifier=None,
        )
        return ("none",), [nothing]
    return names, [read_checkpoint(folder / f"fold_{name}" / checkpoint) for name in names]


def _with_foreign_head(
    folder: Path,
    checkpoints: Sequence[Checkpoint],
    plans: dict[str, Any],
    dataset: Mapping[str, Any],
    plan: Plan,
    given: GivenNetwork | None,
) -> tuple[tuple[Mapping[str, Tensor], ...], dict[str, Any], Plan, str | None]:
    """Find the classification head of another program, and put its description into the plans.

    Returns:
        Weights by fold, plans, plan, and what has to be said about the weights.
    """
    weights = tuple(loaded.weights for loaded in checkpoints)
    if given is not None or not is_unet(plan.architecture):
        return weights, plans, plan, None
    file = folder / f"{HEAD_KEY}.json"
    described = _read_json(file) if file.is_file() else plans.get(HEAD_KEY)
    everything = [{**loaded.weights, **loaded.other_weights} for loaded in checkpoints]
    found = find_head(everything, described, plan)
    if found.description is not None:
        plans = {**plans, HEAD_KEY: found.description}
        plan = parse_plan(plans, dataset, plan.configuration)
    return found.weights, plans, plan, found.remark


def _for_given_network(
    checkpoints: Sequence[Checkpoint], plan: Plan, given: GivenNetwork
) -> tuple[list[Checkpoint], Plan]:
    """Leave out the class of a case, which a given network does not have."""
    if plan.classification is not None:
        logger.warning("the given network %s segments only: the class of a case is left out", given.name)
    return (
        [replace(each, pooled_classifier=None) for each in checkpoints],
        replace(plan, classification=None),
    )


def with_classifier(model: Model, wanted: str) -> Model:
    """Keep a model's fitted classifiers, or remove them so that the network's head classifies.

    Args:
        model: The model.
        wanted: "lda" for the fitted classifiers, "head" for the network's head, or "auto" for the fitted ones if every
            fold has one that is preferred.

    Raises:
        ModelError: For "lda" where a fold has no fitted classifier.
    """
    if model.plan.classification is None:
        return model
    without = [fold for fold in model.folds if fold not in model.fitted_folds]
    if wanted == "lda" and without:
        raise ModelError(
            f"classifier lda needs a fitted classifier in every fold's checkpoint; in {model.source} fold "
            f"{', '.join(without)} has none. Fit it, or take the network's head: --classifier head"
        )
    if wanted == "auto" and 0 < len(without) < len(model.folds):
        logger.warning(
            "%s: fold %s has no fitted classifier, so the network's head answers", model.source, ", ".join(without)
        )
    declined = [
        fold
        for fold, fitted in zip(model.folds, model.pooled_classifiers, strict=False)
        if fitted is not None and not fitted.preferred
    ]
    if wanted == "auto" and declined:
        logger.info(
            "%s: on validation cases the fitted classifier of fold %s was not better than the network's head, which "
            "answers unless it is told otherwise",
            model.source,
            ", ".join(declined),
        )
    fitted_answers = wanted == "lda" or (wanted == "auto" and not without and not declined)
    chosen = model if fitted_answers else replace(model, pooled_classifiers=())
    logger.info("classifier %s of %s", chosen.classifier, model.source)
    return chosen


def _calibrated(weights: Mapping[str, Tensor], loaded: Checkpoint) -> Mapping[str, Tensor]:
    """Divide the class logits of a network's own head by the temperature in its checkpoint."""
    return weights if loaded.temperature == 1 else divide_class_logits(weights, loaded.temperature)


def _check_classes(fitted: PooledClassifier | None, plan: Plan, where: str) -> None:
    """Refuse a fitted classifier whose classes are not the plan's."""
    if fitted is None:
        return
    if plan.classification is None:
        raise CheckpointError(
            f"{where}: only checkpoints of a network with a classification head may have a pooled_classifier, the plan "
            f"names {plan.architecture.class_name:.120}. Are checkpoint and plans from the same training?"
        )
    if len(fitted.bias) != plan.classification.num_classes:
        raise CheckpointError(
            f"{where}: pooled_classifier must have the plan's {plan.classification.num_classes} classes, it has "
            f"{len(fitted.bias)}. Fit it again on this data set"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"a model folder must have {path.name} beside its folders fold_0, ...; {path.parent} has none")
    if path.stat().st_size > LARGEST_JSON_BYTES:
        raise ModelError(f"{path} must be at most {LARGEST_JSON_BYTES} bytes, it has {path.stat().st_size}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def _find_folds(folder: Path, folds: Sequence[int | str] | None, checkpoint: str) -> tuple[str, ...]:
    """Name the folds to use, in nnU-Net's order."""
    if Path(checkpoint).name != checkpoint:
        raise ValueError(f"checkpoint must be a file name, got {checkpoint!r}")
    found = {path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")}
    numbered = sorted((name for name in found if name.isdecimal()), key=int)
    if folds is None:
        names = numbered or [name for name in ("all",) if name in found]
        if not names:
            raise ModelError(
                f"{folder} must have a fold with {checkpoint}, such as fold_0/{checkpoint}; it has "
                f"{', '.join(sorted(str(p.relative_to(folder)) for p in folder.glob('fold_*/*.pth'))) or 'none'}"
            )
        return tuple(names)
    names = tuple(str(fold) for fold in folds)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"folds must be one or more different folds, got {list(folds)}")
    if absent := [name for name in names if name not in found]:
        raise ModelError(
            f"{folder} must have {checkpoint} for every fold asked for; fold {', '.join(absent)} has none, "
            f"found are {', '.join(sorted(found)) or 'none'}"
        )
    return names
