"""nnU-Net's planning and preprocessing, which validation cases stay out of."""

import builtins
import json
import os

import numpy as np
import pytest
from nnturbo.engine.errors import EngineError
from nnturbo.training.data import planning
from nnturbo.training.data.planning import plan_and_preprocess
from nnturbo.training.data.tables import DatasetError

from tests.training.task_files import CASES, image_of, labels, mask_of, prepare, scan, write_image


@pytest.fixture
def bright_validation(tmp_path, raw):
    """A raw data set whose validation cases are brighter, larger and of other spacing than the training cases."""
    source = tmp_path / "source"
    for seed, (name, split) in enumerate(CASES.items()):
        is_train = split == "train"
        shape, spacing = ((20, 24, 28), (1, 1, 2)) if is_train else ((24, 32, 36), (0.5, 0.5, 5))
        write_image(image_of(source, name), scan(seed, shape) + np.int16(0 if is_train else 1000), spacing=spacing)
        write_image(mask_of(source, name), labels(shape), spacing=spacing)
    return prepare(source, raw)


class TestPlanning:
    @pytest.mark.parametrize(
        ("planner", "plans"),
        [
            ("resenc", "nnUNetResEncUNetMPlans.json"),
            pytest.param("plain", "nnUNetPlans.json", marks=pytest.mark.thorough),
        ],
    )
    def test_validation_stays_out_of_the_plans(
        self, bright_validation, tmp_path, in_threads, monkeypatch, planner, plans
    ):
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            monkeypatch.delenv(name, raising=False)
        plans_file = plan_and_preprocess(bright_validation.folder, tmp_path / "pre", planner=planner, processes=1)
        folder = tmp_path / "pre" / "Dataset007_Pancreas"
        assert plans_file == folder / plans
        fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
        assert fingerprint["spacings"] == [[2.0, 1.0, 1.0]] * 2
        assert fingerprint["shapes_after_crop"] == [[20, 24, 28]] * 2
        assert fingerprint["foreground_intensity_properties_per_channel"]["0"]["max"] < 200
        content = json.loads(plans_file.read_text())
        assert content["foreground_intensity_properties_per_channel"]["0"]["max"] < 200
        assert content["configurations"]["3d_fullres"]["spacing"] == [2.0, 1.0, 1.0]
        preprocessed = folder / content["configurations"]["3d_fullres"]["data_identifier"]
        assert {path.stem for path in preprocessed.glob("*.pkl")} == set(CASES)
        assert {path.name for path in (folder / "gt_segmentations").iterdir()} == {f"{name}.nii.gz" for name in CASES}
        for name in ("splits_final.json", "classification_labels.csv", "dataset.json"):
            assert (folder / name).read_text() == (bright_validation.folder / name).read_text()
        assert "nnUNet_raw" not in os.environ

    def test_refuses_an_unknown_configuration_and_restores_the_environment(
        self, bright_validation, tmp_path, in_threads, monkeypatch
    ):
        monkeypatch.setenv("nnUNet_raw", "before")
        with pytest.raises(ValueError, match=r"configurations must be among .*3d_fullres.*, got 4d"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre", configurations=["4d"], planner="plain")
        assert os.getenv("nnUNet_raw") == "before"  # noqa: SIM112 (nnU-Net's own spelling)

    def test_refuses_what_was_made_with_another_split(self, bright_validation, tmp_path):
        present = tmp_path / "pre" / "Dataset007_Pancreas" / "splits_final.json"
        present.parent.mkdir(parents=True)
        present.write_text(json.dumps([{"train": list(CASES), "val": []}]))
        with pytest.raises(DatasetError, match=r"splits_final\.json holds other splits than .*: remove"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    @pytest.mark.parametrize("content", ["", "{}", "[]", '[{"train": []}]', "[1]"])
    def test_refuses_a_damaged_split(self, bright_validation, tmp_path, content):
        (bright_validation.folder / "splits_final.json").write_text(content)
        with pytest.raises(DatasetError, match=r"splits_final\.json must be a list of splits with train and val"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    def test_says_when_nnunet_fails(self, bright_validation, tmp_path, monkeypatch):
        def fail(*_):
            raise RuntimeError("Some background worker is 6 feet under")

        monkeypatch.setattr(planning, "_plan", fail)
        with pytest.raises(EngineError, match=r"nnU-Net failed on .*Dataset007_Pancreas: .*take fewer processes"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    @pytest.mark.parametrize("name", ["dataset.json", "splits_final.json", "classification_labels.csv"])
    def test_refuses_another_folder(self, bright_validation, tmp_path, name):
        (bright_validation.folder / name).unlink()
        with pytest.raises(DatasetError, match=f"{name} is missing: make the folder with nnturbo prepare"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    def test_refuses_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="planner must be one of resenc, .*, got 'best'"):
            plan_and_preprocess(tmp_path, tmp_path, planner="best")
        with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
            plan_and_preprocess(tmp_path, tmp_path, processes=0)

    def test_says_how_to_install_nnunet(self, bright_validation, tmp_path, monkeypatch):
        importing = builtins.__import__

        def without_nnunet(name, *arguments, **more):
            if name.startswith("nnunetv2"):
                raise ImportError(f"No module named {name}")
            return importing(name, *arguments, **more)

        monkeypatch.setattr(builtins, "__import__", without_nnunet)
        with pytest.raises(EngineError, match=r"needs nnU-Net.*pip install 'nnturbo\[training\]'"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    @pytest.mark.slow  # nnU-Net starts processes that each import torch, and samples 33 million voxels a case
    def test_runs_in_processes(self, bright_validation, tmp_path, nnunet):
        assert plan_and_preprocess(bright_validation.folder, tmp_path / "pre", processes=1).is_file()
