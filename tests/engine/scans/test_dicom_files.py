"""What lies beside the slices of a series: left out and named; and what may be a slice: never left out."""

import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans.dicom import list_slices
from nnturbo.engine.scans.volume import read_volume

from tests.engine.scans.dicom_slices import (
    CAPTURE,
    CT,
    STORAGE,
    TILTED,
    UID,
    assert_equal,
    capture,
    directory,
    icon,
    localizer,
    stored_pixels,
    write_object,
    write_series,
    write_slice,
)
from tests.engine.scans.refusals import refusal

ENHANCED = (STORAGE + "2.1", STORAGE + "4.1", STORAGE + "130")
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
PIXEL_DATA_TAG = b"\xe0\x7f\x10\x00"


def presentation(path, **options):
    write_object(path, STORAGE + "11.1", Modality="PR", IconImageSequence=[icon()], **options)


def document(path, **options):
    write_object(path, STORAGE + "104.1", Modality="DOC", EncapsulatedDocument=b"%PDF" + 2 * PIXEL_DATA_TAG, **options)


def nameless_report(path, **options):
    write_object(path, STORAGE + "88.11", SeriesDescription="a report without a modality", **options)


def private(path, **options):
    write_object(path, "1.3.12.2.1107.5.9.1", Modality="CT", **options)


def segmentation(path, **options):
    pixels = np.zeros((6, 5, 6), np.uint8)
    write_slice(path, pixels, (0, 0, 0), sop_class=STORAGE + "66.4", Modality="SEG", NumberOfFrames=6, **options)


def placed_capture(path, **options):
    """A secondary capture with a position is no slice either where there are some."""
    write_slice(path, stored_pixels(0), (10, 20, -30), sop_class=CAPTURE, **options)


def dose_grid(path, **options):
    pixels = np.zeros((3, 5, 6), np.uint16)
    write_slice(path, pixels, (0, 0, 0), sop_class=STORAGE + "481.2", Modality="RTDOSE", NumberOfFrames=3, **options)


def text(path, **options):
    path.write_text("A scan. " * 50)


BESIDE = {  # how it is named in the warning
    directory: "directory",
    presentation: "PR",
    document: "DOC",
    nameless_report: "no image",
    private: "CT",
    segmentation: "SEG",
    capture: "secondary capture",
    placed_capture: "secondary capture",
    dose_grid: "RTDOSE",
    localizer: "localizer",
    text: "no DICOM",
}


@pytest.mark.parametrize("write", BESIDE, ids=lambda write: write.__name__)
@pytest.mark.parametrize("series", [UID, f"{UID}.2"], ids=["same series", "another"])
def test_what_is_no_slice_is_left_out(tmp_path, write, series):
    folder = write_series(tmp_path / "ct")
    expected = read_volume(folder)
    write(folder / "beside", SeriesInstanceUID=series)
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, expected.array)
    assert volume.geometry == expected.geometry
    assert volume.warnings == (f"ct: 1 file(s) beside the slices are left out: beside ({BESIDE[write]})",)
    assert len(list_slices(folder)[0]) == 6


@pytest.mark.parametrize("write", [directory, presentation], ids=lambda write: write.__name__)
@pytest.mark.parametrize("is_undefined", [True, False])
@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"]
)
def test_pictures_in_sequences_are_no_slices(tmp_path, write, syntax, is_undefined):
    folder = write_series(tmp_path / "ct")
    write(folder / "beside", syntax=syntax, is_undefined=is_undefined)
    assert "beside (" in read_volume(folder).warnings[0]


def test_slices_may_hold_pictures(tmp_path):
    folder = write_series(tmp_path / "ct", IconImageSequence=[icon()])
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array[0], [stored_pixels(index) - 1024 for index in range(6)])
    assert volume.warnings == ()


def test_sequences_of_unknown_type_are_stepped_into(tmp_path):
    """PS3.5, section 6.2.2: of undefined length, their content is implicit whatever the file is."""
    folder = write_series(tmp_path / "ct")
    inner = pydicom.Dataset()
    inner.IconImageSequence = [icon()]
    inner[0x00880200].is_undefined_length = True
    encoded = pydicom.filebase.DicomBytesIO()
    encoded.is_implicit_VR, encoded.is_little_endian = True, True
    pydicom.filewriter.write_dataset(encoded, inner)
    item = b"\xfe\xff\x00\xe0" + 4 * b"\xff" + encoded.getvalue() + b"\xfe\xff\x0d\xe0" + bytes(4)
    for path in folder.iterdir():
        content = path.read_bytes()
        place = content.index(b"\x10\0\x10\0PN") if b"\x10\0\x10\0PN" in content else content.index(b"\x18\0\x50\0DS")
        unknown = b"\x09\0\x01\x10UN\0\0" + 4 * b"\xff" + item + b"\xfe\xff\xdd\xe0" + bytes(4)
        path.write_bytes(content[:place] + unknown + content[place:])
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array[0], [stored_pixels(index) - 1024 for index in range(6)])


def test_many_are_counted_and_hidden_ones_passed_over(tmp_path, capfd):
    folder = write_series(tmp_path / "ct")
    for number in range(12):
        presentation(folder / f"{number:02d}")
    (folder / ".DS_Store").write_bytes(bytes(100))
    (folder / "empty.txt").touch()
    (folder / "deeper").mkdir()
    (warning,) = read_volume(folder).warnings
    assert warning == (
        "ct: 13 file(s) beside the slices are left out: 00 (PR), 01 (PR), 02 (PR), 03 (PR), 04 (PR) and 8 more"
    )
    assert capfd.readouterr() == ("", "")


def test_names_need_not_be_text(tmp_path):
    folder = write_series(tmp_path / "ct")
    try:
        (folder / "caf\udce9.txt").write_text("x")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes names in UTF-8 alone")
    assert "caf\\udce9.txt (no DICOM)" in read_volume(folder).warnings[0]


def test_slices_without_a_class_are_told_by_their_modality(tmp_path):
    folder = write_series(tmp_path / "ct")
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content.replace(CT.encode() + b"\0", bytes(len(CT) + 1)))
    assert read_volume(folder).array.shape == (1, 6, 5, 6)
    shutil.copyfile(path, folder / "beside")
    (folder / "beside").write_bytes(path.read_bytes().replace(b"\x08\0\x60\0CS\x02\0CT", b"\x08\0\x60\0CS\x02\0US"))
    assert "beside (US)" in read_volume(folder).warnings[0]


class TestOtherImagesAlone:
    """Where a folder holds no slices of CT, MR or PET, what comes nearest is taken."""

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"sop_class": CAPTURE}, "secondary capture"),
            ({"sop_class": STORAGE + "20", "Modality": "NM"}, "NM"),
            ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ],
    )
    def test_are_taken(self, tmp_path, options, what):
        folder = write_series(tmp_path / "ct", **options)
        capture(folder / "beside")
        volume = read_volume(folder)
        np.testing.assert_array_equal(volume.array[0], [stored_pixels(index) - 1024 for index in range(6)])
        assert volume.geometry.origin == (10, 20, -30)
        assert volume.warnings == (
            f"ct: there are no slices of CT, MR or PET: 6 image(s) of another kind ({what}) are taken",
            "ct: 1 file(s) beside the slices are left out: beside (secondary capture)",
        )

    def test_without_a_place_they_are_none(self, tmp_path):
        folder = write_series(tmp_path / "ct", sop_class=CAPTURE, ImagePositionPatient=None)
        assert "got 6 other file(s) and no slice: pass" in refusal(folder)


class TestWhatMayBeASlice:
    def test_several_series_are_still_listed(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        write_slice(folder / "other", stored_pixels(0), (0, 0, 0), SeriesInstanceUID=f"{UID}.2", SeriesDescription="b")
        directory(folder / "DICOMDIR")
        text = refusal(folder)
        assert "must hold one DICOM series, got 2: " in text
        assert f"{UID}.2 (b; 1 slices, such as other)" in text

    @pytest.mark.parametrize("kept", [300, 0.5, -1])
    def test_damage(self, tmp_path, kept):
        """What was a slice is refused; other objects are left out whether damaged or not."""

        def cut_off(write):
            write(folder / "beside")
            content = (folder / "beside").read_bytes()
            (folder / "beside").write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])

        folder = write_series(tmp_path / "ct")
        cut_off(presentation)
        assert "left out: beside (" in read_volume(folder).warnings[0]
        cut_off(lambda path: write_slice(path, stored_pixels(7), (10, 20, 0)))
        assert "beside: the DICOM slice is cut off or damaged" in refusal(folder)

    def test_a_file_that_ends_before_it_says_what_it_is(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        (folder / "beside").write_bytes(next(folder.iterdir()).read_bytes()[:150])
        assert "beside: the DICOM slice is cut off or damaged" in refusal(folder)

    @pytest.mark.parametrize("name", ["5.dcm", "5.DCM", "5.IMA", "IM0005", "1.2.840.5"])
    @pytest.mark.parametrize("kept", [0, 4, 131])
    def test_a_file_that_ends_before_it_says_that_it_is_dicom(self, tmp_path, name, kept):
        folder = write_series(tmp_path / "ct")
        path = sorted(folder.iterdir())[-1]  # the last slice: no gap would show that it is missing
        content = path.read_bytes()
        path.rename(folder / name).write_bytes(content[:kept])
        assert f"{name}: a file that is named like a slice must hold one, got {kept} bytes: copy it" in refusal(folder)
        (folder / name).rename(folder / "notes.txt")
        assert "notes.txt (no DICOM)" in read_volume(folder).warnings[0]

    @pytest.mark.parametrize("missing", [*PLACE, "grey"])
    def test_scans_that_are_no_slices(self, tmp_path, missing):
        """Dose sheets, protocols, pictures: left out of a series of their own, refused inside the scan's."""
        folder = write_series(tmp_path / "ct")
        expected = read_volume(folder)
        colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 1}
        tags = colour if missing == "grey" else {missing: None}
        pixels = np.zeros((3, 5, 6), np.uint8) if missing == "grey" else stored_pixels(0)
        write_slice(folder / "beside", pixels, (0, 0, 0), SeriesInstanceUID=f"{UID}.2", **tags)
        volume = read_volume(folder)
        np.testing.assert_array_equal(volume.array, expected.array)
        assert volume.warnings == ("ct: 1 file(s) beside the slices are left out: beside (CT, no slice)",)
        write_slice(folder / "beside", pixels, (0, 0, 0), **tags)
        assert "beside: " in refusal(folder)

    def test_many_frames_of_another_series_are_a_scan_too(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        tags = {"NumberOfFrames": 3, "ImagePositionPatient": None, "SeriesInstanceUID": f"{UID}.2"}
        write_slice(folder / "beside", np.zeros((3, 5, 6), np.uint16), (0, 0, 0), sop_class=ENHANCED[0], **tags)
        assert "must hold one DICOM series, got 2: " in refusal(folder)

    def test_a_slice_without_pixels(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        write_object(folder / "beside", CT, Modality="CT", SeriesInstanceUID=UID)
        assert "beside: the DICOM slice is cut off or damaged" in refusal(folder)

    @pytest.mark.parametrize("sop_class", ENHANCED)
    def test_many_frames_in_one_file(self, tmp_path, sop_class):
        folder = tmp_path / "ct"
        folder.mkdir()
        tags = {"NumberOfFrames": 3, "ImagePositionPatient": None}
        write_slice(folder / "1.dcm", np.zeros((3, 5, 6), np.uint16), (0, 0, 0), sop_class=sop_class, **tags)
        assert "1.dcm: a DICOM file must hold one slice and its position (ImagePositionPatient), got 3" in refusal(
            folder
        )

    @pytest.mark.parametrize("value", [None, "", ["1", "0", "0", "0", "1"], ["0"] * 6, ["1", "0", "0", "1", "0", "0"]])
    def test_orientation_is_needed(self, tmp_path, value):
        folder = write_series(tmp_path / "ct", positions=range(5))
        write_slice(folder / "beside", stored_pixels(5), (10, 20, 0), ImageOrientationPatient=value)
        text = refusal(folder)
        assert text.startswith("ct: beside: ")
        assert "ImageOrientationPatient" in text
        if not value:
            assert "must tell how it is turned (ImageOrientationPatient), but that is missing: export" in text

    @pytest.mark.parametrize("value", [None, ["0", "1"], ["1"], ["-1", "1"]])
    def test_spacing_is_needed(self, tmp_path, value):
        assert "PixelSpacing" in refusal(write_series(tmp_path / "ct", PixelSpacing=value))


@pytest.mark.parametrize(
    "cosines", [(0.866, 0.5, 0, -0.5, 0.866, 0.001), (0.9998, 0.01, 0.012, -0.01, 0.999, 0.02), TILTED]
)
def test_cosines_that_are_rounded_are_those_of_itk(tmp_path, cosines):
    folder = tmp_path / "ct"
    folder.mkdir()
    normal = np.cross(cosines[:3], cosines[3:])
    for index in range(4):
        write_slice(folder / f"{index}.dcm", stored_pixels(index), 2.5 * index * normal, orientation=cosines)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    assert_equal(read_volume(folder), reader.Execute())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    syntax=st.sampled_from(
        ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"]
    ),
    changes=st.lists(st.tuples(st.integers(128, 1100), st.integers(0, 255)), max_size=4),
    kept=st.integers(140, 1200),
)
def test_whatever_the_bytes_are_it_is_an_error_of_one_line(tmp_path, syntax, changes, kept):
    folder = write_series(tmp_path / "ct", positions=range(2), syntax=syntax, IconImageSequence=[icon()])
    path = folder / "0-1.dcm"
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[:kept])
    try:
        read_volume(folder)
    except VolumeError as error:
        assert "\n" not in str(error)
