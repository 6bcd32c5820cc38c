"""The script for a GPU, tried on the CPU with small sizes: what it would leave on a machine with one."""

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

HIDDEN = """
import sys
for name in {hidden!r}:
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {hidden!r} else find(name, *more)
sys.path.insert(0, {root!r} + "/benchmarks")
import gpu

sys.exit(gpu.main(["--device", "cpu", "--backends", "torch", "--out", sys.argv[1]]))
"""


def tried(out, hidden=()):
    program = HIDDEN.format(hidden=tuple(hidden), root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", program, str(out)], cwd=out.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.thorough  # nnU-Net and all kernels for most of a minute
def test_every_part_leaves_its_numbers(tmp_path):
    found = tried(tmp_path / "gpu.json")
    assert found["failed"] == found["left_out"] == {}
    assert found["peaks"]["copy_gb_per_s"] > 0.1
    assert {row["kernel"] for row in found["kernels"]} == {
        "gather_tiles",
        "accumulate_views",
        "resample_axis x",
        "resample_axis y",
        "resample_axis z",
        "resample_labels",
    }
    assert all(row["seconds"] > 0 and row["of_copy"] > 0 for row in found["kernels"])
    (row,) = found["whole_path"]
    assert row["ratio"] == row["stock_s"] / row["nnturbo_s"]
    assert row["voxels_differing"] < 0.02 * row["voxels"]
    assert {row["way"] for row in found["networks"]} >= {"nnU-Net, eager", "torch"}
    assert all(row["seconds"] > 0 for row in found["networks"])


def test_what_is_not_installed_is_named_and_left_out(tmp_path):
    found = tried(tmp_path / "gpu.json", ["dynamic_network_architectures", "SimpleITK", "nnunetv2", "cupy"])
    missing = "dynamic_network_architectures not installed"
    assert found["left_out"] == {"memory": missing, "whole_path": missing, "networks": missing}
    assert found["failed"] == {}
    assert found["kernels"]


def test_without_a_gpu_nothing_is_written(tmp_path):
    if __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "gpu.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no CUDA device is here" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
