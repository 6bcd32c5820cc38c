"""`nnturbo demo`: predicts and evaluates phantoms."""

from __future__ import annotations

import argparse
from typing import Any

from .command import DONE, add_command, say


def add_demo(commands: Any) -> None:
    """Declare the command."""
    add = add_command(commands, "demo", _demo, "predict and evaluate phantoms that no training saw, and draw one")
    add("-m", required=True, metavar="MODEL", help="a model trained on phantoms, such as examples/demo_model")
    add("-o", default="demo", metavar="FOLDER", help="default: %(default)s; must hold nothing but earlier results")
    add("--cases", type=int, default=6, metavar="N", help="phantoms (default: %(default)s)")
    add("--mirror", action="store_true", help="average over mirrored views, which takes eight times as long")
    add(
        "--held_out",
        metavar="FILE",
        help="what python -m nnturbo.benchmarks.demo_model found of the same model over more phantoms, to be shown too",
    )
    add("-device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")


def _demo(options: argparse.Namespace) -> int:
    from ..demo import DEMO_SEED, demo_table, demonstrate, held_out_table

    more = "" if options.held_out is None else f"\n\n{held_out_table(options.held_out, options.m)}"
    say(f"the first {options.cases} phantoms of seed {DEMO_SEED}: generating, predicting, comparing with the truth")
    demo = demonstrate(options.m, options.o, cases=options.cases, mirror=options.mirror, device=options.device)
    say(f"\n{demo_table(demo)}{more}\n\na picture of one case: {demo.picture}")
    return DONE
