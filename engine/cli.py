"""The `nnturbo` command: reads arguments, calls the library, turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DONE, SOME_FAILED, UNUSABLE = 0, 1, 2
PRECISIONS = ("fp32", "bf16", "fp16", "int8")  # as in backends.choose, which imports torch
CLASSIFIERS = ("auto", "head", "lda")
AGGREGATIONS = ("foreground", "mean")
LOADERS = ("exact", "dali", "dali-linear")
PHANTOMS, PHANTOM_SEED = 4, 11
"""What lower precision is measured on where no scans are given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when every case is done, 1 when some case failed, 2 for wrong usage or a model that cannot be used.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if getattr(options, "verbose", False) else logging.WARNING,
        format="%(message)s",
        stream=sys.stderr,
    )
    from .errors import EngineError

    try:
        return options.run(options)
    except (EngineError, ValueError) as error:
        _say(f"nnturbo: {error}", sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        kept = "; finished cases are kept, --continue_prediction goes on with the rest"
        _say(f"nnturbo: interrupted{kept if options.run is _predict else ''}", sys.stderr)
        return 130


def _say(text: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnturbo", description="Runs trained nnU-Net v2 models: the labels nnU-Net gives, many times sooner."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_predict(commands)
    _add_build(commands)
    inspect = commands.add_parser("inspect", help="say what is in a model or bundle and how it can run here")
    inspect.add_argument("model", help="model folder, nnU-Net export zip, or bundle")
    inspect.add_argument("-c", dest="configuration", help="configuration to take from a zip that holds several")
    inspect.set_defaults(run=_inspect)
    doctor = commands.add_parser("doctor", help="say what this machine offers")
    doctor.set_defaults(run=_doctor)
    # The command line is the one place above both engine and training; what is imported here is light.
    from ..training.cli import add_commands

    add_commands(commands)
    return parser


def _add_predict(commands: Any) -> None:
    """Declare nnU-Net's own flags, with nnU-Net's meaning, and ours."""
    predict = commands.add_parser(
        "predict",
        help="segment scans; takes the flags of nnUNetv2_predict and nnUNetv2_predict_from_modelfolder",
        description="Exit status: 0 all cases done, 1 some failed (named on stderr and in predictions.json), "
        "2 wrong usage or unusable model.",
    )
    add = predict.add_argument
    add(
        "-i", required=True, metavar="INPUT", help="folder of scans named NAME_0000.nii.gz, one file, or a DICOM folder"
    )
    add("-o", required=True, metavar="OUTPUT", help="folder for the segmentations; made if it is not there")
    add(
        "-m",
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="model folder, nnU-Net export zip, or bundle; the probabilities of several are averaged",
    )
    add("-d", metavar="DATASET", help="dataset name or number, looked up in $nnUNet_results, in place of -m")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans, with -d (default: %(default)s)")
    add("-tr", default="nnUNetTrainer", metavar="TRAINER", help="trainer, with -d (default: %(default)s)")
    add("-c", metavar="CONFIGURATION", help="configuration, with -d or with a zip that holds several")
    add("-f", nargs="+", metavar="FOLD", help="folds to average (default: all numbered folds that are there)")
    add("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint file (default: %(default)s)")
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
    add("--continue_prediction", "--c", action="store_true", help="leave alone the cases whose results are there")
    add("-npp", type=int, default=3, help="accepted as by nnU-Net; scans are read one at a time so far")
    add("-nps", type=int, default=3, help="accepted as by nnU-Net; results are written one at a time so far")
    add("-prev_stage_predictions", metavar="FOLDER", help="labels of the previous stage, for cascades")
    add("-num_parts", type=int, default=1, help="how many calls share the cases (default: %(default)s)")
    add("-part_id", type=int, default=0, help="which of them this is, from 0")
    add("-device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add("--disable_progress_bar", action="store_true", help="no progress bar; there is none either without a terminal")
    add("--verbose", action="store_true", help="say what was chosen, and times by stage")
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
        default="auto",
        choices=CLASSIFIERS,
        help="what answers for the case in multi-task models: the network's head, or a classifier fitted afterwards; "
        "auto takes the latter where every fold has one (default: %(default)s)",
    )
    add(
        "--aggregation",
        default="foreground",
        choices=AGGREGATIONS,
        help="tiles count by how much they show of what the class is about, or all alike (default: %(default)s)",
    )
    add(
        "--loader",
        default="exact",
        choices=LOADERS,
        help="what reads, normalises and resamples: nnU-Net's way to rounding, or NVIDIA's DALI, whose cubic kernel is "
        "another one (default: %(default)s)",
    )
    predict.set_defaults(run=_predict)


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="compile a model into a bundle",
        description="Below fp32, the bundle's labels are compared with those of fp32 first, on the calibration scans "
        "or, for CT models without any, on generated phantoms; where they agree too little there is no bundle.",
    )
    add = build.add_argument
    add("-m", required=True, metavar="MODEL", help="model folder or nnU-Net export zip")
    add("-o", required=True, metavar="BUNDLE", help="folder for the bundle, which must not exist, or file")
    add("-c", metavar="CONFIGURATION", help="configuration, with a zip that holds several")
    add("-f", nargs="+", metavar="FOLD", help="folds to average (default: all numbered folds that are there)")
    add("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint file (default: %(default)s)")
    add("-device", default="auto", help="what to build for: auto, cpu or cuda (default: %(default)s)")
    add("--backend", default="auto", help="what to compile for; nnturbo inspect lists them (default: %(default)s)")
    add("--precision", default="auto", choices=("auto", *PRECISIONS), help="(default: %(default)s)")
    add("--classifier", default="auto", choices=CLASSIFIERS, help="as in predict (default: %(default)s)")
    add("--aggregation", default="foreground", choices=AGGREGATIONS, help="as in predict, with --whole-path")
    add("--calibration", metavar="FOLDER", help="scans, named as for predict, to calibrate int8 and compare labels on")
    add("--floor", type=float, metavar="DICE", help="least agreement with fp32 (default: 0.99, int8 0.98, fp32 0.9995)")
    add(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="X.Y",
        help="GPUs that are not here, such as 8.6 12.0, to build TensorRT engines for",
    )
    add(
        "--whole-path",
        action="store_true",
        help="write one TorchScript file from scan to labels, for programs with nothing but torch, no bundle",
    )
    add("--verbose", action="store_true", help="say what was chosen")
    build.set_defaults(run=_build)


def _build(options: argparse.Namespace) -> int:
    from .compilation import build, build_whole_path
    from .inspection import describe

    if options.whole_path:
        given = {"--backend": options.backend != "auto", "--precision": options.precision not in ("auto", "fp32")}
        given |= {"--calibration": options.calibration is not None, "--floor": options.floor is not None}
        if wrong := [flag for flag, is_given in given.items() if is_given]:
            raise ValueError(f"--whole-path is TorchScript in fp32, {', '.join(wrong)} cannot be chosen")
        build_whole_path(
            options.m,
            options.o,
            device=options.device,
            folds=options.f,
            checkpoint=options.chk,
            configuration=options.c,
            classifier=options.classifier,
            aggregation=options.aggregation,
        )
        return DONE
    with contextlib.ExitStack() as stack:
        calibration, name = _calibration(options, stack)
        build(
            options.m,
            options.o,
            backend=options.backend,
            precision=options.precision,
            device=options.device,
            folds=options.f,
            checkpoint=options.chk,
            configuration=options.c,
            classifier=options.classifier,
            calibration=calibration,
            calibration_name=name,
            floor=options.floor,
            compute_capabilities=options.compute_capability,
        )
    return _say_rows(describe(options.o, None))


def _calibration(options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[list[Any], str]:
    """Find the scans to calibrate with; phantoms where none are given and labels may change."""
    from .backends.choose import choose_device, choose_precision
    from .model import read_model

    plan = read_model(options.m, folds=options.f, checkpoint=options.chk, configuration=options.c).plan
    if options.calibration is not None:
        from .batch import find_cases

        if not Path(options.calibration).is_dir():
            raise ValueError(f"--calibration must be a folder of scans, {options.calibration} is none")
        cases = find_cases(Path(options.calibration), plan.file_ending)
        return [case.images for case in cases], "calibration scans"
    if choose_precision(options.precision, choose_device(options.device)) == "fp32" or options.compute_capability:
        return [], ""
    if [channel.scheme for channel in plan.channels] != ["CTNormalization"]:
        raise ValueError(
            f"{options.precision} changes some labels, and a bundle says how many: give scans to measure it on as "
            "--calibration FOLDER. Phantoms stand in for CT alone"
        )
    import tempfile

    from ..training.phantom import SMALL_SETTINGS, write_dataset

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nnturbo-"))
    phantoms = write_dataset(folder, counts={"test": PHANTOMS}, seed=PHANTOM_SEED, settings=SMALL_SETTINGS)
    return [phantom.image for phantom in phantoms], "generated phantoms"


def _predict(options: argparse.Namespace) -> int:
    if not 0 <= options.part_id < options.num_parts:
        raise ValueError(f"-part_id must be from 0 to -num_parts - 1, got {options.part_id} of {options.num_parts}")
    models = _models(options)
    # Before torch is imported, so that a wrong path is answered at once.
    if not Path(options.i).exists():
        raise ValueError(f"-i: {options.i} does not exist")

    from .batch import Job, find_cases, predict_cases
    from .ensemble import Ensemble
    from .options import EngineOptions

    ensemble = Ensemble.load(
        models,
        folds=options.f,
        checkpoint=options.chk,
        configuration=options.c if options.m else None,
        backend=options.backend,
        precision=options.precision,
        device=options.device,
        tile_step_size=options.step_size,
        mirror=not options.disable_tta,
        options=EngineOptions(
            sums_on_device=not options.not_on_device,
            classifier=options.classifier,
            aggregation=options.aggregation,
            loader=options.loader,
        ),
    )
    # One model alone needs no probabilities.
    engine = ensemble if len(models) > 1 else ensemble.engines[0]
    _check_cascade(engine.model.plan.previous_stage, options.prev_stage_predictions)
    cases = find_cases(Path(options.i), engine.model.plan.file_ending)[options.part_id :: options.num_parts]
    # Parts may run at the same time, and each writes its records whole.
    part = "" if options.num_parts == 1 else f".part{options.part_id}"
    job = Job(
        output=Path(options.o),
        save_probabilities=options.save_probabilities,
        skip_existing=options.continue_prediction,
        previous_stage=Path(options.prev_stage_predictions) if options.prev_stage_predictions else None,
        records=f"predictions{part}.json",
        subtypes=f"subtype_results{part}.csv",
    )
    with _ProgressBar(len(cases), shown=not options.disable_progress_bar) as progress:
        outcome = predict_cases(engine, cases, job, progress=progress)
    for name, reason in outcome.failed.items():
        _say(f"nnturbo: {name} failed: {reason}", sys.stderr)
    _say(
        f"{len(outcome.done)} done, {len(outcome.skipped)} already there, {len(outcome.failed)} failed; "
        f"results in {options.o}"
    )
    return SOME_FAILED if outcome.failed else DONE


def _check_cascade(wanted: str | None, given: str | None) -> None:
    if wanted and not given:
        raise ValueError(
            f"this model continues from the labels of {wanted}; give their folder as -prev_stage_predictions"
        )
    if given and not Path(given).is_dir():
        raise ValueError(f"-prev_stage_predictions must be a folder, {given} is none")


def _models(options: argparse.Namespace) -> list[str]:
    """Find the models by -m, or one as nnU-Net does by -d, -tr, -p and -c."""
    if bool(options.m) == bool(options.d):
        raise ValueError("give the model as -m FOLDER, or as -d DATASET with -c CONFIGURATION")
    if options.m:
        return options.m
    if not options.c:
        raise ValueError("-d needs -c, the configuration, such as 3d_fullres")
    results = os.environ.get("nnUNet_results")  # noqa: SIM112 - nnU-Net's own spelling
    if not results:
        raise ValueError(
            "-d looks the model up in the folder that the environment variable nnUNet_results names; "
            "set it, or give the model folder as -m"
        )
    pattern = f"Dataset{int(options.d):03d}_*" if options.d.isdecimal() else options.d
    datasets = sorted(path for path in Path(results).glob(pattern) if path.is_dir())
    if len(datasets) != 1:
        raise ValueError(
            f"-d {options.d} must name one dataset in {results}; found "
            f"{', '.join(path.name for path in datasets) or 'none'}"
        )
    return [str(datasets[0] / f"{options.tr}__{options.p}__{options.c}")]


class _ProgressBar:
    """One bar over the tiles of the current case, on terminals only."""

    def __init__(self, cases: int, *, shown: bool) -> None:
        self._cases = cases
        self._shown = shown and sys.stderr.isatty()
        self._case = 0
        self._name = ""
        self._bar: Any = None

    def __enter__(self) -> Callable[[str, int, int], None] | None:
        return self._update if self._shown else None

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _update(self, name: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if name != self._name:
            if self._bar is not None:
                self._bar.close()
            self._case += 1
            self._name = name
            self._bar = tqdm(total=total, desc=f"{name} ({self._case}/{self._cases})", unit="tile", leave=False)
        self._bar.update(done - self._bar.n)


def _inspect(options: argparse.Namespace) -> int:
    from .inspection import describe

    return _say_rows(describe(options.model, options.configuration))


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    return _say_rows(examine())


def _say_rows(rows: Sequence[tuple[str, str]]) -> int:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        _say(f"{name:{width}}  {value}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
