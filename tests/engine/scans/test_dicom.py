"""Folders of DICOM slices: order, gaps, duplicates, several series, and files that are no slices."""

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans import dicom, dicom_compression, dicom_header
from nnturbo.engine.scans.volume import read_volume

from tests.engine.scans.dicom_slices import (
    AXIAL,
    REAL_SERIES,
    TILTED,
    UID,
    assert_equal,
    needs_real_series,
    stored_pixels,
    write_report,
    write_series,
    write_slice,
)
from tests.engine.scans.refusals import refusal


@pytest.fixture
def gdcm_stays_out(monkeypatch):
    """Fail where GDCM is given a file that it must not see."""
    monkeypatch.setattr(dicom_compression, "read_voxels", lambda *arguments: pytest.fail("GDCM must not see it"))


class TestSeries:
    @pytest.mark.parametrize("orientation", [AXIAL, TILTED, (0, 1, 0, 0, 0, -1), (-1, 0, 0, 0, 1, 0)])
    def test_is_sorted_along_the_normal(self, tmp_path, orientation, caplog):
        folder = write_series(tmp_path / "ct", orientation=orientation)
        with caplog.at_level(logging.WARNING):
            volume = read_volume(str(folder), channels=1)
        np.testing.assert_array_equal(volume.array[0], [stored_pixels(index) - 1024 for index in range(6)])
        assert volume.array.dtype == np.int16
        assert volume.name == "ct"
        assert volume.warnings == ()
        assert caplog.messages == []
        np.testing.assert_allclose(volume.geometry.spacing, (2.5, 0.75, 0.5), rtol=1e-6)
        np.testing.assert_allclose(volume.geometry.origin, (10, 20, -30))
        columns = np.stack([orientation[:3], orientation[3:], np.cross(orientation[:3], orientation[3:])], axis=1)
        np.testing.assert_allclose(np.reshape(volume.geometry.direction, (3, 3)), columns, atol=1e-6)

    def test_equals_itk(self, tmp_path):
        """ITK's own series reader, for a tilted series whose slices have different slopes."""
        folder = write_series(tmp_path / "ct", orientation=TILTED)
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        assert_equal(read_volume(folder), reader.Execute())

    @needs_real_series
    def test_a_real_series_equals_itk(self):
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(REAL_SERIES)))
        volume = read_volume(REAL_SERIES)
        assert volume.array.shape == (1, 20, 512, 512)
        assert volume.geometry.spacing == (2.0, 0.9765625, 0.9765625)
        assert volume.warnings == ()
        assert_equal(volume, reader.Execute())

    def test_slopes_of_single_slices(self, tmp_path):
        """PET: each slice has its own slope, and one of them is a whole number."""
        folder = tmp_path / "pet"
        folder.mkdir()
        for index, slope in enumerate((1, 0.5, 0.25)):
            tags = {"RescaleSlope": slope, "RescaleIntercept": 0}
            write_slice(folder / f"{index}.dcm", stored_pixels(index), (0, 0, index), **tags)
        volume = read_volume(folder)
        assert volume.array.dtype == np.float64
        np.testing.assert_allclose(volume.array[0], [stored_pixels(k) * s for k, s in enumerate((1, 0.5, 0.25))])

    def test_spacing_is_the_distance_of_positions(self, tmp_path):
        folder = write_series(tmp_path / "ct", step_mm=1.25, SpacingBetweenSlices=5)
        assert read_volume(folder).geometry.spacing == (1.25, 0.75, 0.5)

    def test_the_current_folder_has_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(write_series(tmp_path / "ct"))
        assert read_volume(".").name == "ct"

    def test_two_folders_as_channels(self, tmp_path):
        folders = [write_series(tmp_path / str(intercept), RescaleIntercept=intercept) for intercept in (0, -1024)]
        volume = read_volume(folders, channels=2)
        np.testing.assert_array_equal(volume.array[0] - volume.array[1], 1024)

    def test_other_files_are_skipped(self, tmp_path, capfd):
        folder = write_series(tmp_path / "ct")
        (folder / "README").write_text("A scan. " * 50)
        (folder / "empty.txt").touch()
        (folder / "preview.png").write_bytes(b"\x89PNG" + bytes(1000))
        write_report(folder / "report.dcm")
        write_report(folder / "DICOMDIR", "1.2.840.10008.1.3.10")
        (folder / "more").mkdir()
        assert read_volume(folder).array.shape == (1, 6, 5, 6)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("is_undefined", [True, False])
    @pytest.mark.parametrize(
        "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"]
    )
    def test_encodings(self, tmp_path, syntax, is_undefined):
        """Implicit, explicit, big-endian and deflated, with nested sequences of stated and of undefined length."""
        deepest = pydicom.Dataset()
        deepest.CodeValue = "T-65000"
        inner = pydicom.Dataset()
        inner.add_new(0x00082228, "SQ", [deepest, deepest])
        inner[0x00082228].is_undefined_length = is_undefined
        sequence = pydicom.Sequence([inner, pydicom.Dataset()])
        folder = write_series(tmp_path / "ct", syntax=syntax, AnatomicRegionSequence=sequence)
        volume = read_volume(folder)
        np.testing.assert_array_equal(volume.array[0], [stored_pixels(index) - 1024 for index in range(6)])

    def test_slices_without_a_preamble(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes()[132:])
        assert read_volume(folder).array.shape == (1, 6, 5, 6)


class TestWarnings:
    def test_missing_slices_are_named(self, tmp_path, caplog):
        folder = write_series(tmp_path / "ct", positions=(0, 1, 2, 5, 6, 7, 9))
        with caplog.at_level(logging.WARNING, "nnturbo.engine.scans.volume"):
            volume = read_volume(folder)
        (warning,) = volume.warnings
        assert "usually 2.5 mm" in warning
        assert "at -25.00 to -17.50 mm (2 missing), -12.50 to -7.50 mm (1 missing): slices may be missing" in warning
        assert caplog.messages == [warning]
        assert volume.array.shape == (1, 7, 5, 6)
        np.testing.assert_allclose(volume.geometry.spacing[0], 9 * 2.5 / 6)

    @needs_real_series
    def test_a_real_series_with_a_gap(self, tmp_path):
        folder = tmp_path / "ct"
        folder.mkdir()
        for path in sorted(REAL_SERIES.glob("*.dcm"))[:6]:
            if path.name != "003.dcm":
                shutil.copyfile(path, folder / path.name)
        (warning,) = read_volume(folder).warnings
        assert "-772.50 to -768.50 mm (1 missing)" in warning

    def test_many_gaps_are_summed_up(self, tmp_path):
        positions = [k for k in range(40) if k % 4 != 1]
        (warning,) = read_volume(write_series(tmp_path / "ct", positions=positions, BitsStored=16, HighBit=15)).warnings
        assert warning.count("(1 missing)") == 5
        assert "and 5 more" in warning

    @pytest.mark.parametrize(("shift_mm", "is_told"), [(0.02, False), (0.1, True)])
    def test_small_unevenness(self, tmp_path, shift_mm, is_told):
        folder = write_series(tmp_path / "ct", positions=(0, 1, 2, 4, 5))
        write_slice(folder / "3.dcm", stored_pixels(3), (10, 20, -30 + 3 * 2.5 + shift_mm))
        warnings = read_volume(folder).warnings
        assert len(warnings) == is_told
        if is_told:
            assert "(0 missing)" in warnings[0]

    def test_a_tilted_gantry(self, tmp_path):
        folder = tmp_path / "ct"
        folder.mkdir()
        for index in range(6):
            write_slice(folder / f"{index}.dcm", stored_pixels(index), (0, 0.4 * index, 2 * index))
        (warning,) = read_volume(folder).warnings
        assert "shift sideways by up to 2.0 mm" in warning


class TestRefusals:
    def test_folders_without_slices(self, tmp_path):
        folder = tmp_path / "scan"
        folder.mkdir()
        assert "got 0 other file(s) and no slice" in refusal(folder)
        (folder / "case_0000.nii.gz").write_bytes(b"x" * 1000)
        write_report(folder / "report.dcm")
        (folder / "deeper").mkdir()
        text = refusal(folder)
        assert "must hold the slices of one DICOM series, got 2 other file(s) and no slice: pass" in text
        assert "for .nii.gz and other images the file itself" in text

    def test_several_series_are_listed(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        write_series(folder, positions=(8, 9), SeriesInstanceUID=f"{UID}.2", SeriesDescription="localizer")
        text = refusal(folder)
        assert "must hold one DICOM series, got 2: " in text
        assert f"{UID} (synthetic; 6 slices, such as 0-1.dcm)" in text
        assert f"{UID}.2 (localizer; 2 slices, such as 6-9.dcm)" in text
        assert "move the one to predict into a folder of its own" in text

    @needs_real_series
    def test_a_real_series_beside_another(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        for path in sorted(REAL_SERIES.glob("*.dcm"))[:2]:
            shutil.copyfile(path, folder / path.name)
        assert "without UID (CT Body 3.0; 2 slices, such as 001.dcm)" in refusal(folder)

    def test_two_slices_at_one_position(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        shutil.copyfile(next(folder.glob("*-3.dcm")), folder / "copy.dcm")
        text = refusal(folder)
        assert "every slice must have its own position" in text
        assert "copy.dcm" in text
        assert "-3.dcm" in text
        assert "both at -22.50 mm" in text

    @pytest.mark.parametrize(
        ("what", "pixels", "options"),
        [
            ("size", np.zeros((5, 7), np.int16), {}),
            ("spacing", stored_pixels(9), {"PixelSpacing": [0.75, 0.51]}),
            ("orientation", stored_pixels(9), {"orientation": TILTED}),
        ],
    )
    def test_slices_that_do_not_fit(self, tmp_path, what, pixels, options):
        folder = write_series(tmp_path / "ct")
        write_slice(folder / "odd.dcm", pixels, (10, 20, 40), **options)
        text = refusal(folder)
        assert f"all slices must have the same {what}, got " in text
        assert "odd.dcm" in text

    def test_one_slice(self, tmp_path):
        assert "at least two slices, got only" in refusal(write_series(tmp_path / "ct", positions=[3]))

    @pytest.mark.parametrize(
        ("pixels", "options", "text"),
        [
            (np.zeros((3, 5, 6), np.uint16), {"NumberOfFrames": 3}, "must hold one slice and its position .* got 3"),
            (stored_pixels(0), {"ImagePositionPatient": None}, r"got 1 slice\(s\), position missing"),
            (
                np.zeros((3, 5, 6), np.uint8),
                {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 1},
                "one grey value each .* got 3 x RGB",
            ),
        ],
    )
    def test_frames_colour_and_missing_positions(self, tmp_path, pixels, options, text):
        folder = write_series(tmp_path / "ct")
        write_slice(folder / "odd.dcm", pixels, (0, 0, 0), **options)
        assert re.search(f"odd.dcm: .*{text}", refusal(folder))

    def test_positions_beyond_reason(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        for number, position in enumerate(("-1e400", "1e400")):
            tags = {"ImagePositionPatient": ["0", "0", position]}
            write_slice(folder / f"odd{number}.dcm", stored_pixels(0), (0, 0, 0), **tags)
            assert "slice positions must be below 1e+06 mm" in refusal(folder)

    @pytest.mark.parametrize("kept", [-1, -20, 0.95, 0.5, 300])
    def test_cut_off_slices(self, tmp_path, gdcm_stays_out, capfd, kept):
        """GDCM would take seconds and gigabytes to find out."""
        path = tmp_path / "ct" / "1.dcm"
        path.parent.mkdir()
        write_slice(path, stored_pixels(0), (0, 0, 0), AnatomicRegionSequence=[pydicom.Dataset()])
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
        assert "1.dcm: the DICOM slice is cut off or damaged: export or copy it again" in refusal(path.parent)
        assert capfd.readouterr() == ("", "")

    @needs_real_series
    @pytest.mark.parametrize("kept", [-1, -8, -100, 0.5, 5000, 4000])
    def test_a_real_compressed_slice_cut_off(self, tmp_path, gdcm_stays_out, kept):
        content = (REAL_SERIES / "001.dcm").read_bytes()
        (tmp_path / "001.dcm").write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
        assert "001.dcm: the DICOM slice is cut off or damaged" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("found", "replaced"),
        [
            (b"\x28\0\x10\0US\x02\0", b"\x28\0\x10\0UT\x02\0"),  # Rows as a text that is gigabytes long
            (b"\x28\0\x10\0US\x02\0", b"\x28\0\x10\0Us\x02\0"),
            (b"\xe0\x7f\x10\0OW\0\0\x3c\0\0\0", b"\xe0\x7f\x10\0OW\0\0\x3c\0\0\x7f"),
            (b"\xe0\x7f\x10\0OW\0\0\x3c\0\0\0", b"\xe0\x7f\x10\0OW\0\0\xff\xff\xff\xff"),
        ],
    )
    def test_lengths_that_cannot_be(self, tmp_path, gdcm_stays_out, found, replaced):
        path = tmp_path / "ct" / "1.dcm"
        path.parent.mkdir()
        write_slice(path, stored_pixels(0), (0, 0, 0))
        content = path.read_bytes()
        assert content.count(found) == 1
        path.write_bytes(content.replace(found, replaced))
        assert "1.dcm: the DICOM slice is cut off or damaged" in refusal(path.parent)

    @pytest.mark.parametrize("kind", [b"??", b"\0\0"])
    def test_unknown_types(self, tmp_path, kind):
        """Some old exports have them; what cannot be a type is damage."""
        write_slice(tmp_path / "1.dcm", stored_pixels(0), (0, 0, 0))
        content = (tmp_path / "1.dcm").read_bytes()
        found = b"\x08\0\x3e\x10LO\x0a\0"
        assert content.count(found) == 1
        (tmp_path / "1.dcm").write_bytes(content.replace(found, found.replace(b"LO", kind)))
        header = dicom_header.read_header(tmp_path / "1.dcm")
        assert header.is_whole
        assert header.text("SeriesDescription") == "synthetic"
        (tmp_path / "1.dcm").write_bytes(content.replace(found, found.replace(b"LO", b"?!")))
        assert not dicom_header.read_header(tmp_path / "1.dcm").is_whole

    def test_a_slice_that_vanishes(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        source = dicom.open_series(folder)
        path = next(folder.glob("*-3.dcm"))
        path.unlink()
        with pytest.raises(VolumeError, match=f"ct: {path.name}: the system cannot read it"):
            source.voxels()

    def test_a_folder_that_cannot_be_listed(self, tmp_path, monkeypatch):
        def deny(self):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", deny)
        assert "the system cannot read it: Permission denied" in refusal(tmp_path)
