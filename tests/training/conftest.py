"""One tiny data set, prepared and planned as `nnturbo prepare` does it, and trainings on it."""

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
from nnturbo.training.data.planning import nnunet_environment, plan_and_preprocess
from nnturbo.training.data.prepare import prepare_dataset
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset
from nnturbo.training.recipe import Recipe
from nnturbo.training.train import train

from tests.training.task_files import CASES, image_of, labels, mask_of, scan, write_image

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


def make_trainer(tiny: TinyDataset, recipe: Recipe, **changes: Any) -> Any:
    """Make a trainer as `train` does, inside an environment; `changes` replace entries of plans."""
    plans = json.loads(json.dumps(tiny.plans)) | changes
    plans |= {"nnturbo_recipe": recipe.describe(), "continue_training": False}
    return import_nnunet().nnUNetTrainerMultiTask(plans, CONFIGURATION, 0, tiny.dataset, torch.device("cpu"))


def work_in_threads(patch: pytest.MonkeyPatch) -> None:
    """Give nnU-Net threads in place of processes, which would each import it for seconds."""
    patch.setattr(multiprocessing, "get_context", lambda method: types.SimpleNamespace(Pool=ThreadPool))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Seven training and three validation phantoms of 40 x 50 x 60 voxels, and plans for a network of four stages."""
    pytest.importorskip("nnunetv2", reason="training needs nnU-Net")
    import_nnunet()
    folder = tmp_path_factory.mktemp("tiny")
    counts = {"train": 7, "validation": 3, "test": 2}
    write_dataset(folder / "source", counts=counts, seed=3, settings=PHANTOMS, answers=True)
    prepared = prepare_dataset(folder / "source", folder / "raw", dataset_id=7, dataset_name="Tiny")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work_in_threads(patch)
        from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

        extractor = fingerprint_extractor.DatasetFingerprintExtractor
        # A thousand voxels of a case are enough.
        collect = extractor.collect_foreground_intensities
        few = staticmethod(lambda labels, images, num_samples: collect(labels, images, num_samples=1000))
        patch.setattr(extractor, "collect_foreground_intensities", few)
        plans_file = plan_and_preprocess(prepared.folder, folder / "preprocessed", planner="compact", processes=1)
    plans = json.loads(plans_file.read_text())
    shrink(plans["configurations"][CONFIGURATION])
    plans_file.write_text(json.dumps(plans))
    return TinyDataset(
        source=folder / "source",
        raw=folder / "raw",
        preprocessed=folder / "preprocessed",
        name=prepared.folder.name,
        plans_name=plans_file.stem,
        plans=plans,
        dataset=json.loads((plans_file.parent / "dataset.json").read_text()),
        training_cases=prepared.names("train"),
        validation_cases=prepared.names("validation"),
    )


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


@pytest.fixture
def environment(tiny, tmp_path, monkeypatch):
    """nnU-Net's folders, no processes for augmentation; gives the results folder."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with nnunet_environment(raw=tiny.raw, preprocessed=tiny.preprocessed, results=tmp_path / "results"):
        yield tmp_path / "results"


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """Model folder of a training of two epochs that nothing interrupted."""
    results = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        seed_everything(0)
        return train(**tiny.arguments(results))


@pytest.fixture
def source(tmp_path):
    """A data set of eight small files in the task's folders, and a test scan."""
    folder = tmp_path / "source"
    for seed, name in enumerate(CASES):
        write_image(image_of(folder, name), scan(seed))
        write_image(mask_of(folder, name), labels())
    write_image(folder / "test" / "quiz_005_0000.nii.gz", scan(99))
    return folder


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw"


@pytest.fixture(scope="session")
def nnunet():
    """The module that extracts fingerprints; nnU-Net's imports warn about what is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor")
        pytest.importorskip("nnunetv2.preprocessing.preprocessors.default_preprocessor")
    return module


@pytest.fixture
def in_threads(nnunet, monkeypatch):
    """Let nnU-Net work in threads, which start at once, and sample fewer than a hundred million voxels."""
    work_in_threads(monkeypatch)
    collect = nnunet.DatasetFingerprintExtractor.collect_foreground_intensities
    few = staticmethod(lambda segmentation, images, num_samples: collect(segmentation, images, num_samples=500))
    monkeypatch.setattr(nnunet.DatasetFingerprintExtractor, "collect_foreground_intensities", few)
