"""`nnturbo crossvalidate`: predicts every held-out case by the fold that did not see it, and calibrates classes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ...engine.options import AGGREGATIONS, CLASSIFIERS, DEFAULT_CHECKPOINT
from .command import DONE, add_command, dataset_name, nnunet_folder, progress_line, say


def add_crossvalidate(commands: Any) -> None:
    """Declare the command."""
    add = add_command(
        commands,
        "crossvalidate",
        _crossvalidate,
        "predict cases by the folds that did not see them, and calibrate class probabilities by them",
    )
    add_held_out_flags(add)
    add("-m", required=True, metavar="MODEL", help="model folder; its checkpoints get the temperatures")
    add("-o", required=True, metavar="FOLDER", help="for masks, subtype_results.csv and cross_validation.json")
    add("--classifier", default="auto", choices=CLASSIFIERS, help="as in predict (default: %(default)s)")
    add("--aggregation", default="foreground", choices=AGGREGATIONS, help="as in predict (default: %(default)s)")


def add_held_out_flags(add: Any) -> None:
    """Declare what commands that predict held-out cases share."""
    add("-d", required=True, metavar="DATASET", help="number or name of the data set")
    add(
        "-f",
        nargs="+",
        type=int,
        metavar="FOLD",
        help="trained folds, each of which predicts the cases that it holds out (default: those of prepare --folds, "
        "else 0)",
    )
    add("-chk", default=DEFAULT_CHECKPOINT, metavar="FILE", help="checkpoint file (default: %(default)s)")
    add("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    add("-device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    for name in ("raw", "preprocessed"):
        add(f"--{name}", metavar="FOLDER", help=f"default: the environment variable nnUNet_{name}")


def dataset_folders(options: argparse.Namespace) -> tuple[Path, Path]:
    """Find the raw and the preprocessed data set."""
    raw, preprocessed = (
        nnunet_folder(getattr(options, name), f"nnUNet_{name}", f"--{name}") for name in ("raw", "preprocessed")
    )
    name = dataset_name(options.d, preprocessed)
    return raw / name, preprocessed / name


def chosen_folds(options: argparse.Namespace, preprocessed_dataset: Path) -> list[int]:
    """Take the folds that are given, else those of a cross-validation, else the only split."""
    from ..data.cases import LABELS_FILE
    from ..data.cross_validation import read_folds

    return options.f or sorted(set(read_folds(preprocessed_dataset / LABELS_FILE).values())) or [0]


def _crossvalidate(options: argparse.Namespace) -> int:
    from ..cross_validate import cross_validate, quality_table
    from ..data.cases import LABELS_FILE
    from ..data.cross_validation import read_folds

    raw_dataset, preprocessed_dataset = dataset_folders(options)
    folds = chosen_folds(options, preprocessed_dataset)
    with progress_line("cases") as progress:
        result = cross_validate(
            options.m,
            raw_dataset,
            preprocessed_dataset,
            folds,
            Path(options.o),
            classifier=options.classifier,
            aggregation=options.aggregation,
            checkpoint=options.chk,
            mirror=not options.disable_tta,
            device=options.device,
            progress=progress,
        )
    say(quality_table(result))
    listed = ", ".join(map(str, folds))
    say(f"the temperatures are in the checkpoints of fold {listed}; {result.classifier} answers in subtype_results.csv")
    made = set(read_folds(preprocessed_dataset / LABELS_FILE).values())
    split = "train" if set(folds) <= made else "validation"
    quoted = (shlex.quote(str(path)) for path in (options.o, raw_dataset))
    say("next: nnturbo evaluate -p {} -r {} --split {}".format(*quoted, split))
    if split == "train" and (left := sorted(made - set(folds))):
        say(f"evaluate counts the cases of fold {', '.join(map(str, left))} as missing: cross-validate all folds first")
    return DONE
