"""`nnturbo build`: compiles a model into a bundle."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from ..options import AGGREGATIONS, CLASSIFIERS, DEFAULT_CHECKPOINT, PRECISIONS, ModelChoice
from .output import DONE, say_rows
from .predict_flags import refuse_flags_beside_choice

PHANTOMS, PHANTOM_SEED = 4, 11
"""Number and seed of the phantoms on which lower precision is measured if no scans are given."""


def add_build(commands: Any) -> None:
    """Declare `nnturbo build`."""
    build = commands.add_parser(
        "build",
        help="compile a model into a bundle",
        description="Below fp32, the bundle's labels are compared with those of fp32 first, on the calibration scans "
        "or, for CT models without any, on generated phantoms; where they agree too little there is no bundle.",
    )
    add = build.add_argument
    add(
        "-m",
        required=True,
        metavar="MODEL",
        help="model folder, nnU-Net export zip, or the choice.json of nnturbo choose",
    )
    add("-o", required=True, metavar="BUNDLE", help="folder for the bundle, which must not exist, or file")
    add("-c", metavar="CONFIGURATION", help="configuration, with a zip that holds several")
    add("-f", nargs="+", metavar="FOLD", help="folds to average (default: all numbered folds that are there)")
    add("-chk", metavar="FILE", help=f"checkpoint file (default: {DEFAULT_CHECKPOINT})")
    add("-device", default="auto", help="what to build for: auto, cpu or cuda (default: %(default)s)")
    add("--backend", default="auto", help="what to compile for; nnturbo inspect lists them (default: %(default)s)")
    add("--precision", default="auto", choices=("auto", *PRECISIONS), help="(default: %(default)s)")
    add("--classifier", choices=CLASSIFIERS, help="as in predict (default: auto)")
    add("--aggregation", choices=AGGREGATIONS, help="as in predict, with --whole-path (default: foreground)")
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
    from ..export.build import build, build_whole_path
    from .inspect import describe

    refuse_flags_beside_choice(options)
    classifier = options.classifier or "auto"
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
            classifier=classifier,
            aggregation=options.aggregation or "foreground",
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
            classifier=classifier,
            calibration=calibration,
            calibration_name=name,
            floor=options.floor,
            compute_capabilities=options.compute_capability,
        )
    return say_rows(describe(options.o, None))


def _calibration(options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[list[Any], str]:
    """Find the calibration scans; if none are given and labels may change, generate phantoms."""
    from ..backends.choose import choose_device, choose_precision
    from ..model.choice import follow_single
    from ..model.folder import read_chosen

    asked = ModelChoice(folds=options.f, checkpoint=options.chk, configuration=options.c)
    plan = read_chosen(*follow_single(options.m, asked)).plan
    if options.calibration is not None:
        from ..jobs.cases import find_cases

        if not Path(options.calibration).is_dir():
            raise ValueError(f"--calibration must be a folder of scans, {options.calibration} is not one")
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

    from ...training.phantoms.phantom import SMALL_SETTINGS, write_dataset

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nnturbo-"))
    phantoms = write_dataset(folder, counts={"test": PHANTOMS}, seed=PHANTOM_SEED, settings=SMALL_SETTINGS)
    return [phantom.image for phantom in phantoms], "generated phantoms"
