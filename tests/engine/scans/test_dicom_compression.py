"""Grey values of compressed DICOM slices: those from before compression, or one clear error."""

import itertools

import numpy as np
import pydicom
import pytest
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans.volume import read_volume

from tests.engine.scans.dicom_pixels import (
    COMPRESSED,
    MR,
    RESCALINGS,
    assert_read_as,
    compress,
    put_frame,
    stored_values,
    write_pair,
)


@pytest.mark.parametrize("syntax", COMPRESSED.values(), ids=COMPRESSED)
@pytest.mark.parametrize("bits", [(8, 12, 16), pytest.param((9, 10, 11, 13, 14, 15), marks=pytest.mark.thorough)])
def test_all_that_is_compressed(tmp_path, bits, syntax, capfd):
    """The same values as before compression."""
    for stored, is_signed, photometric, (slope, intercept) in itertools.product(
        bits, (False, True), ("MONOCHROME1", "MONOCHROME2"), RESCALINGS[::2]
    ):
        pixels = stored_values(stored, is_signed, 8 if stored == 8 else 16)
        expected = write_pair(
            tmp_path / "scan",
            pixels,
            stored,
            sop_class=MR,
            PhotometricInterpretation=photometric,
            RescaleSlope=slope,
            RescaleIntercept=intercept,
        )
        for path in (tmp_path / "scan").iterdir():
            compress(path, syntax, pixels, stored)
        assert_read_as(tmp_path / "scan", expected)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("syntax", "name", "options"),
    [
        ("1.2.840.10008.1.2.4.50", "jpeg", {"level": 90}),
        ("1.2.840.10008.1.2.4.51", "jpeg", {"level": 90, "bitspersample": 12}),
        ("1.2.840.10008.1.2.4.57", "ljpeg", {"bitspersample": 12}),
        ("1.2.840.10008.1.2.4.81", "jpegls", {"level": 2}),
        ("1.2.840.10008.1.2.4.91", "jpeg2k", {"codecformat": "j2k", "level": 50, "bitspersample": 12}),
    ],
)
def test_compression_with_losses(tmp_path, syntax, name, options):
    """The values that another decoder gives."""
    codecs = pytest.importorskip("imagecodecs")
    pixels = (1000 + 30 * np.add.outer(np.arange(24), np.arange(32))).astype(np.uint16)
    pixels = (pixels // 16).astype(np.uint8) if syntax.endswith(".50") else pixels
    folder = tmp_path / "scan"
    write_pair(folder, pixels, 8 if pixels.itemsize == 1 else 12)
    frame = bytes(getattr(codecs, f"{name}_encode")(pixels, **options))
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        put_frame(slice_, frame, syntax)
        slice_.save_as(path)
    assert_read_as(folder, getattr(codecs, f"{name}_decode")(frame).astype(int) - 1024)


@pytest.mark.parametrize(
    "syntax", [COMPRESSED["jpeg-lossless"], COMPRESSED["jpeg-2000"]], ids=["jpeg-lossless", "jpeg-2000"]
)
def test_signs_that_are_not_clear_are_refused(tmp_path, syntax):
    """Compressed pixels of fewer bits than the header says are read where signs do not matter."""
    folder = tmp_path / "scan"
    for is_signed in (False, True):
        pixels = stored_values(10, False)
        expected = write_pair(folder, pixels, 16, PixelRepresentation=int(is_signed))
        for path in folder.iterdir():
            compress(path, syntax, pixels, 10)
        if not is_signed:
            assert_read_as(folder, expected)
    with pytest.raises(
        VolumeError, match="scan: 0.dcm: it is not clear .* negative: the header says 16 bits with a sign, "
    ):
        read_volume(folder)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_signs_that_the_header_denies_are_refused(tmp_path, bits):
    """At whatever precision; the other way round, two's complement in pixels without a sign is what the header says."""
    folder = tmp_path / "scan"
    pixels = stored_values(bits, True, 8 if bits == 8 else 16)
    expected = write_pair(folder, pixels, bits)
    unsigned = pixels.view(f"u{pixels.itemsize}") & np.array((1 << bits) - 1, f"u{pixels.itemsize}")
    for path in folder.iterdir():
        compress(path, COMPRESSED["jpeg-2000"], unsigned, bits)
    assert_read_as(folder, expected)
    for header_bits in {bits, max(bits - 2, 8)}:
        write_pair(folder, unsigned, header_bits)
        for path in folder.iterdir():
            compress(path, COMPRESSED["jpeg-2000"], pixels, bits)
        with pytest.raises(VolumeError, match=f"says {header_bits} bits without a sign, the pixels have {bits} with"):
            read_volume(folder)


@pytest.mark.parametrize(
    "syntax", [COMPRESSED["jpeg-lossless"], COMPRESSED["jpeg-2000"]], ids=["jpeg-lossless", "jpeg-2000"]
)
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("precision", [14, 16])
def test_more_bits_than_the_header_says(tmp_path, syntax, is_signed, precision):
    """Read where all values fit, as pydicom reads them uncompressed; refused where one does not."""
    folder = tmp_path / "scan"
    pixels = stored_values(12, is_signed)
    expected = write_pair(folder, pixels, 12)
    for path in folder.iterdir():
        compress(path, syntax, pixels, precision)
    assert_read_as(folder, expected)
    for beyond in (1 << 12 - is_signed, (1 << precision - is_signed) - 1, *((-(1 << 11) - 1,) if is_signed else ())):
        if beyond == 1 << 11 and syntax == COMPRESSED["jpeg-lossless"]:
            continue  # without signs in the pixels, it is the lowest value
        outside = pixels.copy()
        outside[3, 4] = beyond
        compress(folder / "1.dcm", syntax, outside, precision)
        with pytest.raises(VolumeError, match=f"1.dcm: .* must fit in the 12 bits .* have {precision}"):
            read_volume(folder)


def test_rle_that_cannot_be_so_many_pixels_is_refused_before_memory_is_taken(tmp_path):
    folder = tmp_path / "scan"
    write_pair(folder, stored_values(12, False), 12)
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        slice_.Rows = slice_.Columns = 40000
        put_frame(slice_, bytes(1000), COMPRESSED["rle"])
        slice_.save_as(path)
    with pytest.raises(VolumeError, match="0.dcm: the DICOM slice is cut off or damaged"):
        read_volume(folder)
    zeros = np.zeros((256, 256), np.uint16)  # as small as RLE can make them
    expected = write_pair(folder, zeros, 12)
    for path in folder.iterdir():
        compress(path, COMPRESSED["rle"], zeros, 12)
    assert_read_as(folder, expected)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.102", "1.2.3"])
def test_compression_that_is_not_read_is_named(tmp_path, syntax):
    folder = tmp_path / "scan"
    write_pair(folder, stored_values(12, False), 12)
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        put_frame(slice_, bytes(40), syntax)
        slice_.save_as(path)
    with pytest.raises(VolumeError, match=f"0.dcm: pixel data must be .* got transfer syntax {syntax}: decompress"):
        read_volume(folder)


def test_damage_inside_compressed_pixels(tmp_path):
    folder = tmp_path / "scan"
    pixels = stored_values(12, False)
    write_pair(folder, pixels, 12)
    for path in folder.iterdir():
        compress(path, COMPRESSED["jpeg-2000"], pixels, 12)
    slice_ = pydicom.dcmread(folder / "1.dcm")
    put_frame(slice_, bytes(100), COMPRESSED["jpeg-2000"])
    slice_.save_as(folder / "1.dcm")
    with pytest.raises(VolumeError, match=r"scan: 1.dcm: the voxels cannot be read: "):
        read_volume(folder)
    compress(folder / "1.dcm", COMPRESSED["jpeg-2000"], np.zeros((4, 4), np.uint16), 12)
    with pytest.raises(VolumeError, match=r"scan: 1.dcm: .*(cannot be read|must be those of the header, 9 x 12 of 16)"):
        read_volume(folder)
