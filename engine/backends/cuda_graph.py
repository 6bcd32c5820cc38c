"""Launches the network as one CUDA graph: a gain where launching a kernel takes longer than running it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.device_memory import RECORDING, give_back

logger = logging.getLogger(__name__)

MOST_RECORDED = 4
"""Batch sizes kept, each of which holds memory of its own; the sliding window has as many."""

LEAST_LAUNCHING = 0.5
"""A network is recorded where launching takes at least this share of its time: elsewhere a GPU never waits for it."""

TRIALS = 3
WORTH_IT = 0.97
"""A graph is used if it takes less than this share of the time of single launches."""

Network = Callable[[Tensor], tuple[Tensor, ...]]
_Result = TypeVar("_Result")


class Recording(NamedTuple):
    """One batch size. The next replay overwrites the outputs. `graph` is None if single launches were as fast."""

    graph: torch.cuda.CUDAGraph | None
    inputs: Tensor
    outputs: tuple[Tensor, ...]


_NO_GRAPH = Recording(None, torch.empty(0), ())


class GraphedNetwork:
    """Runs a network on a CUDA device, with a CUDA graph for batch sizes where that is faster.

    The first call of a batch size lets cuDNN choose its algorithms, the second is timed; where much of that is
    launching, the network is recorded, and replayed from the third call on if that is faster. One thread may call it at
    a time.

    Args:
        network: From tiles (N, C, *patch) to any number of tensors; it must do the same work for the same N.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._recordings: dict[torch.Size, Recording | None] = {}
        self._done = torch.cuda.Event()

    def __call__(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """Run the network on (N, C, *patch)."""
        try:
            return self._run(tiles)
        except torch.OutOfMemoryError:
            self._recordings.clear()  # they hold memory which the caller needs to try again with less
            raise

    def _run(self, tiles: Tensor) -> tuple[Tensor, ...]:
        if tiles.shape not in self._recordings:
            while len(self._recordings) >= MOST_RECORDED:
                del self._recordings[next(iter(self._recordings))]
            if not self._recordings:
                give_back()  # what an earlier network has left
                _keep_workspace(tiles)
            self._recordings[tiles.shape] = None
            return self._network(tiles)
        recording = self._recordings[tiles.shape]
        if recording is None:
            launched: list[float] = []
            outputs, taken_ms = _timed(lambda: self._network(tiles), launched)
            gains = launched[0] >= LEAST_LAUNCHING * taken_ms
            self._recordings[tiles.shape] = self._record(tiles) if gains else _NO_GRAPH
            return outputs
        if recording.graph is None:
            return self._network(tiles)
        # The last call may have used another stream.
        torch.cuda.current_stream(tiles.device).wait_event(self._done)
        recording.inputs.copy_(tiles)
        recording.graph.replay()
        outputs = tuple(output.clone() for output in recording.outputs)
        self._done.record(torch.cuda.current_stream(tiles.device))
        return outputs

    def _record(self, tiles: Tensor) -> Recording:
        """Record the launches for this batch size, and find out whether replaying them is faster."""
        inputs = tiles.clone()
        with RECORDING:
            stream = _recording_stream(tiles.device)
            stream.wait_stream(torch.cuda.current_stream(tiles.device))
            with torch.cuda.stream(stream):
                _keep_workspace(tiles)
                single_ms = _least_ms(lambda: self._network(inputs))
                recording, replay_ms = self._captured(inputs, stream)
            torch.cuda.current_stream(tiles.device).wait_stream(stream)
            give_back()  # single launches had blocks of their own, beside those of the graph
        logger.info("%d tiles: %.2f ms, %.2f ms as a CUDA graph", len(tiles), single_ms, replay_ms)
        return recording if replay_ms <= WORTH_IT * single_ms else _NO_GRAPH

    def _captured(self, inputs: Tensor, stream: torch.cuda.Stream) -> tuple[Recording, float]:
        """Record the launches, and time a replay; a network that cannot be recorded runs without a graph."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may upload scans meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = self._network(inputs)
            return Recording(graph, inputs, outputs), _least_ms(graph.replay)
        except RuntimeError as error:  # for example, the graph does not fit into memory
            logger.warning("the network cannot be a CUDA graph: %s", str(error).partition("\n")[0])
            return _NO_GRAPH, math.inf


@lru_cache(maxsize=64)
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all networks of a device, since cuBLAS keeps memory for each thread and stream."""
    return torch.cuda.Stream(device)


def _keep_workspace(tiles: Tensor) -> None:
    """Multiply small matrices on the current stream.

    cuBLAS asks for memory at its first product on a stream, 32 MiB on the newest GPUs, and keeps it: cut out of a large
    block which features have left, it would keep that from being given back.
    """
    ones = tiles.new_ones(16, 16)
    F.linear(ones, ones, ones[0])


def _least_ms(run: Callable[[], object]) -> float:
    """Time a few runs on the current stream, the first of which only warms up."""
    return min([_timed(run)[1] for _ in range(TRIALS + 1)][1:])


def _timed(run: Callable[[], _Result], launched: list[float] | None = None) -> tuple[_Result, float]:
    """Run a function on the current stream; returns its result and the milliseconds until the GPU was done.

    Args:
        run: The function.
        launched: Gets the milliseconds until it returned.
    """
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.current_stream().synchronize()
    began.record()
    start = time.perf_counter()
    result = run()
    if launched is not None:
        launched.append(1e3 * (time.perf_counter() - start))
    ended.record()
    ended.synchronize()
    return result, began.elapsed_time(ended)
