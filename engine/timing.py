"""Where the time of one prediction goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """Milliseconds per stage, added up over every time the stage is entered; stages do not nest."""

    def __init__(self) -> None:
        self._milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body of a `with` statement as part of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._milliseconds[stage] = self._milliseconds.get(stage, 0.0) + (time.perf_counter() - start) * 1e3

    def as_dict(self) -> dict[str, float]:
        """Milliseconds by stage, in the order the stages first ran."""
        return dict(self._milliseconds)
