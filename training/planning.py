"""Run nnU-Net's planning and preprocessing without letting validation cases into the plans."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..engine.errors import EngineError
from .cases import ENDING, LABELS_FILE, SPLITS_FILE
from .tables import DatasetError

logger = logging.getLogger(__name__)


def plan_and_preprocess(
    dataset_folder: str | os.PathLike[str],
    preprocessed_folder: str | os.PathLike[str],
    *,
    planner: Literal["resenc", "plain"] = "resenc",
    configurations: Sequence[str] = ("3d_fullres",),
    processes: int = 4,
) -> Path:
    """Plan and preprocess with nnU-Net, showing the planner the training cases alone.

    Args:
        dataset_folder: `nnUNet_raw/DatasetXXX_Name` as `prepare_dataset` writes it.
        preprocessed_folder: nnU-Net's `nnUNet_preprocessed`; made if it does not exist.
        planner: "resenc" for `nnUNetPlannerResEncM`, "plain" for `ExperimentPlanner`.
        configurations: Which to preprocess, such as "3d_fullres"; those the plans do not have are refused.
        processes: That nnU-Net starts.

    Returns:
        The plans file, in `preprocessed_folder/DatasetXXX_Name`, with the splits and class labels beside it.

    Raises:
        ValueError: If an argument is out of its range.
        DatasetError: If `dataset_folder` is no such folder, or data preprocessed with another split are there already.
        EngineError: If nnU-Net is not installed.

    Note:
        nnunetv2's `fingerprint_extractor.DatasetFingerprintExtractor` and `default_experiment_planner` take all of
        imagesTr: intensities, spacings and shapes of validation cases would reach the plans. Here the extractor's
        `dataset` and the planner's `numTraining` hold the first split's training cases. All cases are preprocessed.
        Running nnU-Net's own command with `--clean` afterwards would undo this.
    """
    if planner not in ("resenc", "plain"):
        raise ValueError(f"planner must be 'resenc' or 'plain', got {planner!r}")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    raw, preprocessed = Path(dataset_folder).absolute(), Path(preprocessed_folder).absolute()
    training_cases = _training_cases(raw, preprocessed / raw.name)
    with _nnunet_environment(raw.parent, preprocessed), _logged_prints():
        plans_file = _plan(raw.name, preprocessed, planner, training_cases, processes)
        _preprocess(raw.name, plans_file, configurations, processes)
    references = plans_file.parent / "gt_segmentations"
    references.mkdir(exist_ok=True)
    for source in (raw / "labelsTr").glob(f"*{ENDING}"):
        shutil.copyfile(source, references / source.name)
    shutil.copyfile(raw / LABELS_FILE, plans_file.parent / LABELS_FILE)
    return plans_file


def _training_cases(dataset_folder: Path, target: Path) -> frozenset[str]:
    """Read the training cases of the first split, and check that nothing in the target was made with another."""
    for name in ("dataset.json", SPLITS_FILE, LABELS_FILE):
        if not (dataset_folder / name).is_file():
            raise DatasetError(f"{dataset_folder / name} is missing: make the folder with nnturbo prepare")
    split = json.loads((dataset_folder / SPLITS_FILE).read_text())[0]
    present = target / SPLITS_FILE
    if present.is_file():
        other = json.loads(present.read_text())[0]
        if any(set(split[part]) != set(other[part]) for part in ("train", "val")):
            raise DatasetError(f"{present} holds another split than {dataset_folder}: remove {target}")
    return frozenset(split["train"])


@contextlib.contextmanager
def _nnunet_environment(raw: Path, preprocessed: Path) -> Iterator[None]:
    """Point nnU-Net at its folders, which it and its processes take from the environment."""
    wanted = {"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(preprocessed)}
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
    """Extract the fingerprint and plan the experiment, both from the training cases alone."""
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
    planning = {"resenc": nnUNetPlannerResEncM, "plain": ExperimentPlanner}[planner](name)
    planning.dataset_json["numTraining"] = len(training_cases)
    planning.plan_experiment()
    return preprocessed / name / f"{planning.plans_identifier}.json"


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
