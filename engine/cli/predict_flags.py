"""The flags of `nnturbo predict`: nnU-Net's own, with nnU-Net's meaning, and ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..model.choice import is_choice
from ..options import AGGREGATIONS, CLASSIFIERS, DEFAULT_CHECKPOINT, LOADERS, PRECISIONS

AddArgument = Callable[..., Any]


def add_flags(parser: Any) -> None:
    """Declare all flags, in the order in which `--help` shows them."""
    for declare in (_add_model, _add_results, _add_job, _add_network, _add_workers):
        declare(parser.add_argument)


def _add_model(add: AddArgument) -> None:
    """Declare what is read, where results go, and which model is used."""
    add(
        "-i",
        required=True,
        metavar="INPUT",
        help="folder of scans named NAME_0000.nii.gz, one file, a DICOM folder, or a folder of DICOM folders",
    )
    add("-o", required=True, metavar="OUTPUT", help="folder for the segmentations; made if it is not there")
    add(
        "-m",
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="model folder, nnU-Net export zip, or bundle; the probabilities of several are averaged; or what nnturbo "
        "choose wrote, choice.json, which names models, folds, classifier and aggregation",
    )
    add("-d", metavar="DATASET", help="dataset name or number, looked up in $nnUNet_results, in place of -m")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans, with -d (default: %(default)s)")
    add("-tr", default="nnUNetTrainer", metavar="TRAINER", help="trainer, with -d (default: %(default)s)")
    add("-c", metavar="CONFIGURATION", help="configuration, with -d or with a zip that holds several")
    add("-f", nargs="+", metavar="FOLD", help="folds to average (default: all numbered folds that are there)")
    add("-chk", metavar="FILE", help=f"checkpoint file (default: {DEFAULT_CHECKPOINT}, or that of a bundle)")


def _add_results(add: AddArgument) -> None:
    """Declare how tiles are laid, and what is written beside labels."""
    add(
        "-step_size",
        type=float,
        default=0.5,
        help="distance of tiles as a fraction of the patch (default: %(default)s)",
    )
    add("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    add(
        "--save_probabilities",
        action="store_true",
        help="also write .npz and .pkl, as nnU-Net; takes 4 bytes per class and voxel of memory",
    )
    add(
        "--class_probabilities",
        action="store_true",
        help="also write the probability of each class into subtype_results.csv, for multi-task models",
    )
    add(
        "--dicom_seg",
        action="store_true",
        help="also write NAME.dcm, a DICOM Segmentation object, for scans that are DICOM folders",
    )


def _add_job(add: AddArgument) -> None:
    """Declare what becomes of earlier results, how cases are shared, and what is shown."""
    add(
        "--continue_prediction",
        "--c",
        action="store_true",
        help="leave alone the labels that are there, corrected ones and those of other programs among them",
    )
    add(
        "--redo_outdated",
        action="store_true",
        help="with --continue_prediction, make again what nnturbo made with another model, other settings or another "
        "version of the scan, unless somebody has changed it since",
    )
    add(
        "-npp", type=int, default=3, help="how many scans are read at once, ahead; 0: none ahead (default: %(default)s)"
    )
    add(
        "-nps", type=int, default=3, help="how many results are written at once, behind; 0: none (default: %(default)s)"
    )
    add("-prev_stage_predictions", metavar="FOLDER", help="labels of the previous stage, for cascades")
    add("-num_parts", type=int, default=1, help="how many calls share the cases (default: %(default)s)")
    add("-part_id", type=int, default=0, help="which of them this is, from 0")
    add("-device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add(
        "--disable_progress_bar",
        action="store_true",
        help="no line of progress (one a minute without a terminal)",
    )
    add("--verbose", action="store_true", help="say what was chosen, and times by stage")
    add("--log", metavar="FILE", help="add what happens to this file, as lines of JSON")
    add("--report", action="store_true", help="also write report.html: a table of the cases, and pictures of each")


def _add_network(add: AddArgument) -> None:
    """Declare how the network runs."""
    add("--not_on_device", action="store_true", help="keep planes and sums in main memory")
    add("--backend", default="auto", help="how the network runs (default: %(default)s)")
    add(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="auto is fp32 on a CPU and fp16 on a GPU, as nnU-Net (default: %(default)s)",
    )
    add(
        "--classifier",
        choices=CLASSIFIERS,
        help="what answers for the case in multi-task models: the network's head, or a classifier fitted afterwards; "
        "auto takes the latter where every fold has one that is preferred (default: auto)",
    )
    add(
        "--aggregation",
        choices=AGGREGATIONS,
        help="tiles count by how much they show of what the class is about, or all alike (default: foreground)",
    )
    add(
        "--loader",
        default="exact",
        choices=LOADERS,
        help="what reads, normalises and resamples: nnU-Net's way to rounding, or NVIDIA's DALI, whose cubic kernel is "
        "another one (default: %(default)s)",
    )


def _add_workers(add: AddArgument) -> None:
    """Declare who predicts."""
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that share the cases (default: one for each GPU; one on a CPU, where several share its cores)",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        help="do it on a Ray cluster: HOST:PORT, auto for the one this machine is in, or local; input, model and "
        "output must be on storage that all machines share",
    )
    add("--cores", type=int, default=4, help="CPU cores of each process on a cluster (default: %(default)s)")


def refuse_flags_beside_choice(options: argparse.Namespace) -> None:
    """Refuse flags for what a choice says, even with their defaults: it is read later, and may say otherwise."""
    models = [options.m] if isinstance(options.m, str) else options.m or []
    flags = {
        "-f": options.f,
        "-chk": options.chk,
        "--classifier": options.classifier,
        "--aggregation": options.aggregation,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if given and (choices := [model for model in models if is_choice(model)]):
        raise ValueError(f"{choices[0]} says it already: leave out {', '.join(given)}, or give the models as -m")
