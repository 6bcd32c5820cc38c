"""Finds the slices of a scan among the files of a folder."""

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import IncompleteFile, VolumeError
from .dicom_header import Header, looks_like_dicom, read_header
from .voxel_data import naming

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_SCAN_CLASSES = {  # CT, MR and PET images; also with many frames in one file, which is refused later
    _STORAGE + number for number in ("2", "2.1", "2.2", "4", "4.1", "4.4", "128", "128.1", "130")
}
_NAMED_CLASSES = {"1.2.840.10008.1.3.10": "directory", _STORAGE + "7": "secondary capture"}
_SCAN_MODALITIES = ("CT", "MR", "PT")
_LOCALIZERS = ("LOCALIZER", "SCOUT")  # values of ImageType
_SLICE_NAME = re.compile(r"[^.]*|.*\.(dcm|ima|\d+)", re.IGNORECASE)  # without an ending, as UIDs are
_PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_LEAST_BYTES = 132  # the preamble and the mark behind it
_MOST_NAMES = 5


class Kind(enum.IntEnum):
    """What a DICOM file is; the files of the lowest kind in a folder are taken as the scan."""

    SLICE = 0
    LOCALIZER = 1
    OTHER_IMAGE = 2
    """A single image with a position in the patient: old exporters store slices as secondary captures."""
    NO_IMAGE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """A DICOM file and its header."""

    path: Path
    header: Header
    kind: Kind

    @property
    def series(self) -> str:
        """Series instance UID."""
        return self.header.text("SeriesInstanceUID")

    @property
    def has_one_frame(self) -> bool:
        """Whether it holds one image."""
        return self.header.text("NumberOfFrames") in ("", "1")

    @property
    def has_place(self) -> bool:
        """Whether it gives the position of its pixels in the patient."""
        return all(self.header.text(key) for key in _PLACE)

    @property
    def is_slice_of_scan(self) -> bool:
        """Whether it may be a slice: it is grey and has a position in the patient."""
        grey = self.header.text("PhotometricInterpretation") in ("", "MONOCHROME1", "MONOCHROME2")
        return self.has_one_frame and self.has_place and grey

    @property
    def what(self) -> str:
        """What it is, in a word or two."""
        if self.kind is Kind.LOCALIZER:
            return "localizer"
        named = _NAMED_CLASSES.get(self.header.sop_class)
        return named or self.header.text("Modality") or "no image"


def find_slices(folder: Path) -> tuple[list[DicomFile], tuple[str, ...]]:
    """Find the images of one series in a folder, in the order of their names.

    Images of CT, MR and PET are slices, except localizers. If there are none, localizers are taken, and if there are no
    localizers, other images that have a position in the patient. All other files are left out.

    Returns:
        The images, and warnings about which images were taken and which files were left out.

    Raises:
        VolumeError: If there are none, several series, or files that are damaged and may be slices.
    """
    files: list[DicomFile] = []
    others: dict[str, str] = {}
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    for path in paths:
        with naming(path.name):
            if looks_like_dicom(path):
                files.append(_read_file(path))
            elif not path.name.startswith("."):  # hidden files such as .DS_Store come from operating systems
                _refuse_cut_off(path)
                others[path.name] = "no DICOM"
    kind = min((file.kind for file in files), default=Kind.NO_IMAGE)
    if kind is Kind.NO_IMAGE:
        raise VolumeError(
            f"a folder must hold the slices of one DICOM series, got {len(paths)} other file(s) and no slice: "
            "pass the series' own folder, or for .nii.gz and other images the file itself"
        )
    found = [file for file in files if file.kind is kind]
    no_slices = _of_other_series(found)
    others |= {file.path.name: f"{file.what}, no slice" for file in no_slices}
    found = [file for file in found if file not in no_slices]
    _check_one_series(found)
    warnings = []
    if kind is not Kind.SLICE:
        warnings.append(
            f"there are no slices of CT, MR or PET: {len(found)} image(s) of another kind ({found[0].what}) are taken"
        )
    others |= {file.path.name: file.what for file in files if file.kind is not kind}
    if others:
        listed = summary(f"{name} ({others[name]})" for name in sorted(others))
        warnings.append(f"{len(others)} file(s) beside the slices are left out: {listed}")
    return found, tuple(warnings)


def summary(names: Iterable[str]) -> str:
    """List names, at most a few of them."""
    # File names may hold bytes that are not text.
    names = [name.encode("utf-8", "backslashreplace").decode("utf-8") for name in names]
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _read_file(path: Path) -> DicomFile:
    """Read a DICOM file's header and find out what it is.

    Raises:
        VolumeError: If it is damaged and may have been a slice.
    """
    header = read_header(path)
    sop_class, modality = header.sop_class, header.text("Modality")
    is_scan = sop_class in _SCAN_CLASSES or (not sop_class and modality in (*_SCAN_MODALITIES, ""))
    if is_scan and (not header.is_whole or (header.pixels is None and (sop_class or modality))):
        raise VolumeError("the DICOM slice is cut off or damaged: export or copy it again")
    if header.pixels is None:
        kind = Kind.NO_IMAGE
    elif is_scan:
        image_type = [value.strip() for value in header.text("ImageType").split("\\")]
        kind = Kind.LOCALIZER if any(value in image_type for value in _LOCALIZERS) else Kind.SLICE
    else:
        kind = Kind.NO_IMAGE
    file = DicomFile(path=path, header=header, kind=kind)
    if header.pixels is not None and not is_scan and file.has_place and file.has_one_frame:
        return replace(file, kind=Kind.OTHER_IMAGE)
    return file


def _refuse_cut_off(path: Path) -> None:
    """Refuse a file that is named like a slice but is too short to be one."""
    size = path.stat().st_size
    if size < _LEAST_BYTES and _SLICE_NAME.fullmatch(path.name):
        raise IncompleteFile(
            f"a file that is named like a slice must hold one, got {size} bytes: copy it again, or move it out of the "
            "folder"
        )


def _of_other_series(files: list[DicomFile]) -> list[DicomFile]:
    """Find dose sheets, protocols and pictures that scanners store as CT images in a separate series."""
    series = {file.series for file in files if file.is_slice_of_scan}
    if not series:
        return []
    return [file for file in files if file.series not in series and file.has_one_frame and not file.is_slice_of_scan]


def _check_one_series(files: list[DicomFile]) -> None:
    """Refuse several series, and list them so that the user can choose."""
    series: dict[str, list[DicomFile]] = {}
    for file in files:
        series.setdefault(file.series, []).append(file)
    if len(series) > 1:
        listed = ", ".join(
            f"{uid or 'without UID'} ({parts[0].header.text('SeriesDescription') or 'no description'}; "
            f"{len(parts)} slices, such as {parts[0].path.name})"
            for uid, parts in series.items()
        )
        raise VolumeError(
            f"a folder must hold one DICOM series, got {len(series)}: {listed}: "
            "move the one to predict into a folder of its own"
        )
