"""Shows the progress of a job: one line for people, and a log in JSON lines for programs."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TextIO

from .events import Done, Event, Failed, Finished, Lost, Retried, Started, Tiles

logger = logging.getLogger(__name__)

_ON_TERMINAL_S, _ELSEWHERE_S = 0.2, 60.0


class ProgressLine:
    """One line with cases done, rate, time left and current tiles; it changes, or in a log file is written each minute.

    Args:
        stream: Output stream; on a terminal, the line is replaced.
        clock: Gives the time in seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._live = stream.isatty()
        self._width = 0  # of the line that is there
        self._cases = self._done = self._failed = 0
        self._tiles: dict[str, tuple[int, int]] = {}
        self._began = self._said = clock()

    def __call__(self, event: Event) -> None:
        """Note an event, and show the line if it is time."""
        match event:
            case Started(cases=cases):
                self._cases, self._began = cases, self._clock()
            case Tiles(name=name, done=done, total=total):
                self._tiles[name] = (done, total)
            case Lost(cases=cases):
                for name in cases:
                    self._tiles.pop(name, None)
            case Done(name=name) | Failed(name=name) | Retried(name=name):
                self._tiles.pop(name, None)
                self._done += isinstance(event, Done)
                self._failed += isinstance(event, Failed)
            case Finished():
                if self._live:
                    self._replace("")
                    self._show("\r")
                return
        now = self._clock()
        if now - self._said >= (_ON_TERMINAL_S if self._live else _ELSEWHERE_S):
            self._said = now
            self._say(now)

    def _say(self, now: float) -> None:
        text = self.text(now)
        if self._live:
            self._replace(text[: shutil.get_terminal_size().columns - 1])
        else:
            self._show(text + "\n")

    def _replace(self, text: str) -> None:
        """Write over the line that is there, and spaces over its end: old consoles know no sequence that clears it."""
        self._show("\r" + text.ljust(self._width))
        self._width = len(text)

    def _show(self, text: str) -> None:
        """Write; if the stream is closed, the job continues without progress."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._said = math.inf

    def text(self, now: float) -> str:
        """Describe the progress."""
        ended = self._done + self._failed
        parts = [f"{ended}/{self._cases} cases" + (f", {self._failed} failed" if self._failed else "")]
        # Tiles of unfinished cases count too, so that there is a rate before the first case is done.
        share = ended + sum(done / total for done, total in self._tiles.values() if done < total)
        if share > 0 and now > self._began:
            rate = share / (now - self._began)
            parts.append(_rate(rate))
            parts.append(f"{_duration((self._cases - share) / rate)} left" if ended < self._cases else "writing")
        working = [(name, done, total) for name, (done, total) in self._tiles.items() if done < total]
        if working:
            name, done, total = working[-1]
            others = f" and {len(working) - 1} more" if len(working) > 1 else ""
            parts.append(f"{name} at tile {done} of {total}{others}")
        elif ended < self._cases:
            parts.append("reading")
        return ", ".join(parts)


class JsonLog:
    """Every event but tiles as a line of JSON with its time (UTC), added to a file.

    Args:
        path: The file.

    Raises:
        OSError: Where it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def __call__(self, event: Event) -> None:
        """Add a line in one piece, so that jobs can share a log."""
        if isinstance(event, Tiles) or self._file is None:
            return
        line = json.dumps({"time": datetime.now(timezone.utc).isoformat(), **event.to_json()}) + "\n"
        try:
            os.write(self._file, line.encode())
        except OSError as error:
            logger.warning("%s cannot be written, and is given up: %s", self._path, error.strerror or error)
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _rate(per_s: float) -> str:
    for per, unit in ((per_s, "s"), (60 * per_s, "min")):
        if per >= 1:
            return f"{per:.1f} cases/{unit}"
    return f"{3600 * per_s:.1f} cases/h"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
