"""The script for a GPU, tried on the CPU with small sizes and with parts that fail."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from nnturbo.benchmarks import gpu, gpu_cases, gpu_device
from nnturbo.benchmarks.gpu import PARTS, Part, run_parts

from tests.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"
HIDING = """
import importlib.util, sys
hidden = {hidden!r}
for name in hidden:
    sys.modules[name] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in hidden else find(name, *more)
"""


def tried(folder, parts, hidden=(), modules=None):
    """Run parts on the CPU; `modules` takes the place of packages, by their text."""
    aside = folder / "aside"
    aside.mkdir()
    (aside / "sitecustomize.py").write_text(HIDING.format(hidden=tuple(hidden)))
    for name, text in (modules or {}).items():
        (aside / f"{name}.py").write_text(text)
    path = os.pathsep.join(filter(None, [str(aside), os.environ.get("PYTHONPATH")]))
    out = folder / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--minutes", "20", "--json", str(out), "--parts", *parts],
        cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return done, json.loads(out.read_text())


class TestParts:
    """With small programs in place of the parts."""

    PROGRAM = "import json, os, sys, time; from pathlib import Path; into, before = map(Path, sys.argv[1:]); "

    def run(self, monkeypatch, tmp_path, programs, minutes=1.0, seconds=30.0):
        parts = {name: Part(function=("", ""), seconds=seconds, tells="") for name in programs}
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
        return run_parts(
            list(programs), minutes, tmp_path / "gpu.json",
            lambda name, into, before: [sys.executable, "-c", self.PROGRAM + programs[name], str(into), str(before)],
        )  # fmt: skip

    def test_one_that_fails_crashes_or_hangs_loses_nothing_else_nor_what_it_had_written(self, monkeypatch, tmp_path):
        keep = "into.write_text(json.dumps({'found': [1, 2]})); "
        found = self.run(
            monkeypatch, tmp_path,
            {
                "good": keep,
                "fails": "into.write_text(json.dumps({'found': [3], 'failed': 'RuntimeError: no'})); sys.exit(1)",
                "crashes": keep + "os.abort()",
                "hangs": keep + "import subprocess; subprocess.run(['sleep', '61.25'])",
                "silent": "sys.exit(3)",
                "lacks": "into.write_text(json.dumps({'left_out': 'cc3d not installed'}))",
                "last": "into.write_text(json.dumps({'found': json.loads(before.read_text())['good']}))",
            },
            seconds=3.0,
        )  # fmt: skip
        assert found["good"] == found["crashes"] == found["hangs"] == found["last"] == [1, 2]
        assert found["fails"] == [3]
        assert found["failed"] == {
            "fails": "RuntimeError: no", "crashes": "its process ended with -6", "hangs": "ended after 3 s",
            "silent": "its process ended with 3",
        }  # fmt: skip
        assert found["left_out"] == {"lacks": "cc3d not installed"}
        assert json.loads((tmp_path / "gpu.json").read_text()) == found
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert "sleep 61.25" not in running.splitlines()  # what a part starts is ended with it

    def test_parts_for_which_no_time_is_left_are_named_and_the_one_at_work_is_ended(self, monkeypatch, tmp_path):
        found = self.run(monkeypatch, tmp_path, {"slow": "time.sleep(60)", "never": ""}, minutes=0.04)
        assert found["failed"] == {"slow": "ended after 2 s"}
        assert found["left_out"] == {"never": "no time left"}

    def test_each_has_its_function_and_the_most_telling_come_first(self):
        for part in PARTS.values():
            module, name = part.function
            assert callable(getattr(importlib.import_module(f"nnturbo.benchmarks.{module}"), name))
        assert list(PARTS)[:3] == ["versions", "tests", "forward"]

    def test_the_files_with_tests_for_a_gpu_are_those_that_are_run(self):
        marked = {
            str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
            if "pytest.mark." + "gpu" in path.read_text()
        }  # fmt: skip
        assert marked == set(gpu_device.TEST_FILES)


@pytest.mark.thorough
def test_every_part_leaves_its_numbers(tmp_path):
    from nnturbo.benchmarks import gpu_networks

    done, found = tried(tmp_path, ["versions", "forward", "whole", "many", "kernels", "views"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert found["failed"] == found["left_out"] == {}
    assert found["versions"]["copy_gb_per_s"] > 0
    assert found["versions"]["installed"]["torch"] == torch.__version__
    kernels = {row["kernel"] for row in found["kernels"]}
    assert kernels == {
        "gather_tiles", "accumulate_views", "instance_norm", "instance_norm with a residual",
        "instance_norm with a copy", "resample_axis x", "resample_axis y", "resample_axis z", "resample_labels",
        "spread_blocks", "upsample", "convolve of a scan", "convolve 1 x 3 x 3", "convolve 3 x 3 x 3",
        "convolve of joined features", "convolve to logits",
    }  # fmt: skip
    assert all(row["seconds"] > 0 and row["of_copy"] > 0 for row in found["kernels"])
    ways = {row["way"]: row for row in found["forward"]}
    assert next(iter(ways)) == "nnU-Net, one view at a time"
    assert list(ways)[:4] == list(gpu_networks.TELLING)
    assert all(row["voxels_differing"] < 0.01 and row["ratio"] > 0 for row in ways.values())
    assert [row["views"] for row in found["views"]] == [1, 2]
    assert all(row["voxels_differing"] < 0.01 for row in found["views"])
    assert all(row["seconds_per_view"] == row["seconds"] / row["views"] for row in found["views"])
    (row,) = found["whole"]
    assert row["ratio"] == row["stock_s"] / row["nnturbo_s"]
    assert row["voxels_differing"] < 0.02 * row["voxels"]
    assert found["many"]["cases"] == 2
    assert found["many"]["ratio"] > 0


@pytest.mark.thorough
def test_what_is_not_installed_or_broken_is_named_and_the_rest_goes_on(tmp_path):
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    done, found = tried(tmp_path, ["versions", "whole"], hidden=["cupy"], modules={"nnunetv2": broken})
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = found["whole"]
    assert row["nnturbo_s"] > 0
    assert row["stock_failed"] == "RuntimeError: operator torchvision::nms does not exist"
    (tmp_path / "again").mkdir()
    done, found = tried(tmp_path / "again", ["whole"], hidden=["dynamic_network_architectures"])
    assert done.returncode == 0
    assert found["left_out"] == {"whole": "dynamic_network_architectures not installed"}


@pytest.mark.thorough
def test_a_way_that_fails_loses_no_other(monkeypatch, tmp_path):
    from nnturbo.benchmarks import gpu_networks

    def no_kernels(bench, model, usual=gpu_networks.ways):
        def fails():
            raise RuntimeError("an illegal memory access was encountered")

        kept = usual(bench, model)
        return {"nnU-Net, one view at a time": kept["nnU-Net, one view at a time"], "broken": fails}

    monkeypatch.setattr(gpu_networks, "ways", no_kernels)
    rows = gpu_networks.forward(gpu_device.Bench(torch.device("cpu"), {}, tmp_path / "part.json"))
    assert "seconds" in rows[0]
    assert rows[1]["failed"] == "RuntimeError: an illegal memory access was encountered"


def test_agreement_is_told_by_label():
    one, other = torch.tensor([0, 1, 1, 2]).numpy(), torch.tensor([0, 1, 0, 2]).numpy()
    assert gpu_cases.agreement(one, other) == {"voxels": 4, "voxels_differing": 1, "dice": {1: 2 / 3, 2: 1.0}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_written(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(tmp_path / "gpu.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no CUDA device is here" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
