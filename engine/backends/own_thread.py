"""One thread for all calls of a network on a GPU, however many threads ask for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


class OwnThread:
    """Runs one function after another in the same thread, on the caller's stream.

    cuDNN's choice of algorithms belongs to the thread that made it: another thread searches again, for seconds.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Its thread ends with it.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nnturbo-network")

    def __call__(self, run: Callable[[], _Result]) -> _Result:
        """Run a function there, and return what it returns or raise what it raises."""
        stream = torch.cuda.current_stream(self._device)

        def on_stream() -> _Result:
            with torch.cuda.stream(stream):
                return run()

        # No name for the future: what a failed call held on the device would live as long as that.
        return self._executor.submit(on_stream).result()
