"""Printing and exit statuses of commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

DONE, SOME_FAILED, UNUSABLE = 0, 1, 2
"""Exit statuses: all cases are done; some case failed; wrong usage, or a model that cannot be used."""


def say(text: str, *, error: bool = False) -> None:
    """Print a line; a closed pipe or a full disk does not end a job.

    Args:
        text: The line.
        error: Print it on stderr.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed from the start
        return
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        _give_up(stream)


def open_missing_streams() -> None:
    """Open the null device for closed standard streams, so that no other file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the least free number


def _give_up(stream: Any) -> None:
    """Send all further output of a stream to the null device; Python would try to write it again at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say_rows(rows: Sequence[tuple[str, str]]) -> int:
    """Print a table of two columns, and return the exit status."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:{width}}  {value}")
    return DONE
