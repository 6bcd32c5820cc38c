"""The benchmark of the C program: which runs count, and that its labels are compared; commands are stood in for."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.benchmarks import native_command
from nnturbo.benchmarks.kernel_tables import kind_of
from nnturbo.benchmarks.native_command import BUNDLE, MODEL, PROGRAM, STOCK, measure
from nnturbo.benchmarks.report import Run


@pytest.fixture
def ran(monkeypatch):
    """Commands that ran; each takes a second longer than the one before. Labels are `given` by the program's name."""
    commands, given, seconds = [], {}, itertools.count(1)

    def run(command, *, environment):
        commands.append(command)
        name = Path(command[0]).name
        out = Path(command[-1], "scan.nii.gz") if "-o" in command else Path(command[3])
        out.parent.mkdir(exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(given.get(name, np.zeros((2, 3, 4), np.uint8))), str(out))
        return Run(seconds=next(seconds), cpu_seconds=1.0, peak_bytes=2)

    monkeypatch.setattr(native_command, "run_measured", run)
    return commands, given


def test_the_first_round_does_not_count(ran, tmp_path):
    commands, given = ran
    given["nnUNetv2_predict_from_modelfolder"] = np.eye(3, 4, dtype=np.uint8)[None].repeat(2, 0)
    row = measure("small", Path("program"), 2, tmp_path)
    assert row["median_seconds"] == {STOCK: 7, MODEL: 8, BUNDLE: 9, PROGRAM: 10}
    assert (row["voxels"], row["voxels_differing"]) == (24, 6)
    assert [Path(command[0]).name for command in commands[:4]] == [
        *("nnUNetv2_predict_from_modelfolder", "nnturbo", "nnturbo", "program"),
    ]
    assert "--disable_tta" in commands[0]
    assert "--disable-tta" in commands[3]


def test_labels_of_the_program_must_be_those_of_python(ran, tmp_path):
    _, given = ran
    given["program"] = np.ones((2, 3, 4), np.uint8)
    with pytest.raises(RuntimeError, match="must be those of nnturbo predict"):
        measure("small", Path("program"), 1, tmp_path)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"kind": "norm"}, "norm"),
        ({"channels": [1, 32]}, "convolution of less than 32 channels"),
        ({"stride": [1, 2, 2]}, "convolution with a stride"),
        ({"taps": [1, 1, 1]}, "convolution of single voxels"),
        ({}, "convolution, 3 taps"),
        ({"kind": "convolution by fewer products"}, "convolution by fewer products"),
    ],
)
def test_layers_are_sorted_by_what_limits_them(changes, kind):
    layer = {"kind": "convolution", "channels": [64, 64], "taps": [3, 3, 3], "stride": [1, 1, 1]}
    assert kind_of({**layer, **changes}) == kind
