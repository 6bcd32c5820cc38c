"""DICOM Segmentation objects, read back by DCMTK (through dcmqi) and by ITK."""

import json
import shutil
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nnturbo.engine import BackendUnavailable, OutputError, VolumeError
from nnturbo.engine.cli import main
from nnturbo.engine.jobs.cases import CaseFiles, find_cases
from nnturbo.engine.jobs.dicom_seg import write_dicom_seg
from nnturbo.engine.jobs.job import Job
from nnturbo.engine.scans.volume import read_volume

from tests.engine.factory import smooth_scan, write_model
from tests.engine.jobs.segmented_series import labelled, read_with_dcmqi
from tests.engine.scans.dicom_slices import (
    AXIAL,
    REAL_SERIES,
    TILTED,
    UID,
    needs_real_series,
    write_report,
    write_slice,
)

SAGITTAL = (0, 1, 0, 0, 0, -1)
FRAME = {"FrameOfReferenceUID": f"{UID}.7", "BitsStored": 16, "HighBit": 15}
SHAPE = (8, 14, 16)


def write_series(folder, *, orientation=AXIAL, step_mm=2.5, **tags):
    """Write slices under names in the reverse of their order."""
    folder.mkdir(parents=True)
    normal = np.cross(orientation[:3], orientation[3:])
    for index, pixels in enumerate((1000 + 100 * smooth_scan(SHAPE)).astype(np.int16)):
        position = np.array([10, 20, -30]) + index * step_mm * normal
        write_slice(folder / f"{99 - index}.dcm", pixels, position, orientation=orientation, **{**FRAME, **tags})
    return folder


@pytest.mark.parametrize("orientation", [AXIAL, TILTED, SAGITTAL], ids=["axial", "tilted", "sagittal"])
def test_another_library_finds_the_labels_in_place(tmp_path, orientation):
    folder = write_series(tmp_path / "ct", orientation=orientation)
    prediction = labelled(folder)
    write_dicom_seg(tmp_path / "seg.dcm", prediction, folder)
    segments = read_with_dcmqi(tmp_path / "seg.dcm", tmp_path / "read", read_volume(folder))
    assert list(segments) == ["pancreas", "lesion"]
    np.testing.assert_array_equal(segments["pancreas"], prediction.segmentation == 1)
    np.testing.assert_array_equal(segments["lesion"], prediction.segmentation == 2)
    # ITK (GDCM) sees the frames one behind the other: those of the pancreas, the last first, and that of the lesion.
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "seg.dcm"))) > 0
    expected = [*(prediction.segmentation[5:1:-1] == 1), prediction.segmentation[4] == 2]
    np.testing.assert_array_equal(frames, expected)


def test_the_object_names_what_it_was_made_of(tmp_path):
    name = "Müller^Zoë"
    folder = write_series(tmp_path / "ct", PatientName=name, SpecificCharacterSet="ISO_IR 192", SeriesNumber=4)
    write_dicom_seg(tmp_path / "seg.dcm", labelled(folder, pancreas=1, left_kidney=2), folder)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    slices = sorted((pydicom.dcmread(path) for path in folder.iterdir()), key=lambda part: part.ImagePositionPatient[2])
    assert (seg.Modality, seg.SegmentationType, seg.PatientName) == ("SEG", "BINARY", name)
    assert seg.StudyInstanceUID == slices[0].StudyInstanceUID
    assert seg.SeriesInstanceUID not in ("", slices[0].SeriesInstanceUID)
    assert seg.SeriesNumber == 1004
    assert seg.FrameOfReferenceUID == FRAME["FrameOfReferenceUID"]
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == UID
    used = [part.ReferencedSOPInstanceUID for part in series.ReferencedInstanceSequence]
    assert set(used) == {part.SOPInstanceUID for part in slices}
    # Every frame names the slice at its place.
    by_uid = {part.SOPInstanceUID: list(part.ImagePositionPatient) for part in slices}
    frames = seg.PerFrameFunctionalGroupsSequence
    assert len(frames) == 5
    for frame in frames:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert list(frame.PlanePositionSequence[0].ImagePositionPatient) == by_uid[source.ReferencedSOPInstanceUID]
    kinds = [
        (part.SegmentLabel, part.SegmentedPropertyTypeCodeSequence[0].CodeMeaning, part.SegmentAlgorithmName)
        for part in seg.SegmentSequence
    ]
    assert kinds == [
        ("pancreas", "Pancreas", "nnU-Net Dataset777_Test"),
        ("left_kidney", "Tissue", "nnU-Net Dataset777_Test"),
    ]


def test_regions_may_overlap(tmp_path):
    folder = write_series(tmp_path / "ct")
    prediction = labelled(folder, regions_class_order=(1, 2), whole_tumor=(1, 2), tumor_core=(2,))
    write_dicom_seg(tmp_path / "seg.dcm", prediction, folder)
    segments = read_with_dcmqi(tmp_path / "seg.dcm", tmp_path / "read", read_volume(folder))
    np.testing.assert_array_equal(segments["whole_tumor"], prediction.segmentation > 0)
    np.testing.assert_array_equal(segments["tumor_core"], prediction.segmentation == 2)


def test_label_values_need_not_be_consecutive(tmp_path):
    """nnU-Net numbers them in their order."""
    folder = write_series(tmp_path / "ct")
    segmentation = np.zeros(SHAPE, np.uint8)
    segmentation[1, 2:4], segmentation[2, 5:9] = 2, 1
    write_dicom_seg(tmp_path / "seg.dcm", labelled(folder, segmentation, spleen=7, cancer=300), folder)
    segments = read_with_dcmqi(tmp_path / "seg.dcm", tmp_path / "read", read_volume(folder))
    np.testing.assert_array_equal(segments["spleen"], segmentation == 1)
    np.testing.assert_array_equal(segments["cancer"], segmentation == 2)
    codes = [part.SegmentedPropertyTypeCodeSequence[0].CodeValue for part in segments_of(tmp_path / "seg.dcm")]
    assert codes == ["78961009", "108369006"]  # SNOMED CT: spleen, neoplasm


@pytest.mark.parametrize(
    ("order", "labels", "values"),
    [
        ((3, 5), {"whole": (1, 2), "core": (2,)}, {"whole": (3, 5), "core": (5,)}),
        (None, {"spleen": 1, "milt": 1, "cancer": 2}, {"spleen": (1,), "milt": (1,), "cancer": (2,)}),
    ],
    ids=["regions painted by other values", "a label named twice"],
)
def test_segments_are_those_of_the_values_that_are_written(tmp_path, order, labels, values):
    folder = write_series(tmp_path / "ct")
    segmentation = np.zeros(SHAPE, np.uint8)
    first, second = (1, 2) if order is None else order
    segmentation[1:4, 2:6], segmentation[2, 3:5] = first, second
    write_dicom_seg(tmp_path / "seg.dcm", labelled(folder, segmentation, order, **labels), folder)
    segments = read_with_dcmqi(tmp_path / "seg.dcm", tmp_path / "read", read_volume(folder))
    assert list(segments) == list(values)
    for name, value in values.items():
        np.testing.assert_array_equal(segments[name], np.isin(segmentation, value))


def segments_of(path):
    return pydicom.dcmread(path).SegmentSequence


def test_nothing_found_is_an_object_too(tmp_path):
    folder = write_series(tmp_path / "ct")
    write_dicom_seg(tmp_path / "seg.dcm", labelled(folder, np.zeros(SHAPE, np.uint8)), folder)
    assert [part.SegmentLabel for part in segments_of(tmp_path / "seg.dcm")] == ["pancreas", "lesion"]
    assert not (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "seg.dcm"))) > 0).any()


@needs_real_series
def test_a_real_series(tmp_path):
    """It lacks the identifiers, as anonymised series may; with new ones it is compressed and complete."""
    assert "has no StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID, SOPClassUID" in refusal(tmp_path, REAL_SERIES)
    folder = tmp_path / "ct"
    folder.mkdir()
    for path in REAL_SERIES.iterdir():
        part = pydicom.dcmread(path)
        part.SOPClassUID = part.file_meta.MediaStorageSOPClassUID
        part.SOPInstanceUID = part.file_meta.MediaStorageSOPInstanceUID
        part.StudyInstanceUID, part.SeriesInstanceUID = f"{UID}.9", UID
        part.save_as(folder / path.name)
    volume = read_volume(folder)
    prediction = labelled(folder, (volume.array[0] > 200).astype(np.uint8), bone=1)
    assert prediction.segmentation.any()
    write_dicom_seg(tmp_path / "seg.dcm", prediction, folder)
    segments = read_with_dcmqi(tmp_path / "seg.dcm", tmp_path / "read", volume)
    np.testing.assert_array_equal(segments["bone"], prediction.segmentation)


def refusal(tmp_path, folder):
    with pytest.raises(VolumeError) as error:
        write_dicom_seg(tmp_path / "seg.dcm", labelled(folder), folder)
    assert not (tmp_path / "seg.dcm").exists()
    return str(error.value)


def test_what_cannot_be_referred_to_is_refused(tmp_path):
    assert "has no FrameOfReferenceUID" in refusal(tmp_path, write_series(tmp_path / "a", FrameOfReferenceUID=None))
    assert "has no FrameOfReferenceUID" in refusal(tmp_path, write_series(tmp_path / "b", FrameOfReferenceUID=""))
    folder = write_series(tmp_path / "c")
    prediction = labelled(folder)
    (folder / "99.dcm").unlink()
    with pytest.raises(VolumeError, match=r"c: the slices must be those that were predicted, \(8, 14, 16\)"):
        write_dicom_seg(tmp_path / "seg.dcm", prediction, folder)
    with pytest.raises(OutputError, match="No such file or directory"):
        write_dicom_seg(tmp_path / "missing" / "seg.dcm", labelled(folder), folder)


@pytest.mark.parametrize(
    ("keyword", "value", "text"),
    [
        ("StudyInstanceUID", f"{UID}.10", "headers must be those of one series, but StudyInstanceUID is "),
        ("FrameOfReferenceUID", f"{UID}.10", "headers must be those of one series, but FrameOfReferenceUID is "),
        ("SOPInstanceUID", None, "every slice must have a SOPInstanceUID of its own"),
        (
            "SOPInstanceUID",
            "anonymous",
            "95.dcm: SOPInstanceUID must be a valid UID, such as 1.2.840, got 'anonymous'",
        ),
        ("StudyInstanceUID", "1." * 40, "95.dcm: StudyInstanceUID must be a valid UID, such as 1.2.840, got '1.1."),
        ("StudyInstanceUID", "1..3", "95.dcm: StudyInstanceUID must be a valid UID, such as 1.2.840, got '1..3'"),
        (
            "StudyInstanceUID",
            "1.02.3",
            "95.dcm: StudyInstanceUID must be a valid UID, such as 1.2.840, got '1.02.3'",
        ),
        ("StudyInstanceUID", "1.2\\1.3", "95.dcm: StudyInstanceUID must be a valid UID, such as 1.2.840, got "),
    ],
)
def test_identifiers_that_do_not_fit_are_named(tmp_path, keyword, value, text):
    folder = write_series(tmp_path / "ct")
    part = pydicom.dcmread(folder / "95.dcm")
    with pydicom.config.disable_value_validation():
        setattr(part, keyword, value or pydicom.dcmread(folder / "96.dcm").SOPInstanceUID)
        part.save_as(folder / "95.dcm")
    assert f"ct: {text}" in refusal(tmp_path, folder).replace("the slices' headers", "headers")


def test_without_highdicom_its_extra_is_named(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "ct")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'nnturbo\[dicom\]'"):
        write_dicom_seg(tmp_path / "seg.dcm", labelled(folder), folder)


class TestJobs:
    def test_a_folder_of_series_is_many_cases(self, tmp_path):
        scans = tmp_path / "scans"
        for name in ("b", "a"):
            write_series(scans / name)
        (scans / "README.txt").write_text("not a slice")
        write_report(scans / "DICOMDIR")
        assert find_cases(scans, ".nii.gz") == [CaseFiles(name=name, images=(scans / name,)) for name in ("a", "b")]
        assert find_cases(scans / "a", ".nii.gz") == [CaseFiles(name="a", images=(scans / "a",))]
        # Slices beside a folder: it is one series.
        shutil.copytree(scans / "a", scans, dirs_exist_ok=True)
        assert find_cases(scans, ".nii.gz") == [CaseFiles(name="scans", images=(scans,))]

    def test_segmentations_beside_the_labels(self, tmp_path, capsys):
        model = write_model(tmp_path / "model")
        write_series(tmp_path / "scans" / "a")
        with pydicom.config.disable_value_validation():
            write_series(tmp_path / "scans" / "b", PatientSex="Unknown")
        write_series(tmp_path / "scans" / "nameless", FrameOfReferenceUID=None)
        out = tmp_path / "out"
        call = ["predict", "-i", tmp_path / "scans", "-o", out, "-m", model, "-device", "cpu", "--dicom_seg"]
        call = [str(part) for part in [*call, "--backend", "torch", "--disable_progress_bar"]]
        assert main(call) == 1
        said = capsys.readouterr().err
        assert "nameless failed: its labels are written, but no DICOM segmentation: nameless: 99.dcm: a DICOM" in said
        assert sorted(path.name for path in out.iterdir() if path.suffix in (".dcm", ".gz")) == [
            *("a.dcm", "a.nii.gz", "b.dcm", "b.nii.gz", "nameless.nii.gz")
        ]
        records = {case["name"]: case for case in json.loads((out / "predictions.json").read_text())["cases"]}
        assert records["a"]["warnings"] == []
        assert any("PatientSex" in warning for warning in records["b"]["warnings"])
        volume = read_volume(tmp_path / "scans" / "a")
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "a.nii.gz")))
        assert labels.any()
        segments = read_with_dcmqi(out / "a.dcm", tmp_path / "read", volume)
        for number, (name, found) in enumerate(segments.items(), 1):
            np.testing.assert_array_equal(found, labels == number, err_msg=name)
        # The object counts as a result: where it is gone, the case is not complete.
        (out / "a.dcm").unlink()
        assert main([*call, "--continue_prediction"]) == 1
        assert (out / "a.dcm").exists()
        assert "1 done, 1 already there, 1 failed" in capsys.readouterr().out

    def test_other_scans_are_refused_at_once(self, tmp_path, capsys):
        model = write_model(tmp_path / "model")
        scan = tmp_path / "scan_0000.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(smooth_scan(SHAPE)), str(scan))
        call = ["predict", "-i", scan, "-o", tmp_path / "out", "-m", model, "-device", "cpu", "--dicom_seg"]
        assert main([str(part) for part in call]) == 2
        assert "every scan must be a folder of them; " in capsys.readouterr().err
        assert not Job(output=tmp_path / "out").output.exists()
