"""`nnturbo submit`: packs predictions of the test split."""

from __future__ import annotations

import argparse
from typing import Any

from .command import DONE, add_command, say


def add_submit(commands: Any) -> None:
    """Declare the command."""
    add = add_command(commands, "submit", _submit, "check predictions of the test split and pack them for submission")
    add("-p", required=True, metavar="PREDICTIONS", help="folder of predicted masks and subtype_results.csv")
    add("-o", required=True, metavar="ZIP", help="the submission")
    add("--images", metavar="FOLDER", help="test images, each of which must have a mask on its grid and a row")
    add("--subtypes", metavar="CSV", help="predicted subtypes (default: subtype_results.csv in PREDICTIONS)")
    add("--overwrite", action="store_true", help="replace an existing file")


def _submit(options: argparse.Namespace) -> int:
    from ..evaluation.submission import write_submission

    done = write_submission(
        options.p, options.o, images_folder=options.images, subtypes=options.subtypes, overwrite=options.overwrite
    )
    checked = "compared with the images" if done.compared_with_images else "not compared with images (--images FOLDER)"
    say(f"{done.path}: {len(done.subtypes)} masks and subtypes, {checked}")
    return DONE
