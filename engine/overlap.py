"""Runs one step of a pipeline over many items in threads, ahead of the caller, and gives results in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def overlapped(
    run: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    threads: int = 1,
    name: str = "nnturbo",
    leave: Callable[[], None] | None = None,
) -> Generator[_Result, None, None]:
    """Run a function over items in threads; the results of one step can be the items of the next.

    Args:
        run: Function of an item.
        items: Taken one at a time, by one thread at a time, when there is room for the result.
        threads: Number of threads. At most one more item than threads has been taken and its result not yielded. With
            0, each item is run when its result is needed.
        name: Name of the threads, for debuggers.
        leave: Called at the end, before it waits for running items, so that these can stop early.

    Yields:
        Results in the order of the items. An exception of `run` or `items` is raised in its place, and ends the step.

    Note:
        Closing the generator waits for running items, and closes `items`.
    """
    source = iter(items)
    close: Callable[[], Any] = getattr(source, "close", lambda: None)
    leave = leave or (lambda: None)
    if threads == 0:
        try:
            for item in source:
                yield run(item)
        finally:
            leave()
            close()
        return
    step = _Step(run, source, threads, name)
    try:
        while (slot := step.slots.get()) is not None:
            result = slot.result()
            del slot
            yield result
            del result
            step.make_room()
    finally:
        step.stop()
        leave()
        step.join()
        close()


class _Step(Generic[_Item, _Result]):
    """Threads that take items and run a function on them.

    Args:
        run: Function of an item.
        source: Iterator over the items.
        threads: Number of threads.
        name: Name of the threads.

    Attributes:
        slots: Future results, in the order in which items are taken, and None after the last.
    """

    def __init__(self, run: Callable[[_Item], _Result], source: Iterator[_Item], threads: int, name: str) -> None:
        self.slots: queue.SimpleQueue[Future[_Result] | None] = queue.SimpleQueue()
        self._run, self._source = run, source
        self._taking = threading.Lock()
        self._places = threading.Semaphore(threads + 1)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def make_room(self) -> None:
        """Let one more item be taken."""
        self._places.release()

    def stop(self) -> None:
        """Take no more items."""
        self._stopped.set()

    def join(self) -> None:
        """Wait for the threads."""
        for _ in self._threads:
            self._places.release()
        for thread in self._threads:
            thread.join()

    def _take(self) -> tuple[_Item, Future[_Result]] | None:
        """Take the next item and queue a slot for its result; None after the last one."""
        with self._taking:
            if self._stopped.is_set():
                return None
            try:
                item = next(self._source)
            except StopIteration:
                self._stopped.set()
                self.slots.put(None)
                return None
            except BaseException as error:
                self._stopped.set()
                self.slots.put(_failed(error))
                return None
            slot: Future[_Result] = Future()
            self.slots.put(slot)
            return item, slot

    def _work(self) -> None:
        while True:
            self._places.acquire()
            taken = self._take()
            if taken is None:
                self._places.release()  # let other waiting threads see the end too
                return
            item, slot = taken
            try:
                slot.set_result(self._run(item))
            except BaseException as error:
                slot.set_exception(error)
            # A thread that waits for the next item must not keep the last one in memory.
            del taken, item, slot


def _failed(error: BaseException) -> Future[Any]:
    slot: Future[Any] = Future()
    slot.set_exception(error)
    return slot
