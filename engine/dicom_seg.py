"""A segmentation as a DICOM Segmentation object that refers to the slices it was made of."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .dicom import list_slices
from .errors import BackendUnavailable, VolumeError
from .files import written_atomically
from .image_header import naming
from .prediction import Prediction

# Attributes that a segmentation takes from its slices (DICOM PS3.3, C.8.20.2): without the first it means nothing, the
# others may be empty.
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "PositionReferenceIndicator"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
_SAME_AS = {"Tumor": "Neoplasm", "Tumour": "Neoplasm", "Cancer": "Neoplasm"}
_AFTER_THE_SCAN = 1000  # added to the scan's series number, so that viewers list the segmentation behind it


def write_dicom_seg(path: str | os.PathLike[str], prediction: Prediction, folder: str | os.PathLike[str]) -> None:
    """Write the labels as a DICOM Segmentation object (binary), a segment for each label or region.

    Segments are numbered from 1 in the order of the model's labels, and named as these are. A name that DICOM knows,
    such as pancreas or lesion, gets its SNOMED code, every other one the code for tissue.

    Args:
        path: File in an existing folder; an existing one is replaced.
        prediction: What was predicted for the series.
        folder: The slices of the series it was made of, which the object refers to.

    Raises:
        BackendUnavailable: Where highdicom is not installed.
        VolumeError: Where the slices are not those of the prediction, or lack what a segmentation must name.
        OutputError: Where the file cannot be written; nothing is left under the name then.
    """
    highdicom = import_highdicom()
    segmentation, folder = prediction.segmentation, Path(folder)
    slices = _read_headers(folder)
    rows, columns = slices[0].Rows, slices[0].Columns
    if segmentation.shape != (len(slices), rows, columns):
        raise VolumeError(
            f"{folder.name}: the slices must be those that were predicted, {segmentation.shape} (slices, rows, "
            f"columns), got {(len(slices), rows, columns)}: predict the series again"
        )
    names = [name for name, value in prediction.labels.labels.items() if value != 0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what others have written into the slices
            written = highdicom.seg.Segmentation(
                source_images=slices,
                pixel_array=_segments(prediction),
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[_describe(number, name, prediction) for number, name in enumerate(names, 1)],
                series_instance_uid=highdicom.UID(),
                series_number=int(slices[0].get("SeriesNumber") or 0) + _AFTER_THE_SCAN,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="nnturbo",
                manufacturer_model_name=_algorithm(prediction),
                software_versions=_version(),
                device_serial_number="0",
                content_label="SEGMENTATION",
                content_description="Labels predicted by nnU-Net",
                series_description=f"Segmentation by {_algorithm(prediction)}"[:64],
                specific_character_set="ISO_IR 192",
            )
            with written_atomically(path) as temporary:
                written.save_as(temporary)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise VolumeError(
            f"{folder.name}: the slices' headers must be those of a DICOM series, and a segmentation cannot refer to "
            f"them ({error}): export the series again, or predict without a DICOM segmentation"
        ) from error


def _segments(prediction: Prediction) -> np.ndarray:
    """Number the segments: (Z, Y, X) of numbers, or (Z, Y, X, segments) of booleans for regions, which overlap."""
    segmentation, labels = prediction.segmentation, prediction.labels
    values = [value for value in labels.labels.values() if value != 0]
    if labels.regions_class_order is not None:
        return np.stack([np.isin(segmentation, value) for value in values], axis=-1)
    numbers = np.zeros(max(labels.foreground) + 1, segmentation.dtype)
    numbers[values] = np.arange(1, len(values) + 1)
    return numbers[segmentation]


def _describe(number: int, name: str, prediction: Prediction) -> Any:
    """Describe a segment; names of labels are those of the training set."""
    highdicom = import_highdicom()
    from pydicom.sr.codedict import codes

    keyword = "".join(word[:1].upper() + word[1:].lower() for word in name.replace("_", " ").split())
    keyword = _SAME_AS.get(keyword, keyword)
    category = kind = codes.SCT.Tissue
    for group, its_category in (
        ("cid7159", codes.SCT.MorphologicallyAbnormalStructure),
        ("cid7157", codes.SCT.PhysicalObject),
        ("cid7166", codes.SCT.Tissue),
        ("cid7151", codes.SCT.AnatomicalStructure),
    ):
        if keyword in getattr(codes, group).dir():
            category, kind = its_category, getattr(getattr(codes, group), keyword)
            break
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=_algorithm(prediction), family=codes.DCM.ArtificialIntelligence, version=_version()
        ),
    )


def _algorithm(prediction: Prediction) -> str:
    """Name the model by its data set, as nnU-Net names it; of several, the first."""
    provenance = prediction.provenance
    return f"nnU-Net {provenance.get('models', [provenance])[0]['dataset']}"[:64]


def _version() -> str:
    return f"nnturbo {version('nnturbo')}"


def _read_headers(folder: Path) -> list[Any]:
    """Read the slices in the order of the scan, without their pixels."""
    import pydicom

    headers = []
    for part in list_slices(folder)[0]:
        with naming(f"{folder.name}: {part.path.name}"):
            header = pydicom.dcmread(part.path, stop_before_pixels=True, force=True)
            if missing := [keyword for keyword in _NEEDED if not header.get(keyword)]:
                raise VolumeError(
                    f"a DICOM segmentation must name what it was made of, and the slice has no {', '.join(missing)}: "
                    "export the series with it, or predict without a DICOM segmentation"
                )
            for keyword in _MAY_BE_EMPTY:
                if keyword not in header:
                    setattr(header, keyword, None)
        headers.append(header)
    return headers


def import_highdicom() -> Any:
    """Import the library, or say how to install it."""
    try:
        import highdicom
    except ImportError as error:
        raise BackendUnavailable("DICOM segmentations need highdicom: pip install 'nnturbo[dicom]'") from error
    return highdicom
