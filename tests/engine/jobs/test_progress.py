"""The line of progress, and the log in JSON lines."""

import io
import json

import pytest
from nnturbo.engine.jobs.events import Done, Failed, Finished, Lost, Retried, Started, Tiles
from nnturbo.engine.jobs.progress import JsonLog, ProgressLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


def line(stream=None):
    now = [0.0]
    made = ProgressLine(stream or Terminal(), clock=lambda: now[0])
    made(Started(cases=40, skipped=2, kept=0))
    return made, now


def test_rate_and_time_left_count_the_case_at_hand():
    progress, now = line()
    now[0] = 30.0
    progress(Done(name="a"))
    progress(Failed(name="b", error="x"))
    progress(Tiles(name="c", done=6, total=12))
    assert progress.text(30.0) == "2/40 cases, 1 failed, 5.0 cases/min, 7 min 30 s left, c at tile 6 of 12"


@pytest.mark.parametrize(
    ("tiles", "seconds", "expected"),
    [
        ([], 5, "0/40 cases, reading"),
        ([("a", 1, 4)], 1000, "0/40 cases, 0.9 cases/h, 44 h 10 min left, a at tile 1 of 4"),
        ([("a", 1, 4), ("b", 1, 4)], 0.25, "0/40 cases, 2.0 cases/s, 20 s left, b at tile 1 of 4 and 1 more"),
        ([("a", 4, 4)], 5, "0/40 cases, reading"),
    ],
)
def test_where_the_work_is(tiles, seconds, expected):
    progress, _ = line()
    for name, done, total in tiles:
        progress(Tiles(name=name, done=done, total=total))
    assert progress.text(seconds) == expected


def test_cases_that_come_again_are_not_counted_twice():
    progress, now = line()
    now[0] = 10.0
    progress(Tiles(name="a", done=1, total=2))
    progress(Lost(how="signal 9", cases=["a"]))
    progress(Tiles(name="b", done=1, total=2))
    progress(Retried(name="b", error="x"))
    assert progress.text(10.0) == "0/40 cases, reading"
    for index in range(40):
        progress(Done(name=str(index)))
    assert progress.text(10.0) == "40/40 cases, 4.0 cases/s, writing"


def test_a_terminal_has_one_line_that_is_replaced_and_removed():
    stream = Terminal()
    progress, now = line(stream)
    now[0] = 1.0
    progress(Tiles(name="a", done=1, total=2))
    progress(Tiles(name="a", done=2, total=2))  # too soon for another look
    progress(Finished(done=0, failed=0))
    _, shown, nothing, end = stream.getvalue().split("\r")
    assert shown.endswith(" left, a at tile 1 of 2")
    assert nothing == " " * len(shown)
    assert end == ""


def test_a_shorter_line_covers_a_longer_one_and_no_console_has_to_know_escape_sequences():
    stream = Terminal()
    progress, now = line(stream)
    for second, name in ((1, "a longer name"), (2, "b"), (3, "c")):
        now[0] = float(second)
        progress(Tiles(name=name, done=1, total=2))
        progress(Lost(how="signal 9", cases=[name]))
    assert "\x1b" not in stream.getvalue()
    _, longest, shorter, *_ = stream.getvalue().split("\r")
    assert len(shorter) == len(longest) > len(shorter.rstrip())


def test_a_file_has_a_line_a_minute():
    stream = io.StringIO()
    progress, now = line(stream)
    for second in range(1, 181):
        now[0] = float(second)
        progress(Tiles(name="a", done=second, total=200))
    progress(Finished(done=0, failed=0))
    assert [text.split(", ")[-1] for text in stream.getvalue().splitlines()] == [
        "a at tile 60 of 200",
        "a at tile 120 of 200",
        "a at tile 180 of 200",
    ]


def test_the_log_has_a_line_for_every_event_but_tiles(tmp_path):
    for _ in range(2):  # a job that goes on adds to it
        log = JsonLog(tmp_path / "log.jsonl")
        log(Started(cases=1, skipped=0, kept=0))
        log(Tiles(name="a", done=1, total=2))
        log(Done(name="a", timings_ms={"read": 1.5}))
        log.close()
    lines = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [each["event"] for each in lines] == ["started", "done"] * 2
    assert all(each["time"].endswith("+00:00") for each in lines)


@pytest.mark.posix("a device that is full")
def test_a_log_that_cannot_be_written_stops_nothing(caplog):
    log = JsonLog("/dev/full")
    log(Started(cases=1, skipped=0, kept=0))
    log(Finished(done=1, failed=0))
    log.close()
    assert caplog.text.count("is given up") == 1
