"""A segmentation as a DICOM Segmentation object that refers to the slices it was made of."""

from __future__ import annotations

import os
import threading
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, EngineError, VolumeError
from ..files import written_atomically
from ..pipeline.prediction import Prediction
from ..scans.dicom_files import summary
from .dicom_attributes import may_be_empty, read_source_images

_SAME_AS = {"Tumor": "Neoplasm", "Tumour": "Neoplasm", "Cancer": "Neoplasm"}
_ONE_AT_A_TIME = threading.Lock()  # warnings are filtered for all threads, and must be again when the last one is done
_HIGHEST_NUMBER = 2**31 - 1
_AFTER_THE_SCAN = 1000  # added to the scan's series number, so that viewers list the segmentation behind it


def write_dicom_seg(
    path: str | os.PathLike[str], prediction: Prediction, folder: str | os.PathLike[str]
) -> tuple[str, ...]:
    """Write the labels as a DICOM Segmentation object (binary), a segment for each label or region.

    Segments are numbered from 1 in the order of the model's labels, and named as these are. A name that DICOM knows,
    such as pancreas or lesion, gets its SNOMED code, every other one the code for tissue.

    Args:
        path: File in an existing folder; an existing one is replaced.
        prediction: What was predicted for the series.
        folder: The slices of the series it was made of, which the object refers to.

    Returns:
        What the user should know: attributes of the slices that the object does not repeat, as the standard does not
        allow what is in them.

    Raises:
        BackendUnavailable: Where highdicom is not installed.
        VolumeError: Where the slices are not those of the prediction, or lack what a segmentation must name.
        OutputError: Where the file cannot be written; nothing is left under the name then.
    """
    import_highdicom()
    segmentation, folder = prediction.segmentation, Path(folder)
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what others have written into the slices
        images, emptied = read_source_images(folder)
        found = (len(images), images[0].Rows, images[0].Columns)
        if segmentation.shape != found:
            raise VolumeError(
                f"{folder.name}: the slices must be those that were predicted, {segmentation.shape} (slices, rows, "
                f"columns), got {found}: predict the series again"
            )
        try:
            written = _make(prediction, images)
            # What is in no segmentation, such as the slice's own time, is not missed.
            missed = [keyword for keyword in emptied if keyword in written and not written[keyword].value]
            for keyword in missed:
                if not may_be_empty(keyword):
                    del written[keyword]
            with written_atomically(path) as temporary:
                written.save_as(temporary)
        except (EngineError, MemoryError):
            raise
        except Exception as error:  # highdicom and pydicom raise many types
            raise VolumeError(
                f"{folder.name}: the slices' headers must be those of a DICOM series, and a segmentation cannot refer "
                f"to them ({' '.join(str(error).split())}): export the series again, or predict without a DICOM "
                "segmentation"
            ) from error
    if not missed:
        return ()
    return (
        f"the standard does not allow what the slices hold as {summary(missed)}: it is left empty in the DICOM "
        "segmentation",
    )


def _make(prediction: Prediction, images: list[Any]) -> Any:
    """Make the object."""
    highdicom = import_highdicom()
    return highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=_segments(prediction),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _describe(number, name, prediction) for number, name in enumerate(prediction.labels.written, 1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=_series_number(images[0]),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="nnturbo",
        manufacturer_model_name=_algorithm(prediction),
        software_versions=_version(),
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description="Labels predicted by nnU-Net",
        series_description=_long_string(f"Segmentation by {_algorithm(prediction)}"),
        specific_character_set="ISO_IR 192",
    )


def _series_number(image: Any) -> int:
    """Number the series of the segmentation behind that of the scan; a number that cannot be counts as none."""
    number = int(image.get("SeriesNumber") or 0)
    return number + _AFTER_THE_SCAN if 0 <= number <= _HIGHEST_NUMBER - _AFTER_THE_SCAN else _AFTER_THE_SCAN


def _long_string(text: str) -> str:
    """Make text that DICOM takes for a description: on one line, of at most 64 characters, without a backslash."""
    return "".join(each if each.isprintable() and each != "\\" else "_" for each in text)[:64].strip() or "_"


def _segments(prediction: Prediction) -> np.ndarray:
    """Number the segments: (Z, Y, X) of numbers, or (Z, Y, X, segments) of booleans where labels share values."""
    segments = list(prediction.labels.written.values())
    values = [value for segment in segments for value in segment]
    if len(values) != len(segments) or len(set(values)) != len(values):
        return np.stack([np.isin(prediction.segmentation, segment) for segment in segments], axis=-1)
    numbers = np.zeros(max(values) + 1, prediction.segmentation.dtype)
    numbers[values] = np.arange(1, len(values) + 1)
    return numbers[prediction.segmentation]


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
        segment_label=_long_string(name),
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=_algorithm(prediction), family=codes.DCM.ArtificialIntelligence, version=_version()
        ),
    )


def _algorithm(prediction: Prediction) -> str:
    """Name the model by its data set, as nnU-Net names it; of several, the first."""
    return _long_string(f"nnU-Net {prediction.provenance[0].dataset}")


def _version() -> str:
    return f"nnturbo {version('nnturbo')}"


def import_highdicom() -> Any:
    """Import the library, or say how to install it."""
    try:
        import highdicom
    except ImportError as error:
        raise BackendUnavailable("DICOM segmentations need highdicom: pip install 'nnturbo[dicom]'") from error
    return highdicom
