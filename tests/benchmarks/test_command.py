"""`nnturbo benchmark`: what it compares, what it refuses, and one real comparison."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.benchmarks.command import compare_classes, compare_labels
from nnturbo.benchmarks.report import memory_over_time, run_measured
from nnturbo.engine.cli import main
from nnturbo.engine.jobs.cases import find_cases

from tests.engine.factory import multi_task, plans_json, write_model, write_scan


def write(folder, name, array, origin=(0.0, 0.0, 0.0)):
    folder.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array, np.uint8))
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(folder / name))


LABELS = {"whole": (1, 2), "core": (2,), "absent": (3,)}


class TestCompareLabels:
    def test_counts_over_all_scans(self, tmp_path):
        one, other = np.zeros((2, 4, 5, 6)), np.zeros((2, 4, 5, 6))
        one[0, 0, 0, :4], other[0, 0, 0, 2:6] = 1, 1  # two in common of four and four
        one[1, 0, 0, :3], other[1, 0, 0, :1] = 2, 2  # one in common of three and one
        for index in range(2):
            write(tmp_path / "a", f"{index}.nii.gz", one[index])
            write(tmp_path / "b", f"{index}.nii.gz", other[index])
        result = compare_labels(tmp_path / "a", tmp_path / "b", LABELS, ".nii.gz")
        assert result == {
            "voxels": 240,
            "voxels_differing": 6,
            "dice": {"whole": 2 * 3 / 12, "core": 2 * 1 / 4, "absent": None},
        }

    def test_what_cannot_be_compared(self, tmp_path):
        empty = np.zeros((4, 5, 6))
        write(tmp_path / "a", "x.nii.gz", empty)
        (tmp_path / "b").mkdir()
        with pytest.raises(RuntimeError, match="the same segmentations"):
            compare_labels(tmp_path / "a", tmp_path / "b", LABELS, ".nii.gz")
        write(tmp_path / "b", "x.nii.gz", empty, origin=(1, 0, 0))
        with pytest.raises(RuntimeError, match="same grid"):
            compare_labels(tmp_path / "a", tmp_path / "b", LABELS, ".nii.gz")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-m", "model"], "give a model and scans"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--disable_tta"], "without -m and -i"),
    ],
)
def test_wrong_usage_is_said_in_one_line(arguments, reason, capsys):
    assert main(["benchmark", *arguments]) == 2
    assert reason in capsys.readouterr().err


class TestCompareClasses:
    def test_with_what_the_eager_network_says(self, tmp_path):
        model = write_model(tmp_path / "model", plans=multi_task(plans_json()))
        scan = write_scan(tmp_path / "scan_0000.nii.gz")
        assert main(["predict", "-m", str(model), "-i", str(scan), "-o", str(tmp_path / "out"), "--disable_tta"]) == 0
        compared = (tmp_path / "out", model, "0", False, find_cases(scan, ".nii.gz"))
        result = compare_classes(*compared)
        assert result["classes"] == 1
        assert result["classes_differing"] == 0
        assert result["probability_difference"] < 1e-4
        path = tmp_path / "out" / "predictions.json"
        written = json.loads(path.read_text())
        answer = written["cases"][0]["classification"]
        answer["label"], answer["probabilities"] = (answer["label"] + 1) % 3, {"a": 0, "b": 0, "c": 0}
        path.write_text(json.dumps(written))
        result = compare_classes(*compared)
        assert result["classes_differing"] == 1
        assert result["probability_difference"] > 1 / 3


class TestGpuMemory:
    def test_peak_and_area_are_beyond_what_was_there_before(self):
        samples = [(10.0, 500), (10.5, 500), (11.0, 700), (11.5, 900), (12.5, 600), (13.0, 400)]
        assert memory_over_time(samples) == (400, 0.5 * 200 + 1.0 * 400 + 0.5 * 100)

    def test_is_asked_for_while_the_command_runs(self, tmp_path, monkeypatch):
        fake = tmp_path / "nvidia-smi"  # what the real one prints, and a command that takes 96 MiB
        fake.write_text(f"""#!/bin/sh
case "$*" in *--id=3*memory.used*nounits*) ;; *) exit 1;; esac
while true; do if [ -e {tmp_path}/busy ]; then echo 100; else echo 4; fi; sleep 0.02; done
""")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
        run = run_measured(["sh", "-c", f"touch {tmp_path}/busy; sleep 0.5; rm {tmp_path}/busy"], watch_gpu=True)
        assert run.gpu_peak_bytes == 96 * 2**20
        assert run.gpu_byte_seconds is not None
        assert 0.1 < run.gpu_byte_seconds / (96 * 2**20) < 0.9
        assert "GPU     96 MiB" in str(run)

    def test_is_not_there_without_a_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match="nvidia-smi, which is not installed"):
            run_measured(["true"], watch_gpu=True)


@pytest.mark.slow  # six commands, of which each of nnU-Net's takes ten seconds to begin
def test_the_quick_comparison(tmp_path, capsys):
    stored = tmp_path / "result.json"
    assert main(["benchmark", "--quick", "--json", str(stored)]) == 0
    (result,) = json.loads(stored.read_text())["results"]
    assert result["order"] == ["stock", "nnturbo", "stock", "nnturbo", "nnturbo", "stock"]
    assert [len(runs) for runs in result["samples"].values()] == [3, 3]
    assert result["scans"] == 5
    assert result["voxels_differing"] < result["voxels"] / 20_000
    assert min(result["dice"].values()) > 0.999
    assert result["classes"] == 5
    assert result["classes_differing"] == 0
    assert result["ratio"] > 1
    assert f"{result['ratio']:.2f} times faster" in capsys.readouterr().out
