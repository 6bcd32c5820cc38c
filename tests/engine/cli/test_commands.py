import contextlib
import json
import re
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import Engine, Ensemble, read_volume
from nnturbo.engine.cli import build as build_command
from nnturbo.engine.cli import main
from nnturbo.engine.cli.main import _parser

from tests.engine.factory import (
    dataset_json,
    multi_task,
    plans_2d,
    plans_json,
    pooled_classifier,
    write_model,
    write_scan,
    write_scans,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    return write_model(results / "Dataset900_Test" / "nnUNetTrainer__nnUNetPlans__3d_fullres")


@pytest.fixture
def scans(tmp_path):
    return write_scans(tmp_path / "scans", "abcd")


def test_predict_with_a_model_folder(model, scans, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", "-i", str(scans), "-o", str(out), "-m", str(model), "-device", "cpu", "--disable_tta"]) == 0
    assert "4 done, 0 already there, 0 failed" in capsys.readouterr().out
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "a.nii.gz")))
    expected = Engine.load(model, device="cpu", mirror=False).predict(scans / "a_0000.nii.gz")
    assert np.array_equal(labels, expected.segmentation)


@pytest.mark.parametrize("dataset", ["900", "Dataset900_Test"])
def test_predict_with_a_dataset_as_nnunet_takes_it(model, scans, tmp_path, monkeypatch, dataset):
    monkeypatch.setenv("nnUNet_results", str(model.parents[1]))
    out = tmp_path / "out"
    arguments = ["-i", str(scans), "-o", str(out), "-d", dataset, "-c", "3d_fullres", "-f", "0", "-device", "cpu"]
    assert main(["predict", *arguments, "--disable_tta", "-num_parts", "3", "-part_id", "1"]) == 0
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["b.nii.gz"]


def test_every_flag_of_nnunet_is_taken(model, scans, tmp_path):
    arguments = (
        f"-i {scans} -o {tmp_path / 'out'} -m {model} -f 0 -chk checkpoint_final.pth -step_size 0.9 --disable_tta "
        "--save_probabilities --continue_prediction -npp 1 -nps 1 -device cpu --disable_progress_bar --verbose "
        "--not_on_device -p nnUNetPlans -tr nnUNetTrainer -num_parts 4 -part_id 0"
    )
    assert main(["predict", *arguments.split()]) == 0
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".gz", ".npz", ".pkl", ".json"}


def test_a_failed_case_gives_status_1_and_is_named(model, scans, tmp_path, capsys):
    (scans / "c_0000.nii.gz").write_bytes(b"")
    arguments = ["-i", str(scans), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu", "--disable_tta"]
    assert main(["predict", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("nnturbo: c failed:")
    assert "3 done, 0 already there, 1 failed" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m {model} -d 900", "give the model as -m FOLDER, or as -d"),
        ("", "give the model as -m FOLDER, or as -d"),
        ("-d 900", "-d needs -c"),
        ("-d 901 -c 3d_fullres", "must name one dataset"),
        ("-m {model}/nowhere", "does not exist"),
        ("-m {model} -f 3", "fold 3 has none"),
        ("-m {model} -part_id 2 -num_parts 2", "-part_id must be"),
        ("-m {model} -step_size 2", "tile_step_size"),
        ("-m {model} -npp -1", "-npp must be 0 or more"),
        ("-m {model}/fold_0/checkpoint_final.pth", "is a checkpoint: give the folder with plans.json"),
        ("-m {model} --backend magic", "backend must be"),
        ("-m {model} -device cuda:77", "is not there"),
    ],
)
def test_wrong_usage_gives_status_2_and_one_line(model, scans, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("nnUNet_results", str(model.parents[1]))
    given = arguments.format(model=model).split()
    assert main(["predict", "-i", str(scans), "-o", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["-npp 0 -nps 0", "-npp 0", "-nps 0"])
def test_one_scan_after_the_other_as_nnunet_does_it(model, scans, tmp_path, monkeypatch, flags):
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread.name), start(thread))[1])
    out, arguments = tmp_path / "out", ["-m", str(model), "-device", "cpu", "--disable_tta", *flags.split()]
    assert main(["predict", "-i", str(scans), "-o", str(out), *arguments]) == 0
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"{name}.nii.gz" for name in "abcd"]
    kinds = {name.rpartition("-")[0] for name in started if name.startswith("nnturbo-")}
    expected = {"nnturbo-read", "nnturbo-compute", "nnturbo-write"}
    expected -= {"nnturbo-read", "nnturbo-compute"} if "-npp 0" in flags else set()
    assert kinds == expected - ({"nnturbo-write"} if "-nps 0" in flags else set())


def test_what_is_kept_is_said_and_outdated_results_are_made_again_where_asked(model, scans, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["predict", "-i", str(scans), "-o", str(out), "-m", str(model), "-device", "cpu"]
    assert main([*arguments, "--disable_tta"]) == 0
    write_scan(out / "b.nii.gz", 5)
    capsys.readouterr()
    assert main([*arguments, "--continue_prediction"]) == 0
    said = capsys.readouterr()
    assert "0 done, 4 already there" in said.out
    assert "nnturbo: 1 kept as they are (changed since nnturbo wrote it): b" in said.err
    assert "--redo_outdated replaces it): a, c, d" in said.err
    assert main([*arguments, "--continue_prediction", "--redo_outdated"]) == 0
    assert "3 done, 1 already there" in capsys.readouterr().out
    assert main([*arguments, "--redo_outdated"]) == 2
    assert "goes with --continue_prediction" in capsys.readouterr().err


def test_parts_share_their_records(model, scans, tmp_path):
    out = tmp_path / "out"
    for part, known in (("1", ["b", "d"]), ("0", ["a", "b", "c", "d"])):
        arguments = ["-i", str(scans), "-o", str(out), "-m", str(model), "-device", "cpu", "--disable_tta"]
        assert main(["predict", *arguments, "-num_parts", "2", "-part_id", part]) == 0
        assert [case["name"] for case in json.loads((out / "predictions.json").read_text())["cases"]] == known


@pytest.mark.parametrize("given", ["-m {0} {1}", "-m {0} -m {1}"])
def test_several_models_are_averaged(model, scans, tmp_path, given):
    other = write_model(tmp_path / "2d", plans=plans_2d(), folds=("0", "1"))
    arguments = f"-i {scans} -o {tmp_path / 'out'} {given.format(model, other)} -f 0 -device cpu --disable_tta"
    assert main(["predict", *arguments.split()]) == 0
    ensemble = Ensemble.load([model, other], folds=[0], device="cpu", mirror=False)
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "b.nii.gz")))
    assert np.array_equal(labels, ensemble.predict(scans / "b_0000.nii.gz").segmentation)
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"][0]
    assert [entry["folds"] for entry in record["provenance"]["models"]] == [["0"], ["0"]]


def test_models_that_do_not_fit_together_are_wrong_usage(model, scans, tmp_path, capsys):
    other = write_model(tmp_path / "other", dataset=dataset_json(channel_names={"0": "MR"}))
    arguments = f"-i {scans} -o {tmp_path / 'out'} -m {model} {other} -device cpu"
    assert main(["predict", *arguments.split()]) == 2
    assert "must agree on channels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_class_is_written_and_how_it_is_found_can_be_chosen(scans, tmp_path, capsys):
    folder = write_model(
        tmp_path / "m", plans=multi_task(plans_json()), checkpoint={"pooled_classifier": pooled_classifier()}
    )
    arguments = ["predict", "-i", str(scans), "-m", str(folder), "-device", "cpu", "--disable_tta"]
    for out, given, classifier, aggregation in (
        ("a", [], "lda", "foreground"),
        ("b", ["--classifier", "head", "--aggregation", "mean"], "head", "mean"),
    ):
        assert main([*arguments, "-o", str(tmp_path / out), *given]) == 0
        assert len((tmp_path / out / "subtype_results.csv").read_text().splitlines()) == 5
        record = json.loads((tmp_path / out / "predictions.json").read_text())["cases"][0]
        chosen = {key: record["provenance"][key] for key in ("classifier", "aggregation")}
        assert chosen == {"classifier": classifier, "aggregation": aggregation}
    plain = write_model(tmp_path / "plain", plans=multi_task(plans_json()))
    arguments[4] = str(plain)
    capsys.readouterr()
    assert main([*arguments, "-o", str(tmp_path / "c"), "--classifier", "lda"]) == 2
    assert "classifier lda needs a fitted classifier" in capsys.readouterr().err


def test_parts_share_their_table(scans, tmp_path):
    folder = write_model(tmp_path / "m", plans=multi_task(plans_json()))
    arguments = ["-i", str(scans), "-o", str(tmp_path / "out"), "-m", str(folder), "-device", "cpu", "--disable_tta"]
    for part in ("0", "1"):
        assert main(["predict", *arguments, "-num_parts", "2", "-part_id", part]) == 0
    header, *rows = (tmp_path / "out" / "subtype_results.csv").read_text().split()
    assert header == "Names,Subtype"
    assert [row.partition(",")[0] for row in rows] == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz"]


@pytest.mark.parametrize("fitted", [False, True])
def test_inspect_shows_the_head(tmp_path, capsys, fitted):
    folder = write_model(
        tmp_path / "m",
        plans=multi_task(plans_json(), kind="attention", class_names=["benign", "low", "high"]),
        folds=("0", "1"),
        checkpoint={"pooled_classifier": pooled_classifier(stages=[1]) if fitted else None},
    )
    assert main(["inspect", str(folder)]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["network"].startswith("MultiTaskUNet around PlainConvUNet, ")
    assert rows["classes"] == "0 benign, 1 low, 2 high"
    assert rows["head"] == "attention on stages 0, 1"
    assert rows["fitted classifier"] == ("fold 0: lda on stages 1; fold 1: lda on stages 1" if fitted else "none")


def test_inspect_refuses_a_fitted_classifier_that_does_not_fit(tmp_path, capsys):
    wrong = {**pooled_classifier(), "stages": [0]}
    folder = write_model(tmp_path / "m", plans=multi_task(plans_json()), checkpoint={"pooled_classifier": wrong})
    assert main(["inspect", str(folder)]) == 2
    assert "must have 12 features" in capsys.readouterr().err


def test_a_cascade_without_its_previous_stage_is_wrong_usage(scans, tmp_path, capsys):
    folder = write_model(tmp_path / "m", plans=plans_json(previous_stage="3d_lowres"))
    arguments = ["predict", "-i", str(scans), "-o", str(tmp_path / "out"), "-m", str(folder), "-device", "cpu"]
    assert main(arguments) == 2
    assert "continues from the labels of 3d_lowres" in capsys.readouterr().err
    assert main([*arguments, "-prev_stage_predictions", str(tmp_path / "no")]) == 2
    assert "must be a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_refuses_what_cannot_run(tmp_path, capsys):
    folder = write_model(tmp_path / "m", plans=plans_json(patch_size=[9, 12, 16]))
    assert main(["inspect", str(folder)]) == 2
    assert "must be divisible by the strides" in capsys.readouterr().err


def test_an_input_that_is_not_there_gives_status_2(model, tmp_path, capsys):
    assert main(["predict", "-i", str(tmp_path / "no"), "-o", str(tmp_path / "out"), "-m", str(model)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_inspect_says_what_is_in_a_model_and_how_it_runs(model, capsys):
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    for text in (
        "Dataset900_Test",
        "3d_fullres",
        "PlainConvUNet",
        "CT (CTNormalization)",
        "1 pancreas",
        "8 x 12 x 16 voxels of 2 x 1.5 x 1.5 mm",
        "along axes 0, 1, 2",
        "no: fp16 needs a GPU",
    ):
        assert text in out


def test_doctor_names_every_part(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("processor", "memory", "torch", "c++ compiler", "openvino", "ray"):
        assert text in out


def test_help_starts_without_torch():
    code = (
        "import sys; sys.argv = ['nnturbo', '--help']\nfrom nnturbo.engine.cli import main\ntry: main()\n"
        "except SystemExit: pass\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_installed_command_runs():
    result = subprocess.run(
        [sys.executable, "-m", "nnturbo.engine.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "predict" in result.stdout


class TestBuild:
    def test_a_bundle_predicts_and_says_what_it_is(self, model, scans, tmp_path, capsys):
        bundle = str(tmp_path / "bundle")
        assert main(["build", "-m", str(model), "-o", bundle, "-device", "cpu", "--backend", "torchscript"]) == 0
        said = capsys.readouterr().out
        assert main(["inspect", bundle]) == 0
        assert capsys.readouterr().out == said
        assert re.search(r"^built for +torchscript in fp32$", said, re.MULTILINE)
        assert re.search(r"^agreement +not measured", said, re.MULTILINE)
        assert re.search(r"^source fold_0/checkpoint_final\.pth +[0-9a-f]{64}$", said, re.MULTILINE)
        arguments = ["-i", str(scans), "-o", str(tmp_path / "out"), "-m", bundle, "--disable_tta"]
        assert main(["predict", *arguments]) == 0
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz")))
        expected = Engine.load(model, device="cpu", mirror=False).predict(scans / "a_0000.nii.gz")
        assert np.array_equal(labels, expected.segmentation)

    def test_calibration_scans_are_compared_on(self, model, scans, tmp_path, capsys):
        arguments = ["-m", str(model), "-o", str(tmp_path / "b"), "-device", "cpu", "--backend", "torch"]
        assert main(["build", *arguments, "--calibration", str(scans)]) == 0
        assert "0 of " in (said := capsys.readouterr().out)
        assert "voxels differ from fp32 on 4 calibration scans; Dice pancreas 1.0000, lesion 1.0000" in said

    def test_phantoms_stand_in_for_ct(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(build_command, "PHANTOMS", 1)
        arguments = ["build", "-m", str(model), "-o", str(tmp_path / "b"), "--precision", "bf16"]
        with contextlib.ExitStack() as stack:
            scans, name = build_command._calibration(_parser().parse_args(arguments), stack)
            assert name == "generated phantoms"
            (phantom,) = [read_volume(scan, channels=1) for scan in scans]
            assert phantom.array.min() < -100 < 200 < phantom.array.max()  # fat to beyond soft tissue
        assert not scans[0].exists()

    def test_fp32_needs_no_scans(self, model, tmp_path):
        arguments = ["build", "-m", str(model), "-o", str(tmp_path / "b")]
        assert build_command._calibration(_parser().parse_args(arguments), contextlib.ExitStack()) == ([], "")

    def test_but_not_for_mr(self, tmp_path, capsys):
        mr = write_model(tmp_path / "mr", plans=plans_json(normalization_schemes=["ZScoreNormalization"]))
        arguments = ["-m", str(mr), "-o", str(tmp_path / "b"), "-device", "cpu", "--backend", "torch"]
        assert main(["build", *arguments, "--precision", "bf16"]) == 2
        assert "give scans to measure it on as --calibration FOLDER" in capsys.readouterr().err

    def test_wrong_usage_is_status_2(self, model, tmp_path, capsys):
        (tmp_path / "b").mkdir()
        arguments = ["-m", str(model), "-o", str(tmp_path / "b"), "-device", "cpu"]
        assert main(["build", *arguments]) == 2
        assert "exists: choose another folder" in capsys.readouterr().err
        assert main(["build", *arguments, "--calibration", str(tmp_path / "nowhere")]) == 2
        assert "nowhere" in capsys.readouterr().err

    def test_the_whole_path_is_one_file(self, model, scans, tmp_path):
        out = tmp_path / "model.ts"
        assert main(["build", "-m", str(model), "-o", str(out), "-device", "cpu", "--whole-path"]) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
            script = torch.jit.load(out)
        volume = read_volume(scans / "a_0000.nii.gz", channels=1)
        labels, classes = script(torch.from_numpy(volume.array), list(volume.geometry.spacing))
        expected = Engine.load(model, device="cpu").predict(scans / "a_0000.nii.gz").segmentation
        assert np.array_equal(labels.numpy(), expected)
        assert len(np.unique(expected)) > 1
        assert len(classes) == 0

    def test_the_whole_path_has_no_backend_to_choose(self, model, tmp_path, capsys):
        arguments = ["-m", str(model), "-o", str(tmp_path / "model.ts"), "--whole-path", "--backend", "onnx"]
        assert main(["build", *arguments, "--precision", "bf16"]) == 2
        assert "--backend, --precision cannot be chosen" in capsys.readouterr().err
