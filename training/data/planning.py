"""Run nnU-Net's planning and preprocessing; only training cases influence the plans."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ...engine.errors import EngineError, OutputError
from ...engine.files import write_json
from .cases import LABELS_FILE, SPLITS_FILE
from .tables import DatasetError
from .task import DATASET_FILE, read_task

logger = logging.getLogger(__name__)

Planner = Literal["resenc", "plain", "compact"]
PLANNERS: tuple[Planner, ...] = ("resenc", "plain", "compact")

# Size of a preprocessed case relative to its gzipped image; measured 2.4 to 4.
PREPROCESSED_RATIO = 4

COMPACT_FEATURES = (16, 32, 64, 128, 128)
COMPACT_PATCH = (32, 64, 96)
COMPACT_PIXELS = 1.5
COMPACT_STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
"""A network of 3.1 million parameters that trains on a CPU: two seconds a step of two patches on two cores."""


def plan_and_preprocess(
    dataset_folder: str | os.PathLike[str],
    preprocessed_folder: str | os.PathLike[str],
    *,
    planner: Planner = "resenc",
    configurations: Sequence[str] = ("3d_fullres",),
    processes: int = 4,
) -> Path:
    """Plan and preprocess with nnU-Net; the planner sees only the training cases.

    Args:
        dataset_folder: `nnUNet_raw/DatasetXXX_Name` as `prepare_dataset` writes it.
        preprocessed_folder: nnU-Net's `nnUNet_preprocessed`; made if it does not exist.
        planner: "resenc" for `nnUNetPlannerResEncM`, "plain" for `ExperimentPlanner`, "compact" for the latter
            with larger pixels and a small network, for CPUs.
        configurations: Configurations to preprocess, such as "3d_fullres"; the plans must have them.
        processes: Number of processes that nnU-Net starts.

    Returns:
        The plans file, in `preprocessed_folder/DatasetXXX_Name`, with the splits and class labels beside it.

    Raises:
        ValueError: If an argument is out of its range.
        DatasetError: If `dataset_folder` is not a prepared data set, or the target has data that were preprocessed with
            another split.
        OutputError: If the disk has too little room; then nothing is written.
        EngineError: If nnU-Net is not installed or fails.

    Note:
        nnunetv2's `fingerprint_extractor.DatasetFingerprintExtractor` and `default_experiment_planner` take all of
        imagesTr: intensities, spacings and shapes of validation cases would reach the plans. Here the extractor's
        `dataset` and the planner's `numTraining` hold the training cases of the data set's own split; those of a
        cross-validation are all among them, as in nnU-Net. All cases are preprocessed.
        Running nnU-Net's own command with `--clean` afterwards would undo this.
    """
    if planner not in PLANNERS:
        raise ValueError(f"planner must be one of {', '.join(PLANNERS)}, got {planner!r}")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    raw, preprocessed = Path(dataset_folder).absolute(), Path(preprocessed_folder).absolute()
    training_cases = _training_cases(raw, preprocessed / raw.name)
    _check_room(raw, preprocessed, len(configurations))
    # nnU-Net's planner uses n_proc_DA threads, and fails if a training has set it to 0.
    with nnunet_environment(raw=raw.parent, preprocessed=preprocessed, n_proc_DA=processes), _logged_prints():
        try:
            plans_file = _plan(raw.name, preprocessed, planner, training_cases, processes)
            _preprocess(raw.name, plans_file, configurations, processes)
        except RuntimeError as error:  # nnU-Net raises this if one of its processes died
            raise EngineError(f"nnU-Net failed on {raw}: {error}; if memory ran out, take fewer processes") from error
    references = plans_file.parent / "gt_segmentations"
    references.mkdir(exist_ok=True)
    for source in (raw / "labelsTr").glob(f"*{read_task(raw / DATASET_FILE).file_ending}"):
        shutil.copyfile(source, references / source.name)
    shutil.copyfile(raw / LABELS_FILE, plans_file.parent / LABELS_FILE)
    return plans_file


def _check_room(dataset_folder: Path, preprocessed: Path, configurations: int) -> None:
    """Refuse to begin if the disk has too little room."""
    stored = sum(path.stat().st_size for path in (dataset_folder / "imagesTr").iterdir())
    needed = PREPROCESSED_RATIO * stored * configurations
    existing = next(folder for folder in (preprocessed, *preprocessed.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"preprocessing {dataset_folder.name} needs about {needed / 1e6:.0f} MB, {existing} has "
            f"{free / 1e6:.0f} MB free; make room, or choose another folder"
        )


def require_nnunet() -> None:
    """Check that nnU-Net is installed, before other work begins.

    Raises:
        EngineError: If it is not.
    """
    if importlib.util.find_spec("nnunetv2") is None:
        raise EngineError("this needs nnU-Net, which is not installed: pip install 'nnturbo[training]'")


def _training_cases(dataset_folder: Path, target: Path) -> frozenset[str]:
    """Read the training cases, and check that nothing in the target was made with other splits."""
    for name in (DATASET_FILE, SPLITS_FILE, LABELS_FILE):
        if not (dataset_folder / name).is_file():
            raise DatasetError(f"{dataset_folder / name} is missing: make the folder with nnturbo prepare")
    splits = _read_splits(dataset_folder / SPLITS_FILE)
    present = target / SPLITS_FILE
    if present.is_file() and _read_splits(present) != splits:
        raise DatasetError(f"{present} holds other splits than {dataset_folder}: remove {target}")
    return splits[-1]["train"]  # of the data set's own split, which is the last one


def _read_splits(path: Path) -> list[dict[str, frozenset[str]]]:
    try:
        splits = [
            {part: frozenset(split[part]) for part in ("train", "val")} for split in json.loads(path.read_bytes())
        ]
        return [*splits[:-1], splits[-1]]  # an empty list is an error
    except (ValueError, LookupError, TypeError) as error:
        raise DatasetError(
            f"{path} must be a list of splits with train and val, it cannot be read so ({error}): remove it and "
            "prepare the data set again"
        ) from error


@contextlib.contextmanager
def nnunet_environment(**settings: Path | int) -> Iterator[None]:
    """Set nnU-Net's environment variables: its folders (raw, preprocessed, results), and n_proc_DA."""
    wanted = {
        f"nnUNet_{name}": str(value.absolute() if isinstance(value, Path) else value)
        for name, value in settings.items()
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _logged_prints() -> Iterator[None]:
    """Log what nnU-Net prints."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        logger.debug("%s", printed.getvalue())


def _plan(name: str, preprocessed: Path, planner: str, training_cases: frozenset[str], processes: int) -> Path:
    """Extract the fingerprint and plan the experiment, both from the training cases only."""
    try:
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
        from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
            nnUNetPlannerResEncM,
        )
    except ImportError as error:
        raise EngineError(f"planning needs nnU-Net ({error}): pip install 'nnturbo[training]'") from error
    extractor = DatasetFingerprintExtractor(name, processes)
    extractor.show_progress_bar = False
    extractor.dataset = {case: files for case, files in extractor.dataset.items() if case in training_cases}
    extractor.run(overwrite_existing=True)
    planning = (nnUNetPlannerResEncM if planner == "resenc" else ExperimentPlanner)(name)
    planning.dataset_json["numTraining"] = len(training_cases)
    if planner == "compact":
        planning.plans_identifier = "nnUNetCompactPlans"
    planning.plan_experiment()
    plans_file = preprocessed / name / f"{planning.plans_identifier}.json"
    if planner == "compact":
        plans = json.loads(plans_file.read_bytes())
        _make_compact(plans["configurations"]["3d_fullres"])
        write_json(plans_file, plans)
    return plans_file


def _make_compact(configuration: dict[str, Any]) -> None:
    """Replace the network that was planned for a GPU."""
    depth = len(COMPACT_FEATURES)
    # Larger pixels, so that a patch shows most of the region: a small network needs context most.
    slice_mm, *pixel_mm = configuration["spacing"]
    configuration["spacing"] = [slice_mm, *(COMPACT_PIXELS * mm for mm in pixel_mm)]
    slices, *pixels = configuration["median_image_size_in_voxels"]
    configuration["median_image_size_in_voxels"] = [slices, *(round(count / COMPACT_PIXELS) for count in pixels)]
    configuration["patch_size"] = list(COMPACT_PATCH)
    configuration["batch_size"] = 2
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": depth,
        "features_per_stage": list(COMPACT_FEATURES),
        # Slices are thicker than pixels, as in nnU-Net's own plans for such spacings.
        "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * (depth - 1)],
        "strides": [list(stride) for stride in COMPACT_STRIDES],
        "n_conv_per_stage": [2] * depth,
        "n_conv_per_stage_decoder": [1] * (depth - 1),
    }


def _preprocess(name: str, plans_file: Path, configurations: Sequence[str], processes: int) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(str(plans_file))
    if unknown := set(configurations) - set(plans.available_configurations):
        raise ValueError(
            f"configurations must be among {', '.join(plans.available_configurations)} of {plans_file.name}, got "
            f"{', '.join(sorted(unknown))}"
        )
    for configuration in configurations:
        logger.info("%s: preprocessing %s", name, configuration)
        preprocessor = plans.get_configuration(configuration).preprocessor_class(verbose=False)
        preprocessor.show_progress_bar = False
        preprocessor.run(name, configuration, plans_file.stem, num_processes=processes)
