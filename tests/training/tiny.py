"""Phantoms, a recipe and a network so small that a training takes a second."""

from __future__ import annotations

import json
import multiprocessing
import random
import types
import warnings
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS
from nnturbo.training.recipe import Recipe

PHANTOMS = replace(
    SMALL_SETTINGS,
    slice_spacings_mm=((3.0, 1),),
    other_slice_spacings_mm=(3.0, 3.0, 3.0),
    in_plane_mm=(1.9, 2.0, 2.1),
    smallest_shape=(30, 40, 50),
    largest_shape=(40, 60, 80),
    painting_mm=3.0,
)

CONFIGURATION = "3d_fullres"
TIMES = ("epoch_start_timestamps", "epoch_end_timestamps")
TINY = Recipe(
    head_stages=(1, 2),
    head_hidden=8,
    head_queries=2,
    epochs=2,
    iterations=2,
    validation_iterations=1,
    segmentation_epochs=0,
    detached_epochs=1,
    validate_every=1,
    validation_cases=2,
    save_every=1,
)
"""Two epochs: the first with the head apart, the second with both tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDataset:
    """Where the data set lies, as it came and prepared; `plans` and `dataset` are what its json files hold."""

    source: Path
    raw: Path
    preprocessed: Path
    name: str
    plans_name: str
    plans: dict[str, Any]
    dataset: dict[str, Any]
    training_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]

    def arguments(self, results: Path, **changes: Any) -> dict[str, Any]:
        """What `train` needs to train it in a folder."""
        return {
            "dataset_name": self.name,
            "configuration": CONFIGURATION,
            "fold": 0,
            "recipe": TINY,
            "plans_name": self.plans_name,
            "raw": self.raw,
            "preprocessed": self.preprocessed,
            "results": results,
            "device": "cpu",
            **changes,
        }

    def image(self, case: str) -> Path:
        return self.raw / self.name / "imagesTr" / f"{case}_0000.nii.gz"

    def labels(self, case: str) -> Path:
        return self.raw / self.name / "labelsTr" / f"{case}.nii.gz"


def seed_everything(seed: int) -> None:
    """Set every source of random numbers that a training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def import_nnunet() -> types.ModuleType:
    """Import nnU-Net's trainer; what it depends on warns about itself on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nnturbo.training import trainer
    return trainer


def make_trainer(tiny: TinyDataset, recipe: Recipe, *, fold: int | str = 0, **changes: Any) -> Any:
    """Make a trainer as `train` does, inside an environment; `changes` replace entries of plans."""
    plans = json.loads(json.dumps(tiny.plans)) | changes
    plans |= {"nnturbo_recipe": recipe.describe(), "continue_training": False}
    return import_nnunet().nnUNetTrainerMultiTask(plans, CONFIGURATION, fold, tiny.dataset, torch.device("cpu"))


def work_in_threads(patch: pytest.MonkeyPatch) -> None:
    """Give nnU-Net threads in place of processes, which would each import it for seconds."""
    patch.setattr(multiprocessing, "get_context", lambda method: types.SimpleNamespace(Pool=ThreadPool))


def shrink(configuration: dict[str, Any]) -> None:
    """Plan a network of some thousand parameters."""
    configuration["patch_size"] = [16, 32, 32]
    configuration["batch_size"] = 2
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": 4,
        "features_per_stage": [4, 8, 8, 8],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1, 1],
    }


def assert_same(got: Any, wanted: Any, where: str = "checkpoint") -> None:
    """Compare nested values bit by bit, but for nnU-Net's times of day."""
    assert type(got) is type(wanted), where
    if isinstance(wanted, dict):
        assert list(got) == list(wanted), where
        for key in wanted:
            if key not in TIMES:
                assert_same(got[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted), where
        for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype, where
        assert torch.equal(got, wanted), where
    else:
        assert got == wanted or (got != got and wanted != wanted), where
