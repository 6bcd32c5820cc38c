"""Copies between main memory and a GPU, beside what computes instead of in its way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor


class Transfers:
    """Copies to and from a device; on a GPU through pinned memory, on streams of their own.

    Args:
        device: Where the network runs. Nothing but a CUDA device needs copies that overlap.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None

    @contextlib.contextmanager
    def uploading(self) -> Iterator[Callable[[], None]]:
        """Run the body on the stream of uploads.

        Yields:
            What makes the stream that calls it, once the body is done, wait until all it has uploaded is there.
        """
        if self._streams is None:
            yield lambda: None
            return
        stream = self._streams[0]
        arrived = torch.cuda.Event()
        with torch.cuda.stream(stream):
            yield lambda: torch.cuda.current_stream(stream.device).wait_event(arrived)
            arrived.record()

    def download(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        """Begin to copy a tensor to main memory, after what the current stream has been asked for.

        Returns:
            What waits for the copy and gives it.
        """
        copy, wait = self._begin(tensor)

        def fetch() -> np.ndarray:
            wait()
            # Pinned memory is scarce, and the result may live long.
            return copy.numpy().copy() if tensor.is_cuda else copy.numpy()

        return fetch

    def download_into(self, target: np.ndarray, tensor: Tensor) -> Callable[[], None]:
        """Begin to copy a tensor to main memory, after what the current stream has been asked for.

        Args:
            target: Of the tensor's shape and number type, with any strides.
            tensor: What to copy; nobody may change it afterwards.

        Returns:
            What waits for the copy and puts it into its place.
        """
        copy, wait = self._begin(tensor)

        def place() -> None:
            wait()
            np.copyto(target, copy.numpy())

        return place

    def _begin(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Begin a copy; returns where it will be, and what waits until it is there."""
        if self._streams is None or not tensor.is_cuda:
            return tensor.cpu(), lambda: None
        stream = self._streams[1]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        arrived = torch.cuda.Event()
        with torch.cuda.stream(stream):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # its memory is not another's before the copy is done
            arrived.record()
        return copy, arrived.synchronize


def begin_to_ask(flag: Tensor) -> Callable[[], bool]:
    """Begin to copy one boolean to main memory.

    `bool` of a tensor on a GPU waits for all that the GPU was asked for until then; what this returns waits for what it
    was asked for before this.
    """
    if not flag.is_cuda:
        return lambda: bool(flag)
    pinned = torch.empty((), dtype=torch.bool, pin_memory=True)
    pinned.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(flag.device))

    def ask() -> bool:
        arrived.synchronize()
        return bool(pinned)

    return ask
