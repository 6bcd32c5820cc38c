"""Real processes that share a job: the same results, and what happens when they are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from nnturbo.engine import ModelError
from nnturbo.engine.jobs import local_workers as pool_module
from nnturbo.engine.jobs.cases import find_cases
from nnturbo.engine.jobs.job import Job, load_predictor
from nnturbo.engine.jobs.local_workers import LocalWorkers
from nnturbo.engine.jobs.run import predict_cases, run_job
from nnturbo.engine.jobs.worker import ModelArguments, Place, local_places, serve
from nnturbo.engine.options import ModelChoice
from nnturbo.engine.pipeline import loading

from tests.engine.factory import write_scan, write_scans
from tests.engine.jobs.outputs import label_files

CHOICE = ModelChoice(mirror=False, backend="torch")
CORES = [core for place in local_places("cpu", None) for core in place.cores]
PLACES = [Place("cpu", (core,)) for core in CORES[:2]] * 2


def serve_with_poison(connection, *more):
    """A process that a scan named poison ends, as a fault in a library would."""
    read_volume = loading.read_volume

    def read(image, **how):
        if "poison" in str(image):
            os.kill(os.getpid(), signal.SIGKILL)
        return read_volume(image, **how)

    loading.read_volume = read
    serve(connection, *more)


@pytest.fixture
def scans(tmp_path):
    return write_scans(tmp_path / "scans", [f"c{index}" for index in range(8)])


@pytest.fixture
def pool(model, tmp_path):
    made = LocalWorkers(ModelArguments(models=(str(model),), choice=CHOICE), Job(output=tmp_path / "out"), PLACES[:2])
    yield made
    made.close()


def processes(pool):
    return [worker.handle[0] for worker in pool._running]


def test_results_are_those_of_one_process_with_as_many_cores(model, scans, tmp_path, pool):
    import torch

    outcome = run_job(pool, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert sorted(outcome.done) == [f"c{index}" for index in range(8)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = load_predictor([model], CHOICE, "cpu")
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "alone"))
    finally:
        torch.set_num_threads(before)
    assert label_files(tmp_path / "out") == label_files(tmp_path / "alone")
    assert len(label_files(tmp_path / "out")) == 8
    workers = processes(pool)
    pool.close()
    assert [process.exitcode for process in workers] == [0, 0]


@pytest.mark.posix("signals")
def test_a_process_that_is_killed_costs_no_case(scans, tmp_path, pool):
    events = []

    def on_event(event):
        if event.kind == "done" and not any(each.kind == "done" for each in events):
            os.kill(processes(pool)[0].pid, signal.SIGKILL)
        events.append(event)

    outcome = run_job(pool, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"), on_event=on_event)
    assert sorted(outcome.done) == [f"c{index}" for index in range(8)]
    assert [event.how for event in events if event.kind == "lost"] == ["signal 9"]
    assert len(label_files(tmp_path / "out")) == 8


@pytest.mark.posix("signals")
@pytest.mark.thorough
def test_a_scan_that_ends_its_process_fails_alone(model, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "serve", serve_with_poison)
    write_scan(scans / "poison_0000.nii.gz")
    job = Job(output=tmp_path / "out")
    workers = LocalWorkers(ModelArguments(models=(str(model),), choice=CHOICE), job, PLACES[:2])
    try:
        outcome = run_job(workers, find_cases(scans, ".nii.gz"), job)
    finally:
        workers.close()
    assert outcome.failed == {"poison": "the process that worked on it ended (signal 9)"}
    assert sorted(outcome.done) == [f"c{index}" for index in range(8)]


@pytest.mark.thorough
def test_a_bad_scan_and_a_result_that_cannot_be_written_fail_their_cases(scans, tmp_path, pool):
    (scans / "c3_0000.nii.gz").write_bytes(b"")
    (tmp_path / "out" / "c2.nii.gz").mkdir(parents=True)
    outcome = run_job(pool, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert sorted(outcome.failed) == ["c2", "c3"]
    assert "c2.nii.gz cannot be written" in outcome.failed["c2"]
    assert "c3_0000.nii.gz" in outcome.failed["c3"]
    assert len(outcome.done) == 6


@pytest.mark.thorough
def test_arguments_that_no_process_can_use_are_said(model, tmp_path):
    wrong = ModelArguments(models=(str(model),), choice=replace(CHOICE, tile_step_size=2))
    with pytest.raises(ValueError, match="tile_step_size must be in"):
        LocalWorkers(wrong, Job(output=tmp_path), PLACES[:2])


@pytest.mark.thorough
def test_a_model_that_cannot_be_used_is_said_by_its_process(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        LocalWorkers(
            ModelArguments(models=(str(tmp_path / "nowhere"),), choice=CHOICE), Job(output=tmp_path), PLACES[:2]
        )


def test_places():
    cores = list(CORES)
    assert [place.device for place in local_places("cpu", None)] == ["cpu"]
    shares = local_places("cpu", len(cores))
    assert sorted(core for place in shares for core in place.cores) == cores
    assert local_places("cuda:1", 2) == [Place("cuda:1"), Place("cuda:1")]
    with pytest.raises(ValueError, match="not enough for"):
        local_places("cpu", len(cores) + 1)
    with pytest.raises(ValueError, match="at least 1"):
        local_places("cpu", 0)


def test_every_gpu_has_a_process(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_places("auto", None) == [Place("cuda:0"), Place("cuda:1")]
    assert [place.device for place in local_places("cuda", 4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert local_places("cuda:1", None) == [Place("cuda:1")]
    assert [place.device for place in local_places("cpu", 1)] == ["cpu"]


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except (OSError, IndexError):
            pass
    return found


@pytest.mark.posix("signals")
@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGINT, "1"),
        pytest.param(9, "2", marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, "2", marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, "1", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "2", marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_what_is_done_and_the_rest_can_go_on(model, scans, tmp_path, number, workers):
    if workers == "2" and len(CORES) < 2:
        pytest.skip("there is one core")
    for index in range(8, 60):
        write_scan(scans / f"c{index}_0000.nii.gz", index)
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    command = [
        sys.executable, "-m", "nnturbo.engine.cli", "predict", "-i", scans, "-o", out, "-m", model, "-device", "cpu",
        "--workers", workers, "--log", log, "--backend", "torch",
    ]  # fmt: skip
    # Where the tests run in the background, SIGINT is ignored, and would be there too.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (log.exists() and '"done"' in log.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    family = children(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    done = len(label_files(out))
    assert 1 <= done < 60
    if number == 9:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number
        assert "--continue_prediction does what is missing" in err
        assert "Traceback" not in err
        assert not list(out.glob(".writing-*"))
        assert len(json.loads((out / "predictions.json").read_text())["cases"]) == done
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    again = subprocess.run([*command, "--continue_prediction"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert len(label_files(out)) == 60
    # What was on its way to the disk when the signal came is whole too, but is done again where it had no record.
    assert int(again.stdout.split(" already there")[0].rpartition(" ")[2]) >= done - 6
