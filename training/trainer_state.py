"""What a checkpoint of a multi-task training holds, and how a training goes on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..engine.errors import CheckpointError, EngineError
from ..engine.model.checkpoint import TEMPERATURE_KEY, read_checkpoint
from .data.cases import SPLITS_FILE
from .random_state import random_state
from .recipe import Recipe

LATEST = "checkpoint_latest.pth"
FITTED = ("pooled_classifier", TEMPERATURE_KEY)
"""Entries of a checkpoint that were fitted to its weights after the training."""


def state_of(trainer: Any, next_epoch: int) -> dict[str, Any]:
    """Collect all that a resumed training needs, as plain values and tensors.

    Args:
        trainer: The `nnUNetTrainerMultiTask`.
        next_epoch: Epoch with which a training goes on from here.

    Returns:
        nnU-Net's own entries, and ours under "multi_task". With an average of the weights, `network_weights` are the
        averaged ones, and those that are trained on lie in "multi_task".
    """
    trained = trainer.network.state_dict()
    average = trainer.average
    return {
        "network_weights": trained if average is None else average.state_dict(),
        "optimizer_state": trainer.optimizer.state_dict(),
        "grad_scaler_state": None if trainer.grad_scaler is None else trainer.grad_scaler.state_dict(),
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": trainer._best_ema,
        "current_epoch": next_epoch,
        "init_args": trainer.my_init_kwargs,
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        "multi_task": {
            "head": trainer.network.scheme.describe(),
            "recipe": trainer.recipe.describe(),
            "training_cases": _training_cases(trainer),
            "head_optimizer_state": trainer.head_optimizer.state_dict(),
            "anneal_from": trainer.schedule.anneal_from,
            "best": trainer.whole_cases.best,
            "history": trainer.history,
            "random_state": random_state(),
            "trained_weights": None if average is None else trained,
            "average_steps": None if average is None else average.steps,
        },
    }


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of a multi-task training whole.

    Raises:
        CheckpointError: Where it is damaged, or holds more than weights and plain values.
        EngineError: Where it comes from another kind of training.
    """
    read_checkpoint(path)  # refuses content that could run code
    checkpoint: dict[str, Any] = torch.load(path, map_location=device, weights_only=False)
    if checkpoint.get("multi_task") is None:
        raise EngineError(
            f"a multi-task training goes on from a checkpoint of its own, this one is of "
            f"{checkpoint.get('trainer_name', 'an unknown trainer')}: start again in another folder"
        )
    return checkpoint


def stored_recipe(path: Path) -> Recipe:
    """Read the recipe with which a checkpoint was trained.

    Raises:
        CheckpointError: Where the checkpoint is damaged, or its recipe cannot be used.
        EngineError: Where it comes from another kind of training.
    """
    return recipe_of(read_state(path), str(path))


def recipe_of(checkpoint: Mapping[str, Any], where: str) -> Recipe:
    """Take the recipe from the content of a checkpoint.

    Raises:
        CheckpointError: Where it cannot be used.
    """
    try:
        return Recipe.parse(checkpoint["multi_task"]["recipe"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: its recipe cannot be used ({error}): start again in another folder") from error


def check_resumable(
    state: Mapping[str, Any], stored: Recipe, head: Mapping[str, Any], recipe: Recipe, allowed: bool
) -> str:
    """Compare head and recipe with those of a checkpoint.

    Args:
        state: The entry "multi_task" of the checkpoint.
        stored: Its recipe.
        head: Description of the network's head.
        recipe: The recipe that is asked for.
        allowed: Whether the recipe may differ.

    Returns:
        What differs, or nothing.

    Raises:
        EngineError: Where head or optimizer differ, or anything does that may not.
    """
    had = state["head"]
    if changed := [f"{key} {had.get(key)} is now {value}" for key, value in head.items() if had.get(key) != value]:
        raise EngineError(f"the checkpoint is of another head: {'; '.join(changed)}; resume with the same recipe")
    if stored.optimizer != recipe.optimizer:
        raise EngineError(
            f"the checkpoint is of optimizer {stored.optimizer}, the recipe asks for {recipe.optimizer}; resume with "
            f"the same recipe"
        )
    before, now = stored.describe(), recipe.describe()
    difference = "; ".join(f"{key} {before[key]} is now {value}" for key, value in now.items() if before[key] != value)
    if difference and not allowed:
        raise EngineError(
            f"a training goes on with the recipe of its checkpoint, another is asked for: {difference}; leave out "
            f"--preset, --set and --seed, or allow it with --change-recipe"
        )
    return difference


def _training_cases(trainer: Any) -> list[str]:
    """Name the cases that an initialised trainer trains on.

    Note:
        As nnU-Net's `do_split`, which logs four lines each time.
    """
    if trainer.fold == "all":
        return sorted(trainer.dataset_class.get_identifiers(trainer.preprocessed_dataset_folder))
    splits = json.loads((Path(trainer.preprocessed_dataset_folder_base) / SPLITS_FILE).read_bytes())
    return sorted(splits[trainer.fold]["train"] if trainer.fold < len(splits) else trainer.do_split()[0])


def trained_cases(path: Path) -> frozenset[str] | None:
    """Read on which cases a checkpoint was trained; `None` where it does not say, as one that was published.

    Raises:
        CheckpointError: Where it is damaged, or holds more than weights and plain values.
    """
    read_checkpoint(path)  # refuses content that could run code
    state = torch.load(path, map_location="cpu", weights_only=False).get("multi_task") or {}
    return frozenset(state["training_cases"]) if "training_cases" in state else None


def _check_same_training(trainer: Any, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other plans, another network or other cases than the trainer's.

    Raises:
        EngineError: Where something differs.
    """
    before, now = (
        _plan_of(plans, trainer) for plans in (checkpoint["init_args"]["plans"], trainer.plans_manager.plans)
    )
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise EngineError(
            f"the checkpoint is of other plans, {', '.join(changed)} differ: plan as before, or start again in another "
            f"folder"
        )
    had = checkpoint["multi_task"].get("training_cases")
    if had is not None and (differing := set(had) ^ set(_training_cases(trainer))):
        raise EngineError(
            f"the checkpoint was trained on other cases than fold {trainer.fold} now has, {len(differing)} differ, "
            f"such as {min(differing)}: go on with the splits as they were, or start again in another folder"
        )


def _plan_of(plans: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """Take from plans what decides the numbers that a configuration's network gets and gives, without its head."""
    whole = (
        "image_reader_writer",
        "transpose_forward",
        "transpose_backward",
        "foreground_intensity_properties_per_channel",
    )
    manager = type(trainer.plans_manager)(dict(plans))  # resolves what a configuration inherits
    configuration = dict(manager.get_configuration(trainer.configuration_name).configuration)
    architecture = dict(configuration.pop("architecture"))
    kwargs = {name: value for name, value in architecture["arch_kwargs"].items() if name != "head"}
    return {
        **{name: plans.get(name) for name in whole},
        **configuration,
        "architecture": {**architecture, "arch_kwargs": kwargs},
    }


def restore(trainer: Any, checkpoint: Mapping[str, Any]) -> None:
    """Give an initialised trainer everything that a checkpoint holds but the random numbers.

    Raises:
        EngineError: Where the checkpoint is of other plans or other cases.

    Note:
        As in nnU-Net's `nnUNetTrainer.load_checkpoint`, which takes no dictionary in 2.8.
    """
    _check_same_training(trainer, checkpoint)
    state = checkpoint["multi_task"]
    averaged = checkpoint["network_weights"]
    trained = state.get("trained_weights")
    trainer.network.load_state_dict(averaged if trained is None else trained)
    if trainer.average is not None:
        trainer.average.restore(averaged, state.get("average_steps") or 0)
    trainer.optimizer.load_state_dict(checkpoint["optimizer_state"])
    trainer.head_optimizer.load_state_dict(state["head_optimizer_state"])
    if trainer.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
    trainer.logger.load_checkpoint(checkpoint["logging"])
    trainer.current_epoch, trainer._best_ema = checkpoint["current_epoch"], checkpoint["_best_ema"]
    trainer.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
    for optimizer, decay in (
        (trainer.optimizer, trainer.recipe.weight_decay),
        (trainer.head_optimizer, trainer.recipe.head_weight_decay),
    ):
        for group in optimizer.param_groups:
            group["weight_decay"] = decay  # from the recipe, like all settings
    trainer.schedule = replace(trainer.schedule, anneal_from=state["anneal_from"])
    trainer.whole_cases.best, trainer.history = tuple(state["best"]), state["history"]
