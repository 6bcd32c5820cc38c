"""Runs programs of other people on nnU-Net, and unchanged with `nnturbo run`: times, memory, and what differs.

    python -m nnturbo.benchmarks.programs -i CT [--size usual] [--only NAME ...] [--rounds 1] [--json FILE]

The programs must be installed: TotalSegmentator, HD-BET, moosez. Their weights are not needed: model folders of their
layout with seeded weights are written, in a folder that is removed again. MOOSE keeps its models in its own package.
"""

# pyright: reportMissingImports=false
# The programs are not installed with nnturbo.

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from .program_models import SIZES, SeededModel, Size
from .report import Run, run_measured, write_report

SIDES = ("stock", "nnturbo")
CUBE_MM = 192.0
"""Edge of the part of a scan that a program gets, unless it takes all."""

PARTS = (291, 292, 293, 294, 295)
"""Data sets of TotalSegmentator's models of 1.5 mm, which together have all classes."""

MOOSE_MODEL = "clin_ct_fast_organs"
MOOSE = f"""
import sys
from moosez import moose

if __name__ == "__main__":
    moose(sys.argv[1], "{MOOSE_MODEL}", sys.argv[2], "cpu")
"""

# As MONAI's get_nnunet_monai_predictor, which asks for a GPU.
MONAI = """
import sys
import SimpleITK as sitk
import torch
from monai.apps.nnunet.nnunet_bundle import ModelnnUNetWrapper
from monai.data import MetaTensor
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

if __name__ == "__main__":
    predictor = nnUNetPredictor(tile_step_size=0.5, use_gaussian=True, use_mirroring=False, device=torch.device("cpu"))
    scan = sitk.ReadImage(sys.argv[2])
    voxels = torch.from_numpy(sitk.GetArrayFromImage(scan))[None, None].float()
    affine = torch.diag(torch.tensor([*scan.GetSpacing()[::-1], 1.0]))
    labels = ModelnnUNetWrapper(predictor, sys.argv[1])(MetaTensor(voxels, affine=affine))
    sitk.WriteImage(sitk.GetImageFromArray(labels[0, 0].numpy().astype("uint8")), sys.argv[3])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program, as people call it.

    Args:
        package: That it is in.
        models: Gives the models that it looks for.
        home: Where it looks for them, in a folder of ours.
        command: From the scan and the folder of its results to the command.
        environment: From our folder to variables.
        add: Adds to each model's folder what nnU-Net's has not.
        takes_all: Whether the scan is not cut.
    """

    package: str
    models: Callable[[], Sequence[SeededModel]]
    home: Callable[[Path], Path]
    command: Callable[[Path, Path], list[str]]
    environment: Callable[[Path], dict[str, str]]
    add: Callable[[Path], None] | None = None
    takes_all: bool = False


def tool(name: str) -> str:
    """Path of a command beside this Python."""
    return str(Path(sys.executable).parent / name)


def total_models(*numbers: int) -> Callable[[], list[SeededModel]]:
    """Models of TotalSegmentator by the number of their data set."""

    def models() -> list[SeededModel]:
        from totalsegmentator.libs import TASK_ID_WEIGHTS_CONFIGS
        from totalsegmentator.map_tasks_config import TASK_CONFIGS
        from totalsegmentator.map_to_binary import class_map, class_map_5_parts, map_taskid_to_partname_ct

        labels = {number: class_map_5_parts[part] for number, part in map_taskid_to_partname_ct.items()}
        labels |= {297: class_map["total"], 298: class_map["total"], 299: class_map["body"], 300: class_map["body"]}
        labels[8] = class_map["liver_vessels"]
        modes = TASK_CONFIGS["total"]["sub_modes"] | {
            f"body {name}": mode for name, mode in TASK_CONFIGS["body"]["sub_modes"].items()
        }
        modes["liver_vessels"] = TASK_CONFIGS["liver_vessels"]
        found = []
        for number in numbers:
            mode = next(mode for mode in modes.values() if number in np.atleast_1d(mode["task_id"]))
            found.append(
                SeededModel(
                    folder=TASK_ID_WEIGHTS_CONFIGS[number]["foldername"],
                    trainer=mode["trainer"],
                    labels={"background": 0, **{name: label for label, name in labels[number].items()}},
                    spacing_mm=mode.get("resample", 1.5),
                    reader="NibabelIOWithReorient",
                    mirror_axes=None if "NoMirroring" in mode["trainer"] else (0, 1, 2),
                    common=tuple({"liver", "body_trunc"} & set(labels[number].values())),
                )
            )
        return found

    return models


def total_segmentator(models: Callable[[], list[SeededModel]], *flags: str, takes_all: bool = False) -> Program:
    """TotalSegmentator with some flags."""

    def environment(folder: Path) -> dict[str, str]:
        (folder / "config.json").write_text(
            json.dumps({"totalseg_id": "none", "send_usage_stats": False, "prediction_counter": 0}), encoding="utf-8"
        )
        return {"TOTALSEG_HOME_DIR": str(folder)}

    return Program(
        package="TotalSegmentator", models=models, home=lambda folder: folder / "nnunet" / "results",
        environment=environment, takes_all=takes_all,
        command=lambda scan, out: [
            tool("TotalSegmentator"), "-i", str(scan), "-o", str(out / "labels.nii.gz"), "--ml", "--device", "cpu",
            *flags,
        ],
    )  # fmt: skip


def hd_bet_models() -> list[SeededModel]:
    """The model of HD-BET."""
    return [
        SeededModel(
            folder="release_2.0.0", trainer="nnUNetTrainer", labels={"background": 0, "brain": 1}, spacing_mm=1.5,
            fold="all", has_configuration=False,
        )
    ]  # fmt: skip


def moose_models() -> list[SeededModel]:
    """A model of MOOSE."""
    from moosez.models import MODEL_METADATA

    labels = {"background": 0, **{f"organ {label}": label for label in range(1, 14)}}
    folder = MODEL_METADATA[MOOSE_MODEL]["folder_name"]
    return [SeededModel(folder=folder, trainer="nnUNetTrainer", labels=labels, spacing_mm=1.5)]


def moose_home(_: Path) -> Path:
    """Where MOOSE looks for models."""
    from moosez.system import MODELS_DIRECTORY_PATH

    return Path(MODELS_DIRECTORY_PATH)


def add_version(model: Path) -> None:
    """Write what MOOSE looks for before it uses a model."""
    from moosez.models import MODEL_METADATA

    version = {"url": MODEL_METADATA[MOOSE_MODEL]["url"]}
    (model / "model_version.json").write_text(json.dumps(version), encoding="utf-8")


def monai_models() -> list[SeededModel]:
    """The model of a bundle of MONAI."""
    labels = {"background": 0, **{f"organ {label}": label for label in range(1, 14)}}
    return [
        SeededModel(folder="models", trainer="nnUNetTrainer", labels=labels, spacing_mm=1.5, has_configuration=False)
    ]


def add_weights(model: Path) -> None:
    """Write checkpoints under the names of MONAI's bundles."""
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    shutil.copy(checkpoint, model / "nnunet_checkpoint.pth")
    checkpoint.rename(checkpoint.with_name("model.pt"))


PROGRAMS = {
    "TotalSegmentator": total_segmentator(total_models(*PARTS)),
    "TotalSegmentator --fast --statistics": total_segmentator(
        total_models(297), "--fast", "--statistics", takes_all=True
    ),
    "TotalSegmentator -ta body": total_segmentator(total_models(299), "-ta", "body"),
    "TotalSegmentator -ta liver_vessels": total_segmentator(total_models(298, 8), "-ta", "liver_vessels"),
    "TotalSegmentator --roi_subset liver spleen": total_segmentator(
        total_models(298, *PARTS), "--roi_subset", "liver", "spleen"
    ),
    "hd-bet": Program(
        package="HD-BET", models=hd_bet_models, home=lambda folder: folder / "hd-bet_params",
        environment=lambda folder: {"HOME": str(folder)},
        command=lambda scan, out: [
            tool("hd-bet"), "-i", str(scan), "-o", str(out / "brain.nii.gz"), "-device", "cpu", "--disable_tta",
            "--save_bet_mask",
        ],
    ),
    "MOOSE": Program(
        package="moosez", models=moose_models, home=moose_home, environment=lambda _: {}, add=add_version,
        command=lambda scan, out: [sys.executable, str(_written(out.parent / "moose.py", MOOSE)), str(scan), str(out)],
    ),
    "MONAI's bundle": Program(
        package="monai", models=monai_models, home=lambda folder: folder, environment=lambda _: {}, add=add_weights,
        command=lambda scan, out: [
            sys.executable, str(_written(out.parent / "bundle.py", MONAI)), str(out.parent / "models" / "fold_0"),
            str(scan), str(out / "labels.nii.gz"),
        ],
    ),
}  # fmt: skip


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@contextlib.contextmanager
def models_in_place(program: Program, folder: Path, size: Size) -> Iterator[None]:
    """Write the models of a program, and remove them again.

    Raises:
        RuntimeError: Where it has a model of that name.
    """
    written: list[Path] = []
    try:
        for model in program.models():
            path = program.home(folder) / model.folder
            if path.exists():
                raise RuntimeError(f"{path} must not be there: a seeded model would go into its place")
            written.append(path)
            model.write(program.home(folder), size)
            if program.add is not None:
                program.add(path)
        yield
    finally:
        for path in written:
            shutil.rmtree(path, ignore_errors=True)


def cut(scan: Path, target: Path) -> Path:
    """Write a cube from the middle of a scan."""
    image = sitk.ReadImage(str(scan))
    size = [
        min(length, round(CUBE_MM / spacing))
        for length, spacing in zip(image.GetSize(), image.GetSpacing(), strict=True)
    ]
    start = [(length - n) // 2 for length, n in zip(image.GetSize(), size, strict=True)]
    sitk.WriteImage(sitk.RegionOfInterest(image, size, start), str(target))
    return target


def compare(program: Program, scan: Path, size: str, rounds: int) -> dict[str, Any]:
    """Run a program on both sides, in turn.

    Returns:
        Ratios, times and memory, and how many voxels of its label files differ.

    Raises:
        RuntimeError: Where a side fails, or files are missing on one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not program.takes_all:
            scan = cut(scan, folder / scan.name)
        with models_in_place(program, folder, SIZES[size]):
            runs: dict[str, list[Run]] = {side: [] for side in SIDES}
            outputs = {side: folder / side for side in SIDES}
            order = (SIDES + SIDES[::-1]) * rounds
            for side in order[: 2 * rounds]:
                shutil.rmtree(outputs[side], ignore_errors=True)
                outputs[side].mkdir()
                command = program.command(scan, outputs[side])
                if side == "nnturbo":
                    command = [sys.executable, "-m", "nnturbo.engine.cli", "run", *command]
                runs[side].append(run_measured(command, environment=program.environment(folder)))
                print(f"  {side:8} {runs[side][-1]}", flush=True)
        agreement = _compare_files(outputs)
    medians = {
        what: {side: statistics.median(getattr(run, what) for run in taken) for side, taken in runs.items()}
        for what in ("seconds", "cpu_seconds", "peak_bytes", "peak_bytes_together")
    }
    return {
        "version": metadata.version(program.package),
        "size": size,
        **{f"{what}_ratio": value["stock"] / value["nnturbo"] for what, value in medians.items()},
        **{f"median_{what}": value for what, value in medians.items()},
        **agreement,
        "samples": {side: [asdict(run) for run in taken] for side, taken in runs.items()},
    }


def _compare_files(outputs: dict[str, Path]) -> dict[str, int]:
    names = [sorted(str(path.relative_to(of)) for path in of.rglob("*") if path.is_file()) for of in outputs.values()]
    images = [name for name in names[0] if name.endswith(".nii.gz")]
    if names[0] != names[1] or not images:
        raise RuntimeError(f"both sides must write the same files, got {names[0]} and {names[1]}")
    voxels = differing = labels = 0
    for name in images:
        one, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(of / name))) for of in outputs.values())
        voxels += one.size
        differing += int(np.count_nonzero(one != other))
        labels = max(labels, len(np.unique(one)))
    return {"voxels": voxels, "voxels_differing": differing, "most_labels_in_a_file": labels}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description="programs of other people, on nnU-Net and on nnturbo")
    parser.add_argument("-i", "--scan", type=Path, required=True, help="a CT")
    parser.add_argument("--size", choices=SIZES, default="usual", help="of the networks")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.only:
        program = PROGRAMS[name]
        if importlib.util.find_spec(program.package.replace("-", "_")) is None and not _is_installed(program.package):
            print(f"{name}: not installed")
            continue
        print(name, flush=True)
        row = {"program": name, **compare(program, options.scan, options.size, options.rounds)}
        print(
            f"  {row['seconds_ratio']:.2f} x sooner, {row['cpu_seconds_ratio']:.2f} x less processor time, "
            f"{row['peak_bytes_together_ratio']:.2f} x less memory, "
            f"{row['voxels_differing']} of {row['voxels']} voxels differ",
            flush=True,
        )
        rows.append(row)
        write_report(options.json, {"benchmark": "programs", "scan": options.scan.name, "rows": rows})


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
