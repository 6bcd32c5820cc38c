"""Convert the pancreas data set to nnU-Net's raw format, with splits and class labels.

`cases` finds the cases before, and `planning` runs nnU-Net's planning afterwards. Everything is checked before the
first file is written, and the folder gets its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...engine.errors import OutputError, VolumeError
from ...engine.files import put_in_place, write_json, written_atomically
from ...engine.scans.volume import Volume, read_volume, write_segmentation
from .cases import (
    ENDING,
    IMAGE_ENDING,
    LABELS,
    LABELS_FILE,
    SPLITS_FILE,
    SourceCase,
    find_cases,
    grid_difference,
    read_mask,
)
from .planning import plan_and_preprocess
from .tables import DatasetError, raise_problems

__all__ = ["LABELS_FILE", "SPLITS_FILE", "DatasetError", "PreparedDataset", "plan_and_preprocess", "prepare_dataset"]

logger = logging.getLogger(__name__)

_SPARE_BYTES = 1 << 20  # for small files and folders


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDataset:
    """An nnU-Net raw data set.

    Attributes:
        folder: `.../DatasetXXX_Name`, which also holds `splits_final.json` and `classification_labels.csv`.
        cases: Source files of each case, split by split.
        rounded: Names of the cases whose masks held numbers that are not integers.
        without_lesion: Names of the cases whose masks hold no lesion; in the task every case has one.
        linked: Number of images that are hard links to the source; the others are copies.
    """

    folder: Path
    cases: tuple[SourceCase, ...]
    rounded: tuple[str, ...]
    without_lesion: tuple[str, ...]
    linked: int

    def names(self, split: str) -> tuple[str, ...]:
        """Names of the cases of a split, sorted."""
        return tuple(case.name for case in self.cases if case.split == split)


def prepare_dataset(
    source: str | os.PathLike[str],
    raw_folder: str | os.PathLike[str],
    *,
    dataset_id: int,
    dataset_name: str,
    table: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> PreparedDataset:
    """Convert a data set to nnU-Net's raw format, with explicit splits and class labels.

    Args:
        source: Folder of the data set, see `cases.find_cases`.
        raw_folder: nnU-Net's `nnUNet_raw`; made if it does not exist.
        dataset_id: 1 to 999.
        dataset_name: Letters, digits, - and _; the folder is `DatasetXXX_<dataset_name>`.
        table: csv or xlsx with the columns filename, subtype and split, if the folders do not have this information.
        overwrite: Whether an existing folder of this name is replaced.
        progress: Called after each case was checked with the number done, the number of all, and the name.

    Returns:
        What was written.

    Raises:
        ValueError: If the id or the name is not valid.
        DatasetError: If files of the data set are missing, doubled or do not fit together; it lists all problems.
        OutputError: If the folder or another data set of this id exists, the source lies in the folder, the disk has
            too little room, or a file cannot be written. After any error, nothing under the final name has changed.

    Note:
        Images are hard links if the file system allows it, so editing a source image in place edits the data set. Those
        of the validation split are also in `imagesVal`, a folder for prediction that nnU-Net ignores. While the folder
        is written it has a hidden name, because nnU-Net refuses an id that two `DatasetXXX...` folders have.
    """
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"dataset_id must lie in 1 to 999, got {dataset_id}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", dataset_name):
        raise ValueError(f"dataset_name must be letters, digits, - and _, got {dataset_name!r}")
    target = Path(raw_folder) / f"Dataset{dataset_id:03d}_{dataset_name}"
    _check_target(target, Path(source), overwrite)
    cases, problems = find_cases(source, table)
    _check_room(target, cases)
    rounded, without_lesion, unusable = _check_scans(cases, progress)
    raise_problems(str(source), [*problems, *unusable])
    if without_lesion:
        logger.warning("%d masks hold no lesion: %s", len(without_lesion), ", ".join(without_lesion))
    with _built_aside(target) as folder:
        linked = _write_cases(folder, cases)
        _write_descriptions(folder, target.name, cases)
    logger.info("%s: %d cases, %d masks rounded, %d images linked", target, len(cases), len(rounded), linked)
    return PreparedDataset(folder=target, cases=cases, rounded=rounded, without_lesion=without_lesion, linked=linked)


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise OutputError(
            f"{target} exists: choose another id or name, or allow replacing it (--overwrite, overwrite=True)"
        )
    if source.resolve().is_relative_to(target.resolve()):
        raise OutputError(f"{source} lies in {target}, which would be replaced: choose another id or name")
    number = target.name.partition("_")[0]
    for other in target.parent.glob(f"{number}*") if target.parent.is_dir() else ():
        if other.name != target.name and other.is_dir():
            raise OutputError(f"{other} has the same id, which nnU-Net refuses: choose another id")


def _check_room(target: Path, cases: Sequence[SourceCase]) -> None:
    """Refuse to begin if the disk has too little room; rounded masks are smaller than the original ones."""
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    status = os.stat(existing)
    files = [case.mask for case in cases if case.mask is not None]
    copied = [case for case in cases if case.image.stat().st_dev != status.st_dev]  # cannot be linked
    files += [case.image for case in copied] + [case.image for case in copied if case.split == "validation"]
    needed = sum(path.stat().st_size for path in files) + _SPARE_BYTES
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{target} needs about {needed / 1e6:.0f} MB, {existing} has {free / 1e6:.0f} MB free; make room, or "
            "choose another folder"
        )


def _check_scans(
    cases: Sequence[SourceCase], progress: Callable[[int, int, str], None] | None
) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Read all files; return the names of cases to round, of cases without lesion, and the problems.

    Note:
        Scans are compared by their voxels as float32, so that copies with another compression or type are found too.
    """
    rounded, without_lesion, problems, seen = [], [], [], dict[bytes, SourceCase]()
    for done, case in enumerate(cases, start=1):
        image, mask = None, None
        try:
            image = read_volume(case.image, channels=1)
        except VolumeError as error:
            problems.append(str(error))
        if case.mask is not None:
            try:
                mask, was_rounded = read_mask(case.mask)
                rounded += [case.name] if was_rounded else []
                without_lesion += [] if (mask.array == LABELS["lesion"]).any() else [case.name]
            except (VolumeError, DatasetError) as error:
                problems.append(str(error))
        if image is not None and mask is not None and (difference := grid_difference(mask, image)):
            problems.append(f"{case.mask}: {difference}")
        if image is not None:
            twin = seen.setdefault(_voxel_digest(image), case)
            if twin.split != case.split:
                problems.append(f"{case.image}: leaked, the same scan as {twin.image} of the {twin.split} split")
            elif twin is not case:
                problems.append(f"{case.image}: a scan must occur once, {twin.image} is the same")
        if progress is not None:
            progress(done, len(cases), case.name)
    return tuple(rounded), tuple(without_lesion), problems


def _voxel_digest(image: Volume) -> bytes:
    digest = hashlib.sha256(repr(image.array.shape).encode())
    digest.update(np.ascontiguousarray(image.array, dtype=np.float32).data)
    return digest.digest()


@contextlib.contextmanager
def _built_aside(target: Path) -> Iterator[Path]:
    """Give a hidden folder that replaces `target` when the block succeeds, and is removed if it fails."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    displaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            put_in_place(target, displaced)
        try:
            put_in_place(partial, target)
        except BaseException:  # an interruption too
            if displaced.exists():
                put_in_place(displaced, target)
            raise
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}; choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(displaced, ignore_errors=True)


def _write_cases(folder: Path, cases: Sequence[SourceCase]) -> int:
    """Write images and masks, and return how many images are linked."""
    for name in ("imagesTr", "labelsTr", "imagesTs", "imagesVal"):
        (folder / name).mkdir()
    linked = 0
    for case in cases:
        images = "imagesTs" if case.mask is None else "imagesTr"
        linked += _link_or_copy(case.image, folder / images / f"{case.name}{IMAGE_ENDING}")
        if case.split == "validation":
            _link_or_copy(case.image, folder / "imagesVal" / f"{case.name}{IMAGE_ENDING}")
        if case.mask is not None:
            mask, _ = read_mask(case.mask)
            # With the image's own geometry, so that headers do not differ in the last digit.
            geometry = read_volume(case.image).geometry
            write_segmentation(folder / "labelsTr" / f"{case.name}{ENDING}", mask.array[0], geometry)
    return linked


def _link_or_copy(source: Path, target: Path) -> bool:
    """Link a file, or copy it if that is not possible; return whether it is linked."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True


def _write_descriptions(folder: Path, name: str, cases: Sequence[SourceCase]) -> None:
    """Write `dataset.json`, the one explicit split, and the class labels."""
    by_split = {split: [case.name for case in cases if case.split == split] for split in ("train", "validation")}
    description = {
        "name": name,
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": sum(map(len, by_split.values())),
        "file_ending": ENDING,
    }
    write_json(folder / "dataset.json", description)
    write_json(folder / SPLITS_FILE, [{"train": by_split["train"], "val": by_split["validation"]}])
    rows = [(case.name, case.subtype, case.split) for case in cases if case.subtype is not None]
    with (
        written_atomically(folder / LABELS_FILE) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([("case", "subtype", "split"), *rows])
