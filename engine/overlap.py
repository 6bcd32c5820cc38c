"""One step of a pipeline over many items: done in threads, ahead of who takes the results, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

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
    if threads == 0:
        try:
            for item in source:
                yield run(item)
        finally:
            if leave is not None:
                leave()
            close()
        return
    taking = threading.Lock()
    places = threading.Semaphore(threads + 1)
    stopped = threading.Event()
    slots: queue.SimpleQueue[Future[_Result] | None] = queue.SimpleQueue()

    def take() -> tuple[_Item, Future[_Result]] | None:
        """Take the next item; results come in the order in which items are taken."""
        with taking:
            if stopped.is_set():
                return None
            try:
                item = next(source)
            except StopIteration:
                stopped.set()
                slots.put(None)
                return None
            except BaseException as error:
                stopped.set()
                slots.put(_failed(error))
                return None
            slot: Future[_Result] = Future()
            slots.put(slot)
            return item, slot

    def work() -> None:
        while True:
            places.acquire()
            taken = take()
            if taken is None:
                places.release()  # another thread may wait for a place only to see that there is nothing left
                return
            item, slot = taken
            try:
                slot.set_result(run(item))
            except BaseException as error:
                slot.set_exception(error)
            # A thread that waits for the next item holds on to nothing.
            del taken, item, slot

    workers = [threading.Thread(target=work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
    for thread in workers:
        thread.start()
    try:
        while (slot := slots.get()) is not None:
            result = slot.result()
            del slot
            yield result
            del result
            places.release()
    finally:
        stopped.set()
        if leave is not None:
            leave()
        for _ in workers:
            places.release()
        for thread in workers:
            thread.join()
        close()


def _failed(error: BaseException) -> Future[Any]:
    slot: Future[Any] = Future()
    slot.set_exception(error)
    return slot
