"""nnU-Net's trainer with a second task: a class per case, from a head on the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from ..engine.errors import EngineError
from ..engine.files import written_atomically
from ..engine.model.checkpoint import read_checkpoint
from .class_loss import class_loss, class_weights, content_weights, shown_content
from .data.cases import LABELS_FILE
from .data.multi_task_plans import RECIPE_KEY, multi_task_plans, read_classes
from .data.tables import DatasetError
from .history import write_history
from .random_state import random_state, restore_random_state
from .recipe import PRESETS, EpochScheduler, Recipe, Schedule
from .whole_cases import LabelledCase, find_labelled_cases, network_engine, validate


class nnUNetTrainerMultiTask(nnUNetTrainer):  # noqa: N801 - nnU-Net finds trainers by names of this form
    """Trains a `MultiTaskUNet` by the recipe in the plans, or the preset "balanced" if they have none.

    nnU-Net's command finds it through `nnUNet_extTrainer`; `nnturbo train` makes it directly. nnU-Net's own prediction
    and final validation work with the model, because `forward` gives only the segmentation.
    """

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
        recipe = Recipe.parse(plans[RECIPE_KEY]) if RECIPE_KEY in plans else PRESETS["balanced"]
        if not nnUNet_preprocessed.is_set():
            raise EngineError("training reads from the folder that the environment variable nnUNet_preprocessed names")
        self._classes_file = Path(str(nnUNet_preprocessed)) / str(plans["dataset_name"]) / LABELS_FILE
        self.subtypes, class_names = read_classes(self._classes_file)
        plans = multi_task_plans(plans, configuration, dataset_json, recipe, class_names)
        super().__init__(plans, configuration, fold, dataset_json, device)  # type: ignore[arg-type]
        self.recipe = recipe
        self.schedule = Schedule(epochs=recipe.epochs, annealing_epochs=recipe.annealing_epochs)
        self.num_epochs = recipe.epochs
        self.num_iterations_per_epoch = recipe.iterations
        self.num_val_iterations_per_epoch = recipe.validation_iterations
        self.initial_lr, self.weight_decay = recipe.learning_rate, recipe.weight_decay
        self.oversample_foreground_percent = recipe.oversample_foreground
        self.history: list[dict[str, float]] = []
        self._best = (-np.inf, 0)  # score and epoch
        self._random_state: dict[str, Any] | None = None

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
        super().initialize()
        self.class_weights = weights.to(self.device)
        if super()._do_i_compile():
            self.network.encoder.compile()
            self.network.decoder.compile()

    def _do_i_compile(self) -> bool:
        """Do not compile the network as a whole, because the two tasks call different methods."""
        return False

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Give the head its own optimizer; nnU-Net steps the other one, and calls the schedule once an epoch."""
        recipe, head = self.recipe, list(self.network.head.parameters())
        # Lists, because a checkpoint identifies parameters by their position.
        of_head = set(map(id, head))
        backbone = [parameter for parameter in self.network.parameters() if id(parameter) not in of_head]
        if recipe.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                backbone, recipe.learning_rate, weight_decay=recipe.weight_decay, momentum=0.99, nesterov=True
            )
        else:
            optimizer = torch.optim.AdamW(backbone, recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.head_optimizer = torch.optim.AdamW(head, recipe.head_learning_rate, weight_decay=recipe.head_weight_decay)
        return optimizer, EpochScheduler(self, optimizer)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:  # type: ignore[override]
        """nnU-Net's augmentation without the transforms that the recipe leaves out."""
        composed: Any = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        kept = [
            transform for transform in composed.transforms if _augmentation_name(transform) not in self.recipe.left_out
        ]
        return ComposeTransforms(kept)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train one step of both tasks, or of the segmentation alone in the first epochs."""
        data, target, labels = self._to_device(batch)
        with_class = self.current_epoch >= self.recipe.segmentation_epochs
        joint = self.recipe.class_loss_weight > 0 and self.current_epoch >= (
            self.recipe.segmentation_epochs + self.recipe.detached_epochs
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.head_optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            if with_class:
                seg_logits, class_logits = self.network.forward_multitask(data, detached=not joint)
            else:
                seg_logits, class_logits = self.network(data), None
            seg_loss = self.loss(seg_logits, target)
        loss, of_class = seg_loss, torch.zeros((), device=self.device)
        if class_logits is not None:
            of_class = self._class_loss(class_logits, labels, target)
            loss = seg_loss + (self.recipe.class_loss_weight if joint else 1.0) * of_class
        self._step(loss, with_class)
        return {"loss": seg_loss.detach().cpu().numpy(), "class_loss": of_class.detach().cpu().numpy()}

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

    def _step(self, loss: Tensor, with_class: bool) -> None:
        """Run backward, clip the gradients of each part, and step both optimizers."""
        head = list(self.network.head.parameters())
        backbone = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        optimizers = [self.optimizer, *([self.head_optimizer] if with_class else [])]
        if self.grad_scaler is None:
            loss.backward()
        else:
            self.grad_scaler.scale(loss).backward()
            for optimizer in optimizers:
                self.grad_scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(backbone, self.recipe.gradient_clip)
        nn.utils.clip_grad_norm_(head, self.recipe.head_gradient_clip)
        for optimizer in optimizers:
            if self.grad_scaler is None:
                optimizer.step()
            else:
                self.grad_scaler.step(optimizer)
        if self.grad_scaler is not None:
            self.grad_scaler.update()

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
        if every and ((epoch + 1) % every == 0 or epoch + 1 == self.schedule.last_epoch):
            self._validate_whole_cases(line)

    def _validate_whole_cases(self, line: dict[str, float]) -> None:
        cases = self._validation_cases()
        self.set_deep_supervision_enabled(False)
        engine = network_engine(
            self.network, self.plans_manager.plans, self.dataset_json, self.configuration_name, self.device
        )
        result = validate(engine, cases)
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        line |= {"foreground_dsc": result.foreground_dsc, "macro_f1": result.macro_f1, "score": result.score}
        line |= {f"dsc_{label}": value for label, value in result.label_dsc.items()}
        self.print_to_log_file(
            f"Whole cases: foreground DSC {result.foreground_dsc:.4f}, by label "
            f"{', '.join(f'{label}: {value:.4f}' for label, value in result.label_dsc.items())}, "
            f"macro-F1 {result.macro_f1:.4f}"
        )
        if result.score > self._best[0]:
            self._best = (result.score, self.current_epoch)
        warming_up = self.recipe.segmentation_epochs + self.recipe.detached_epochs
        waited = self.current_epoch - max(self._best[1], warming_up)
        ended = self.current_epoch + 1 == self.schedule.last_epoch
        if self.schedule.anneal_from is None and waited >= self.recipe.patience and not ended:
            self.schedule = replace(self.schedule, anneal_from=self.current_epoch + 1)
            self.print_to_log_file(
                f"No better score for {waited} epochs: the learning rate goes to zero, the last epoch is "
                f"{self.schedule.last_epoch - 1}"
            )

    def _validation_cases(self) -> list[LabelledCase]:
        """Cases of the validation split, as many as the recipe asks for, with their raw scans.

        Raises:
            EngineError: Where there are no such cases, or their scans are not in nnUNet_raw.
        """
        if self.is_cascaded:
            raise EngineError(
                f"{self.configuration_name} takes another stage's labels, and is not validated on whole cases: set the "
                f"recipe's validate_every to 0"
            )
        cases = sorted(self.do_split()[1])
        if 0 < self.recipe.validation_cases < len(cases):
            cases = [cases[i * len(cases) // self.recipe.validation_cases] for i in range(self.recipe.validation_cases)]
        if not nnUNet_raw.is_set():
            raise EngineError("validation on whole cases reads scans from nnUNet_raw, set it; or set validate_every 0")
        folder = Path(str(nnUNet_raw)) / self.plans_manager.dataset_name
        return find_labelled_cases(folder, cases, self.dataset_json, self.subtypes)

    def on_epoch_end(self) -> None:
        """Let nnU-Net log and keep its best checkpoint; then save, and write the history."""
        self.save_every = self.num_epochs  # not by nnU-Net, which would save before it updates its best score
        super().on_epoch_end()
        if self.current_epoch % self.recipe.save_every == 0 and self.current_epoch < self.schedule.last_epoch:
            self._write_checkpoint(Path(self.output_folder) / "checkpoint_latest.pth", self.current_epoch)
        write_history(self.history, Path(self.output_folder))

    def on_train_start(self) -> None:
        """Prepare the training; after a resume, restore the random number generators."""
        if not self.was_initialized:
            self.initialize()
        if self.recipe.validate_every:
            self._validation_cases()  # errors that would come after hours come now
        super().on_train_start()
        if self._random_state is not None:
            restore_random_state(self._random_state)

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
            with torch.no_grad():
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
        """Write all that a resumed training needs, as plain values and tensors, completely or not at all."""
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoint = {
            "network_weights": self.network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": next_epoch,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "multi_task": {
                "head": self.network.scheme.describe(),
                "recipe": self.recipe.describe(),
                "head_optimizer_state": self.head_optimizer.state_dict(),
                "anneal_from": self.schedule.anneal_from,
                "best": self._best,
                "history": self.history,
                "random_state": random_state(),
            },
        }
        with written_atomically(path) as temporary:
            torch.save(checkpoint, temporary)

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

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: Where it is damaged, or holds more than weights and plain values.
            EngineError: Where it comes from another kind of training, or has another head or optimizer.
        """
        checkpoint = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            read_checkpoint(Path(checkpoint))  # refuses content that could run code
            checkpoint = torch.load(checkpoint, map_location=self.device, weights_only=False)
        state = checkpoint.get("multi_task")
        if state is None:
            raise EngineError(
                f"a multi-task training goes on from a checkpoint of its own, this one is of "
                f"{checkpoint.get('trainer_name', 'an unknown trainer')}: start again in another folder"
            )
        if not self.was_initialized:
            self.initialize()
        self._check_resumable(state)
        # As in nnU-Net's own method, which takes no dictionary in 2.8.
        self.network.load_state_dict(checkpoint["network_weights"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        self.head_optimizer.load_state_dict(state["head_optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        self.current_epoch, self._best_ema = checkpoint["current_epoch"], checkpoint["_best_ema"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        for optimizer, decay in (
            (self.optimizer, self.recipe.weight_decay),
            (self.head_optimizer, self.recipe.head_weight_decay),
        ):
            for group in optimizer.param_groups:
                group["weight_decay"] = decay  # from the recipe, like all settings
        self.schedule = replace(self.schedule, anneal_from=state["anneal_from"])
        self._best, self.history = tuple(state["best"]), state["history"]
        self._random_state = state["random_state"]

    def _check_resumable(self, state: dict[str, Any]) -> None:
        """Compare head and recipe with those of a checkpoint; unusable ones are errors, others are logged."""
        head, had = self.network.scheme.describe(), state["head"]
        if changed := [f"{key} {had.get(key)} is now {value}" for key, value in head.items() if had.get(key) != value]:
            raise EngineError(f"the checkpoint is of another head: {'; '.join(changed)}; resume with the same recipe")
        before, now = state["recipe"], self.recipe.describe()
        changed = [f"{key} {before.get(key)} is now {value}" for key, value in now.items() if before.get(key) != value]
        if before["optimizer"] != now["optimizer"]:
            raise EngineError(
                f"the checkpoint is of optimizer {before['optimizer']}, the recipe asks for {now['optimizer']}; resume "
                f"with the same recipe"
            )
        if changed:
            self.print_to_log_file(f"Going on with another recipe: {'; '.join(changed)}")


def _augmentation_name(transform: Any) -> str:
    return type(transform.transform if isinstance(transform, RandomTransform) else transform).__name__
