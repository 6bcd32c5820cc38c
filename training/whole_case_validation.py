"""The validation on whole cases inside a training: its cases, its best epoch, and when training stops."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.helpers import empty_cache

from ..engine.errors import EngineError
from .whole_cases import LabelledCase, find_labelled_cases, network_engine, validate


class WholeCaseValidation:
    """Validates a training on whole cases, and lets the learning rate anneal where no score gets better.

    Args:
        trainer: The `nnUNetTrainerMultiTask`.

    Attributes:
        best: The best score so far, and its epoch. Epochs in which the head is not trained yet have no score.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.best: tuple[float, int] = (-np.inf, 0)

    @cached_property
    def cases(self) -> list[LabelledCase]:
        """Cases of the validation split with their raw scans, as many as the recipe asks for; none for fold all.

        Raises:
            EngineError: Where there are no such cases, or their scans are not in nnUNet_raw.
        """
        trainer, recipe = self._trainer, self._trainer.recipe
        if recipe.validate_every == 0:
            return []
        if trainer.fold == "all":
            trainer.print_to_log_file(
                f"Fold all trains on every case: none is left to validate on, all {recipe.epochs} epochs are trained"
            )
            return []
        if trainer.is_cascaded:
            raise EngineError(
                f"{trainer.configuration_name} takes another stage's labels, and is not validated on whole cases: set "
                f"the recipe's validate_every to 0"
            )
        names = sorted(trainer.do_split()[1])
        if 0 < recipe.validation_cases < len(names):
            names = [names[i * len(names) // recipe.validation_cases] for i in range(recipe.validation_cases)]
        if not nnUNet_raw.is_set():
            raise EngineError("validation on whole cases reads scans from nnUNet_raw, set it; or set validate_every 0")
        folder = Path(str(nnUNet_raw)) / trainer.plans_manager.dataset_name
        return find_labelled_cases(folder, names, trainer.dataset_json, trainer.subtypes)

    def validate(self, line: dict[str, float]) -> None:
        """Predict the cases, add the results to a line of the history, and decide whether to go on."""
        trainer, focus = self._trainer, self._trainer.recipe.focus_labels
        trainer.set_deep_supervision_enabled(False)
        engine = network_engine(
            trainer.network,
            trainer.plans_manager.plans,
            trainer.dataset_json,
            trainer.configuration_name,
            trainer.device,
        )
        result = validate(engine, self.cases, focus)
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        del engine
        gc.collect()  # an engine refers to itself, and would keep memory of the device
        empty_cache(trainer.device)
        line |= {"foreground_dsc": result.foreground_dsc, "focus_dsc": result.focus_dsc}
        line |= {f"dsc_{label}": value for label, value in result.label_dsc.items()}
        said = [f"foreground DSC {result.foreground_dsc:.4f}", f"{' and '.join(focus)} DSC {result.focus_dsc:.4f}"]
        said.append(f"by label {', '.join(f'{label}: {value:.4f}' for label, value in result.label_dsc.items())}")
        if trainer.head_is_trained():
            line |= {"macro_f1": result.macro_f1, "score": result.score}
            said.append(f"macro-F1 {result.macro_f1:.4f}, score {result.score:.4f}")
            if result.score > self.best[0]:
                self.best = (result.score, trainer.current_epoch)
        trainer.print_to_log_file(f"Whole cases: {', '.join(said)}")
        self._stop_without_progress()

    def _stop_without_progress(self) -> None:
        trainer, recipe = self._trainer, self._trainer.recipe
        warming_up = recipe.segmentation_epochs + recipe.detached_epochs
        waited = trainer.current_epoch - max(self.best[1], warming_up)
        ended = trainer.current_epoch + 1 == trainer.schedule.last_epoch
        if trainer.schedule.anneal_from is None and waited >= recipe.patience and not ended:
            trainer.schedule = replace(trainer.schedule, anneal_from=trainer.current_epoch + 1)
            trainer.print_to_log_file(
                f"No better score for {waited} epochs: the learning rate goes to zero, the last epoch is "
                f"{trainer.schedule.last_epoch - 1}"
            )
