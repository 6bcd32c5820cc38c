"""The training side of the `nnturbo` command: argument parsing only.

This module has only light imports, so that `nnturbo --help` starts at once; commands import other modules when they
run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..engine.errors import EngineError

DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130

# Copies of constants in `phantom`, `planning` and `recipe`, which import numpy or torch; a test compares them.
PHANTOM_COUNTS = {"train": 252, "validation": 36, "test": 72}
PLANNERS = ("resenc", "plain", "compact")
PRESETS = ("balanced", "conservative", "aggressive", "segmentation_focused")
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")


def add_commands(commands: Any) -> None:
    """Declare the commands.

    Args:
        commands: What `ArgumentParser.add_subparsers` returns. Each command sets `run`, a function of the parsed
            arguments that returns an exit status.
    """
    _add_phantom(commands)
    _add_prepare(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_submit(commands)
    _add_publish(commands)
    _add_demo(commands)


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=lambda options: _in_one_line(run, options))
    return parser.add_argument


def _in_one_line(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; what the file system refuses becomes an error like any other."""
    try:
        return run(options)
    except OSError as error:
        raise EngineError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        sys.stderr.write("nnturbo: interrupted; every file that is there is complete\n")
        return INTERRUPTED


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _progress_line(what: str) -> Iterator[Callable[[int, int, object], None]]:
    """Give a function to call with the number done, the number of all and the case; it draws on terminals only."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="case", disable=None, leave=False) as bar:

        def update(done: int, total: int, _: object) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


# ---- phantom ---------------------------------------------------------------------------------------------------------


def _add_phantom(commands: Any) -> None:
    add = _command(commands, "phantom", _phantom, "generate a data set of CT-like scans with a pancreas and one lesion")
    add("-o", required=True, metavar="FOLDER", help="where; made if it is not there")
    for split, count in PHANTOM_COUNTS.items():
        add(f"--{split}", type=int, default=count, metavar="N", help=f"{split} cases (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same data set (default: %(default)s)")
    add("--small", action="store_true", help="small regions of coarse voxels: a third of a second a case")
    add("--answers", action="store_true", help="write the test split's masks and subtypes to test_answers")
    add("--overwrite", action="store_true", help="replace files of the same names")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")


def _phantom(options: argparse.Namespace) -> int:
    from .phantoms.phantom import DEFAULT_SETTINGS, SMALL_SETTINGS, write_dataset

    counts = {split: getattr(options, split) for split in PHANTOM_COUNTS}
    with _progress_line("phantoms") as progress:
        write_dataset(
            options.o,
            counts=counts,
            seed=options.seed,
            settings=SMALL_SETTINGS if options.small else DEFAULT_SETTINGS,
            answers=options.answers,
            overwrite=options.overwrite,
            workers=options.workers,
            progress=progress,
        )
    _say(f"{options.o}: {', '.join(f'{count} {split}' for split, count in counts.items())}")
    _say(f"next: nnturbo prepare -i {shlex.quote(options.o)} -d 801 -n PancreasPhantom")
    return DONE


# ---- prepare ---------------------------------------------------------------------------------------------------------


def _add_prepare(commands: Any) -> None:
    add = _command(
        commands, "prepare", _prepare, "check a data set, convert it to nnU-Net's raw format, plan and preprocess it"
    )
    add(
        "-i",
        required=True,
        metavar="SOURCE",
        help="folder with train|validation/subtype{0,1,2} and test; or see --table",
    )
    add("--table", metavar="FILE", help="csv or xlsx with filename, subtype, split, for files anywhere in SOURCE")
    add("-d", required=True, type=int, metavar="ID", help="number of the data set, 1 to 999")
    add("-n", required=True, metavar="NAME", help="name of the data set; the folder is DatasetID_NAME")
    add("--raw", metavar="FOLDER", help="default: the environment variable nnUNet_raw")
    add("--preprocessed", metavar="FOLDER", help="default: the environment variable nnUNet_preprocessed")
    add(
        "--planner",
        choices=PLANNERS,
        default=PLANNERS[0],
        help="ResEnc M, plain U-Net, or a small U-Net for CPUs (default: %(default)s)",
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
    raw = _nnunet_folder(options.raw, "nnUNet_raw", "--raw")
    preprocessed = None
    if not options.no_preprocessing:
        preprocessed = _nnunet_folder(options.preprocessed, "nnUNet_preprocessed", "--preprocessed")
        if options.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {options.processes}")
        from .data.planning import require_nnunet

        require_nnunet()
    from .data.prepare import plan_and_preprocess, prepare_dataset

    with _progress_line("checking") as progress:
        dataset = prepare_dataset(
            options.i,
            raw,
            dataset_id=options.d,
            dataset_name=options.n,
            table=options.table,
            overwrite=options.overwrite,
            progress=progress,
        )
    counts = ", ".join(f"{len(dataset.names(split))} {split}" for split in PHANTOM_COUNTS)
    _say(f"{dataset.folder}: {counts}; {len(dataset.rounded)} masks rounded to whole labels")
    if preprocessed is None:
        return DONE
    _say("planning from the training cases alone, and preprocessing all")
    plans_file = plan_and_preprocess(
        dataset.folder,
        preprocessed,
        planner=options.planner,
        configurations=options.configurations,
        processes=options.processes,
    )
    _say(f"plans: {plans_file}")
    given = {"nnUNet_raw": options.raw, "nnUNet_preprocessed": options.preprocessed}
    setting = "".join(f"{name}={shlex.quote(folder)} " for name, folder in given.items() if folder)
    _say(f"next: {setting}nnturbo train -d {options.d} -c {options.configurations[0]} -p {plans_file.stem}")
    return DONE


def _nnunet_folder(given: str | None, variable: str, option: str) -> Path:
    folder = given or os.environ.get(variable)
    if not folder:
        raise ValueError(f"nnU-Net's folder must be given as {option} FOLDER or by the environment variable {variable}")
    return Path(folder)


# ---- train -----------------------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    add = _command(commands, "train", _train, "train the multi-task model on a prepared data set")
    add("-d", required=True, metavar="DATASET", help="number or name of the data set")
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    add("-p", default="nnUNetResEncUNetMPlans", metavar="PLANS", help="default: %(default)s")
    add("-f", default="0", metavar="FOLD", help="split of splits_final.json, or all (default: %(default)s)")
    add("--preset", choices=PRESETS, default=PRESETS[0], help="recipe to begin with (default: %(default)s)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="entries of the recipe to change, such as epochs=60 head=gap_mlp head_stages=1,2 focus_labels=lesion",
    )
    add("--lda", nargs="+", type=int, metavar="STAGE", help="afterwards fit a classifier on these encoder stages")
    add("-device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add("--pretrained", metavar="FILE", help="checkpoint to begin with; a plain nnU-Net's will do")
    add("--continue", dest="resume", action="store_true", help="go on from the newest checkpoint")
    add("--val", action="store_true", help="run nnU-Net's own validation of the final checkpoint afterwards")
    for name in ("raw", "preprocessed", "results"):
        add(f"--{name}", metavar="FOLDER", help=f"default: the environment variable nnUNet_{name}")


def _train(options: argparse.Namespace) -> int:
    folders = {
        name: _nnunet_folder(getattr(options, name), f"nnUNet_{name}", f"--{name}")
        for name in ("raw", "preprocessed", "results")
    }
    from .data.planning import require_nnunet

    require_nnunet()
    from .pooled_classifier import check_counts, fit_pooled_classifier, training_scans
    from .recipe import changed_recipe
    from .train import train

    recipe = changed_recipe(options.preset, options.set)
    dataset = _dataset_name(options.d, folders["preprocessed"])
    fold: int | str = int(options.f) if options.f.isdecimal() else options.f
    scans = []
    if options.lda is not None:
        # Errors that would stop the fit are raised before hours of training.
        scans = training_scans(folders["raw"] / dataset, folders["preprocessed"] / dataset, fold)
        subtypes = [scan.subtype for scan in scans]
        check_counts(subtypes, max(subtypes) + 1)
    model = train(
        dataset,
        options.c,
        fold,
        recipe=recipe,
        plans_name=options.p,
        device=options.device,
        resume=options.resume,
        pretrained=options.pretrained,
        final_validation=options.val,
        **folders,
    )
    if options.lda is not None:
        _say("fitting a classifier on pooled features of the training cases")
        with _progress_line("cases") as progress:
            fit = fit_pooled_classifier(
                model, fold, scans, stages=options.lda, device=options.device, progress=progress
            )
        _say(f"fitted on {fit.cases} cases; macro-F1 {fit.macro_f1:.3f} in cross-validation over them")
    _say(f"model: {model}")
    _say(f"next: nnturbo predict -i SCANS -o PREDICTIONS -m {shlex.quote(str(model))} -f {fold}")
    return DONE


def _dataset_name(given: str, preprocessed: Path) -> str:
    pattern = f"Dataset{int(given):03d}_*" if given.isdecimal() else given
    found = sorted(path.name for path in preprocessed.glob(pattern) if path.is_dir())
    if len(found) != 1:
        raise ValueError(
            f"-d {given} must name one data set in {preprocessed}, found {', '.join(found) or 'none'}: run nnturbo "
            f"prepare first, or check --preprocessed"
        )
    return found[0]


# ---- evaluate --------------------------------------------------------------------------------------------------------


def _add_evaluate(commands: Any) -> None:
    add = _command(commands, "evaluate", _evaluate, "compare predicted masks and subtypes with the truth")
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
    from .data.references import holds_splits
    from .evaluation.evaluate import comparison_table, evaluate

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
    _say(comparison_table(evaluation))
    _say(f"\nevery case and measure: {out}")
    return SOME_FAILED if evaluation.missing_masks or evaluation.missing_subtypes else DONE


# ---- submit ----------------------------------------------------------------------------------------------------------


def _add_submit(commands: Any) -> None:
    add = _command(commands, "submit", _submit, "check predictions of the test split and pack them for submission")
    add("-p", required=True, metavar="PREDICTIONS", help="folder of predicted masks and subtype_results.csv")
    add("-o", required=True, metavar="ZIP", help="the submission")
    add("--images", metavar="FOLDER", help="test images, each of which must have a mask on its grid and a row")
    add("--subtypes", metavar="CSV", help="predicted subtypes (default: subtype_results.csv in PREDICTIONS)")
    add("--overwrite", action="store_true", help="replace an existing file")


def _submit(options: argparse.Namespace) -> int:
    from .evaluation.submission import write_submission

    done = write_submission(
        options.p, options.o, images_folder=options.images, subtypes=options.subtypes, overwrite=options.overwrite
    )
    checked = "compared with the images" if done.compared_with_images else "not compared with images (--images FOLDER)"
    _say(f"{done.path}: {len(done.subtypes)} masks and subtypes, {checked}")
    return DONE


# ---- publish ---------------------------------------------------------------------------------------------------------


def _add_publish(commands: Any) -> None:
    add = _command(commands, "publish", _publish, "copy a trained model without the state of its training")
    add("-m", required=True, metavar="MODEL", help="model folder")
    add("-o", required=True, metavar="FOLDER", help="the copy; must not exist")
    add("-f", nargs="+", metavar="FOLD", help="folds to copy (default: all that are there)")
    add("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint file (default: %(default)s)")


def _publish(options: argparse.Namespace) -> int:
    from .publish import publish_model

    _say(f"{publish_model(options.m, options.o, folds=options.f, checkpoint=options.chk)}: ready to hand on")
    return DONE


# ---- demo ------------------------------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    add = _command(commands, "demo", _demo, "predict and evaluate phantoms that no training saw, and draw one")
    add("-m", required=True, metavar="MODEL", help="a model trained on phantoms, such as examples/demo_model")
    add("-o", default="demo", metavar="FOLDER", help="default: %(default)s; must hold nothing but earlier results")
    add("--cases", type=int, default=6, metavar="N", help="phantoms (default: %(default)s)")
    add("--mirror", action="store_true", help="average over mirrored views, which takes eight times as long")
    add("-device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo_table, demonstrate

    _say(f"{options.cases} phantoms: generating, predicting, comparing with the truth")
    demo = demonstrate(options.m, options.o, cases=options.cases, mirror=options.mirror, device=options.device)
    _say(f"\n{demo_table(demo)}\n\na picture of one case: {demo.picture}")
    return DONE
