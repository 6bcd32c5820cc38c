"""A real Ray cluster on this machine."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from nnturbo.engine import BackendUnavailable, ModelError
from nnturbo.engine.cli import main
from nnturbo.engine.jobs.cases import find_cases
from nnturbo.engine.jobs.events import Ready
from nnturbo.engine.jobs.job import Job
from nnturbo.engine.jobs.run import run_job
from nnturbo.engine.jobs.worker import ModelArguments
from nnturbo.engine.options import ModelChoice

from tests.engine.factory import write_scan, write_scans
from tests.engine.jobs.outputs import label_files

ray = pytest.importorskip("ray", reason="needs Ray")
pytestmark = [
    pytest.mark.posix("processes of Ray, which start as they do on Linux"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
CHOICE = ModelChoice(mirror=False, backend="torch")


@pytest.fixture(scope="module")
def machines():
    """A cluster that jobs come to and leave."""
    from ray.cluster_utils import Cluster as LocalCluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 10**8}
    made = LocalCluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def cluster(machines):
    return machines.address


@pytest.fixture
def scans(tmp_path):
    return write_scans(tmp_path / "scans", [f"c{index}" for index in range(10)])


def workers(address, model, out, **more):
    from nnturbo.engine.jobs.ray_workers import RayWorkers

    model_arguments = ModelArguments(models=(str(model),), choice=CHOICE)
    return RayWorkers(address, model_arguments, Job(output=out), **{"device": "cpu", "workers": 2, "cores": 1, **more})


@pytest.mark.posix("signals")
def test_a_killed_actor_costs_no_case(cluster, model, scans, tmp_path):
    made = workers(cluster, model, tmp_path / "out")
    pids, events = [], []

    def on_event(event):
        if event.kind == "done" and not pids:
            worker = next(worker for worker in made._running if worker.given)
            pids.append(ray.get(worker.handle.__ray_call__.remote(lambda actor: os.getpid())))
            os.kill(pids[0], signal.SIGKILL)
        events.append(event)

    try:
        outcome = run_job(made, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"), on_event=on_event)
    finally:
        made.close()
    assert sorted(outcome.done) == [f"c{index}" for index in range(10)]
    assert len([event for event in events if event.kind == "lost"]) == 1
    assert len(label_files(tmp_path / "out")) == 10


def test_the_command_gives_what_it_gives_without_a_cluster(cluster, model, scans, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["-i", "scans", "-m", str(model), "--disable_tta", "--backend", "torch", "--disable_progress_bar"]
    (scans / "c3_0000.nii.gz").write_bytes(b"")
    ray_options = ["--ray", cluster, "--workers", "2", "--cores", "1"]
    assert main(["predict", *given, "-o", "far", "-device", "cpu", *ray_options]) == 1
    assert "c3 failed" in capsys.readouterr().err
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["predict", *given, "-o", "near", "-device", "cpu"]) == 1
    assert label_files(tmp_path / "far").keys() == label_files(tmp_path / "near").keys()
    assert len(label_files(tmp_path / "far")) == 9
    assert (tmp_path / "far" / "predictions.json").read_text().count('"status": "done"') == 9


def test_what_is_wrong_is_said(cluster, model, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        workers(cluster, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(BackendUnavailable, match=r"room for 2 processes .* not for 3"):
        workers(cluster, model, tmp_path / "out", workers=3)
    with pytest.raises(ValueError, match="auto, cpu or cuda"):
        workers(cluster, model, tmp_path / "out", device="mps")
    with pytest.raises(BackendUnavailable, match="no Ray cluster answers"):
        workers("127.0.0.1:1", model, tmp_path / "out")


def test_without_ray_the_extra_is_named(model, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailable, match=r"nnturbo\[ray\]"):
        workers("auto", model, tmp_path / "out")


def children(process):
    """Processes that it has started and that still run."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.posix("signals")
@pytest.mark.thorough  # another machine for a dozen seconds; a killed actor is lost in the same way
def test_a_machine_that_dies_costs_no_case(machines, model, scans, tmp_path):
    machine = machines.add_node(num_cpus=1, object_store_memory=10**8)
    made = workers(machines.address, model, tmp_path / "out", workers=3)
    done, events = [], []

    def on_event(event):
        if event.kind == "done":
            done.append(event.name)
            if len(done) == 5:
                workers = children(machine.all_processes["raylet"][0].process.pid)
                machines.remove_node(machine, allow_graceful=False)
                for worker in workers:  # which would work on for a while without their machine
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
        events.append(event.kind)

    for index in range(10, 40):
        write_scan(scans / f"c{index}_0000.nii.gz", index)
    while not all(worker.ready for worker in made._running):
        for worker, message in made._messages():
            worker.ready = isinstance(message, Ready)
    try:
        outcome = run_job(made, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"), on_event=on_event)
    finally:
        made.close()
    assert len(outcome.done) == 40
    assert "lost" in events
