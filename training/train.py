"""Start or resume a multi-task training, without nnU-Net's search for trainers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine.backends.choose import choose_device
from ..engine.errors import EngineError
from ..engine.files import remove_abandoned, written_atomically
from ..engine.model.checkpoint import read_checkpoint
from ..engine.options import DEFAULT_CHECKPOINT
from .data.cases import SPLITS_FILE
from .data.multi_task_plans import RECIPE_KEY
from .data.planning import nnunet_environment
from .data.tables import DatasetError
from .recipe import Recipe
from .trainer_state import LATEST, read_state, recipe_of, stored_recipe

logger = logging.getLogger(__name__)

TRAINER = "nnUNetTrainerMultiTask"

BEST = "checkpoint_best.pth"


# Its parameters are the flags of `nnturbo train`.
def train(
    dataset_name: str,
    configuration: str,
    fold: int | str,
    *,
    recipe: Recipe,
    plans_name: str,
    raw: str | os.PathLike[str],
    preprocessed: str | os.PathLike[str],
    results: str | os.PathLike[str],
    device: str = "auto",
    resume: bool = False,
    change_recipe: bool = False,
    pretrained: str | os.PathLike[str] | None = None,
    final_validation: bool = False,
) -> Path:
    """Train one fold.

    Args:
        dataset_name: Such as Dataset801_PancreasPhantom.
        configuration: Such as 3d_fullres.
        fold: Number of a split of `splits_final.json`, or "all".
        recipe: Settings of the training; of one that goes on, those of its checkpoint, see `recipe_to_go_on_with`.
        plans_name: Plans file without its ending, such as nnUNetResEncUNetMPlans.
        raw: nnU-Net's nnUNet_raw.
        preprocessed: nnU-Net's nnUNet_preprocessed.
        results: nnU-Net's nnUNet_results.
        device: "auto", "cpu", "cuda" or "mps".
        resume: Whether to continue from the final or the latest checkpoint, whichever is of a later epoch, else from
            the best one; without any, the training begins. A finished training is not changed.
        change_recipe: Whether a training may go on with another recipe than its checkpoint's; if it has more epochs, a
            finished training goes on too, unless it stopped early.
        pretrained: Checkpoint of nnU-Net's trainer or of this one, with whose weights a new training begins. Encoder
            and decoder must fit; a head is used if it fits.
        final_validation: Whether to run nnU-Net's own validation of the final checkpoint afterwards.

    Returns:
        The model folder, which holds `plans.json`, `dataset.json` and `fold_<fold>`.

    Raises:
        ValueError: For an unknown device, or a fold that the splits do not have.
        DatasetError: Where the preprocessed data set is missing or not complete.
        EngineError: Where nnU-Net is not installed, the device is missing, a training would be overwritten, or one
            would go on with another recipe.
    """
    folder = Path(preprocessed) / dataset_name
    plans, dataset = _read_preprocessed(folder, plans_name, configuration)
    fold = _check_fold(fold, folder / SPLITS_FILE)
    _check_arrays(folder, plans["configurations"][configuration].get("data_identifier"), fold)
    chosen = choose_device(device)
    if ":" in device:  # nnU-Net would take the first one
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {device!r}; choose by CUDA_VISIBLE_DEVICES")
    with nnunet_environment(raw=Path(raw), preprocessed=Path(preprocessed), results=Path(results)):
        try:
            from .trainer import nnUNetTrainerMultiTask
        except ImportError as error:
            raise EngineError(f"training needs nnU-Net ({error}): pip install 'nnturbo[training]'") from error
        plans |= {RECIPE_KEY: recipe.describe(), "continue_training": resume}
        target = _model_folder(Path(results), dataset_name, plans, configuration)
        remove_abandoned(target / f"fold_{fold}")  # what a kill left half written is as large as a checkpoint
        present = _resumable(target / f"fold_{fold}")
        if present is not None and not resume:
            raise EngineError(f"{present} is there: resume that training with --continue, or remove its folder")
        if present is None and resume:
            logger.warning("%s has no checkpoint to go on from: the training begins", target / f"fold_{fold}")
        trainer = nnUNetTrainerMultiTask(plans, configuration, fold, dataset, chosen)
        is_finished = False
        if present is not None:
            if pretrained is not None:
                logger.warning("%s is gone on from, so that %s is not begun with", present, pretrained)
            is_finished = _go_on(trainer, present, chosen, change_recipe)
        elif pretrained is not None:
            trainer.begin_with(read_checkpoint(Path(pretrained)).weights)
        if not is_finished:
            if chosen.type == "cuda":
                torch.backends.cudnn.benchmark = True  # as nnU-Net's own command does
            trainer.run_training()
        if final_validation:
            trainer.perform_actual_validation()
    return target


def recipe_to_go_on_with(
    dataset_name: str,
    configuration: str,
    fold: int | str,
    *,
    plans_name: str,
    preprocessed: str | os.PathLike[str],
    results: str | os.PathLike[str],
) -> Recipe | None:
    """Read the recipe of the checkpoint from which `train` would go on; `None` if there is none.

    Args and errors are those of `train`, and a `CheckpointError` for a checkpoint that cannot be used.
    """
    plans, _ = _read_preprocessed(Path(preprocessed) / dataset_name, plans_name, configuration)
    present = _resumable(_model_folder(Path(results), dataset_name, plans, configuration) / f"fold_{fold}")
    return None if present is None else stored_recipe(present)


def _model_folder(results: Path, dataset_name: str, plans: Mapping[str, Any], configuration: str) -> Path:
    """Name the model folder as nnU-Net does: by the plans' own name, and not by their file's."""
    return results / dataset_name / f"{TRAINER}__{plans['plans_name']}__{configuration}"


def _resumable(fold_folder: Path) -> Path | None:
    """Find the checkpoint from which a training resumes.

    Note:
        nnU-Net takes the final, latest or best one, the first that exists. A finished training that goes on by another
        recipe has its old final one beside the latest until it ends again.
    """
    latest, final, best = (fold_folder / name for name in (LATEST, DEFAULT_CHECKPOINT, BEST))
    if latest.is_file() and final.is_file():
        return max(latest, final, key=lambda path: read_state(path)["current_epoch"])
    return next((path for path in (latest, final, best) if path.is_file()), None)


def _go_on(trainer: Any, path: Path, device: torch.device, change_recipe: bool) -> bool:
    """Let a new trainer go on from a checkpoint; return whether the training is finished."""
    checkpoint = read_state(path, device)
    trainer.load_checkpoint(checkpoint, change_recipe=change_recipe)
    is_changed = recipe_of(checkpoint, str(path)) != trainer.recipe
    is_finished = path.name == DEFAULT_CHECKPOINT and trainer.current_epoch >= trainer.schedule.last_epoch
    if is_finished and is_changed:
        logger.warning("%s: the training is finished, and the other recipe leaves no epoch to train", path)
    elif is_finished:
        logger.info("%s: the training is finished", path)
    elif is_changed:  # kept at once: a kill before the next checkpoint would undo it
        kept = {**checkpoint, "init_args": trainer.my_init_kwargs}
        kept["multi_task"] = {**checkpoint["multi_task"], "recipe": trainer.recipe.describe()}
        with written_atomically(path.with_name(LATEST)) as temporary:
            torch.save(kept, temporary)
    return is_finished


def _read_preprocessed(folder: Path, plans_name: str, configuration: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read plans and `dataset.json` of a preprocessed data set, and check that the configuration is there."""
    for name in (f"{plans_name}.json", "dataset.json"):
        if not (folder / name).is_file():
            raise DatasetError(f"{folder / name} is missing: run nnturbo prepare first, or check the names")
    plans: dict[str, Any] = json.loads((folder / f"{plans_name}.json").read_bytes())
    dataset: dict[str, Any] = json.loads((folder / "dataset.json").read_bytes())
    arrays = folder / plans["configurations"].get(configuration, {}).get("data_identifier", "")
    if not arrays.is_dir():
        raise DatasetError(f"{arrays} is missing: run nnturbo prepare with --configurations {configuration}")
    return plans, dataset


def _check_fold(fold: int | str, splits_file: Path) -> int | str:
    """Refuse a fold that does not exist: nnU-Net would split at random, and train on validation cases."""
    if fold == "all":
        return fold
    if not splits_file.is_file():
        raise DatasetError(f"{splits_file} is missing: run nnturbo prepare first, or train fold all")
    count = len(json.loads(splits_file.read_bytes()))
    if not str(fold).isdecimal() or int(fold) >= count:
        raise ValueError(f"fold must be 'all' or below {count}, the number of splits in {splits_file}, got {fold!r}")
    return int(fold)


def _check_arrays(folder: Path, identifier: str | None, fold: int | str) -> None:
    """Refuse a preprocessing that was stopped: nnU-Net would fail when it first draws a case that is missing.

    Note:
        nnU-Net writes the properties of a case last: nnunetv2's `nnunet_dataset`, `save_case`.
    """
    # Fold all takes what is there where nothing says which cases there are; what only inherits is refused later.
    if identifier is None or not (folder / SPLITS_FILE).is_file():
        return
    splits = json.loads((folder / SPLITS_FILE).read_bytes())
    parts = splits if fold == "all" else [splits[int(fold)]]
    names = {name for split in parts for part in ("train", "val") for name in split[part]}
    if absent := sorted(name for name in names if not (folder / identifier / f"{name}.pkl").is_file()):
        raise DatasetError(
            f"{folder / identifier} must hold every case, {len(absent)} are missing: {', '.join(absent)[:200]}; "
            f"preprocessing did not end, run nnturbo prepare with --overwrite again"
        )
