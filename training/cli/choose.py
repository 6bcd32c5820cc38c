"""`nnturbo choose`: proposes models, classifier and aggregation by held-out cases, for `nnturbo predict` to take."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .choices import TAKE
from .command import DONE, add_command, progress_line, say
from .crossvalidate import add_held_out_flags, chosen_folds, dataset_folders

CHOICE_FILE = "choice.json"


def add_choose(commands: Any) -> None:
    """Declare the command."""
    add = add_command(
        commands, "choose", _choose, "choose among trained models and their ensembles, classifiers and aggregations"
    )
    add_held_out_flags(add)
    add("-m", required=True, nargs="+", metavar="MODEL", help="model folders, up to five, trained on the same splits")
    add("-o", required=True, metavar="FOLDER", help=f"for {CHOICE_FILE}; then: nnturbo predict -m FOLDER/{CHOICE_FILE}")
    add(
        "--take",
        choices=TAKE,
        default=TAKE[0],
        help="the simplest way that is not clearly worse than the best, or the best (default: %(default)s)",
    )
    add("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of the bootstrap (default: %(default)s)")


def _choose(options: argparse.Namespace) -> int:
    from ...engine.files import check_writable
    from ...engine.model.choice import Choice, write_choice
    from ..choose import candidate_table, propose
    from ..evidence import gather_evidence

    if options.resamples < 1:
        raise ValueError(f"--resamples must be at least 1, got {options.resamples}")
    if options.seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {options.seed}")
    path = Path(options.o) / CHOICE_FILE
    check_writable(path)
    raw_dataset, preprocessed_dataset = dataset_folders(options)
    folds = chosen_folds(options, preprocessed_dataset)
    with progress_line("cases") as progress:
        evidence = gather_evidence(
            options.m,
            raw_dataset,
            preprocessed_dataset,
            folds,
            checkpoint=options.chk,
            mirror=not options.disable_tta,
            device=options.device,
            progress=progress,
        )
    proposal = propose(evidence, take=options.take, resamples=options.resamples, seed=options.seed)
    chosen = proposal.chosen
    choice = Choice(
        models=tuple(options.m[place] for place in chosen.models),
        folds=tuple(map(str, folds)),
        classifier=chosen.classifier,
        aggregation=chosen.aggregation,
        checkpoint=options.chk,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "cases": len(evidence.truth),
        "mirrored": not options.disable_tta,
        "compared": options.m,
        "chosen": asdict(chosen),
        "candidates": [asdict(candidate) for candidate in proposal.candidates],
        "remarks": proposal.remarks,
    }
    write_choice(choice, found, path)
    say(candidate_table(proposal, options.m))
    say(f"next: nnturbo predict -i SCANS -o PREDICTIONS -m {shlex.quote(str(path))}")
    return DONE
