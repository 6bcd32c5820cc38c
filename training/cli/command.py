"""What the commands share: how they are declared, what they print, and how nnU-Net's folders are found."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...engine.errors import EngineError

DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
    """Declare a command.

    Args:
        commands: What `ArgumentParser.add_subparsers` returns.
        name: Name of the command.
        run: Takes the parsed arguments and returns the exit status.
        text: One line of help, without a full stop.

    Returns:
        The new parser's `add_argument`.
    """
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=lambda options: _in_one_line(run, options))
    return parser.add_argument


def _in_one_line(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; what the file system refuses becomes an error like any other."""
    try:
        return run(options)
    except OSError as error:
        raise EngineError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        sys.stderr.write("nnturbo: interrupted; every file that is there is complete\n")
        return INTERRUPTED


def say(text: str) -> None:
    """Print to stdout at once."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def progress_line(what: str) -> Iterator[Callable[[int, int, object], None]]:
    """Give a function to call with the number done, the number of all and the case; it draws on terminals only."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="case", disable=None, leave=False) as bar:

        def update(done: int, total: int, _: object) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def nnunet_folder(given: str | None, variable: str, option: str) -> Path:
    """Take one of nnU-Net's folders from an option or the environment.

    Raises:
        ValueError: Where neither names it.
    """
    folder = given or os.environ.get(variable)
    if not folder:
        raise ValueError(f"nnU-Net's folder must be given as {option} FOLDER or by the environment variable {variable}")
    return Path(folder)


def dataset_name(given: str, preprocessed: Path) -> str:
    """Find a data set by its number or name.

    Raises:
        ValueError: Where not exactly one fits.
    """
    pattern = f"Dataset{int(given):03d}_*" if given.isdecimal() else given
    found = sorted(path.name for path in preprocessed.glob(pattern) if path.is_dir())
    if len(found) != 1:
        raise ValueError(
            f"-d {given} must name one data set in {preprocessed}, found {', '.join(found) or 'none'}: run nnturbo "
            f"prepare first, or check --preprocessed"
        )
    return found[0]
