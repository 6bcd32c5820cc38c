"""Commands whose output nobody reads, or cannot be written: the job is done all the same."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.engine.factory import write_scan

COMMAND = "import sys; from nnturbo.engine.cli import main; sys.exit(main(sys.argv[1:]))"
THOROUGH = pytest.mark.thorough  # seconds each, for what one of the others mostly shows too
STREAMS = [
    (">&- 2>&-", "1"),
    ("| true", "1"),
    *(
        pytest.param(streams, "1", marks=THOROUGH)
        for streams in (
            *(">&-", "2>&-", "<&- >&- 2>&-", "2>&1 | true"),
            *(">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"),
        )
    ),
    *(pytest.param(streams, "2", marks=THOROUGH) for streams in (">&- 2>&-", "2>&1 | true")),
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full and a POSIX shell")
@pytest.mark.parametrize(("streams", "workers"), STREAMS)
def test_no_job_is_lost_to_its_output(model, tmp_path, streams, workers):
    (tmp_path / "in").mkdir()
    for index, name in enumerate(["a", "b", "\udcfc"]):
        write_scan(tmp_path / "in" / "new.nii.gz", index).rename(tmp_path / "in" / f"{name}_0000.nii.gz")
    write_scan(tmp_path / "in" / "d_0000.nii.gz").write_bytes(b"")
    arguments = ["predict", "-i", "in", "-o", "out", "-m", model, "-device", "cpu", "--disable_tta", "--verbose"]
    arguments += ["--backend", "torch", "--report", "--log", "log.jsonl", "--workers", workers]
    shell = f'"$@" {streams}' if "|" not in streams else f'set -o pipefail; "$@" {streams}'
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, cwd=tmp_path, check=False, timeout=120, capture_output=True)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    records = {
        record["name"]: record["status"]
        for record in json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]
    }
    assert records == {"a": "done", "b": "done", "d": "failed", "\udcfc": "failed"}
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count("data-case=") == 4
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["event"] == "finished"
    for name in "ab":
        assert np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"{name}.nii.gz")))).size > 1


@pytest.mark.parametrize(
    ("command", "streams"),
    [
        ("inspect", ">/dev/full"),
        *(pytest.param("doctor", streams, marks=THOROUGH) for streams in (">&-", ">/dev/full", "| true")),
        *(pytest.param("inspect", streams, marks=THOROUGH) for streams in (">&-", "| true")),
    ],
)
def test_other_commands_end_as_they_would(model, tmp_path, streams, command):
    given = [command] if command == "doctor" else [command, model]
    shell = f'set -o pipefail; "$@" {streams}'
    done = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, "-c", COMMAND, *given],
        check=False,
        timeout=120,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
