"""`nnturbo benchmark`: argument parsing only; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_benchmark(commands: Any) -> None:
    """Declare the command."""
    benchmark = commands.add_parser(
        "benchmark",
        help="measure nnU-Net's own command against nnturbo's on this machine",
        description="Whole commands in fresh processes, interleaved, with the agreement of the labels beside. "
        "Without a model: the demo model on phantoms, then models of the pancreas task's size (hours). "
        "Needs nnU-Net: pip install 'nnturbo[training]'.",
    )
    add = benchmark.add_argument
    add("-m", metavar="MODEL", help="model folder, with -i")
    add("-i", metavar="SCANS", help="folder of scans, or one file")
    add("-f", default="0", metavar="FOLD", help="fold (default: %(default)s)")
    add("--bundle", help="of the same model, for nnturbo")
    add("-device", choices=("cpu", "cuda"), default="cpu", help="of both sides (default: %(default)s)")
    add("--disable_tta", action="store_true", help="no mirroring, on either side")
    add("--rounds", type=int, default=2, help="of A B B A, after one run of each (default: %(default)s)")
    add("--quick", action="store_true", help="without a model: the first measurement alone, in one round; minutes")
    add("--json", metavar="FILE", help="keep results, samples, machine and versions")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to nnturbo predict too")
    benchmark.set_defaults(run=_benchmark)


def _benchmark(options: argparse.Namespace) -> int:
    import tempfile

    _check(options)
    from ..engine.errors import EngineError
    from .command import compare, workloads
    from .report import write_report

    results = []

    def given(folder: Path) -> Iterator[tuple[str, Path, Path, bool]]:
        if options.m:
            yield (
                f"{Path(options.m).absolute().name}, {Path(options.i).name}",
                Path(options.m),
                Path(options.i),
                not options.disable_tta,
            )
        else:
            yield from workloads(folder, quick=options.quick)

    with tempfile.TemporaryDirectory(prefix="nnturbo-") as name:
        for what, model, scans, mirror in given(Path(name)):
            sys.stdout.write(f"{what}\n")
            try:
                result = compare(
                    model,
                    scans,
                    fold=options.f,
                    bundle=Path(options.bundle) if options.bundle else None,
                    device=options.device,
                    mirror=mirror,
                    rounds=1 if options.quick else options.rounds,
                    arguments=options.flags,
                )
            except RuntimeError as error:  # of a command
                raise EngineError(str(error)) from error
            results.append({"what": what, **result})
            dice = ", ".join(f"{label} {'-' if of is None else f'{of:.4f}'}" for label, of in result["dice"].items())
            sys.stdout.write(
                f"{result['ratio']:.2f} times faster, {result['peak_ratio']:.1f} times less memory; "
                f"{result['voxels_differing']} of {result['voxels']} voxels differ; Dice {dice}{_classes(result)}\n\n"
            )
            write_report(Path(options.json) if options.json else None, {"benchmark": "suite", "results": results})
    return 0


def _check(options: argparse.Namespace) -> None:
    import importlib.util

    from ..engine.errors import BackendUnavailable

    if importlib.util.find_spec("nnunetv2") is None:
        raise BackendUnavailable("a comparison needs nnU-Net: pip install 'nnturbo[training]'")
    from .task_models import DEMO_MODEL

    if bool(options.m) != bool(options.i):
        raise ValueError("give a model and scans, -m and -i, or neither")
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    if not options.m and (options.bundle or options.disable_tta or not DEMO_MODEL.is_dir()):
        raise ValueError(
            "without -m and -i the demo model of the source folder is measured as it is; run it there, without "
            "--bundle and --disable_tta, or give -m and -i"
        )
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no such folder")
    if options.quick and options.m:
        raise ValueError("--quick is for the measurement without a model; give --rounds 1 with -m and -i")


def _classes(result: dict[str, Any]) -> str:
    if "classes" not in result:
        return ""
    return f"; {result['classes_differing']} of {result['classes']} classes not those of the eager fp32 network"
