"""`nnturbo train`: trains the multi-task model, and fits a classifier."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from .choices import PRESETS
from .command import DONE, add_command, dataset_name, nnunet_folder, progress_line, say

if TYPE_CHECKING:
    from ..pooled_classifier import PooledFit


def add_train(commands: Any) -> None:
    """Declare the command."""
    add = add_command(commands, "train", _train, "train the multi-task model on a prepared data set")
    add("-d", required=True, metavar="DATASET", help="number or name of the data set")
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    add("-p", default="nnUNetResEncUNetMPlans", metavar="PLANS", help="default: %(default)s")
    add("-f", default="0", metavar="FOLD", help="split of splits_final.json, or all (default: %(default)s)")
    add("--preset", choices=PRESETS, help=f"recipe to begin with (default: {PRESETS[0]})")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="entries of the recipe to change, such as epochs=60 head=gap_mlp head_stages=1,2 focus_labels=lesion",
    )
    add("--seed", type=int, metavar="S", help="of weights, batches and augmentation; the same as --set seed=S")
    add("--lda", nargs="+", type=int, metavar="STAGE", help="afterwards fit a classifier on these encoder stages")
    add("-device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add("--pretrained", metavar="FILE", help="checkpoint to begin with; a plain nnU-Net's will do")
    add("--continue", dest="resume", action="store_true", help="go on from the newest checkpoint, with its recipe")
    add(
        "--change-recipe", action="store_true", help="with --continue: let --preset, --set and --seed change the recipe"
    )
    add("--val", action="store_true", help="run nnU-Net's own validation of the final checkpoint afterwards")
    for name in ("raw", "preprocessed", "results"):
        add(f"--{name}", metavar="FOLDER", help=f"default: the environment variable nnUNet_{name}")


def _train(options: argparse.Namespace) -> int:
    if options.change_recipe and not options.resume:
        raise ValueError("--change-recipe is for a training that goes on: give --continue too, or leave it out")
    folders = {
        name: nnunet_folder(getattr(options, name), f"nnUNet_{name}", f"--{name}")
        for name in ("raw", "preprocessed", "results")
    }
    from ..data.planning import require_nnunet

    require_nnunet()
    from ..pooled_classifier import check_counts, fit_pooled_classifier, training_scans
    from ..recipe import changed_recipe
    from ..train import recipe_to_go_on_with, train

    dataset = dataset_name(options.d, folders["preprocessed"])
    fold: int | str = int(options.f) if options.f.isdecimal() else options.f
    stored = None
    if options.resume:
        stored = recipe_to_go_on_with(
            dataset,
            options.c,
            fold,
            plans_name=options.p,
            preprocessed=folders["preprocessed"],
            results=folders["results"],
        )
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    recipe = changed_recipe(options.preset, [*options.set, *seed], stored)
    scans, held_out = [], []
    if options.lda is not None:
        # Errors that would stop the fit are raised before hours of training.
        scans = training_scans(folders["raw"] / dataset, folders["preprocessed"] / dataset, fold)
        subtypes = [scan.subtype for scan in scans]
        check_counts(subtypes, max(subtypes) + 1)
        if fold != "all":
            held_out = training_scans(folders["raw"] / dataset, folders["preprocessed"] / dataset, fold, part="val")
    model = train(
        dataset,
        options.c,
        fold,
        recipe=recipe,
        plans_name=options.p,
        device=options.device,
        resume=options.resume,
        change_recipe=options.change_recipe,
        pretrained=options.pretrained,
        final_validation=options.val,
        **folders,
    )
    if options.lda is not None:
        say("fitting a classifier on pooled features of the training cases")
        with progress_line("cases") as progress:
            fit = fit_pooled_classifier(
                model,
                fold,
                scans,
                stages=options.lda,
                validation=held_out,
                device=options.device,
                progress=progress,
            )
        say(_described(fit))
    say(f"model: {model}")
    say(f"next: nnturbo predict -i SCANS -o PREDICTIONS -m {shlex.quote(str(model))} -f {fold}")
    return DONE


def _described(fit: PooledFit) -> str:
    """Say how good a fitted classifier is, and which answers."""
    lines = [
        f"fitted on {fit.cases} cases; macro-F1 {fit.macro_f1:.3f} in cross-validation over them, which flatters, as "
        f"the network was trained on them"
    ]
    if fit.validated is None:
        lines.append("no validation cases show whether it is better than the network's head, which answers")
    else:
        of_fit, of_head = fit.validated.fitted_interval, fit.validated.head_interval
        lines.append(
            f"on {fit.validated.cases} validation cases: macro-F1 {fit.validated.fitted:.3f} "
            f"({of_fit.low:.3f} to {of_fit.high:.3f}), the network's head {fit.validated.head:.3f} "
            f"({of_head.low:.3f} to {of_head.high:.3f}): the {'fitted one' if fit.validated.better else 'head'} answers"
        )
    return "\n".join([*lines, "nnturbo predict --classifier lda or head asks for one of them"])
