"""Find the true masks and classes for an evaluation, in any of the known folder layouts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .cases import LABELS_FILE, images_below, subtype_in_name
from .cross_validation import read_folds
from .tables import DatasetError, in_words, parse_class, raise_problems, read_table
from .task import DATASET_FILE, PANCREAS, Task, read_task

RESULTS_FILE = "subtype_results.csv"

_MASK_FOLDERS = ("labelsTr", "gt_segmentations")  # of nnU-Net's raw and preprocessed data sets
_LABELLED_SPLITS = ("train", "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """True masks by case, and known true classes by name.

    Attributes:
        task: Labels and classes; without classes where none are known.
        masks: File of each case.
        subtypes: Class of each case that has one.
        folds: Fold of the cross-validation in which each case is held out; empty where the data set has none.
    """

    task: Task
    masks: dict[str, Path]
    subtypes: dict[str, str]
    folds: dict[str, int]


def find_references(
    folder: str | os.PathLike[str],
    *,
    subtypes: str | os.PathLike[str] | Mapping[str, int | str] | None = None,
    split: str | None = None,
    predictions: str | os.PathLike[str] | None = None,
) -> References:
    """Find true masks and classes.

    Args:
        folder: One of: a prepared data set (`labelsTr` with `classification_labels.csv` beside it) or its `labelsTr`;
            the original data set (`train|validation/<class>/`); any other folder of masks `<name><ending>`, at any
            depth, with or without a `subtype_results.csv`, such as `test_answers`. Images (`_0000`) are ignored.
        subtypes: Classes by case; or a csv or xlsx with the columns case (or Names, or filename) and subtype. By
            default the table in the folder, else names `quiz_<subtype>_<nnn>`.
        split: Only the cases of this split, such as "validation"; all if `None`.
        predictions: Folder whose `dataset.json` says what the task is where the references do not.

    Returns:
        The masks, and their known classes.

    Raises:
        ValueError: If `split` is given, and neither the folder nor `subtypes` has splits.
        DatasetError: If there are no masks, a case occurs twice, or the table cannot be used.
    """
    folder = Path(folder)
    task = _task_of(folder, predictions)
    own_table = _labels_table(folder)
    table = own_table if subtypes is None and own_table is not None else subtypes
    if split is not None and not isinstance(table, str | os.PathLike) and not _is_original(folder):
        raise ValueError(
            f"split={split!r} needs subtypes to be a file with the columns case, subtype and split, or references of a "
            "prepared or the original data set"
        )
    if _is_original(folder):
        masks = masks_in(task, *(folder / part for part in _LABELLED_SPLITS if split in (None, part)), deep=True)
    else:
        masks = masks_in(task, _mask_folder(folder), deep=True)
    known: Mapping[str, str | None]
    if table is None:
        known = {name: _told_by_place(path, name, task, _is_original(folder)) for name, path in masks.items()}
    elif isinstance(table, Mapping):
        known = {name: parse_class(str(label)) for name, label in table.items()}
    else:
        in_split = None if _is_original(folder) else split
        known = _read_true_classes(Path(table), task, in_split)
        if in_split is not None:
            if absent := sorted(set(known) - set(masks)):
                raise DatasetError(f"{table}: cases of {split} must have a reference, none for {', '.join(absent)}")
            masks = {name: path for name, path in masks.items() if name in known}
    if not masks:
        raise DatasetError(f"{folder}: there must be masks named <case>{task.file_ending} to compare with, got none")
    task = task.with_classes(label for label in known.values() if label is not None)
    return References(
        task=task,
        masks=masks,
        subtypes={name: label for name, label in known.items() if label in task.class_names and name in masks},
        folds={name: fold for name, fold in _folds_of(own_table).items() if name in masks},
    )


def _task_of(folder: Path, predictions: str | os.PathLike[str] | None) -> Task:
    """Read the dataset.json of the references, else that of the predictions; else it is the pancreas task."""
    masks = _mask_folder(folder).resolve()
    places = [folder, *([masks.parent] if masks.name in _MASK_FOLDERS else [])]
    if predictions is not None:
        places.append(Path(predictions))
    found = next((place / DATASET_FILE for place in places if (place / DATASET_FILE).is_file()), None)
    if found is None:
        return PANCREAS
    task = read_task(found)
    # What an older nnturbo prepared does not list the classes.
    return task if task.class_names or not task.is_pancreas else task.with_classes(PANCREAS.class_names)


def _folds_of(table: Path | None) -> dict[str, int]:
    return {} if table is None or table.name != LABELS_FILE else read_folds(table)


def _told_by_place(mask: Path, name: str, task: Task, is_original: bool) -> str | None:
    """Take a class from a name of the pancreas task, or from the folder in which the original data set has the mask."""
    if task.is_pancreas:
        return subtype_in_name(name)
    return mask.parent.name.removeprefix(task.class_folder) if is_original else None


def holds_splits(folder: str | os.PathLike[str]) -> bool:
    """Whether a reference folder has splits."""
    table = _labels_table(Path(folder))
    return _is_original(Path(folder)) or (table is not None and table.name == LABELS_FILE)


def masks_in(task: Task, *folders: str | os.PathLike[str], deep: bool = False) -> dict[str, Path]:
    """Masks by case, of folders or all below them; a task tells them from images.

    Raises:
        DatasetError: If a folder does not exist or cannot be listed, or a case occurs twice.
    """
    masks: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DatasetError(f"{folder}: there is no such folder with masks: check the path")
        files = [path for path in images_below(folder) if path.name.endswith(task.file_ending)]
        for name, paths in task.files_by_case(files)[1].items():
            for path in paths:
                if not deep and path.parent != folder:
                    continue
                if name in masks:
                    raise DatasetError(f"{path}: a case must occur once, {masks[name]} has the same name")
                masks[name] = path
    return masks


def missing(wanted: Iterable[str], given: Iterable[str]) -> tuple[str, ...]:
    """Names that are wanted and not given, sorted."""
    return tuple(sorted(set(wanted) - set(given)))


def _is_original(folder: Path) -> bool:
    return (folder / "validation").is_dir()


def _mask_folder(folder: Path) -> Path:
    return next((folder / name for name in _MASK_FOLDERS if (folder / name).is_dir()), folder)


def _labels_table(folder: Path) -> Path | None:
    """The table of subtypes that belongs to a folder of references."""
    masks = _mask_folder(folder).resolve()
    prepared, results = masks.parent / LABELS_FILE, masks / RESULTS_FILE
    if masks.name in _MASK_FOLDERS and prepared.is_file():
        return prepared
    return results if results.is_file() else None


def _read_true_classes(table: Path, task: Task, split: str | None) -> dict[str, str]:
    """Classes by case, of one split or all; rows without a class are ignored."""
    columns = ("case", "subtype", *(["split"] if split else []))
    subtypes: dict[str, str] = {}
    problems = []
    for row in read_table(table, columns, aliases={"names": "case", "filename": "case"}):
        name, subtype = task.case_name(row.cells["case"]), parse_class(row.cells["subtype"])
        if subtype is None or (split and row.cells["split"].lower() != split):
            continue
        if name in subtypes:
            problems.append(f"line {row.line}: {name} must occur once")
        elif task.class_names and subtype not in task.class_names:
            wanted = in_words(task.class_names)
            problems.append(f"line {row.line}: the subtype of {name} must be {wanted}, got {row.cells['subtype']!r}")
        else:
            subtypes[name] = subtype
    raise_problems(str(table), problems)
    return subtypes
