"""What the suite predicts: every model kind on its scans, and the trained model on pieces of real scans."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from tests.parity.catalogue import PAIRS
from tests.parity.kinds import ModelKind
from tests.parity.model_folders import ModelFolder
from tests.parity.scans import SCANS, write_channels, write_previous_stage
from tests.paths import SHARED, TRAINED_MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is predicted, and how.

    Attributes:
        name: Name in reports.
        model: Model folder for nnturbo.
        stock_model: The same model for stock.
        files: The scan, one file per channel.
        previous_stage: Labels of the previous stage, for a cascade.
        folds: Folds to average, or None.
        checkpoint: File name in each fold.
        mirror: Whether to mirror, where the checkpoint allows it.
        tile_step_size: Step between tiles in units of the patch.
    """

    name: str
    model: Path
    stock_model: Path
    files: Sequence[Path]
    previous_stage: Path | None = None
    folds: tuple[int | str, ...] | None = None
    checkpoint: str = "checkpoint_final.pth"
    mirror: bool = True
    tile_step_size: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A piece of a real scan, for the trained model.

    Attributes:
        name: Name in test ids.
        file: Scan below `SHARED / "data"`.
        start: First voxel (z, y, x).
        shape: Voxels (z, y, x).
        mirror: Whether to mirror.
    """

    name: str
    file: str
    start: tuple[int, int, int]
    shape: tuple[int, int, int]
    mirror: bool = False


SYNTHETIC = {f"{kind.name}-{scan}": (kind, scan) for kind, scan in PAIRS}
CROPS = {
    crop.name: crop
    for crop in (
        Crop(name="trained-abdomen", file="abdomen_ct_0000.nii.gz", start=(40, 28, 34), shape=(44, 40, 40)),
        Crop(name="trained-chest", file="chest_ct_0000.nii.gz", start=(20, 30, 25), shape=(75, 80, 80)),
        Crop(
            name="trained-mirrored", file="abdomen_ct_0000.nii.gz", start=(55, 30, 50), shape=(30, 34, 30), mirror=True
        ),
    )
}


def synthetic_task(name: str, kind: ModelKind, scan_name: str, model: ModelFolder, folder: Path) -> Task:
    """Write a scan for a model kind into a folder.

    Args:
        name: Name of the task.
        kind: The model's kind.
        scan_name: Key of `SCANS`.
        model: The model, built.
        folder: Existing folder for the scan's files.

    Returns:
        The task.
    """
    scan = SCANS[scan_name]
    previous_stage = None
    if kind.previous_stage is not None:
        previous_stage = write_previous_stage(scan, len(kind.labels), folder, kind.file_ending)
    return Task(
        name=name,
        model=model.path,
        stock_model=model.stock_path,
        files=write_channels(scan, kind.channels, folder, kind.file_ending),
        previous_stage=previous_stage,
        folds=kind.use_folds,
        checkpoint=kind.checkpoint,
        mirror=kind.use_mirroring,
        tile_step_size=kind.tile_step_size,
    )


def trained_task(crop: Crop, folder: Path) -> Task:
    """Cut a piece from a real scan and write it into a folder."""
    scan = sitk.ReadImage(SHARED / "data" / crop.file)
    file = folder / "case_0000.nii.gz"
    sitk.WriteImage(sitk.RegionOfInterest(scan, crop.shape[::-1], crop.start[::-1]), file)
    return Task(
        name=crop.name,
        model=TRAINED_MODEL,
        stock_model=TRAINED_MODEL,
        files=[file],
        folds=("all",),
        mirror=crop.mirror,
    )
