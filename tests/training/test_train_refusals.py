"""What cannot be trained is refused at once, each with one clear line."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from nnturbo.engine import BackendUnavailable, EngineError
from nnturbo.engine.errors import ModelError
from nnturbo.training.data.tables import DatasetError
from nnturbo.training.train import train

from tests.training.tiny import CONFIGURATION, TINY, import_nnunet, make_trainer


@pytest.fixture
def copied(tiny, tmp_path, monkeypatch):
    """The preprocessed data set without its arrays, to be spoilt; the folder, and what `train` needs."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    folder = tmp_path / "preprocessed" / tiny.name
    folder.mkdir(parents=True)
    for path in (tiny.preprocessed / tiny.name).iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
        else:
            (folder / path.name).symlink_to(path)
    return folder, tiny.arguments(tmp_path / "results", preprocessed=tmp_path / "preprocessed")


def refused(error, message, arguments):
    with pytest.raises(error, match=message) as caught:
        train(**arguments)
    assert "\n" not in str(caught.value)
    assert not list(arguments["results"].rglob("*.pth"))


class TestClasses:
    def test_no_file(self, copied):
        folder, arguments = copied
        (folder / "classification_labels.csv").unlink()
        refused(DatasetError, r"classification_labels\.csv must say the class of every case, it is missing", arguments)

    @pytest.mark.parametrize("part", ["training_cases", "validation_cases"])
    def test_a_case_without_a_class(self, tiny, copied, part):
        folder, arguments = copied
        case = getattr(tiny, part)[0]
        path = folder / "classification_labels.csv"
        lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{case},")]
        path.write_text("\n".join(lines))
        message = rf"classification_labels\.csv must say the class of every case; 1 are missing: {case}$"
        refused(DatasetError, message, arguments)

    def test_a_class_without_training_cases(self, tiny, copied):
        folder, arguments = copied
        path = folder / "classification_labels.csv"
        case = tiny.validation_cases[0]
        lines = [f"{case},3,validation" if line.startswith(f"{case},") else line for line in path.read_text().split()]
        path.write_text("\n".join(lines))
        counts = [sum(f"_{subtype}_" in case for case in tiny.training_cases) for subtype in range(3)]
        message = f"{path}: every class must have a training case, counts by class are {[*counts, 0]}"
        refused(DatasetError, re.escape(message), arguments)

    def test_one_class(self, tiny, copied):
        folder, arguments = copied
        rows = [f"{case},1" for case in (*tiny.training_cases, *tiny.validation_cases)]
        (folder / "classification_labels.csv").write_text("\n".join(["case,subtype", *rows]))
        refused(ModelError, "class_names must be 2 to 1024 different texts", arguments)


class TestArguments:
    def test_unknown_focus(self, copied):
        arguments = copied[1] | {"recipe": replace(TINY, focus_labels=("cyst",))}
        refused(ValueError, "focus_labels must be among the labels pancreas, lesion, got cyst", arguments)

    def test_a_stage_that_the_encoder_does_not_have(self, copied):
        arguments = copied[1] | {"recipe": replace(TINY, head_stages=(1, 4))}
        refused(ModelError, r"the classification head reads stages \[1, 4\], the encoder has 4, from 0", arguments)

    def test_no_plans(self, copied):
        arguments = copied[1] | {"plans_name": "nnUNetOther"}
        refused(DatasetError, r"nnUNetOther\.json is missing: run nnturbo prepare first, or check the names", arguments)

    def test_a_configuration_that_was_not_preprocessed(self, copied):
        message = r"nnUNetCompactPlans_2d is missing: run nnturbo prepare with --configurations 2d$"
        refused(DatasetError, message, copied[1] | {"configuration": "2d"})

    @pytest.mark.parametrize("fold", [0, "all"])
    def test_a_preprocessing_that_was_stopped(self, tiny, copied, fold):
        folder, arguments = copied
        arrays = folder / tiny.plans["configurations"][CONFIGURATION]["data_identifier"]
        whole = list(arrays.resolve().iterdir())
        arrays.unlink()
        arrays.mkdir()
        case = tiny.training_cases[2]
        for path in whole:
            if path.name != f"{case}.pkl":
                (arrays / path.name).symlink_to(path)
        message = rf"must hold every case, 1 are missing: {case}; preprocessing did not end, run nnturbo prepare"
        refused(DatasetError, message, arguments | {"fold": fold})

    def test_a_configuration_that_only_inherits(self, tiny, copied):
        folder, arguments = copied
        path = folder / f"{tiny.plans_name}.json"
        plans = json.loads(path.read_text())
        plans["configurations"]["3d_large"] = {"inherits_from": "3d_fullres", "batch_size": 4}
        path.write_text(json.dumps(plans))
        arguments = arguments | {"configuration": "3d_large"}
        refused(ValueError, "configuration '3d_large' must have its own 'architecture' in the plans", arguments)

    @pytest.mark.parametrize("fold", [1, "2", -1, "one"])
    def test_a_fold_that_nnunet_would_draw_at_random(self, copied, fold):
        message = rf"fold must be 'all' or below 1, the number of splits in .*splits_final\.json, got {fold!r}"
        refused(ValueError, message, copied[1] | {"fold": fold})

    def test_no_splits(self, copied):
        folder, arguments = copied
        (folder / "splits_final.json").unlink()
        refused(DatasetError, r"splits_final\.json is missing: run nnturbo prepare first, or train fold all", arguments)

    def test_devices(self, copied, monkeypatch):
        refused(ValueError, "device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'", copied[1] | {"device": "tpu"})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        refused(BackendUnavailable, "device cuda is not there", copied[1] | {"device": "cuda"})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        message = "device must be auto, cpu, cuda or mps, got 'cuda:1'; choose by CUDA_VISIBLE_DEVICES"
        refused(ValueError, message, copied[1] | {"device": "cuda:1"})

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_a_gpu_without_a_number_is_none_of_them(self, copied, monkeypatch, device):
        def reached(*of):
            raise EngineError(f"the training would begin on {of[-1]}")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr("nnturbo.training.trainer.nnUNetTrainerMultiTask", reached)
        refused(EngineError, "the training would begin on cuda:0", copied[1] | {"device": device})


class TestScans:
    """Missing scans are found before the first epoch, not at its end."""

    def test_no_raw_scans(self, copied, tmp_path):
        message = r"imagesTr/quiz_0_008_0000\.nii\.gz is missing: whole cases are read from the raw scans and labels$"
        refused(DatasetError, message, copied[1] | {"raw": tmp_path / "nowhere"})

    def test_no_validation_cases(self, tiny, copied):
        folder, arguments = copied
        (folder / "splits_final.json").write_text(json.dumps([{"train": tiny.training_cases, "val": []}]))
        refused(DatasetError, "the split must have cases, it has none: prepare the data set again", arguments)

    def test_without_validation_they_are_not_needed(self, tiny, environment, monkeypatch):
        with monkeypatch.context() as patch:
            patch.delenv("nnUNet_raw")
            trainer = make_trainer(tiny, replace(TINY, validate_every=0))
            trainer.on_train_start()
            assert trainer.dataloader_train is not None
            trainer = make_trainer(tiny, TINY)
            with pytest.raises(EngineError, match="validation on whole cases reads scans from nnUNet_raw, set it; or"):
                trainer.on_train_start()

    def test_a_cascade(self, tiny, environment):
        trainer = make_trainer(tiny, TINY)
        trainer.is_cascaded = True
        with pytest.raises(EngineError, match="3d_fullres takes another stage's labels, and is not validated on whole"):
            trainer.on_train_start()


def test_no_preprocessed_folder_in_the_environment(tiny, environment, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("nnUNet_preprocessed")
        with pytest.raises(EngineError, match="the environment variable nnUNet_preprocessed names"):
            make_trainer(tiny, TINY)


def test_several_processes(tiny, environment, monkeypatch):
    monkeypatch.setattr(import_nnunet().torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(EngineError, match="multi-task models train on one device; run nnU-Net with -num_gpus 1"):
        make_trainer(tiny, TINY)


def test_without_nnunet(copied, monkeypatch):
    monkeypatch.delitem(sys.modules, "nnturbo.training.trainer")
    for name in [name for name in sys.modules if name.partition(".")[0] == "nnunetv2"]:
        monkeypatch.setitem(sys.modules, name, None)
    message = r"^training needs nnU-Net \(import of nnunetv2\S* halted.*\): pip install 'nnturbo\[training\]'$"
    refused(EngineError, message, copied[1])
