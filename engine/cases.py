"""Which scans a folder holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .dicom import looks_like_dicom
from .errors import VolumeError

CHANNEL = re.compile(r"_\d{4}$")
"""nnU-Net's channel number at the end of a file's stem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFiles:
    """One scan to predict: its name, which results are called by, and what to read."""

    name: str
    images: tuple[Path, ...]


def find_cases(source: Path, file_ending: str) -> list[CaseFiles]:
    """List the cases in a folder of `<name>_0000<ending>` files, or of DICOM folders, or make one of a single scan.

    A folder without such files is one case if it holds DICOM slices itself, else every folder in it is one.

    Raises:
        VolumeError: Where there is nothing to predict.
    """
    if not source.exists():
        raise VolumeError(f"{source} does not exist; -i takes a folder of scans, one file, or a folder of DICOM slices")
    if source.is_file():
        stem = _without_ending(source.name, file_ending)
        return [CaseFiles(name=CHANNEL.sub("", stem), images=(source,))]
    files = sorted(path for path in _shown(source) if path.name.endswith(file_ending) and path.is_file())
    if not files:
        return _find_series(source)
    cases: dict[str, list[Path]] = {}
    unnumbered = []
    for path in files:
        stem = path.name.removesuffix(file_ending)
        if CHANNEL.search(stem):
            cases.setdefault(CHANNEL.sub("", stem), []).append(path)
        else:
            unnumbered.append(path.name)
    if unnumbered:
        raise VolumeError(
            f"every file in {source} must end in its channel's number, such as scan_0000{file_ending}; "
            f"{len(unnumbered)} do not, such as {unnumbered[0]}"
        )
    return [
        # Channels are 0, 1, 2, ...; where one is left out, reading says that its file is missing.
        CaseFiles(name=name, images=tuple(source / f"{name}_{i:04d}{file_ending}" for i in range(len(paths))))
        for name, paths in cases.items()
    ]


def _find_series(source: Path) -> list[CaseFiles]:
    """Take a folder as one DICOM series, or the folders in it as several."""
    entries = sorted(_shown(source))
    folders = [path for path in entries if path.is_dir()]
    # An index beside the folders, as on discs, looks like a slice.
    if not folders or any(path.is_file() and path.name != "DICOMDIR" and looks_like_dicom(path) for path in entries):
        return [CaseFiles(name=source.resolve().name, images=(source,))]
    return [CaseFiles(name=folder.name, images=(folder,)) for folder in folders]


def _shown(folder: Path) -> Iterator[Path]:
    """What is in a folder, without hidden files, such as macOS leaves beside others on foreign disks."""
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _without_ending(name: str, file_ending: str) -> str:
    for ending in (file_ending, ".nii.gz", ".gz"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return Path(name).stem
