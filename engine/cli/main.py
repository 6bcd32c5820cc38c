"""The `nnturbo` command: reads arguments, calls the library, and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence

from nnturbo import __version__

from .build import add_build
from .doctor import add_doctor
from .inspect import add_inspect
from .output import UNUSABLE, open_missing_streams, say
from .predict import add_predict
from .run import add_run
from .view import add_view

EXTRA_OF = {
    "scipy": "demo",
    "matplotlib": "demo",
    "nnunetv2": "training",
    "sklearn": "training",
    "openpyxl": "training",
}
"""What commands import that an install without extras lacks, and the extra that brings it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when every case is done, 1 when some case failed, 2 for wrong usage or a model that cannot be used.
    """
    options = _parser().parse_args(arguments)
    open_missing_streams()
    logging.raiseExceptions = False  # a log that cannot be written ends nothing
    if sys.stdout is not None:
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names may hold bytes that are not text
    logging.basicConfig(
        level=logging.INFO if getattr(options, "verbose", False) else logging.WARNING,
        format="%(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("nnturbo.engine.bundles.opening").setLevel(logging.INFO)  # what runs the network is always logged
    from ..errors import EngineError

    try:
        return options.run(options)
    except (EngineError, ValueError) as error:
        say(f"nnturbo: {error}", error=True)
        return UNUSABLE
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        if module not in EXTRA_OF:
            raise
        say(f"nnturbo: this needs {module}, which is missing: pip install 'nnturbo[{EXTRA_OF[module]}]'", error=True)
        return UNUSABLE
    except KeyboardInterrupt:
        say("nnturbo: interrupted", error=True)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnturbo", description="Runs trained nnU-Net v2 models: the labels nnU-Net gives, many times sooner."
    )
    parser.add_argument("--version", action="version", version=f"nnturbo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_predict(commands)
    add_run(commands)
    add_view(commands)
    add_build(commands)
    add_inspect(commands)
    add_doctor(commands)
    # Only the command line may import training and benchmarks; these two imports are light.
    from ...benchmarks.cli import add_benchmark
    from ...training.cli import add_commands

    add_commands(commands)
    add_benchmark(commands)
    return parser
