"""Slices and series of DICOM for tests."""

import numpy as np
import pydicom
import pytest
import SimpleITK

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


STORAGE = "1.2.840.10008.5.1.4.1.1."
DIRECTORY, CAPTURE = "1.2.840.10008.1.3.10", STORAGE + "7"


def icon():
    """Make a small picture, as directories and presentation states hold."""
    item = pydicom.Dataset()
    item.Rows = item.Columns = 8
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 8, 8, 7, 0
    item.add_new("PixelData", "OB", bytes(64))
    return item


def write_object(path, sop_class, *, is_undefined=False, syntax="1.2.840.10008.1.2.1", **elements):
    """Write a DICOM object that is no slice."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    if sop_class != DIRECTORY:
        dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, dataset.file_meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID = elements.pop("SeriesInstanceUID", f"{UID}.77")
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
        if isinstance(value, list):
            dataset[keyword].is_undefined_length = is_undefined
    dataset.save_as(path, enforce_file_format=True)


def directory(path, **options):
    record = pydicom.Dataset()
    record.DirectoryRecordType, record.IconImageSequence = "IMAGE", [icon()]
    write_object(path, DIRECTORY, DirectoryRecordSequence=[record], **options)


def capture(path, **options):
    tags = {
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 1,
        "ImagePositionPatient": None,
    }
    write_slice(path, np.zeros((3, 5, 6), np.uint8), (0, 0, 0), sop_class=CAPTURE, **tags, **options)


def localizer(path, **options):
    image_type = ["ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"]
    write_slice(path, stored_pixels(0)[:4], (0, 0, 0), orientation=TILTED, ImageType=image_type, **options)


def assert_equal(volume, image):
    np.testing.assert_array_equal(volume.array[0], SimpleITK.GetArrayViewFromImage(image))
    np.testing.assert_allclose(volume.geometry.spacing, image.GetSpacing()[::-1], rtol=1e-6)
    np.testing.assert_allclose(volume.geometry.origin, image.GetOrigin(), rtol=1e-12)
    np.testing.assert_allclose(volume.geometry.direction, image.GetDirection(), atol=1e-6)
