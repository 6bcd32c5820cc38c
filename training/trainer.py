"""nnU-Net's trainer with a second task: a class per case, from a head on the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from ..engine.errors import EngineError
from ..engine.files import written_atomically
from .class_loss import class_loss, class_weights, content_weights, shown_content
from .data.cases import LABELS_FILE
from .data.multi_task_plans import RECIPE_KEY, multi_task_plans, read_classes
from .data.tables import DatasetError
from .history import open_events, write_history
from .optimizers import make_optimizers, step_optimizers
from .random_state import restore_random_state, seed_generators
from .recipe import PRESETS, Recipe
from .schedule import EpochScheduler, Schedule
from .step_cost import try_batch
from .trainer_state import FITTED, LATEST, check_resumable, read_state, recipe_of, restore, state_of
from .weight_average import WeightAverage
from .whole_case_validation import WholeCaseValidation

BEST_BY_SCORE = "checkpoint_best_score.pth"
"""Checkpoint of the epoch with the best score on whole cases; nnU-Net's own checkpoint_best.pth goes by patches."""


class nnUNetTrainerMultiTask(nnUNetTrainer):  # noqa: N801 - nnU-Net finds trainers by names of this form
    """Trains a `MultiTaskUNet` by the recipe in the plans, or by a preset if they have none.

    nnU-Net's command finds it through `nnUNet_extTrainer`; `nnturbo train` makes it directly. nnU-Net's own prediction
    and final validation work with the model, because `forward` gives only the segmentation.
    """

    preset = "balanced"
    """Recipe of a new training where the plans have none, as when nnU-Net's own command makes the trainer."""

    # nnU-Net sets these later; each is `None` before.
    network: Any
    optimizer: Any
    logger: Any
    dataloader_train: Any
    dataloader_val: Any
    output_folder: Any
    loss: Any

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature
    ) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise EngineError("multi-task models train on one device; run nnU-Net with -num_gpus 1")
        if not nnUNet_preprocessed.is_set():
            raise EngineError("training reads from the folder that the environment variable nnUNet_preprocessed names")
        self._classes_file = Path(str(nnUNet_preprocessed)) / str(plans["dataset_name"]) / LABELS_FILE
        self.subtypes, self._class_names = read_classes(self._classes_file)
        self._recipe_given = RECIPE_KEY in plans
        recipe = Recipe.parse(plans[RECIPE_KEY]) if self._recipe_given else PRESETS[self.preset]
        # nnU-Net's own part begins to write: what cannot be trained is refused before.
        plans = multi_task_plans(plans, configuration, dataset_json, recipe, self._class_names)
        super().__init__(plans, configuration, fold, dataset_json, device)  # type: ignore[arg-type]
        self._follow(recipe)
        self.average: WeightAverage | None = None
        self.history: list[dict[str, float]] = []
        self.whole_cases = WholeCaseValidation(self)
        self.events: Any = None
        self._random_state: dict[str, Any] | None = None
        self._fitted: dict[str, Any] = {}  # to the weights as they are

    def _follow(self, recipe: Recipe) -> None:
        """Take all settings from a recipe, before the network is built."""
        plans = multi_task_plans(
            self.plans_manager.plans, self.configuration_name, self.dataset_json, recipe, self._class_names
        )
        self.plans_manager = PlansManager(plans)
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration_name)
        self.my_init_kwargs["plans"] = plans
        self.recipe = recipe
        self.schedule = Schedule(epochs=recipe.epochs, annealing_epochs=recipe.annealing_epochs)
        self.num_epochs = recipe.epochs
        self.num_iterations_per_epoch = recipe.iterations
        self.num_val_iterations_per_epoch = recipe.validation_iterations
        self.initial_lr, self.weight_decay = recipe.learning_rate, recipe.weight_decay
        self.oversample_foreground_percent = recipe.oversample_foreground

    def initialize(self) -> None:
        """Build network, optimizers and loss; compile the parts whose weights keep their names.

        Raises:
            DatasetError: Where a case has no class, or a class has no training case.
        """
        training, validation = self.do_split()
        if unknown := sorted({str(case) for case in (*training, *validation)} - set(self.subtypes)):
            raise DatasetError(
                f"{self._classes_file} must say the class of every case; {len(unknown)} are missing: "
                f"{', '.join(unknown)[:200]}"
            )
        try:
            weights = class_weights([self.subtypes[str(case)] for case in training], len(set(self.subtypes.values())))
        except ValueError as error:
            raise DatasetError(f"{self._classes_file}: {error}") from error
        if self.recipe.seed >= 0:
            seed_generators(self.recipe.seed)
        super().initialize()
        self.logger.update_config({"recipe": self.recipe.describe()})
        if self.recipe.average_decay > 0:
            self.average = WeightAverage(self.network, self.recipe.average_decay)
        self.class_weights = weights.to(self.device)
        if super()._do_i_compile():
            self.network.encoder.compile()
            self.network.decoder.compile()

    def _do_i_compile(self) -> bool:
        """Do not compile the network as a whole, because the two tasks call different methods."""
        return False

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Give the head its own optimizer; nnU-Net steps the other one, and calls the schedule once an epoch."""
        optimizer, self.head_optimizer = make_optimizers(self.network, self.recipe)
        return optimizer, EpochScheduler(self, optimizer)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:  # type: ignore[override]
        """nnU-Net's augmentation without the transforms that the recipe leaves out."""
        composed: Any = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        kept = [
            transform for transform in composed.transforms if _augmentation_name(transform) not in self.recipe.left_out
        ]
        return ComposeTransforms(kept)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train one batch of both tasks, or of the segmentation alone in the first epochs."""
        data, target, labels = self._to_device(batch)
        with_class = self.head_is_trained()
        joint = self.recipe.class_loss_weight > 0 and self.current_epoch >= (
            self.recipe.segmentation_epochs + self.recipe.detached_epochs
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.head_optimizer.zero_grad(set_to_none=True)
        loss, seg_loss, of_class = self.losses(data, target, labels, with_class=with_class, joint=joint)
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        optimizers = [self.optimizer, *([self.head_optimizer] if with_class else [])]
        step_optimizers(self.network, optimizers, self.grad_scaler, self.recipe)
        self._fitted = {}
        if self.average is not None:
            self.average.step()
        return {"loss": seg_loss.detach().cpu().numpy(), "class_loss": of_class.detach().cpu().numpy()}

    def losses(
        self, data: Tensor, target: list[Tensor] | Tensor, labels: Tensor, *, with_class: bool, joint: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network, and give the loss that is trained on, the segmentation's and the head's."""
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, enabled=on_gpu or self.recipe.cpu_precision == "bf16"):
            if with_class:
                seg_logits, class_logits = self.network.forward_multitask(data, detached=not joint)
            else:
                seg_logits, class_logits = self.network(data), None
        with torch.autocast(self.device.type, enabled=on_gpu):
            seg_loss = self.loss(seg_logits if on_gpu else _in_fp32(seg_logits), target)
        if class_logits is None:
            return seg_loss, seg_loss, torch.zeros((), device=self.device)
        of_class = self._class_loss(class_logits, labels, target)
        return seg_loss + (self.recipe.class_loss_weight if joint else 1.0) * of_class, seg_loss, of_class

    def _to_device(self, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor] | Tensor, Tensor]:
        target = batch["target"]
        labels = torch.tensor([self.subtypes[case] for case in batch["keys"]], device=self.device)
        moved = (
            [part.to(self.device, non_blocking=True) for part in target]
            if isinstance(target, list)
            else target.to(self.device, non_blocking=True)
        )
        return batch["data"].to(self.device, non_blocking=True), moved, labels

    def _class_loss(self, class_logits: Tensor, labels: Tensor, target: list[Tensor] | Tensor) -> Tensor:
        finest = target[0] if isinstance(target, list) else target  # (N, 1, *patch) labels, or (N, regions, *patch)
        focus, foreground = shown_content(finest, self.network.scheme, self.label_manager.ignore_label)
        by_content = content_weights(focus, foreground, self.recipe.pancreas_weight)
        return class_loss(class_logits, labels, self.class_weights, by_content, self.recipe.label_smoothing)

    def head_is_trained(self) -> bool:
        """Whether this epoch trains the head too."""
        return self.current_epoch >= self.recipe.segmentation_epochs

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Begin this epoch's line of the history."""
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        self.history.append(
            {
                "epoch": self.current_epoch,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "train_loss": float(np.mean([output["loss"] for output in train_outputs])),
                "class_loss": float(np.mean([output["class_loss"] for output in train_outputs])),
            }
        )

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Add nnU-Net's validation on patches and, every few epochs, one on whole cases."""
        super().on_validation_epoch_end(val_outputs)
        line = self.history[-1]
        line["val_loss"] = float(self.logger.get_value("val_losses", step=-1))
        line["pseudo_dice"] = float(self.logger.get_value("mean_fg_dice", step=-1))
        every, epoch = self.recipe.validate_every, self.current_epoch
        if self.whole_cases.cases and ((epoch + 1) % every == 0 or epoch + 1 == self.schedule.last_epoch):
            self.whole_cases.validate(line)

    def on_epoch_end(self) -> None:
        """Let nnU-Net log and keep its best checkpoint; then save, and write the history."""
        epoch, folder = self.current_epoch, Path(self.output_folder)
        self.save_every = self.num_epochs  # not by nnU-Net, which would save before it updates its best score
        if self.head_is_trained():
            self.print_to_log_file("class_loss", np.round(self.history[-1]["class_loss"], decimals=4))
        super().on_epoch_end()
        if self.whole_cases.best[1] == epoch and "score" in self.history[-1]:
            self._write_checkpoint(folder / BEST_BY_SCORE, self.current_epoch)
        if self.current_epoch % self.recipe.save_every == 0 and self.current_epoch < self.schedule.last_epoch:
            self._write_checkpoint(folder / LATEST, self.current_epoch)
        write_history(self.history, folder)
        self._log(self.history[-1])

    def _log(self, line: Mapping[str, float]) -> None:
        """Give a line of the history to TensorBoard, and to what nnU-Net logs to besides, such as W&B."""
        epoch = int(line["epoch"])
        for name, value in line.items():
            if name == "epoch":
                continue
            if self.events is not None:
                self.events.add_scalar(name, value, epoch)
            for logger in self.logger.loggers:
                logger.log(name, value, epoch)
        if self.events is not None:
            self.events.flush()

    def on_train_end(self) -> None:
        """Let nnU-Net write the final checkpoint and end its processes."""
        super().on_train_end()
        if self.events is not None:
            self.events.close()

    def on_train_start(self) -> None:
        """Prepare the training; a new one is saved before its first epoch, a resumed one takes its random numbers."""
        if not self.was_initialized:
            self.initialize()
        _ = self.whole_cases.cases  # errors that would come after hours come now
        super().on_train_start()
        if self.current_epoch < self.schedule.last_epoch:
            left = self.schedule.last_epoch - self.current_epoch
            cost = try_batch(self)
            self.print_to_log_file(cost.described(left, self.recipe.iterations, self.recipe.validation_iterations))
        self.events = open_events(Path(self.output_folder), self.current_epoch)
        if self._random_state is not None:
            restore_random_state(self._random_state)
        else:
            self._write_checkpoint(Path(self.output_folder) / LATEST, self.current_epoch)

    def run_training(self) -> None:
        """Run nnU-Net's loop until the schedule ends."""
        self.on_train_start()
        while self.current_epoch < self.schedule.last_epoch:
            self.num_epochs = self.schedule.last_epoch
            self.on_epoch_start()
            self.on_train_epoch_start()
            self.on_train_epoch_end(
                [self.train_step(next(self.dataloader_train)) for _ in range(self.num_iterations_per_epoch)]
            )
            with torch.no_grad(), nullcontext() if self.average is None else self.average.applied():
                self.on_validation_epoch_start()
                self.on_validation_epoch_end(
                    [self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)]
                )
            self.on_epoch_end()
        self.on_train_end()

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint at the end of an epoch, before nnU-Net counts it."""
        self._write_checkpoint(Path(filename), self.current_epoch + 1)

    def _write_checkpoint(self, path: Path, next_epoch: int) -> None:
        """Write a checkpoint completely or not at all."""
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        with written_atomically(path) as temporary:
            torch.save(state_of(self, next_epoch) | self._fitted, temporary)

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with trained weights, before the first epoch.

        Args:
            weights: Parameters by name, at least those of encoder and decoder; others are used if they fit.

        Raises:
            EngineError: Where weights of encoder or decoder are missing.
        """
        self.initialize()
        own = self.network.state_dict()
        fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
        if absent := [name for name in own if not name.startswith("head.") and name not in fitting]:
            raise EngineError(
                f"the weights to begin with must be of the same network, with encoder and decoder; {len(absent)} are "
                f"missing or of another shape, such as {absent[0]}"
            )
        self.network.load_state_dict({**own, **fitting})

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str, *, change_recipe: bool = False) -> None:
        """Continue from a checkpoint, with its recipe.

        Args:
            filename_or_checkpoint: File, or its content.
            change_recipe: Whether the recipe in the plans may differ from the checkpoint's, and replaces it.

        Raises:
            CheckpointError: Where it is damaged, or holds more than weights and plain values.
            EngineError: Where it comes from another kind of training, or has another head, optimizer or recipe.
        """
        checkpoint = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            checkpoint = read_state(Path(checkpoint), self.device)
        state, stored = checkpoint["multi_task"], recipe_of(checkpoint, "the checkpoint")
        if not self.was_initialized:
            if not self._recipe_given:  # nnU-Net's own command cannot name one
                self._follow(stored)
            self.initialize()
        changed = check_resumable(state, stored, self.network.scheme.describe(), self.recipe, change_recipe)
        if changed:
            self.print_to_log_file(f"Going on with another recipe: {changed}")
        restore(self, checkpoint)
        self._random_state = state["random_state"]
        self._fitted = {name: checkpoint[name] for name in FITTED if name in checkpoint}


def _in_fp32(logits: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
    return [part.float() for part in logits] if isinstance(logits, list) else logits.float()


def _augmentation_name(transform: Any) -> str:
    return type(transform.transform if isinstance(transform, RandomTransform) else transform).__name__
