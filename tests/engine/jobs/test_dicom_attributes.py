"""Attributes that a segmentation repeats from its slices: valid ones as they are, others left empty, never an error."""

import warnings

import highdicom
import numpy as np
import pydicom
import pytest
from highdicom import _standard_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine import VolumeError
from nnturbo.engine.jobs.dicom_attributes import read_source_images
from nnturbo.engine.jobs.dicom_seg import write_dicom_seg
from nnturbo.engine.scans.volume import read_volume
from pydicom.datadict import dictionary_VR

from tests.engine.jobs.segmented_series import labelled, read_with_dcmqi
from tests.engine.scans.dicom_slices import TILTED, UID, capture, directory, localizer, replace_value, write_slice

SHAPE = (3, 12, 14)
TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "PositionReferenceIndicator"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
LONG = "x" * 65
WRONG = {
    "PatientBirthDate": [
        "00000000",
        "REMOVED",
        "1950",
        "1950.01.01",
        "19500231",
        "19500101-19510101",
        "19500101\\19500102",
    ],
    "StudyDate": ["00000000", "2020-01-01", "20201301", "anonymous", "20200101 1200"],
    "StudyTime": ["12:00:00", "25", "120000.1234567", "noon", "12000", "120000-130000"],
    "PatientSex": ["Unknown", "U", "m", "FEMALE", "0", "M\\F"],
    "PatientID": [LONG, "a\\b", "a\nb", "\x1b$B"],
    "PatientName": [LONG, "A^B=C=D=E", "A\\B", "A\x07"],
    "StudyID": ["x" * 17, "1\\2"],
    "AccessionNumber": ["x" * 17, "1\\2", "\x00\x01"],
    "ReferringPhysicianName": [LONG, "A\\B"],
    "PositionReferenceIndicator": [LONG, "a\\b"],
    "PatientAge": ["60", "60 years", "060y", "1000Y"],
    "PatientWeight": ["79 kg", "79,5", "1" * 17, "nan"],
    "PatientSize": ["tall"],
    "PatientIdentityRemoved": ["TRUE", "yes"],
    "DeidentificationMethod": [LONG],
    "EthnicGroup": ["x" * 17],
    "StudyDescription": [LONG, "a\\b"],
    "PatientComments": ["x" * 10241],
    "LossyImageCompression": ["02"],
    "SliceThickness": ["thick", "0", "-2", ""],
    "SpacingBetweenSlices": ["wide", "99"],
    "SeriesNumber": ["4a", "4\\5", "-7", "2147483647", "99999999999"],
    "Manufacturer": [LONG],
    "SoftwareVersions": [LONG],
    "DeviceSerialNumber": [LONG],
    "AcquisitionDate": ["00000000"],
    "ContentDate": ["00000000"],
    "ContentTime": ["12:00:00"],
    "InstanceCreationDate": ["REMOVED"],
    "Modality": ["ct"],
}
RIGHT = {
    "PatientBirthDate": ["19500131", ""],
    "StudyTime": ["12", "1200", "120000", "120000.5", "120000.123456", ""],
    "PatientSex": ["M", "F", "O", ""],
    "PatientAge": ["060Y", "003D"],
    "PatientName": ["Doe^Jane^^Dr", "x" * 64, "Anonymous"],
    "PatientWeight": ["79.50", "8e1"],
    "PregnancyStatus": [4],
    "OtherPatientNames": ["A^B", ["A^B", "C^D"]],
    "PatientComments": ["two\nlines"],
    "AccessionNumber": ["x" * 16],
    "PatientIdentityRemoved": ["YES"],
    "LossyImageCompression": ["01"],
}


def write_scan(folder, *, orientation=(1, 0, 0, 0, 1, 0), **tags):
    """Write a small series, whatever its attributes hold; bytes are written as they are."""
    folder.mkdir(exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    for keyword, value in tags.items():
        if isinstance(value, str) and dictionary_VR(keyword) in ("DS", "IS"):  # pydicom writes numbers alone
            tags[keyword] = (value + " " * (len(value) % 2)).encode()
    raw = {keyword: value for keyword, value in tags.items() if isinstance(value, bytes)}
    tags = {"FrameOfReferenceUID": f"{UID}.7", **tags, **dict.fromkeys(raw, 1)}
    tags |= {keyword: "1" for keyword in raw if dictionary_VR(keyword) not in ("US", "FD")}
    charset = tags.pop("SpecificCharacterSet", None)
    with pydicom.config.disable_value_validation():
        for index in range(SHAPE[0]):
            path = folder / f"{index}.dcm"
            pixels = np.full(SHAPE[1:], index, np.int16)
            write_slice(
                path, pixels, 2.5 * index * normal, orientation=orientation, SpecificCharacterSet=charset and "", **tags
            )
            content = path.read_bytes()
            for keyword, value in raw.items():
                content = replace_value(content, keyword, value)
            if charset:
                stated = "\\".join([charset] if isinstance(charset, str) else charset)
                content = replace_value(content, "SpecificCharacterSet", f"{stated}{' ' * (len(stated) % 2)}".encode())
            path.write_bytes(content)
    return folder


def segment(folder):
    """Write a segmentation of a series; gives what is in it, read strictly, and what was told."""
    segmentation = np.zeros(SHAPE, np.uint8)
    segmentation[1, 2:5, 3:9] = 1
    prediction = labelled(folder, segmentation, pancreas=1)
    path = folder.parent / "seg.dcm"
    told = write_dicom_seg(path, prediction, folder)
    with pydicom.config.strict_reading():
        written = highdicom.seg.segread(path)
        for element in written.iterall():
            assert element.value is not NotImplemented
    uids = [instance_uid(folder / f"{index}.dcm") for index in range(SHAPE[0])]
    frames = written.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(frames[..., 0], segmentation)
    return written, told


def instance_uid(path):
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(path).SOPInstanceUID


@pytest.mark.parametrize("keyword", WRONG)
def test_what_is_not_allowed_is_left_empty_and_named(tmp_path, keyword):
    is_repeated = keyword in TYPE_2 or keyword in list(WRONG)[10:19]
    for number, value in enumerate(WRONG[keyword]):
        written, told = segment(write_scan(tmp_path / str(number), **{keyword: value}))
        if is_repeated and keyword != "EthnicGroup":
            (warning,) = told
            assert f"the standard does not allow what the slices hold as {keyword}: it is left empty" in warning
            assert not written.get(keyword)
            assert (keyword in written) == (keyword in TYPE_2)
        else:
            assert told == ()


@pytest.mark.parametrize("keyword", RIGHT)
def test_what_is_allowed_is_repeated(tmp_path, keyword):
    for number, value in enumerate(RIGHT[keyword]):
        written, told = segment(write_scan(tmp_path / str(number), **{keyword: value}))
        assert told == ()
        assert written[keyword].value == value or not value or str(written[keyword].value) == value


@pytest.mark.parametrize("keyword", TYPE_2)
@pytest.mark.parametrize("value", [None, ""])
def test_what_is_missing_is_empty(tmp_path, keyword, value):
    written, told = segment(write_scan(tmp_path / "ct", **{keyword: value}))
    assert keyword in written
    assert not written[keyword].value
    assert told == ()


@pytest.mark.parametrize(
    ("charset", "name", "expected"),
    [
        (None, b"Mueller^Zoe ", "Mueller^Zoe"),
        ("ISO_IR 100", "Müller^Zoë".encode("latin-1"), "Müller^Zoë"),
        ("ISO_IR 192", "Müller^Zoë 山".encode(), "Müller^Zoë 山"),
        ("ISO_IR 144", "Дядя^Ваня ".encode("iso8859-5"), "Дядя^Ваня"),
        ("GB18030", "Wang^XiaoDong=王^小东".encode("gb18030"), "Wang^XiaoDong=王^小东"),
        (
            ["", "ISO 2022 IR 87"],
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
            "Yamada^Tarou=山田^太郎",
        ),
        (None, "Müller".encode("latin-1"), None),
        ("ISO_IR 6", "Müller".encode("latin-1"), None),
        ("ISO_IR 192", "Müller".encode("latin-1"), None),
        ("private", "Müller".encode(), None),
        ("private", b"Mueller ", "Mueller"),
    ],
)
def test_character_sets(tmp_path, charset, name, expected):
    """The segmentation is in UTF-8, whatever its slices are in."""
    folder = write_scan(tmp_path / "ct", SpecificCharacterSet=charset, PatientName=name, StudyDescription=name)
    written, told = segment(folder)
    assert written.SpecificCharacterSet == "ISO_IR 192"
    if expected is None:
        assert not written.PatientName
        assert "StudyDescription" not in written
        assert "StudyDescription, PatientName: it is left empty" in told[0]
    else:
        assert (str(written.PatientName), written.StudyDescription) == (expected, expected)
        assert told == ()


def wrong_value(kind):
    """Make a value that the type does not allow."""
    if kind == "SQ":
        item = pydicom.Dataset()
        with pydicom.config.disable_value_validation():
            item.CodeValue, item.PatientBirthDate = "x", "REMOVED"
        return [item]
    if kind in ("DS", "US", "FD"):
        return b"abcd" if kind == "DS" else b"abcdef"
    return "\x07" if kind in ("LT", "ST", "UT", "UC", "PN") else LONG


def copied_attributes():
    """List all that highdicom repeats from a CT slice."""
    modules = _standard_utils.get_iod_module_map()["ct-image"]
    attributes = _standard_utils.get_module_attribute_map()
    return [
        item["keyword"]
        for module in modules
        if module["ie"] in ("Patient", "Study")
        for item in attributes[module["key"]]
        if not item["path"] and item["keyword"] != "StudyInstanceUID"
    ]


def test_all_attributes_at_once(tmp_path):
    """Whatever highdicom repeats of a slice: nothing of it costs the segmentation."""
    keywords = copied_attributes()
    assert len(keywords) > 60
    kinds = {keyword: dictionary_VR(keyword) for keyword in keywords}
    tags = {key: wrong_value(kind) for key, kind in kinds.items()}
    folder = write_scan(tmp_path / "ct", **tags)
    _, emptied = read_source_images(folder)
    assert set(tags) <= set(emptied)
    written, (warning,) = segment(folder)
    for keyword in tags:
        assert not written.get(keyword)
        assert keyword in TYPE_2 or keyword not in written
    assert f"and {len(tags) - 5} more: it is left empty" in warning


def test_all_attributes_of_another_type(tmp_path):
    """A type (VR) that is not the attribute's own."""
    folder = write_scan(tmp_path / "ct", PatientWeight="79", PatientAge="060Y", PatientID="a")
    for path in folder.iterdir():
        content = path.read_bytes()
        for found, replaced in (
            (b"\x10\0\x30\x10DS", b"\x10\0\x30\x10US"),  # two letters as a number
            (b"\x10\0\x10\x10AS", b"\x10\0\x10\x10FD"),  # four as a number of eight bytes
            (b"\x10\0\x20\0LO", b"\x10\0\x20\0SH"),
        ):
            assert content.count(found) == 1
            content = content.replace(found, replaced)
        path.write_bytes(content)
    written, (warning,) = segment(folder)
    assert "PatientAge, PatientWeight: it is left empty" in warning
    assert written.PatientID == "a"


def test_sequences(tmp_path):
    """They are repeated with what private programs put into them left out."""
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "CT", "DCM", "Computed Tomography"
    code.add_new(0x00091001, "LO", "private")
    written, told = segment(write_scan(tmp_path / "a", ProcedureCodeSequence=[code]))
    assert written.ProcedureCodeSequence[0].CodeMeaning == "Computed Tomography"
    assert told == ()
    del code.CodeMeaning  # an element remembers how it was checked
    with pydicom.config.disable_value_validation():
        code.CodeMeaning = LONG
    written, told = segment(write_scan(tmp_path / "b", ProcedureCodeSequence=[code]))
    assert "ProcedureCodeSequence" not in written
    assert "ProcedureCodeSequence: it is left empty" in told[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keyword=st.sampled_from([key for key in copied_attributes() if dictionary_VR(key) not in ("SQ", "US", "FD")]),
    value=st.text(st.characters(exclude_categories=["Cs"]), max_size=70),
    charset=st.sampled_from([None, "ISO_IR 192"]),
)
def test_any_text(tmp_path, keyword, value, charset):
    encoded = value.encode()
    encoded += b" " * (len(encoded) % 2)
    folder = write_scan(tmp_path / "ct", SpecificCharacterSet=charset, **{keyword: encoded})
    written, told = segment(folder)
    found = written[keyword].value if keyword in written else ""
    if told:
        assert f"as {keyword}: it is left empty" in told[0]
        assert not found
    else:
        found = found if isinstance(found, pydicom.multival.MultiValue) else [found]
        assert "\\".join(str(each or "") for each in found).strip(" \0") == value.strip(" \0")


def test_directions_that_differ_in_the_last_digit(tmp_path):
    """And positions with more digits than a decimal string may have."""
    folder = write_scan(tmp_path / "ct", orientation=TILTED)
    part = pydicom.dcmread(folder / "1.dcm")
    with pydicom.config.disable_value_validation():
        part.ImageOrientationPatient = [float(number) + 1e-6 for number in part.ImageOrientationPatient]
        part.ImagePositionPatient = [f"{float(number):.20f}" for number in part.ImagePositionPatient]
        part.save_as(folder / "1.dcm")
    segment(folder)


def test_other_programs_read_a_scan_without_thickness(tmp_path):
    folder = write_scan(tmp_path / "ct", SliceThickness=None, PhotometricInterpretation="MONOCHROME1")
    written, _ = segment(folder)
    assert written.PhotometricInterpretation == "MONOCHROME2"
    segments = read_with_dcmqi(tmp_path / "seg.dcm", tmp_path / "read", read_volume(folder))
    assert segments["pancreas"].sum() == 18


def test_what_lies_beside_the_slices_is_not_referred_to(tmp_path):
    folder = write_scan(tmp_path / "ct")
    for write in (capture, directory, localizer):
        write(folder / f"{write.__name__}.dcm")
    written, _ = segment(folder)
    uids = {part.ReferencedSOPInstanceUID for part in written.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert uids == {instance_uid(folder / f"{index}.dcm") for index in range(3)}


def test_other_faults_are_one_line(tmp_path, monkeypatch):
    def fail(**options):
        raise LookupError("something\nthat is on\ntwo lines")

    folder = write_scan(tmp_path / "ct")
    monkeypatch.setattr(highdicom.seg, "Segmentation", fail)
    with pytest.raises(VolumeError, match=r"ct: .* refer to them \(something that is on two lines\)"):
        segment(folder)
    assert not (tmp_path / "seg.dcm").exists()
