"""`nnturbo publish`: copies a trained model for publication."""

from __future__ import annotations

import argparse
from typing import Any

from .command import DONE, add_command, say


def add_publish(commands: Any) -> None:
    """Declare the command."""
    add = add_command(commands, "publish", _publish, "copy a trained model without the state of its training")
    add("-m", required=True, metavar="MODEL", help="model folder")
    add("-o", required=True, metavar="FOLDER", help="the copy; must not exist")
    add("-f", nargs="+", metavar="FOLD", help="folds to copy (default: all that are there)")
    add("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint file (default: %(default)s)")


def _publish(options: argparse.Namespace) -> int:
    from ..publish import publish_model

    say(f"{publish_model(options.m, options.o, folds=options.f, checkpoint=options.chk)}: ready to hand on")
    return DONE
