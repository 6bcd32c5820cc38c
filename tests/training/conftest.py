"""One tiny data set, prepared and planned as `nnturbo prepare` does it, and trainings on it."""

from __future__ import annotations

import json
import warnings

import pytest
from nnturbo.training.data.planning import nnunet_environment, plan_and_preprocess
from nnturbo.training.data.prepare import prepare_dataset
from nnturbo.training.phantoms.phantom import write_dataset
from nnturbo.training.train import train

from tests.training.task_files import CASES, image_of, labels, mask_of, scan, write_image
from tests.training.tiny import (
    CONFIGURATION,
    PHANTOMS,
    TinyDataset,
    import_nnunet,
    seed_everything,
    shrink,
    work_in_threads,
)


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


@pytest.fixture
def environment(tiny, tmp_path, monkeypatch):
    """nnU-Net's folders, no processes for augmentation; gives the results folder."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with nnunet_environment(raw=tiny.raw, preprocessed=tiny.preprocessed, results=tmp_path / "results"):
        yield tmp_path / "results"


@pytest.fixture
def without_curves(monkeypatch):
    """Draw no curves, which take most of the time of a tiny training."""
    import_nnunet()
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.MetaLogger.plot_progress_png", lambda *_: None)
    monkeypatch.setattr("nnturbo.training.history.draw_curves", lambda *_: None)


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
