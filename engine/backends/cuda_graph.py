"""Launches the network as one CUDA graph: a gain where launching a kernel takes longer than running it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MOST_RECORDED = 2
"""Batch sizes kept: the usual one, and that of the last call for a tile. Each holds its own memory."""

TRIALS = 3
WORTH_IT = 0.97
"""A graph is used if it takes less than this share of the time of single launches."""

Network = Callable[[Tensor], tuple[Tensor, ...]]


class Recording(NamedTuple):
    """One batch size. The next replay overwrites the outputs. `graph` is None if single launches were as fast."""

    graph: torch.cuda.CUDAGraph | None
    inputs: Tensor
    outputs: tuple[Tensor, ...]


_NO_GRAPH = Recording(None, torch.empty(0), ())


class GraphedNetwork:
    """Runs a network on a CUDA device, with a CUDA graph for batch sizes where that is faster.

    Args:
        network: From tiles (N, C, *patch) to any number of tensors; it must do the same work for the same N.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._recordings: dict[torch.Size, Recording] = {}
        self._one_at_a_time = threading.Lock()  # a graph has one place for its input
        self._done = torch.cuda.Event()

    def __call__(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """Run the network on (N, C, *patch)."""
        with self._one_at_a_time:
            try:
                return self._run(tiles)
            except torch.OutOfMemoryError:
                self._recordings.clear()  # their memory may be needed by the next, smaller try
                raise

    def _run(self, tiles: Tensor) -> tuple[Tensor, ...]:
        recording = self._recordings.get(tiles.shape) or self._record(tiles)
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
        while len(self._recordings) >= MOST_RECORDED:
            del self._recordings[next(iter(self._recordings))]
        stream = torch.cuda.Stream(tiles.device)
        inputs = tiles.clone()
        stream.wait_stream(torch.cuda.current_stream(tiles.device))
        with torch.cuda.stream(stream):
            single_ms = _least_ms(lambda: self._network(inputs))  # also lets cuDNN choose its algorithms
            recording, replay_ms = self._captured(inputs, stream)
        torch.cuda.current_stream(tiles.device).wait_stream(stream)
        logger.info("%d tiles: %.2f ms, %.2f ms as a CUDA graph", len(tiles), single_ms, replay_ms)
        if replay_ms > WORTH_IT * single_ms:
            recording = _NO_GRAPH
        self._recordings[tiles.shape] = recording
        return recording

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


def _least_ms(run: Callable[[], object]) -> float:
    """Time a few runs on the current stream, the first of which only warms up."""
    least = float("inf")
    for trial in range(TRIALS + 1):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        if trial:
            least = min(least, began.elapsed_time(ended))
    return least
