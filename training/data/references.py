"""Find the true masks and subtypes for an evaluation, in any of the known folder layouts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .cases import ENDING, IMAGE_ENDING, LABELS_FILE, case_name, images_below, subtype_in_name
from .tables import SUBTYPES, DatasetError, parse_subtype, raise_problems, read_table

RESULTS_FILE = "subtype_results.csv"

_MASK_FOLDERS = ("labelsTr", "gt_segmentations")  # of nnU-Net's raw and preprocessed data sets
_LABELLED_SPLITS = ("train", "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """True masks by case, and known true subtypes."""

    masks: dict[str, Path]
    subtypes: dict[str, int]


def find_references(
    folder: str | os.PathLike[str],
    *,
    subtypes: str | os.PathLike[str] | Mapping[str, int] | None = None,
    split: str | None = None,
) -> References:
    """Find true masks and subtypes.

    Args:
        folder: One of: a prepared data set (`labelsTr` with `classification_labels.csv` beside it) or its `labelsTr`;
            the original data set (`train|validation/subtype<s>/`); any other folder of masks `<name>.nii.gz`, at any
            depth, with or without a `subtype_results.csv`, such as `test_answers`. Images (`_0000`) are ignored.
        subtypes: Subtypes by case; or a csv or xlsx with the columns case (or Names, or filename) and subtype. By
            default the table in the folder, else names `quiz_<subtype>_<nnn>`.
        split: Only the cases of this split, such as "validation"; all if `None`.

    Returns:
        The masks, and their known subtypes.

    Raises:
        ValueError: If `split` is given, and neither the folder nor `subtypes` has splits.
        DatasetError: If there are no masks, a case occurs twice, or the table cannot be used.
    """
    folder = Path(folder)
    own_table = _labels_table(folder)
    table = own_table if subtypes is None and own_table is not None else subtypes
    if split is not None and not isinstance(table, str | os.PathLike) and not _is_original(folder):
        raise ValueError(
            f"split={split!r} needs subtypes to be a file with the columns case, subtype and split, or references of a "
            "prepared or the original data set"
        )
    if _is_original(folder):
        masks = masks_in(*(folder / part for part in _LABELLED_SPLITS if split in (None, part)), deep=True)
    else:
        masks = masks_in(_mask_folder(folder), deep=True)
    known: Mapping[str, int | None]
    if table is None:
        known = {name: subtype_in_name(name) for name in masks}
    elif isinstance(table, Mapping):
        known = table
    else:
        in_split = None if _is_original(folder) else split
        known = _read_true_subtypes(Path(table), in_split)
        if in_split is not None:
            if absent := sorted(set(known) - set(masks)):
                raise DatasetError(f"{table}: cases of {split} must have a reference, none for {', '.join(absent)}")
            masks = {name: path for name, path in masks.items() if name in known}
    if not masks:
        raise DatasetError(f"{folder}: there must be masks named <case>{ENDING} to compare with, got none")
    return References(
        masks=masks,
        subtypes={name: label for name, label in known.items() if label in SUBTYPES and name in masks},
    )


def holds_splits(folder: str | os.PathLike[str]) -> bool:
    """Whether a reference folder has splits."""
    table = _labels_table(Path(folder))
    return _is_original(Path(folder)) or (table is not None and table.name == LABELS_FILE)


def masks_in(*folders: str | os.PathLike[str], deep: bool = False) -> dict[str, Path]:
    """Masks by case, of folders or all below them.

    Raises:
        DatasetError: If a folder does not exist or cannot be listed, or a case occurs twice.
    """
    masks: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DatasetError(f"{folder}: there is no such folder with masks: check the path")
        for path in images_below(folder):
            if not path.name.endswith(ENDING) or path.name.endswith(IMAGE_ENDING):
                continue
            if not deep and path.parent != folder:
                continue
            name = case_name(path.name)
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


def _read_true_subtypes(table: Path, split: str | None) -> dict[str, int]:
    """Subtypes by case, of one split or all; rows without a subtype are ignored."""
    columns = ("case", "subtype", *(["split"] if split else []))
    subtypes: dict[str, int] = {}
    problems = []
    for row in read_table(table, columns, aliases={"names": "case", "filename": "case"}):
        name, subtype = case_name(row.cells["case"]), parse_subtype(row.cells["subtype"])
        if not row.cells["subtype"] or (split and row.cells["split"].lower() != split):
            continue
        if name in subtypes:
            problems.append(f"line {row.line}: {name} must occur once")
        elif subtype is None:
            problems.append(f"line {row.line}: the subtype of {name} must be 0, 1 or 2, got {row.cells['subtype']!r}")
        else:
            subtypes[name] = subtype
    raise_problems(str(table), problems)
    return subtypes
