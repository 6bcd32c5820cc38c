"""`nnturbo evaluate`: compares predictions with the truth."""

from __future__ import annotations

import argparse
import os
from typing import Any

from .command import DONE, SOME_FAILED, add_command, say


def add_evaluate(commands: Any) -> None:
    """Declare the command."""
    add = add_command(commands, "evaluate", _evaluate, "compare predicted masks and subtypes with the truth")
    add("-p", required=True, metavar="PREDICTIONS", help="folder of predicted masks")
    add(
        "-r",
        required=True,
        metavar="REFERENCES",
        help="the prepared data set or the original one, or any folder of true masks, such as test_answers",
    )
    add("--subtypes", metavar="CSV", help="predicted subtypes (default: subtype_results.csv in PREDICTIONS)")
    add(
        "--reference_subtypes",
        metavar="TABLE",
        help="true subtypes: csv or xlsx with case (or Names, or filename) and subtype (default: those of REFERENCES)",
    )
    add(
        "--split",
        choices=("train", "validation", "all"),
        help="which references (default: validation where they tell splits, else all)",
    )
    add("-o", metavar="FOLDER", help="for evaluation.json, .csv and .png (default: PREDICTIONS/evaluation)")
    add("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of the bootstrap (default: %(default)s)")


def _evaluate(options: argparse.Namespace) -> int:
    from ..data.references import holds_splits
    from ..evaluation.evaluate import comparison_table, evaluate

    split = options.split or ("validation" if holds_splits(options.r) else "all")
    out = options.o or os.path.join(options.p, "evaluation")
    evaluation = evaluate(
        options.p,
        options.r,
        subtypes=options.reference_subtypes,
        predicted_subtypes=options.subtypes,
        split=None if split == "all" else split,
        out=out,
        resamples=options.resamples,
        seed=options.seed,
    )
    say(comparison_table(evaluation))
    say(f"\nevery case and measure: {out}")
    return SOME_FAILED if evaluation.missing_masks or evaluation.missing_subtypes else DONE
