"""Grey values of DICOM slices: what pydicom makes of the same files, whatever their bits, rescaling and compression."""

import itertools

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans.volume import read_volume
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut

from tests.engine.scans.test_dicom import CT, write_slice

MR, PET = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"
EXPLICIT = "1.2.840.10008.1.2.1"
NATIVE = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": EXPLICIT,
    "big-endian": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
}
COMPRESSED = {
    "rle": "1.2.840.10008.1.2.5",
    "jpeg-lossless": "1.2.840.10008.1.2.4.70",
    "jpeg-ls": "1.2.840.10008.1.2.4.80",
    "jpeg-2000": "1.2.840.10008.1.2.4.90",
}
RESCALINGS = [
    (None, None),
    (1, 0),
    (1, -1024),
    (-1, 5),
    (2, 3),
    ("1.5", "-3.25"),
    ("0.0012345", "1e2"),
    (40000, -40000),
]
SHAPE = (9, 12)  # GDCM does not decompress RLE of fewer than some 70 pixels


def stored_values(bits_stored, is_signed, bits_allocated=16):
    """Make values over all that the bits can hold, both ends included."""
    lowest = -(1 << bits_stored - 1) if is_signed else 0
    values = np.random.default_rng(bits_stored).integers(lowest, lowest + (1 << bits_stored), SHAPE)
    values[0, :2] = lowest, lowest + (1 << bits_stored) - 1
    return values.astype(f"{'i' if is_signed else 'u'}{bits_allocated // 8}")


def write_pair(folder, pixels, bits_stored, **options):
    """Write two slices of the same pixels; gives what pydicom makes of one."""
    folder.mkdir(exist_ok=True)
    options = {"BitsStored": bits_stored, "HighBit": bits_stored - 1, **options}
    for number in range(2):
        write_slice(folder / f"{number}.dcm", pixels, (0, 0, number), **options)
    slice_ = pydicom.dcmread(folder / "0.dcm")
    return apply_modality_lut(slice_.pixel_array, slice_)


def assert_read_as(folder, expected):
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array[0], [expected, expected])
    return volume


def bit_depths():
    return [(8, stored) for stored in range(1, 9)] + [(16, stored) for stored in range(8, 17)] + [(32, 20), (32, 32)]


@pytest.mark.parametrize("syntax", NATIVE.values(), ids=NATIVE)
def test_all_that_is_not_compressed(tmp_path, syntax):
    """Photometric interpretations x bits x signs x rescalings."""
    depths = bit_depths() if syntax == EXPLICIT else [(8, 8), (16, 12), (16, 16), (32, 32)]
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


def compress(path, syntax, pixels, precision):
    """Compress a slice that is not; as other programs do, without signs where the format has none."""
    slice_ = pydicom.dcmread(path)
    if syntax in (COMPRESSED["rle"], COMPRESSED["jpeg-ls"]):
        slice_.compress(syntax, generate_instance_uid=False)
    else:
        codecs = pytest.importorskip("imagecodecs")
        if syntax == COMPRESSED["jpeg-2000"]:
            frame = codecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True, level=0, bitspersample=precision)
        else:
            bits = pixels.view(f"u{pixels.itemsize}") & np.array((1 << precision) - 1, f"u{pixels.itemsize}")
            frame = codecs.ljpeg_encode(bits, bitspersample=precision)
        put_frame(slice_, bytes(frame), syntax)
    slice_.save_as(path)


def put_frame(slice_, frame, syntax):
    slice_.PixelData = encapsulate([frame])
    slice_["PixelData"].is_undefined_length = True
    slice_.file_meta.TransferSyntaxUID = syntax


@pytest.mark.parametrize("syntax", COMPRESSED.values(), ids=COMPRESSED)
def test_all_that_is_compressed(tmp_path, syntax, capfd):
    """The same values as before compression."""
    for stored, is_signed, photometric, (slope, intercept) in itertools.product(
        range(8, 17), (False, True), ("MONOCHROME1", "MONOCHROME2"), RESCALINGS[::2]
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


def replace_value(content, keyword, value):
    """Put bytes in place of an element's value in an explicit little-endian file."""
    tag = pydicom.tag.Tag(keyword)
    start = content.index(tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little"))
    place, size = (start + 8, 4) if content[start + 4 : start + 6] in (b"UC", b"UT") else (start + 6, 2)
    behind = place + size + int.from_bytes(content[place : place + size], "little")
    return content[:place] + len(value).to_bytes(size, "little") + value + content[behind:]


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


@pytest.mark.parametrize("is_undefined", [False, True])
def test_an_empty_sequence_is_no_look_up_table(tmp_path, is_undefined):
    folder = tmp_path / "scan"
    expected = write_pair(folder, stored_values(12, False), 12, ModalityLUTSequence=[])
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        slice_["ModalityLUTSequence"].is_undefined_length = is_undefined
        slice_.save_as(path)
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
