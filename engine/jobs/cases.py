"""Finds the scans in a folder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import VolumeError
from ..scans.dicom_header import looks_like_dicom
from .records import RECORDS

logger = logging.getLogger(__name__)

CHANNEL = re.compile(r"_\d{4}$")
"""nnU-Net's channel number at the end of a file's stem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFiles:
    """One scan to predict: its name, from which results get theirs, and its files or folder."""

    name: str
    images: tuple[Path, ...]


def find_cases(source: Path, file_ending: str, output: Path | None = None) -> list[CaseFiles]:
    """List the cases in a folder of `<name>_0000<ending>` files or of DICOM folders, or make one case of a single scan.

    A folder without such files is one case if it holds DICOM slices; otherwise each folder in it is a case. The files
    of a case are its channels in the order of their numbers. As in nnU-Net, the numbers may have gaps.

    Args:
        source: Folder, or file.
        file_ending: File ending of scans in a folder.
        output: Folder for results; files that a job wrote there are not scans.

    Raises:
        VolumeError: Where there is nothing to predict.
    """
    try:
        if source.is_file():
            stem = _without_ending(source.name, file_ending)
            return [CaseFiles(name=CHANNEL.sub("", stem), images=(source,))]
        shown = _shown(source)
    except OSError as error:
        what = f"it is a broken link to {os.readlink(source)}" if source.is_symlink() else error.strerror or error
        raise VolumeError(
            f"{source} must be a folder of scans, one file, or a folder of DICOM slices: {what}"
        ) from error
    files = [name for name, is_folder in shown.items() if name.endswith(file_ending) and not is_folder]
    is_output = output is not None and output.exists() and output.samefile(source)
    stems = [name.removesuffix(file_ending) for name in files]
    if is_output:  # results are named by their case, and a case's name may end like a channel
        made = {CHANNEL.sub("", stem) for stem in stems if CHANNEL.search(stem, 1)}
        made |= {name.removesuffix(".json") for name in _names(source / RECORDS)}
        stems = [stem for stem in stems if stem not in made]
    cases: dict[str, list[Path]] = {}
    unnumbered = []
    for stem in stems:
        if CHANNEL.search(stem, 1):
            cases.setdefault(CHANNEL.sub("", stem), []).append(source / f"{stem}{file_ending}")
        else:
            unnumbered.append(f"{stem}{file_ending}")
    if unnumbered:
        raise VolumeError(
            f"every file in {source} must end in its channel's number, such as scan_0000{file_ending}; "
            f"{len(unnumbered)} do not, such as {unnumbered[0]}"
        )
    if not cases:
        return _find_series(source, shown, file_ending, output)
    for name, paths in cases.items():
        if len(paths) > 1 and not paths[-1].name.endswith(f"_{len(paths) - 1:04d}{file_ending}"):
            logger.warning("%s: channels are not numbered 0000, 0001, ...: they are taken in their order", name)
    return [CaseFiles(name=name, images=tuple(paths)) for name, paths in cases.items()]


def _find_series(source: Path, shown: Mapping[str, bool], file_ending: str, output: Path | None) -> list[CaseFiles]:
    """Take a folder as one DICOM series, or the folders in it as several."""
    files = [name for name, is_folder in shown.items() if not is_folder]
    # The index DICOMDIR, as on discs, looks like a slice.
    if any((source / name).is_file() and name != "DICOMDIR" and looks_like_dicom(source / name) for name in files):
        return [CaseFiles(name=source.resolve().name, images=(source,))]
    numbered_files = [name for name in files if CHANNEL.search(_without_ending(name, _ending(name)))]
    folders = [source / name for name, is_folder in shown.items() if is_folder]
    if output is not None:
        folders = _without_output(folders, source, output)
    if not folders or numbered_files:
        endings = sorted({_ending(name) for name in numbered_files or files})
        found = f"{len(numbered_files or files)} file(s) ending with {', '.join(endings[:5])}" if files else "nothing"
        raise VolumeError(
            f"{source} must hold scans named NAME_0000{file_ending}, as the model's are, DICOM slices, or folders of "
            f"them; it holds {found}"
        )
    return [CaseFiles(name=folder.name, images=(folder,)) for folder in folders]


def _without_output(folders: list[Path], source: Path, output: Path) -> list[Path]:
    """Leave out the output folder and its records.

    Raises:
        VolumeError: Where scans lie in the output folder.
    """
    output, home = output.resolve(), source.resolve()
    left, own = [], []
    for folder in folders:
        is_own = output.is_relative_to(folder.resolve()) or (folder.name == RECORDS and output == home)
        (own if is_own else left).append(folder)
    for folder in own:
        if any(path.is_file() and looks_like_dicom(path) for path in folder.iterdir()):
            raise VolumeError(f"{folder} holds DICOM slices, and results would go there: choose another output folder")
    return left


def _shown(folder: Path) -> dict[str, bool]:
    """Entries of a folder by name, and whether each is a folder; without hidden files and macOS's own folder."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_dir() for entry in entries}
    return {name: found[name] for name in sorted(found) if not name.startswith(".") and name != "__MACOSX"}


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _ending(name: str) -> str:
    """Give the ending of a file's name, with two parts for a compressed file, such as .nii.gz."""
    suffixes = Path(name).suffixes[-2:]
    return "".join(suffixes if suffixes[-1:] in ([".gz"], [".GZ"]) else suffixes[-1:]) or "no ending"


def _without_ending(name: str, file_ending: str) -> str:
    for ending in (file_ending, ".nii.gz", ".gz"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return Path(name).stem
