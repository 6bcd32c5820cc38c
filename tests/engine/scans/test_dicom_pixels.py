"""Grey values of DICOM slices: what pydicom makes of the same files, whatever their bits and rescaling."""

import itertools

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans.volume import read_volume
from pydicom.pixels import apply_modality_lut

from tests.engine.scans.dicom_pixels import (
    EXPLICIT,
    MR,
    NATIVE,
    PET,
    RESCALINGS,
    SHAPE,
    assert_read_as,
    stored_values,
    write_pair,
)
from tests.engine.scans.dicom_slices import CT, replace_value, write_slice

DEPTHS = [(8, 8), (16, 12), (16, 16), (32, 32)]
OTHER_DEPTHS = [
    *((8, stored) for stored in range(1, 8)),
    *((16, stored) for stored in (8, 9, 10, 11, 13, 14, 15)),
    (32, 20),
]


@pytest.mark.parametrize(
    ("syntax", "depths"),
    [
        *(pytest.param(syntax, DEPTHS, id=name) for name, syntax in NATIVE.items()),
        pytest.param(EXPLICIT, OTHER_DEPTHS, id="other depths", marks=pytest.mark.thorough),
    ],
)
def test_all_that_is_not_compressed(tmp_path, syntax, depths):
    """Photometric interpretations x bits x signs x rescalings."""
    for (allocated, stored), is_signed, photometric, (slope, intercept) in itertools.product(
        depths, (False, True), ("MONOCHROME1", "MONOCHROME2"), RESCALINGS
    ):
        expected = write_pair(
            tmp_path / "scan",
            stored_values(stored, is_signed, allocated),
            stored,
            syntax=syntax,
            PhotometricInterpretation=photometric,
            RescaleSlope=slope,
            RescaleIntercept=intercept,
        )
        assert_read_as(tmp_path / "scan", expected)


@pytest.mark.parametrize("sop_class", [CT, MR, PET], ids=["ct", "mr", "pet"])
def test_all_kinds_of_scans_are_rescaled(tmp_path, sop_class):
    """GDCM leaves out those of MR."""
    for slope, intercept in RESCALINGS:
        tags = {"sop_class": sop_class, "RescaleSlope": slope, "RescaleIntercept": intercept}
        assert_read_as(tmp_path / "scan", write_pair(tmp_path / "scan", stored_values(12, False), 12, **tags))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stored=st.integers(2, 16),
    is_signed=st.booleans(),
    slopes=st.lists(st.decimals(-4000, 4000, places=3).filter(bool), min_size=2, max_size=4),
    intercepts=st.lists(st.one_of(st.integers(-70000, 70000), st.decimals(-99, 99, places=2)), min_size=4, max_size=4),
)
def test_slices_with_slopes_of_their_own(tmp_path, stored, is_signed, slopes, intercepts):
    folder = tmp_path / "scan"
    for path in folder.iterdir() if folder.exists() else ():
        path.unlink()
    folder.mkdir(exist_ok=True)
    expected = []
    for number, (slope, intercept) in enumerate(zip(slopes, intercepts, strict=False)):
        path = folder / f"{number}.dcm"
        tags = {"RescaleSlope": str(slope), "RescaleIntercept": str(intercept), "BitsStored": stored}
        write_slice(path, stored_values(stored, is_signed), (0, 0, number), HighBit=stored - 1, **tags)
        slice_ = pydicom.dcmread(path)
        expected.append(apply_modality_lut(slice_.pixel_array, slice_))
    np.testing.assert_array_equal(read_volume(folder).array[0], expected)


@pytest.mark.parametrize(
    ("bits_stored", "is_signed", "slope", "intercept", "dtype"),
    [
        (12, False, 1, -1024, np.int16),
        (12, True, 1, 0, np.int16),
        (16, False, 1, 0, np.uint16),
        (16, False, 1, -1024, np.int32),
        (16, False, -1, 65535, np.int32),
        (16, False, 1, -32768, np.int16),
        (16, False, -1, 32767, np.int16),
        (12, False, "0.5", 0, np.float64),
        (16, True, 10**19, 0, np.float64),
    ],
)
def test_types_hold_all_values(tmp_path, bits_stored, is_signed, slope, intercept, dtype):
    pixels = stored_values(bits_stored, is_signed)
    expected = write_pair(tmp_path / "scan", pixels, bits_stored, RescaleSlope=slope, RescaleIntercept=intercept)
    assert assert_read_as(tmp_path / "scan", expected).array.dtype == dtype


def test_big_endian_bytes_in_words(tmp_path):
    """PixelData of type OW: bytes are swapped in pairs."""
    pixels = stored_values(8, False, 8)
    folder = tmp_path / "scan"
    expected = write_pair(folder, pixels, 8, syntax=NATIVE["big-endian"])
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        slice_.PixelData = pixels.view(np.uint16).byteswap().tobytes()
        slice_["PixelData"].VR = "OW"
        slice_.save_as(path)
    assert_read_as(folder, expected)


def test_mappings_to_the_real_world_are_another_matter(tmp_path):
    """GDCM takes them for the rescaling of MR images."""
    mapping = pydicom.Dataset()
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 7.0, 100.0
    mapping.RealWorldValueFirstValueMapped, mapping.RealWorldValueLastValueMapped = 0, 4095
    pixels = stored_values(12, False)
    tags = {"RealWorldValueMappingSequence": [mapping], "sop_class": MR, "RescaleSlope": 2, "RescaleIntercept": 1}
    expected = write_pair(tmp_path / "scan", pixels, 12, **tags)
    np.testing.assert_array_equal(expected, 2 * pixels.astype(int) + 1)
    assert_read_as(tmp_path / "scan", expected)


def lut(count):
    """Make an item of a modality look-up table."""
    item = pydicom.Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [count, 0, 16], "US"
    item.add_new("LUTData", "US", list(range(count)))
    return item


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        ({"ModalityLUTSequence": [lut(4)], "RescaleSlope": None, "RescaleIntercept": None}, "a look-up table"),
        ({"RescaleSlope": 0}, "the slope not 0, got 0.0 and -1024.0"),
        ({"RescaleSlope": None}, "must both be there .* got None and -1024.0"),
        ({"RescaleSlope": ""}, "must both be there .* got None and -1024.0"),
        ({"RescaleIntercept": None}, "must both be there .* got 1.0 and None"),
        ({"RescaleSlope": b"1,5 "}, r"RescaleSlope must be 1 number\(s\), got '1,5'"),
        ({"RescaleSlope": b"nan "}, r"RescaleSlope must be 1 number\(s\), got 'nan'"),
        ({"RescaleSlope": b"1\\2 "}, r"RescaleSlope must be 1 number\(s\), got '1.*2'"),
        ({"RescaleIntercept": b"1e999 "}, "must both be there and finite"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "one grey value each .* got 1 x PALETTE COLOR"),
        ({"PhotometricInterpretation": "YBR_FULL", "SamplesPerPixel": 3}, "one grey value each .* got 3 x YBR_FULL"),
        ({"HighBit": 15}, "BitsAllocated 16, BitsStored 12, HighBit 15"),
        ({"BitsStored": 17, "HighBit": 16}, "BitsAllocated 16, BitsStored 17, HighBit 16"),
        ({"BitsStored": 0}, "BitsAllocated 16, BitsStored 0"),
        ({"BitsAllocated": 12}, "BitsAllocated 12, BitsStored 12"),
        ({"PixelRepresentation": 2}, "PixelRepresentation 2"),
        ({"PixelRepresentation": None}, "must have PixelRepresentation, but it is missing"),
        ({"BitsStored": None}, "must have BitsStored, but it is missing"),
        ({"Rows": b"\1"}, "Rows must be one number, got 1 bytes"),
        ({"Rows": 10}, "cut off or damaged"),
        ({"Rows": 0}, "must have rows and columns, got 0 x 12"),
    ],
)
def test_what_would_not_be_right_is_refused(tmp_path, tags, text):
    folder = tmp_path / "scan"
    raw = {key: tags.pop(key) for key in list(tags) if isinstance(tags[key], bytes)}
    pixels = stored_values(12, False)
    folder.mkdir()
    for number in range(2):
        write_slice(folder / f"{number}.dcm", pixels, (0, 0, number), **tags)
        content = (folder / f"{number}.dcm").read_bytes()
        for key, value in raw.items():
            content = replace_value(content, key, value)
        (folder / f"{number}.dcm").write_bytes(content)
    with pytest.raises(VolumeError, match=f"^scan: 0.dcm: .*{text}") as error:
        read_volume(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("is_undefined", [False, True])
def test_an_empty_sequence_is_no_look_up_table(tmp_path, is_undefined):
    folder = tmp_path / "scan"
    expected = write_pair(folder, stored_values(12, False), 12, ModalityLUTSequence=[])
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        slice_["ModalityLUTSequence"].is_undefined_length = is_undefined
        slice_.save_as(path)
    assert_read_as(folder, expected)


def test_big_endian_pixels_of_a_private_syntax(tmp_path):
    """Old files of GE: little-endian but for the pixels."""
    pixels = stored_values(12, False)
    folder = tmp_path / "scan"
    expected = write_pair(folder, pixels, 12, syntax=NATIVE["implicit"])
    write_pair(folder, pixels.byteswap(), 12, syntax=NATIVE["implicit"])
    for path in folder.iterdir():
        path.write_bytes(replace_value(path.read_bytes(), "TransferSyntaxUID", b"1.2.840.113619.5.2"))
    assert_read_as(folder, expected)


@pytest.mark.parametrize(
    ("is_signed", "tags", "count", "named"),
    [
        (True, {"PixelPaddingValue": -2000}, 5, "-2000"),
        (True, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}, 7, "-2000 to -1990"),
        (True, {"PixelPaddingValue": -1990, "PixelPaddingRangeLimit": -2000}, 7, "-2000 to -1990"),
        (False, {"PixelPaddingValue": 63536}, 5, "63536"),
        (True, {"PixelPaddingValue": -3000}, 0, ""),
        (False, {"PixelPaddingValue": 60000, "BitsStored": 12, "HighBit": 11}, 0, ""),
        (True, {}, 0, ""),
    ],
)
def test_padding_is_rescaled_and_told(tmp_path, is_signed, tags, count, named):
    """Neither nnU-Net nor ITK knows it: other values would give other labels than theirs."""
    pixels = np.arange(108).reshape(SHAPE).astype("i2" if is_signed else "u2")
    pixels.flat[:5] = np.array(-2000).astype(pixels.dtype)
    pixels.flat[5:7] = np.array(-1995).astype(pixels.dtype)
    if not is_signed and "BitsStored" in tags:
        pixels &= 4095
    expected = write_pair(tmp_path / "scan", pixels, 16, **tags)
    volume = assert_read_as(tmp_path / "scan", expected)
    if not count:
        assert volume.warnings == ()
        return
    (warning,) = volume.warnings
    assert f"{2 * count} of 216 voxels hold the stored value of padding (PixelPaddingValue {named})" in warning


@pytest.mark.parametrize("is_signed", [False, True])
def test_bits_above_the_stored_ones_are_left_out(tmp_path, is_signed):
    """Old overlays lie there."""
    pixels = stored_values(12, is_signed)
    folder = tmp_path / "scan"
    expected = write_pair(folder, pixels, 12)
    with_overlay = pixels.view(np.uint16) & 0x0FFF | 0x4000
    write_slice(folder / "1.dcm", with_overlay.view(pixels.dtype), (0, 0, 1))
    (warning,) = assert_read_as(folder, expected).warnings
    assert "bits above BitsStored are set in 1.dcm (overlays?)" in warning
    # Negative values without the bits that would complete them are no overlays.
    write_slice(folder / "1.dcm", (pixels.view(np.uint16) & 0x0FFF).view(pixels.dtype), (0, 0, 1))
    assert assert_read_as(folder, expected).warnings == ()


@pytest.mark.parametrize(
    ("sop_class", "modality", "first", "is_told"),
    [(CT, "CT", None, True), (PET, "PT", None, True), (MR, "MR", None, False), (MR, "MR", 2, True)],
)
def test_missing_slopes_are_told(tmp_path, sop_class, modality, first, is_told):
    folder = tmp_path / "scan"
    tags = {"RescaleSlope": None, "RescaleIntercept": None, "Modality": modality, "sop_class": sop_class}
    expected = write_pair(folder, stored_values(12, False), 12, **tags)
    if first is not None:
        tags |= {"RescaleSlope": 1, "RescaleIntercept": 0}
        write_slice(folder / "0.dcm", stored_values(12, False), (0, 0, 0), **tags)
    warnings = assert_read_as(folder, expected).warnings
    assert len(warnings) == is_told
    if is_told:
        names = "0.dcm, 1.dcm" if first is None else "1.dcm"
        assert f"RescaleSlope and RescaleIntercept are missing in {names}: stored values are" in warnings[0]
