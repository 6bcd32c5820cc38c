"""`nnturbo run`: a program that calls nnU-Net, with nnturbo under it."""

from __future__ import annotations

import argparse
from typing import Any


def add_run(commands: Any) -> None:
    """Declare the command."""
    run = commands.add_parser(
        "run",
        help="start a program that calls nnU-Net, with nnturbo in nnU-Net's place",
        usage="nnturbo run PROGRAM [ARGUMENTS ...]",
        description="Starts an unmodified Python program in which nnU-Net's predictor, and the commands "
        "nnUNetv2_predict and nnUNetv2_predict_from_modelfolder, are nnturbo's; in processes that it starts too. Its "
        "exit status is the program's. Example: nnturbo run TotalSegmentator -i ct.nii.gz -o segmentations",
    )
    run.add_argument("program", metavar="PROGRAM", help="a command, a .py file, or python (for python -m MODULE)")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="of the program")
    run.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from ..nnunet.acceleration import run

    run(options.program, options.arguments)
