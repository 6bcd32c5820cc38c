"""Jobs that are killed again and again, and jobs that go on for long."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.engine.factory import multi_task, plans_json, write_model, write_scan, write_scans

CASES = 40
JOB = """
import sys, time
from pathlib import Path
from nnturbo.engine.jobs.run import predict_cases
from nnturbo.engine.jobs.job import Job, load_predictor
from nnturbo.engine.options import ModelChoice
from nnturbo.engine.jobs.cases import find_cases

model, scans, out, resume = sys.argv[1:]
engine = load_predictor([model], ModelChoice(mirror=False, backend="torch"), "cpu")
print("begins", flush=True)
began = time.monotonic()
outcome = predict_cases(engine, find_cases(Path(scans), ".nii.gz"), Job(
    output=Path(out), skip_existing=resume == "resume", readers=3, writers=3, save_probabilities=True,
))
print(time.monotonic() - began, len(outcome.done), len(outcome.skipped), flush=True)
"""
MANY = """
import gc, os, sys
from pathlib import Path
from nnturbo.engine.jobs.run import predict_cases
from nnturbo.engine.jobs.job import Job, load_predictor
from nnturbo.engine.options import ModelChoice
from nnturbo.engine.jobs.cases import CaseFiles

model, scan, out, count = sys.argv[1:]
engine = load_predictor([model], ModelChoice(mirror=False, backend="torch"), "cpu")
seen = []

def on_event(event):
    if event.kind != "done":
        return
    seen.append(event.name)
    if len(seen) in (100, int(count)):
        gc.collect()
        kib = next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]
        print(len(seen), kib, len(os.listdir("/proc/self/fd")), flush=True)

cases = [CaseFiles(name=f"c{index:04d}", images=(Path(scan),)) for index in range(int(count))]
outcome = predict_cases(engine, cases, Job(output=Path(out), readers=3, writers=3), on_event=on_event)
assert len(outcome.done) == int(count)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m", plans=multi_task(plans_json()))


def start(model, scans, out, *, resume):
    arguments = [sys.executable, "-c", JOB, model, scans, out, "resume" if resume else "anew"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def files(folder):
    """What a job leaves, without what depends on the time it took."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    predictions = json.loads(found.pop("predictions.json"))
    for case in predictions["cases"]:
        case.pop("timings_ms")
        for name, description in case["results"].items():
            if name.endswith(".npz"):  # a zip, which holds the time
                description.clear()
    return predictions, {name: content for name, content in found.items() if not name.endswith(".npz")}


@pytest.mark.thorough
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_a_job_gives_the_same(model, tmp_path, kills):
    scans = write_scans(tmp_path / "scans", [f"c{index:02d}" for index in range(CASES)])
    whole = start(model, scans, tmp_path / "whole", resume=False)
    taken_s = float(whole.communicate(timeout=120)[0].split()[0])
    expected = files(tmp_path / "whole")
    assert len(expected[0]["cases"]) == CASES
    luck, killed = random.Random(20261123), 0
    for trial in range(kills):
        out = tmp_path / f"out{trial}"
        has_results = trial % 2 == 1  # of the same command before
        if has_results:
            shutil.copytree(tmp_path / "whole", out)
        process = start(model, scans, out, resume=False)
        time.sleep(luck.uniform(0, taken_s))
        process.kill()
        process.communicate()
        killed += process.returncode != 0
        assert len(list(out.glob("*.nii.gz"))) == CASES or not has_results
        for path in out.iterdir() if out.exists() else ():
            if path.name.endswith((".nii.gz", ".pkl")):
                assert path.read_bytes() == expected[1][path.name], f"{path.name} is not whole"
            elif path.suffix == ".npz":
                with np.load(path) as archive:
                    assert archive["probabilities"].shape[0] == 3
        resumed = start(model, scans, out, resume=True)
        resumed.communicate(timeout=120)
        assert resumed.returncode == 0
        assert files(out) == expected
    assert killed > 0.5 * kills


@pytest.mark.posix("/proc")
@pytest.mark.parametrize(
    "count", [pytest.param(300, marks=pytest.mark.thorough), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_memory_and_descriptors_do_not_grow_with_the_number_of_cases(model, tmp_path, count):
    scan = write_scan(tmp_path / "scan_0000.nii.gz")
    arguments = [sys.executable, "-c", MANY, model, scan, tmp_path / "out", str(count)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    (_, early_kib, early_files), (at, late_kib, late_files) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    assert at == count
    assert late_kib < 1.02 * early_kib
    assert late_files <= early_files + 3  # readers and writers may have one open each
