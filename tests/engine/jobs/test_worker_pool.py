"""Who gets which case, with processes that are only played: losses, retries, shares."""

import random

import pytest
from nnturbo.engine import EngineError, ModelError, OutputError, PredictionError
from nnturbo.engine.errors import DeviceLost
from nnturbo.engine.jobs.case_record import DONE, FAILED, Fingerprint, Record
from nnturbo.engine.jobs.cases import CaseFiles
from nnturbo.engine.jobs.events import Ended, Ready, Stop, Tiles, Unusable
from nnturbo.engine.jobs.job import Job, ModelInfo
from nnturbo.engine.jobs.run import run_job
from nnturbo.engine.jobs.worker_pool import Worker, WorkerPool, throttled

INFO = ModelInfo(
    models=(), file_ending=".nii.gz", reader="SimpleITKIO", class_names=None, previous_stage=None, plans={}, dataset={}
)


class Played(WorkerPool):
    """Processes that do one case a turn; some cases end their process, some processes cannot load."""

    def __init__(self, places, *, ahead=4, poison=(), loads=lambda place, times: None, fails=None, stop=None):
        self.poison, self.loads, self.fails, self.stop = set(poison), loads, dict(fails or {}), stop
        self.started, self.log, self.most = {}, [], 0
        super().__init__(places, ahead)

    def _start(self, place):
        self.started[place] = self.started.get(place, 0) + 1
        return Worker(place=place, handle=[])

    def _send(self, worker, case):
        worker.handle.append(case)
        self.log.append((worker.place, case.name))
        self.most = max(self.most, len(worker.given))

    def _messages(self):
        for worker in list(self._running):
            if not worker.ready:
                error = self.loads(worker.place, self.started[worker.place])
                yield worker, Ready(INFO) if error is None else error
            elif worker.handle:
                case = worker.handle.pop(0)
                if case.name in self.poison:
                    yield worker, Ended("signal 9")
                elif case.name == self.stop:
                    yield worker, Stop(OutputError("the disk is full"))
                else:
                    yield worker, self.record(case.name)

    def record(self, name):
        if self.fails.get(name, 0) > 0:
            self.fails[name] -= 1
            return Record(name=name, status=FAILED, error="the disk did not answer", transient=True)
        return Record(name=name, status=DONE)

    def _end(self, workers):
        for worker in workers:
            worker.handle.clear()


def cases(count):
    return [CaseFiles(name=f"c{index:02d}", images=()) for index in range(count)]


def run(workers, count, tmp_path):
    events = []
    outcome = run_job(workers, cases(count), Job(output=tmp_path), on_event=events.append)
    workers.close()
    return outcome, events


def test_all_processes_work_and_end_together(tmp_path):
    workers = Played("xyz", ahead=5)
    outcome, _ = run(workers, 40, tmp_path)
    assert sorted(outcome.done) == [case.name for case in cases(40)]
    by_place = {place: [name for at, name in workers.log if at == place] for place in "xyz"}
    assert all(len(names) >= 10 for names in by_place.values())
    assert workers.most == 5


def test_a_process_that_is_lost_costs_no_case(tmp_path):
    lost = []

    class Once(Played):
        def _messages(self):
            for worker, message in super()._messages():
                if isinstance(message, Record) and message.name == "c07" and not lost:
                    lost.append(sorted(worker.given))
                    yield worker, Ended("signal 9")
                else:
                    yield worker, message

    workers = Once("xy")
    outcome, events = run(workers, 20, tmp_path)
    assert sorted(outcome.done) == [case.name for case in cases(20)]
    assert not outcome.failed
    (event,) = (event for event in events if event.kind == "lost")
    assert sorted(event.cases) == lost[0]
    assert sorted(event.name for event in events if event.kind == "retried") == lost[0]
    assert sum(workers.started.values()) == 3


def test_cases_that_end_their_process_fail_and_only_they(tmp_path):
    outcome, _ = run(Played("xy", poison=["c03", "c04", "c11"]), 20, tmp_path)
    assert sorted(outcome.failed) == ["c03", "c04", "c11"]
    assert len(outcome.done) == 17
    assert outcome.failed["c03"] == "the process that worked on it ended (signal 9)"


def test_what_may_pass_is_tried_once_more_at_the_end(tmp_path):
    workers = Played("x", fails={"c02": 1, "c05": 2})
    outcome, _ = run(workers, 8, tmp_path)
    assert outcome.failed == {"c05": "the disk did not answer"}
    assert [name for _, name in workers.log][-2:] == ["c02", "c05"]
    assert len(workers.log) == 10


def test_a_case_that_was_recorded_before_its_process_was_lost_is_done(tmp_path):
    class Late(Played):
        def _send(self, worker, case):
            super()._send(worker, case)
            if case.name == "c03" and self.started["x"] > 1:
                (tmp_path / "c03.nii.gz").write_bytes(b"labels")
                results = {"c03.nii.gz": Fingerprint.of(tmp_path / "c03.nii.gz")}
                made_of = INFO.made_of(Job(output=tmp_path), case)
                record = Record(name="c03", status=DONE, results=results, made_of=made_of)
                INFO.record_folder(Job(output=tmp_path)).write(record)

    outcome, _ = run(Late("x", poison=["c03"]), 8, tmp_path)
    assert outcome.failed == {}
    assert len(outcome.done) == 8


def test_a_full_disk_ends_it(tmp_path):
    outcome, _ = run(Played("xy", stop="c05"), 20, tmp_path)
    assert outcome.stopped == "the disk is full"
    assert len(outcome.done) + len(outcome.left) == 20
    assert "c05" in outcome.left
    assert "c19" in outcome.left


def test_a_model_that_cannot_be_used_is_said_at_once():
    with pytest.raises(ModelError, match="no weights"):
        Played("xy", loads=lambda place, times: Unusable(ModelError("no weights")))
    with pytest.raises(DeviceLost, match="ended while it loaded: signal 11"):
        Played("x", loads=lambda place, times: Ended("signal 11"))


def test_a_place_that_never_loads_is_given_up(tmp_path):
    workers = Played("xy", loads=lambda place, times: Unusable(ModelError("broken")) if place == "y" else None)
    outcome, _ = run(workers, 10, tmp_path)
    assert len(outcome.done) == 10
    assert workers.started == {"x": 1, "y": 1}


def test_when_no_process_loads_again_the_rest_is_left(tmp_path):
    workers = Played("x", poison=["c03"], loads=lambda place, times: Ended("signal 11") if times > 1 else None)
    outcome, _ = run(workers, 10, tmp_path)
    assert "no process is left" in outcome.stopped
    assert len(outcome.done) == 3
    assert outcome.left == [case.name for case in cases(10)[3:]]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_every_case_is_accounted_for(tmp_path, seed):
    luck = random.Random(seed)

    class Unlucky(Played):
        def _messages(self):
            for worker, message in super()._messages():
                yield worker, Ended("signal 9") if luck.random() < 0.1 else message

    try:
        workers = Unlucky("wxyz", poison={f"c{luck.randrange(30):02d}" for _ in range(3)})
    except EngineError:
        return
    outcome, _ = run(workers, 30, tmp_path)
    assert sorted([*outcome.done, *outcome.failed, *outcome.left]) == [case.name for case in cases(30)]
    assert outcome.left == [] or outcome.stopped
    for name in set(outcome.failed) - workers.poison:
        assert [at for at, each in workers.log if each == name][1:], "an innocent case was tried once only"


def test_tiles_are_told_now_and_then_and_the_last_always():
    told, now = [], [0.0]
    on_event = throttled(told.append, 1.0, lambda: now[0])
    for done in range(1, 11):
        now[0] += 0.3
        on_event(Tiles(name="a", done=done, total=10))
    assert [event.done for event in told] == [1, 5, 9, 10]


def test_errors_say_whether_they_may_pass():
    assert PredictionError("x", transient=True).transient
    assert not PredictionError("x").transient
