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

from ...engine.errors import EngineError, OutputError
from .cases import LABELS_FILE, SPLITS_FILE
from .planners import Planner, Planning, plan_experiment
from .tables import DatasetError
from .task import DATASET_FILE, read_task

logger = logging.getLogger(__name__)

# Size of a preprocessed case relative to its gzipped image; measured 2.4 to 4.
PREPROCESSED_RATIO = 4


def plan_and_preprocess(
    dataset_folder: str | os.PathLike[str],
    preprocessed_folder: str | os.PathLike[str],
    *,
    planner: Planner = "resenc",
    spacing: Sequence[float] | None = None,
    memory_gb: float | None = None,
    configurations: Sequence[str] = ("3d_fullres",),
    processes: int = 4,
) -> Path:
    """Plan and preprocess with nnU-Net; the planner sees only the training cases.

    Args:
        dataset_folder: `nnUNet_raw/DatasetXXX_Name` as `prepare_dataset` writes it.
        preprocessed_folder: nnU-Net's `nnUNet_preprocessed`; made if it does not exist.
        planner: One of `planners.PLANNERS`.
        spacing: Target spacing in mm, (z, y, x), if it is not the planner's choice.
        memory_gb: GPU memory to plan for, if it is not the planner's own.
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
    planning = Planning(planner=planner, spacing=None if spacing is None else tuple(spacing), memory_gb=memory_gb)
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    raw, preprocessed = Path(dataset_folder).absolute(), Path(preprocessed_folder).absolute()
    training_cases = _training_cases(raw, preprocessed / raw.name)
    _check_room(raw, preprocessed, len(configurations))
    # nnU-Net's planner uses n_proc_DA threads, and fails if a training has set it to 0.
    with nnunet_environment(raw=raw.parent, preprocessed=preprocessed, n_proc_DA=processes), _logged_prints():
        try:
            plans_file = _plan(raw.name, preprocessed, planning, training_cases, processes)
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
    return frozenset().union(*(split["train"] for split in splits))  # without the own split's validation cases


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


def _plan(name: str, preprocessed: Path, planning: Planning, training_cases: frozenset[str], processes: int) -> Path:
    """Extract the fingerprint and plan the experiment, both from the training cases only."""
    try:
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    except ImportError as error:
        raise EngineError(f"planning needs nnU-Net ({error}): pip install 'nnturbo[training]'") from error
    extractor = DatasetFingerprintExtractor(name, processes)
    extractor.show_progress_bar = False
    extractor.dataset = {case: files for case, files in extractor.dataset.items() if case in training_cases}
    extractor.run(overwrite_existing=True)
    return plan_experiment(name, preprocessed, planning, len(training_cases))


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
