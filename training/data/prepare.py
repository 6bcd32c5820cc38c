"""Convert a data set to nnU-Net's raw format, with splits and class labels.

`task` says what it is about, `cases` finds the cases before, and `planning` runs nnU-Net's planning afterwards.
Everything is checked before the first file is written, and the folder gets its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...engine.errors import OutputError, VolumeError
from ...engine.files import put_in_place, write_json, written_atomically
from ...engine.scans.volume import Volume, read_volume, write_segmentation
from .cases import LABELS_FILE, SPLITS_FILE, SourceCase, find_cases
from .cross_validation import FOLD_COLUMN, splits, stratified_folds
from .masks import grid_difference, read_mask
from .planning import plan_and_preprocess
from .tables import DatasetError, raise_problems
from .task import DATASET_FILE, WHOLE, Task, find_task

__all__ = ["LABELS_FILE", "SPLITS_FILE", "DatasetError", "PreparedDataset", "plan_and_preprocess", "prepare_dataset"]

logger = logging.getLogger(__name__)

_SPARE_BYTES = 1 << 20  # for small files and folders


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDataset:
    """An nnU-Net raw data set.

    Attributes:
        folder: `.../DatasetXXX_Name`, which also holds `splits_final.json` and `classification_labels.csv`.
        task: Channels, labels or regions, classes and file ending.
        cases: Source files of each case, split by split.
        rounded: Names of the cases whose masks held numbers that are not integers.
        without_label: Names of the cases whose masks lack a label or region, by its name; "whole" of empty masks.
        linked: Number of images that are hard links to the source; the others are copies.
    """

    folder: Path
    task: Task
    cases: tuple[SourceCase, ...]
    rounded: tuple[str, ...]
    without_label: Mapping[str, tuple[str, ...]]
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
    description: str | os.PathLike[str] | None = None,
    regions: Mapping[str, Sequence[str]] | None = None,
    folds: int | None = None,
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
        description: `dataset.json` with channels, labels, file ending and, if they are to be checked, `class_names`; by
            default the one in `source`. Without one, the data set is that of the pancreas task.
        regions: Labels of each region, by name, larger ones first: nnU-Net then learns regions in place of labels.
        folds: Makes a cross-validation of the training cases, stratified by class: the splits are its folds, from 0,
            and after them the given split, whose validation cases are in none of the folds, if there are any. By
            default the given split is the only one.
        overwrite: Whether an existing folder of this name is replaced.
        progress: Called after each case was checked with the number done, the number of all, and the name.

    Returns:
        What was written.

    Raises:
        ValueError: If the id, the name or the regions are not valid.
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
    task = find_task(Path(source), None if description is None else Path(description))
    task = task if regions is None else task.with_regions(regions)
    needed = ("train", "validation") if folds is None else ("train",)
    cases, problems = find_cases(source, task, table, needed=needed)
    of_training = {case.name: case.subtype for case in cases if case.split == "train" and case.subtype is not None}
    held_out = {} if folds is None or problems else stratified_folds(of_training, folds)
    _check_room(target, cases)
    rounded, without_label, unusable = _check_scans(cases, task, progress)
    raise_problems(str(source), [*problems, *unusable])
    task = task.with_classes(case.subtype for case in cases if case.subtype is not None)
    for label, names in without_label.items():
        lack = "are empty" if label == WHOLE else f"hold no {label}"
        logger.warning("%d masks %s: %s", len(names), lack, ", ".join(names))
    with _built_aside(target) as folder:
        linked = _write_cases(folder, task, cases)
        _write_descriptions(folder, target.name, task, cases, held_out)
    logger.info("%s: %d cases, %d masks rounded, %d images linked", target, len(cases), len(rounded), linked)
    return PreparedDataset(
        folder=target, task=task, cases=cases, rounded=rounded, without_label=without_label, linked=linked
    )


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
    copied = [(case, image) for case in cases for image in case.images if image.stat().st_dev != status.st_dev]
    files += [image for _, image in copied]  # they cannot be linked
    files += [image for case, image in copied if case.split == "validation"]
    needed = sum(path.stat().st_size for path in files) + _SPARE_BYTES
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{target} needs about {needed / 1e6:.0f} MB, {existing} has {free / 1e6:.0f} MB free; make room, or "
            "choose another folder"
        )


def _check_scans(
    cases: Sequence[SourceCase], task: Task, progress: Callable[[int, int, str], None] | None
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], list[str]]:
    """Read all files; return the names of cases to round, of cases that lack a label, and the problems.

    Note:
        Scans are compared by their voxels as float32, so that copies with another compression or type are found too.
    """
    rounded, problems, seen = [], [], dict[bytes, SourceCase]()
    lacking: dict[str, list[str]] = {name: [] for name in task.structures}
    for done, case in enumerate(cases, start=1):
        image, mask = None, None
        try:
            image = read_volume(list(case.images), channels=len(task.channel_names))
        except VolumeError as error:
            problems.append(str(error))
        if case.mask is not None:
            try:
                mask, was_rounded = read_mask(case.mask, task)
                rounded += [case.name] if was_rounded else []
                for name, values in task.structures.items():
                    lacking[name] += [] if np.isin(mask.array, values).any() else [case.name]
            except (VolumeError, DatasetError) as error:
                problems.append(str(error))
        if image is not None and mask is not None and (difference := grid_difference(mask, image)):
            problems.append(f"{case.mask}: {difference}")
        if image is not None:
            twin = seen.setdefault(_voxel_digest(image), case)
            if twin.split != case.split:
                problems.append(
                    f"{case.images[0]}: leaked, the same scan as {twin.images[0]} of the {twin.split} split"
                )
            elif twin is not case:
                problems.append(f"{case.images[0]}: a scan must occur once, {twin.images[0]} is the same")
        if progress is not None:
            progress(done, len(cases), case.name)
    return tuple(rounded), {name: tuple(names) for name, names in lacking.items() if names}, problems


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


def _write_cases(folder: Path, task: Task, cases: Sequence[SourceCase]) -> int:
    """Write images and masks, and return how many images are linked."""
    for name in ("imagesTr", "labelsTr", "imagesTs", "imagesVal"):
        (folder / name).mkdir()
    linked = 0
    for case in cases:
        images = "imagesTs" if case.mask is None else "imagesTr"
        for image, ending in zip(case.images, task.image_endings(), strict=True):
            linked += _link_or_copy(image, folder / images / f"{case.name}{ending}")
            if case.split == "validation":
                _link_or_copy(image, folder / "imagesVal" / f"{case.name}{ending}")
        if case.mask is not None:
            mask, _ = read_mask(case.mask, task)
            # With the image's own geometry, so that headers do not differ in the last digit.
            geometry = read_volume(case.images[0]).geometry
            write_segmentation(folder / "labelsTr" / f"{case.name}{task.file_ending}", mask.array[0], geometry)
    return linked


def _link_or_copy(source: Path, target: Path) -> bool:
    """Link a file, or copy it if that is not possible; return whether it is linked."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True


def _write_descriptions(
    folder: Path, name: str, task: Task, cases: Sequence[SourceCase], folds: Mapping[str, int]
) -> None:
    """Write `dataset.json`, the splits, and the class labels."""
    by_split = {split: [case.name for case in cases if case.split == split] for split in ("train", "validation")}
    description = {"name": name, **task.describe(), "numTraining": sum(map(len, by_split.values()))}
    write_json(folder / DATASET_FILE, description)
    write_json(folder / SPLITS_FILE, splits(folds, by_split["train"], by_split["validation"]))
    rows = [(case.name, case.subtype, case.split) for case in cases if case.subtype is not None]
    header = ("case", "subtype", "split", *([FOLD_COLUMN] if folds else []))
    with (
        written_atomically(folder / LABELS_FILE) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        fold_of = {row[0]: [folds.get(row[0], "")] if folds else [] for row in rows}
        csv.writer(file, lineterminator="\n").writerows([header, *((*row, *fold_of[row[0]]) for row in rows)])
