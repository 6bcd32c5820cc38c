"""Check predictions of the test split, and pack them into the zip for the task."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...engine.errors import OutputError, VolumeError
from ...engine.files import written_atomically
from ...engine.scans.volume import read_volume
from ..data.cases import images_below
from ..data.masks import grid_difference
from ..data.references import RESULTS_FILE, masks_in, missing
from ..data.tables import RESULTS_HEADER, DatasetError, raise_problems, read_subtype_results
from ..data.task import PANCREAS

ENDING, IMAGE_ENDING = PANCREAS.file_ending, PANCREAS.image_ending

_TEST_NAME = re.compile(r"quiz_\d+")
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # time stamp in the zip, so that the same predictions give the same bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A zip that was written.

    Attributes:
        path: The zip.
        subtypes: Predicted subtype by case.
        compared_with_images: Whether cases and grids were checked against the test images.
    """

    path: Path
    subtypes: dict[str, str]
    compared_with_images: bool


def write_submission(
    predictions_folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    images_folder: str | os.PathLike[str] | None = None,
    subtypes: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Submission:
    """Write a flat zip of masks `quiz_<nnn>.nii.gz` and `subtype_results.csv`.

    Args:
        predictions_folder: Masks of the test cases, uint8, as `nnturbo predict` writes them.
        path: File whose name ends with .zip.
        images_folder: Test images `quiz_<nnn>_0000.nii.gz`: then each of them must have a mask on its own grid, and
            no mask may be without an image. Without it, this is not checked.
        subtypes: Predicted subtypes, csv with the header `Names,Subtype`; by default the one in `predictions_folder`.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The zip that was written. The same predictions give the same bytes.

    Raises:
        ValueError: If the name does not end with .zip.
        DatasetError: If a mask or a row is missing, additional or wrong; it lists all problems.
        OutputError: If the file exists or cannot be written. After any error, no existing file has changed.
    """
    path = Path(path)
    if path.suffix != ".zip":
        raise ValueError(f"{path}: the name of a submission must end with .zip")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another name, or allow replacing it (--overwrite, overwrite=True)")
    masks = masks_in(PANCREAS, predictions_folder)
    if not masks:
        raise DatasetError(f"{predictions_folder}: there must be masks named quiz_<number>{ENDING}, got none")
    table = Path(predictions_folder) / RESULTS_FILE if subtypes is None else subtypes
    results = dict(read_subtype_results(table).subtypes)
    images = None if images_folder is None else _images_in(Path(images_folder))
    expected = sorted(masks if images is None else images)
    problems = [f"{name}: the mask {name}{ENDING} is missing" for name in missing(expected, masks)]
    problems += [f"{masks[name]}: there is no image of this case" for name in missing(masks, expected)]
    problems += [f"{name}: the row {name}{ENDING} of {RESULTS_FILE} is missing" for name in missing(expected, results)]
    problems += [f"{RESULTS_FILE}: {name}{ENDING} is none of the cases" for name in missing(results, expected)]
    for name, mask in masks.items():
        if trouble := _mask_trouble(name, mask, None if images is None else images.get(name)):
            problems.append(f"{mask}: {trouble}")
    raise_problems(str(predictions_folder), problems)
    _write_zip(path, masks, results)
    return Submission(path=path, subtypes=results, compared_with_images=images is not None)


def _images_in(folder: Path) -> dict[str, Path]:
    files = (path for path in images_below(folder) if path.parent == folder and path.name.endswith(IMAGE_ENDING))
    images = {PANCREAS.case_name(path.name): path for path in files}
    if not images:
        raise DatasetError(f"{folder}: there must be test images named quiz_<number>{IMAGE_ENDING}, got none")
    return images


def _mask_trouble(name: str, mask: Path, image: Path | None) -> str | None:
    """Say what is wrong with a mask."""
    if not _TEST_NAME.fullmatch(name):
        return f"a test case must be named quiz_<number>{ENDING}"
    try:
        volume = read_volume(mask, channels=1)
        difference = None if image is None else grid_difference(volume, read_volume(image, channels=1))
    except VolumeError as error:
        return str(error)
    if volume.array.dtype != np.uint8:
        return f"a mask must be stored as uint8, got {volume.array.dtype}; write it again"
    if int(volume.array.max()) > max(PANCREAS.mask_values):
        return f"labels must be 0, 1 or 2, got {int(volume.array.max())}"
    return difference


def _write_zip(path: Path, masks: Mapping[str, Path], subtypes: Mapping[str, str]) -> None:
    table = io.StringIO()
    for row in (RESULTS_HEADER, *((f"{name}{ENDING}", subtypes[name]) for name in sorted(subtypes))):
        table.write(f"{row[0]},{row[1]}\n")
    with written_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(masks):  # compressed already
            archive.writestr(_member(f"{name}{ENDING}"), masks[name].read_bytes())
        archive.writestr(_member(RESULTS_FILE), table.getvalue())


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _EARLIEST)
    member.external_attr = 0o644 << 16  # otherwise unpacked files could not be read
    return member
