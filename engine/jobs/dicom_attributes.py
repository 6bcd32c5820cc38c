"""What a DICOM segmentation takes over from the slices it was made of: only what the standard allows.

Headers of real slices hold what it does not: dates such as 00000000 or REMOVED, times with colons, names in a wrong
character set. What need not be there is left empty then, by one rule for all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import VolumeError
from ..scans.dicom import Slice, list_slices
from ..scans.voxel_data import naming

if TYPE_CHECKING:
    from pydicom import Dataset

# DICOM PS3.3, C.8.20.2: without the first a segmentation means nothing, the others may be empty.
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "PositionReferenceIndicator"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
_VALUES = {  # that the standard lists; all others are not allowed
    "PatientSex": ("M", "F", "O"),
    "PatientSexNeutered": ("ALTERED", "UNALTERED"),
    "PatientIdentityRemoved": ("YES", "NO"),
    "QualityControlSubject": ("YES", "NO"),
    "SmokingStatus": ("YES", "NO", "UNKNOWN"),
    "LossyImageCompression": ("00", "01"),
}
_TEXT = ("LO", "LT", "PN", "SH", "ST", "UC", "UT")  # types whose characters the character set tells
_BINARY = ("AT", "FD", "FL", "OB", "OD", "OF", "OL", "OV", "OW", "SL", "SS", "SV", "UL", "UN", "US", "UV")
_GROUPS = (0x08, 0x10, 0x12, 0x18, 0x20, 0x32, 0x38, 0x40)  # of what is not about pixels
_UID = re.compile(r"(?=.{1,64}$)(0|[1-9]\d*)(\.(0|[1-9]\d*))*", re.ASCII)


def read_source_images(folder: Path) -> tuple[list[Dataset], list[str]]:
    """Read what a segmentation must know of its slices.

    Returns:
        For each slice, in the order of the scan, its identifiers and its place; for the first one also what the
        standard allows of the rest. And the keywords of what it does not allow, which is there, but empty.

    Raises:
        VolumeError: If the slices lack identifiers, or have those of several studies.
    """
    from pydicom import dcmread

    slices, _ = list_slices(folder)
    distance_mm = (slices[-1].position_mm - slices[0].position_mm) / (len(slices) - 1)
    images, emptied = [], []
    for index, part in enumerate(slices):
        with naming(f"{folder.name}: {part.path.name}"):
            try:
                tags: list[str] | None = None if index == 0 else list(_NEEDED)
                image = dcmread(part.path, stop_before_pixels=True, force=True, specific_tags=tags)
                identifiers = {keyword: str(image.get(keyword) or "").strip(" \0") for keyword in _NEEDED}
            except Exception as error:  # of many types, as headers are read where they are asked
                raise VolumeError(f"its header must be DICOM, but {error}: export the series again") from error
            _check_identifiers(identifiers)
            if index == 0:
                emptied = _empty_what_is_not_allowed(image)
            for keyword, uid in identifiers.items():
                setattr(image, keyword, uid)
            _place(image, part, slices[0], distance_mm)
        images.append(image)
    with naming(folder.name):
        _check_one_study(slices, images)
    return images, emptied


def may_be_empty(keyword: str) -> bool:
    """Whether a segmentation must have an attribute although nothing needs to be in it."""
    return keyword in _MAY_BE_EMPTY


def _check_identifiers(identifiers: dict[str, str]) -> None:
    if missing := [keyword for keyword, uid in identifiers.items() if not uid]:
        raise VolumeError(
            f"a DICOM segmentation must name what it was made of, and the slice has no {', '.join(missing)}: "
            "export the series with it, or predict without a DICOM segmentation"
        )
    for keyword, uid in identifiers.items():
        if not _UID.fullmatch(uid):
            raise VolumeError(
                f"{keyword} must be a valid UID, such as 1.2.840, got "
                f"{uid[:80]!r}: export the series with valid identifiers, or predict without a DICOM segmentation"
            )


def _check_one_study(slices: list[Slice], images: list[Dataset]) -> None:
    """Refuse identifiers that should be the same for all slices and are not, and the other way round."""
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        for part, image in zip(slices, images, strict=True):
            if image.get(keyword) != images[0].get(keyword):
                raise VolumeError(
                    f"the slices' headers must be those of one series, but {keyword} is {image.get(keyword)} in "
                    f"{part.path.name} and {images[0].get(keyword)} in {slices[0].path.name}: export the series again, "
                    "or predict without a DICOM segmentation"
                )
    if len({image.SOPInstanceUID for image in images}) < len(images):
        raise VolumeError(
            "every slice must have a SOPInstanceUID of its own, but some have the same: export the series again, or "
            "predict without a DICOM segmentation"
        )


def _place(image: Dataset, part: Slice, first: Slice, distance_mm: float) -> None:
    """Say where a slice lies, in numbers that the standard takes, and with those of the first slice where all agree."""
    from pydicom.valuerep import DSfloat

    def decimals(numbers: Iterable[float]) -> list[Any]:
        return [DSfloat(number, auto_format=True) for number in numbers]

    image.Rows, image.Columns = first.pixels.rows, first.pixels.columns
    image.ImagePositionPatient = decimals(part.origin)
    image.ImageOrientationPatient = decimals((*first.direction[0::3], *first.direction[1::3]))
    image.PixelSpacing = decimals(reversed(first.spacing))
    image.pop("SpacingBetweenSlices", None)  # highdicom measures it, and headers may state another one
    if not (image.get("SliceThickness") or 0) > 0:  # readers need one
        image.SliceThickness = DSfloat(distance_mm, auto_format=True)


def _empty_what_is_not_allowed(header: Dataset) -> list[str]:
    """Leave what the standard allows in a header, and nothing in what it does not allow.

    Private elements and those about pixels are removed.

    Returns:
        The keywords of what is empty now and was not.
    """
    from pydicom.datadict import dictionary_VR, keyword_for_tag
    from pydicom.dataelem import DataElement

    emptied = []
    is_ascii = _is_ascii(header)
    for tag in list(header.keys()):
        keyword = keyword_for_tag(tag)
        if not keyword or tag.element == 0 or (tag.group not in _GROUPS and keyword not in _LOSSY):
            del header[tag]
        elif not _is_allowed(header, tag, is_ascii):
            header[tag] = DataElement(tag, dictionary_VR(tag), None)
            emptied.append(keyword)
    for keyword in _MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, None)
    return emptied


def _is_ascii(header: Dataset) -> bool:
    """Whether text must be ASCII, as it must where there is no character set, or none that is known."""
    from pydicom.charset import python_encoding

    try:
        stated = header.get("SpecificCharacterSet") or ""
    except Exception:  # of many types, as below
        return True
    names = [stated] if isinstance(stated, str) else list(stated)
    return not set(names) <= python_encoding.keys() or set(names) <= {"", "ISO_IR 6", "ISO 2022 IR 6"}


def _is_allowed(dataset: Dataset, tag: Any, is_ascii: bool) -> bool:
    """Tell whether an element is what the standard allows, and put it in the form that the standard gives it.

    Note:
        DICOM PS3.5, section 6.2 (types of values), PS3.6 (how many of them), and `_VALUES`.
    """
    from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_for_tag
    from pydicom.dataelem import DataElement

    try:
        element, kind, keyword = dataset[tag], str(dictionary_VR(tag)), keyword_for_tag(tag)
        if kind == "SQ":
            return element.VR == "SQ" and all(_item_is_allowed(item, is_ascii) for item in element.value)
        if kind != element.VR and (kind in _BINARY or element.VR in _BINARY):
            return False
        values = list(element.value) if element.VM > 1 else [element.value] if element.VM else []
        if kind not in _BINARY:
            values = [str(value) for value in values]
            if not all(_is_text(value, kind, is_ascii and kind in _TEXT) for value in values):
                return False
        for value in values:
            _check_value(kind, value)
        if not _count_is_allowed(len(values), dictionary_VM(tag)) or not set(values) <= set(
            _VALUES.get(keyword, values)
        ):
            return False
        dataset[tag] = DataElement(tag, kind, values[0] if len(values) == 1 else values or None)
    except Exception:  # pydicom reads an element where it is asked for, and fails in many ways
        return False
    return True


def _item_is_allowed(item: Dataset, is_ascii: bool) -> bool:
    """Check an item of a sequence; private elements in it are removed."""
    for tag in list(item.keys()):
        if tag.is_private or tag.element == 0:
            del item[tag]
    return all(_is_allowed(item, tag, is_ascii) for tag in list(item.keys()))


def _is_text(text: str, kind: str, is_ascii: bool) -> bool:
    """Whether all characters may be there: no signs of a wrong character set, and no control characters."""
    if is_ascii and not text.isascii():
        return False
    lines = "\t\n\f\r" if kind in ("LT", "ST", "UT") else ""
    return all(each in lines or (each != "\ufffd" and unicodedata.category(each) not in ("Cc", "Cs")) for each in text)


def _check_value(kind: str, value: Any) -> None:
    """Raise what pydicom raises of a value that its type does not allow."""
    from pydicom import config, valuerep

    valuerep.validate_value(kind, value, config.RAISE)
    if kind in ("DA", "DT", "TM"):  # 20230231 has the form of a date
        getattr(valuerep, kind)(value)


def _count_is_allowed(count: int, stated: str) -> bool:
    """Compare the number of values with a multiplicity such as 1, 1-3, 2-n, or 2-2n; none is allowed too."""
    least, _, most = stated.partition("-")
    return count == 0 or (count >= int(least) and (most.endswith("n") or count <= int(most or least)))
