"""`nnturbo prepare`: checks a data set, converts it for nnU-Net, plans and preprocesses it."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from .choices import CONFIGURATIONS, PHANTOM_COUNTS, PLANNERS
from .command import DONE, add_command, nnunet_folder, progress_line, say


def add_prepare(commands: Any) -> None:
    """Declare the command."""
    add = add_command(
        commands, "prepare", _prepare, "check a data set, convert it to nnU-Net's raw format, plan and preprocess it"
    )
    add(
        "-i",
        required=True,
        metavar="SOURCE",
        help="folder with train|validation/subtype{0,1,2} and test, of the pancreas task; with train|validation/CLASS "
        "and a dataset.json, of another one; or see --table",
    )
    add("--table", metavar="FILE", help="csv or xlsx with filename, subtype, split, for files anywhere in SOURCE")
    add(
        "--dataset_json",
        metavar="FILE",
        help="channel_names, labels and file_ending of another task, and class_names if they are to be checked "
        "(default: dataset.json in SOURCE, if it is there)",
    )
    add(
        "--regions",
        nargs="+",
        metavar="NAME=LABEL,LABEL",
        help="regions to learn in place of labels, larger ones first, such as pancreas=pancreas,lesion lesion=lesion",
    )
    add(
        "--folds",
        type=int,
        metavar="K",
        help="cross-validation of the training cases, stratified by class: splits 0 to K-1; the given split is then "
        "split K, and its validation cases, if there are any, are in no fold",
    )
    add("-d", required=True, type=int, metavar="ID", help="number of the data set, 1 to 999")
    add("-n", required=True, metavar="NAME", help="name of the data set; the folder is DatasetID_NAME")
    add("--raw", metavar="FOLDER", help="default: the environment variable nnUNet_raw")
    add("--preprocessed", metavar="FOLDER", help="default: the environment variable nnUNet_preprocessed")
    add(
        "--planner",
        choices=PLANNERS,
        default=PLANNERS[0],
        help="ResEnc M, L or XL, plain U-Net, or a small U-Net for CPUs (default: %(default)s)",
    )
    add("--memory", type=float, metavar="GB", help="GPU memory to plan for (default: 8; L 24, XL 40)")
    add(
        "--spacing",
        nargs=3,
        type=float,
        metavar=("Z", "Y", "X"),
        help="target spacing of 3d_fullres in mm (default: nnU-Net's choice)",
    )
    add(
        "--configurations",
        nargs="+",
        choices=CONFIGURATIONS,
        default=["3d_fullres"],
        metavar="C",
        help=f"of {', '.join(CONFIGURATIONS)} (default: 3d_fullres)",
    )
    add("--no_preprocessing", action="store_true", help="write the raw data set only")
    add("--processes", type=int, default=4, metavar="N", help="that nnU-Net starts (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the raw data set of this id and name")


def _prepare(options: argparse.Namespace) -> int:
    raw = nnunet_folder(options.raw, "nnUNet_raw", "--raw")
    preprocessed = None
    if not options.no_preprocessing:
        preprocessed = nnunet_folder(options.preprocessed, "nnUNet_preprocessed", "--preprocessed")
        if options.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {options.processes}")
        from ..data.planners import Planning
        from ..data.planning import require_nnunet

        # Errors that would come after all files were read come now.
        Planning(planner=options.planner, spacing=options.spacing, memory_gb=options.memory)
        require_nnunet()
    from ..data.planners import described_network
    from ..data.prepare import plan_and_preprocess, prepare_dataset

    with progress_line("checking") as progress:
        dataset = prepare_dataset(
            options.i,
            raw,
            dataset_id=options.d,
            dataset_name=options.n,
            table=options.table,
            description=options.dataset_json,
            regions=None if options.regions is None else _regions(options.regions),
            folds=options.folds,
            overwrite=options.overwrite,
            progress=progress,
        )
    counts = ", ".join(f"{len(dataset.names(split))} {split}" for split in PHANTOM_COUNTS)
    say(f"{dataset.folder}: {counts}; {len(dataset.rounded)} masks rounded to whole labels")
    say(f"classes: {', '.join(dataset.task.class_names)}; labels: {', '.join(dataset.task.structures)}")
    if options.folds is not None:
        given = f"; split {options.folds} is the given one" if dataset.names("validation") else ""
        say(f"folds 0 to {options.folds - 1} of the training cases{given}")
    if preprocessed is None:
        return DONE
    say("planning from the training cases alone, and preprocessing all")
    plans_file = plan_and_preprocess(
        dataset.folder,
        preprocessed,
        planner=options.planner,
        spacing=options.spacing,
        memory_gb=options.memory,
        configurations=options.configurations,
        processes=options.processes,
    )
    say(f"plans: {plans_file}")
    say(described_network(plans_file, options.configurations))
    given = {"nnUNet_raw": options.raw, "nnUNet_preprocessed": options.preprocessed}
    setting = "".join(f"{name}={shlex.quote(folder)} " for name, folder in given.items() if folder)
    *_, last = dataset.task.structures
    focus = "" if "lesion" in dataset.task.structures else f" --set focus_labels={shlex.quote(last)}"
    say(f"next: {setting}nnturbo train -d {options.d} -c {options.configurations[0]} -p {plans_file.stem}{focus}")
    return DONE


def _regions(given: list[str]) -> dict[str, list[str]]:
    regions = {}
    for text in given:
        name, _, labels = text.partition("=")
        if not name or not labels or name in regions:
            raise ValueError(f"--regions must be different NAME=LABEL,LABEL, got {text!r}")
        regions[name] = labels.split(",")
    return regions
