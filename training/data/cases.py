"""Find the cases of a data set: in the pancreas task's folders, or by a table and a folder of files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from ...engine.scans.volume import Volume, read_volume
from .tables import SUBTYPES, DatasetError, TableRow, parse_subtype, read_table

SPLITS = ("train", "validation", "test")
LABELS = {"background": 0, "pancreas": 1, "lesion": 2}
ENDING = ".nii.gz"
IMAGE_ENDING = f"_0000{ENDING}"
SPLITS_FILE = "splits_final.json"
LABELS_FILE = "classification_labels.csv"
TABLE_COLUMNS = ("filename", "subtype", "split")

logger = logging.getLogger(__name__)

_IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")  # never ignored without a message
_LABELLED_NAME = re.compile(r"quiz_(\d+)_\d+")
_TEST_NAME = re.compile(r"quiz_\d+")
_FARTHEST_FROM_INTEGER = 0.01  # labels that were scaled as 16-bit numbers are 1.0000153
_SAME_SPACING = 1e-4  # relative
_SAME_DIRECTION = 1e-3  # per cosine
_SAME_ORIGIN = 0.05  # part of the smallest spacing


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCase:
    """Files of one case as they were found.

    Attributes:
        name: Without channel number and ending, such as "quiz_0_041".
        split: "train", "validation" or "test".
        subtype: 0, 1 or 2; `None` if a test case's subtype is not known.
        image: The scan.
        mask: The labels; `None` for test cases.
    """

    name: str
    split: str
    subtype: int | None
    image: Path
    mask: Path | None


def find_cases(
    source: str | os.PathLike[str], table: str | os.PathLike[str] | None = None
) -> tuple[tuple[SourceCase, ...], tuple[str, ...]]:
    """Find the cases below a folder.

    Args:
        source: With `table`, a folder that holds images `<name>_0000.nii.gz` and masks `<name>.nii.gz` at any depth
            (links to folders are not followed); else one with
            `train|validation/subtype<s>/quiz_<s>_<nnn>_0000.nii.gz`, masks beside the images, and
            `test/quiz_<nnn>_0000.nii.gz`.
        table: csv or xlsx with the columns filename, subtype and split (others are ignored); a filename may have the
            ending of the image, of the mask, or none.

    Returns:
        The cases, split by split, and one line for each problem with missing files, names and folders.

    Raises:
        DatasetError: If `source` is not a folder, or the table cannot be read.
    """
    source = Path(source)
    if not source.is_dir():
        raise DatasetError(f"{source}: the source must be a folder with images: check the path")
    problems: list[str] = []
    found = _cases_of_folders(source, problems) if table is None else _cases_of_table(source, Path(table), problems)
    cases = tuple(sorted(found, key=lambda case: (SPLITS.index(case.split), case.name)))
    for split in ("train", "validation"):
        if not problems and not any(case.split == split for case in cases):
            problems.append(f"{table or source / split}: there must be {split} cases, got none")
    return cases, tuple(problems)


def case_name(filename: str) -> str:
    """Name of a case from the name of its image or mask, with or without folders."""
    return PurePosixPath(filename.replace("\\", "/")).name.removesuffix(IMAGE_ENDING).removesuffix(ENDING)


def subtype_in_name(name: str) -> int | None:
    """Subtype in a name `quiz_<subtype>_<nnn>`, or `None`."""
    match = _LABELLED_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _cases_of_folders(source: Path, problems: list[str]) -> Iterator[SourceCase]:
    seen: dict[str, Path] = {}
    for split in SPLITS:
        for folder in _case_folders(source, split, problems):
            images, masks = _files_by_name(_files_of(folder, problems))
            subtype = None if split == "test" else int(folder.name[-1])
            for name in sorted({*images, *masks}):
                image, mask = images.get(name, [None])[0], masks.get(name, [None])[0]
                if trouble := _name_trouble(name, split, subtype):
                    problems.append(f"{image or mask}: {trouble}")
                elif image is None:
                    problems.append(f"{mask}: the image {name}{IMAGE_ENDING} must lie beside the mask, it is missing")
                elif name in seen:
                    problems.append(f"{image}: a case must occur once, {seen[name]} has the same name")
                elif mask is None and split != "test":
                    problems.append(f"{image}: the mask {name}{ENDING} must lie beside the image, it is missing")
                else:
                    seen[name] = image
                    mask = None if split == "test" else mask
                    yield SourceCase(name=name, split=split, subtype=subtype, image=image, mask=mask)


def _case_folders(source: Path, split: str, problems: list[str]) -> list[Path]:
    """Folders of a split that hold files; problems name the others."""
    root = source / split
    if split == "test":
        return [root] if root.is_dir() else []
    if not root.is_dir():
        problems.append(f"{root}: this folder must exist and hold subtype0, subtype1 and subtype2")
        return []
    folders = []
    for path in sorted(path for path in root.iterdir() if not path.name.startswith(".")):
        if path.is_dir() and path.name in {f"subtype{subtype}" for subtype in SUBTYPES}:
            folders.append(path)
        elif path.is_dir() or path.name.lower().endswith(_IMAGE_ENDINGS):
            problems.append(f"{path}: unknown subtype; {root} must hold the folders subtype0, subtype1 and subtype2")
    return folders


def _name_trouble(name: str, split: str, subtype: int | None) -> str | None:
    if split == "test":
        return None if _TEST_NAME.fullmatch(name) else f"a test image must be named quiz_<number>{IMAGE_ENDING}"
    if subtype_in_name(name) is None:
        return f"the name must be quiz_{subtype}_<number>{IMAGE_ENDING} or, for masks, without _0000"
    if subtype_in_name(name) != subtype:
        return f"the name says subtype {subtype_in_name(name)}, the folder subtype {subtype}: they must agree"
    return None


def _cases_of_table(source: Path, table: Path, problems: list[str]) -> Iterator[SourceCase]:
    found = (path for path in images_below(source) if path.name.endswith(ENDING))
    images, masks = _files_by_name(path for path in found if path.is_file())
    seen: dict[str, TableRow] = {}
    for row in read_table(table, TABLE_COLUMNS):
        where = f"{table} line {row.line}"
        name, split = case_name(row.cells["filename"]), row.cells["split"].lower()
        subtype = parse_subtype(row.cells["subtype"])
        wrong = []
        if not name:
            wrong.append("filename must not be empty")
        elif name in seen:
            other = seen[name].cells["split"]
            wrong.append(f"{name} must occur once, line {seen[name].line} has it too (split {other})")
        if split not in SPLITS:
            wrong.append(f"split must be one of {', '.join(SPLITS)}, got {row.cells['split']!r}")
        if subtype is None and (split != "test" or row.cells["subtype"]):
            wrong.append(f"unknown subtype {row.cells['subtype']!r} of {name}; it must be 0, 1 or 2")
        elif None not in (subtype, subtype_in_name(name)) and subtype != subtype_in_name(name):
            wrong.append(f"the name {name} says subtype {subtype_in_name(name)}, the row {subtype}: they must agree")
        for kind, files, ending in (("image", images, IMAGE_ENDING), ("mask", masks, ENDING)):
            count = len(files.get(name, ()))
            if name and (kind == "image" or split != "test") and count != 1:
                wrong.append(f"{source} must hold the {kind} {name}{ending} once, {count or 'none'} found")
        problems += [f"{where}: {line}" for line in wrong]
        seen.setdefault(name, row)
        if not wrong:
            mask = None if split == "test" else masks[name][0]
            yield SourceCase(name=name, split=split, subtype=subtype, image=images[name][0], mask=mask)
    if left_out := sorted(set(images) - set(seen)):
        logger.warning("%s has no row for %d images of %s: %s", table, len(left_out), source, ", ".join(left_out))


def images_below(folder: Path) -> list[Path]:
    """Files below a folder that have the name of an image and are not hidden, sorted.

    Raises:
        DatasetError: If a folder cannot be listed; `Path.rglob` would treat it as empty.
    """

    def refuse(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: the folder cannot be listed: {error.strerror}") from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in (*folders, *files) if name.lower().endswith(_IMAGE_ENDINGS)]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _files_of(folder: Path, problems: list[str]) -> list[Path]:
    """Images and masks in a folder; problems name files that look like one but are in a wrong place or no file."""
    files = []
    for path in images_below(folder):
        if path.parent != folder or not path.name.endswith(ENDING):
            problems.append(f"{path}: it must lie in {folder} itself, under a name that ends with {ENDING}")
        elif not path.is_file():
            problems.append(f"{path}: it must be a file, it is a folder or a link to nothing")
        else:
            files.append(path)
    return files


def _files_by_name(paths: Iterable[Path]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Images and masks, each by the name of the case."""
    images: dict[str, list[Path]] = {}
    masks: dict[str, list[Path]] = {}
    for path in paths:
        files = images if path.name.endswith(IMAGE_ENDING) else masks
        files.setdefault(case_name(path.name), []).append(path)
    return images, masks


def read_mask(path: str | os.PathLike[str]) -> tuple[Volume, bool]:
    """Read labels and round them.

    Args:
        path: Mask with labels 0, 1 and 2, each at most 0.01 off.

    Returns:
        The labels, (1, Z, Y, X) uint8, and whether a value was rounded.

    Raises:
        VolumeError: If the file cannot be read.
        DatasetError: If a value is not one of the labels.
    """
    stored = read_volume(path, channels=1)
    labels = np.rint(stored.array)
    known = (np.abs(stored.array - labels) <= _FARTHEST_FROM_INTEGER) & (labels >= 0) & (labels < len(LABELS))
    if not known.all():
        wrong = ", ".join(f"{value:g}" for value in np.unique(stored.array[~known])[:5])
        raise DatasetError(f"{path}: labels must be 0, 1 or 2 (within {_FARTHEST_FROM_INTEGER}), got {wrong}")
    return replace(stored, array=labels.astype(np.uint8)), bool((labels != stored.array).any())


def grid_difference(mask: Volume, image: Volume) -> str | None:
    """Say how the grid of a mask differs from that of its image; `None` if it is the same."""
    mine, its = mask.geometry, image.geometry
    for what, found, expected, relative, absolute in (
        ("shape (z, y, x)", mask.array.shape[1:], image.array.shape[1:], 0, 0),
        ("spacing (z, y, x) in mm", mine.spacing, its.spacing, _SAME_SPACING, 0),
        ("origin in mm", mine.origin, its.origin, 0, _SAME_ORIGIN * min(its.spacing)),
        ("direction", mine.direction, its.direction, 0, _SAME_DIRECTION),
    ):
        if not np.allclose(found, expected, rtol=relative, atol=absolute):
            return f"{what} is {found}, but {expected} in {image.name}: both must have the same"
    return None
