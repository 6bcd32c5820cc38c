"""Where the time of one prediction goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timings:
    """Milliseconds per stage, added up over every time the stage is entered; stages do not nest.

    Args:
        device: Where stages compute. A GPU goes on after Python has left a stage: there the longer of both counts.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._host_ms: dict[str, float] = {}
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str, *, on_gpu: bool = True) -> Iterator[None]:
        """Time the body of a `with` statement as part of a stage.

        Args:
            stage: Its name.
            on_gpu: Whether it asks the GPU for something; else what others have asked for must not count.
        """
        start = time.perf_counter()
        began = self._event() if on_gpu else None
        try:
            yield
        finally:
            ended = self._event() if on_gpu else None
            if began is not None and ended is not None:
                self._events.append((stage, began, ended))
            self._host_ms[stage] = self._host_ms.get(stage, 0.0) + (time.perf_counter() - start) * 1e3

    def _event(self) -> torch.cuda.Event | None:
        """Mark a moment of the GPU's current stream."""
        if self._gpu is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    def as_dict(self) -> dict[str, float]:
        """Milliseconds by stage, in the order the stages first ran; waits for a GPU to be done with them."""
        on_gpu: dict[str, float] = {}
        for stage, began, ended in self._events:
            ended.synchronize()
            on_gpu[stage] = on_gpu.get(stage, 0.0) + began.elapsed_time(ended)
        return {stage: max(host, on_gpu.get(stage, 0.0)) for stage, host in self._host_ms.items()}
