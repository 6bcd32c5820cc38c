"""`nnturbo phantom`: generates a data set."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from .choices import PHANTOM_COUNTS
from .command import DONE, add_command, progress_line, say


def add_phantom(commands: Any) -> None:
    """Declare the command."""
    add = add_command(
        commands, "phantom", _phantom, "generate a data set of CT-like scans with a pancreas and one lesion"
    )
    add("-o", required=True, metavar="FOLDER", help="where; made if it is not there")
    for split, count in PHANTOM_COUNTS.items():
        add(f"--{split}", type=int, default=count, metavar="N", help=f"{split} cases (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same data set (default: %(default)s)")
    add("--small", action="store_true", help="small regions of coarse voxels: a third of a second a case")
    add("--answers", action="store_true", help="write the test split's masks and subtypes to test_answers")
    add("--overwrite", action="store_true", help="replace files of the same names")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")


def _phantom(options: argparse.Namespace) -> int:
    from ..phantoms.phantom import DEFAULT_SETTINGS, SMALL_SETTINGS, write_dataset

    counts = {split: getattr(options, split) for split in PHANTOM_COUNTS}
    with progress_line("phantoms") as progress:
        write_dataset(
            options.o,
            counts=counts,
            seed=options.seed,
            settings=SMALL_SETTINGS if options.small else DEFAULT_SETTINGS,
            answers=options.answers,
            overwrite=options.overwrite,
            workers=options.workers,
            progress=progress,
        )
    say(f"{options.o}: {', '.join(f'{count} {split}' for split, count in counts.items())}")
    say(f"next: nnturbo prepare -i {shlex.quote(options.o)} -d 801 -n PancreasPhantom")
    return DONE
