"""What commands print, and how they end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

DONE, SOME_FAILED, UNUSABLE = 0, 1, 2
"""Exit statuses: all is done, some case failed, wrong usage or a model that cannot be used."""


def say(text: str, *, error: bool = False) -> None:
    """Print a line, if anybody can read it: no job is lost to a pipe that was closed or a disk that is full.

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
    """Let no file get the number of a standard stream that is closed, so that nobody writes into it by mistake."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least number that is free


def _give_up(stream: Any) -> None:
    """Send what else goes to a stream nowhere: what it holds would be tried once more when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say_rows(rows: Sequence[tuple[str, str]]) -> int:
    """Print a table of two columns, and end well."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:{width}}  {value}")
    return DONE
