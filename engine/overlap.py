"""One step of a pipeline over many items: done in threads, ahead of who takes the results, in order."""

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
    """Run a function over items in threads; steps are chained by giving one's results as the next one's items.

    Args:
        run: What to do with an item.
        items: Taken one at a time, by one thread at a time, no earlier than there is a place for the result.
        threads: How many run at once; as many items, and one more, are between being taken and being given out. With 0,
            each item is done when its result is asked for.
        name: Of the threads, for debuggers.
        leave: Called when it ends, before it waits for what still runs, which may take notice and end early.

    Yields:
        Results in the order of the items. What `run` or `items` raises comes in its place, and ends it.

    Note:
        Closing it waits for what runs, and closes `items`.
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
        run: What to do with an item.
        source: Of the items.
        threads: How many run at once.
        name: Of the threads.

    Attributes:
        slots: The results to come, in the order in which items are taken, and None after the last.
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
                self._places.release()  # another thread may wait for a place only to see that there is nothing left
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
