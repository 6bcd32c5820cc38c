"""Slices and series of DICOM for tests."""

import numpy as np
import pydicom
import pytest

from tests.paths import SHARED

REAL_SERIES = SHARED / "data" / "dicom_ct"

UID = "1.2.826.0.1.3680043.2.1125.1"

CT = "1.2.840.10008.5.1.4.1.1.2"

AXIAL = (1, 0, 0, 0, 1, 0)

TILTED = (1, 0, 0, 0, np.cos(0.3), np.sin(0.3))

needs_real_series = pytest.mark.skipif(not REAL_SERIES.exists(), reason="the shared real scans are not here")


def write_slice(path, pixels, position, *, orientation=AXIAL, sop_class=CT, syntax="1.2.840.10008.1.2.1", **tags):
    """Write one slice: `pixels` as stored, position and orientation as (x, y, z); a tag of None is absent."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    fields = {
        "SOPClassUID": sop_class,
        "SOPInstanceUID": pydicom.uid.generate_uid(),
        "Modality": "CT",
        "SeriesDescription": "synthetic",
        "StudyInstanceUID": f"{UID}.9",
        "SeriesInstanceUID": UID,
        "ImagePositionPatient": [round(float(number), 6) for number in position],
        "ImageOrientationPatient": [round(float(number), 12) for number in orientation],
        "PixelSpacing": [0.75, 0.5],
        "SliceThickness": 5,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 12 if pixels.itemsize == 2 else 8,
        "HighBit": 11 if pixels.itemsize == 2 else 7,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **tags,
    }
    for keyword, value in fields.items():
        if value is not None:
            setattr(dataset, keyword, value)
    stored = pixels.byteswap() if syntax == "1.2.840.10008.1.2.2" else pixels
    dataset.add_new("PixelData", "OW" if pixels.itemsize > 1 else "OB", stored.tobytes())
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)


def write_report(path, sop_class="1.2.840.10008.5.1.4.1.1.88.11"):
    """Write a DICOM file that is no image."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.Modality = "SR"
    dataset.save_as(path, enforce_file_format=True)


def stored_pixels(index):
    return (np.arange(30).reshape(5, 6) + 100 * index + 1000).astype(np.int16)


def write_series(folder, *, positions=range(6), step_mm=2.5, orientation=AXIAL, **options):
    """Write slices along the normal, under names in no order; the number in a name is the slice's place."""
    folder.mkdir(exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    for index in positions:
        name = f"{(index * 7 + 3) % 10}-{index}.dcm"
        position = np.array([10, 20, -30]) + index * step_mm * normal
        write_slice(folder / name, stored_pixels(index), position, orientation=orientation, **options)
    return folder


def replace_value(content, keyword, value):
    """Put bytes in place of an element's value in an explicit little-endian file."""
    tag = pydicom.tag.Tag(keyword)
    start = content.index(tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little"))
    place, size = (start + 8, 4) if content[start + 4 : start + 6] in (b"UC", b"UT") else (start + 6, 2)
    behind = place + size + int.from_bytes(content[place : place + size], "little")
    return content[:place] + len(value).to_bytes(size, "little") + value + content[behind:]
