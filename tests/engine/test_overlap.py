"""Steps of a pipeline in threads: order, bounds, errors, and what is left when it ends early."""

import threading
import time

import pytest
from nnturbo.engine.overlap import overlapped


def left():
    return [thread for thread in threading.enumerate() if thread.name.startswith("step")]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_however_long_each_takes(threads):
    def slow(number):
        time.sleep(0.02 if number % 3 == 0 else 0.001)
        return number * number

    assert list(overlapped(slow, range(30), threads=threads, name="step")) == [n * n for n in range(30)]
    assert not left()


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_is_taken_than_there_are_places(threads):
    taken, given = [], 0

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    for _ in overlapped(lambda number: number, items(), threads=threads):
        given += 1
        time.sleep(0.005)
        assert len(taken) <= given + threads
    assert given == 20


def test_steps_run_at_the_same_time():
    meet = threading.Barrier(2, timeout=10)

    def first(number):
        if number == 1:
            meet.wait()
        return number

    def second(number):
        if number == 0:
            meet.wait()  # passes only while the step before works on the next item
        return number

    assert list(overlapped(second, overlapped(first, range(2)))) == [0, 1]


def test_an_item_is_ready_before_there_is_another():
    """Cases are given out one at a time, the next one perhaps only when this one is done."""
    done = threading.Event()

    def items():
        yield 0
        assert done.wait(10)
        yield 1

    results = overlapped(lambda number: number, overlapped(lambda number: number, items(), threads=2))
    assert next(results) == 0
    done.set()
    assert list(results) == [1]


@pytest.mark.parametrize("by", ["run", "items"])
def test_an_error_comes_in_its_place_and_ends_it(by):
    def items():
        for number in range(5):
            if number == 2 and by == "items":
                raise KeyError(number)
            yield number

    def run(number):
        if number == 2 and by == "run":
            raise KeyError(number)
        return number

    results = overlapped(run, items(), threads=3, name="step")
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)
    assert list(results) == []
    assert not left()


def test_closing_it_ends_the_threads_and_closes_what_it_takes_from():
    closed = []

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    steps = overlapped(str, overlapped(int, items(), threads=2, name="step"), threads=2, name="step")
    assert next(steps) == "0"
    steps.close()
    assert closed == [True]
    assert not left()


def test_nothing_gives_nothing():
    assert list(overlapped(int, [], threads=3, name="step")) == []
    assert not left()
