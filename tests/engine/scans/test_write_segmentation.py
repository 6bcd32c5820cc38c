"""Segmentations written: labels, type and geometry stay, and a file is whole or not there."""

import os

import numpy as np
import pytest
import SimpleITK
from nnturbo.engine.errors import OutputError
from nnturbo.engine.scans import volume as volume_module
from nnturbo.engine.scans.volume import read_volume, write_segmentation

from tests.engine.scans.image_files import IDENTITY, SIGNED_PERMUTATIONS, oblique_direction, ramp, write_image
from tests.paths import SHARED


class TestWriteSegmentation:
    @pytest.mark.parametrize("direction", [IDENTITY, SIGNED_PERMUTATIONS[13], *map(oblique_direction, (1, 2))])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".NII.GZ"])
    def test_keeps_labels_type_and_geometry(self, tmp_path, ending, dtype, direction):
        source = tmp_path / f"source{ending.lower()}"
        write_image(source, ramp(), origin=(-123.456, 1e3 / 7, 3), direction=direction)
        labels = ramp(dtype=dtype)[:, ::-1]  # not contiguous
        write_segmentation(tmp_path / f"labels{ending}", labels, read_volume(source).geometry)
        written = SimpleITK.ReadImage(str(tmp_path / f"labels{ending}"))
        given = SimpleITK.ReadImage(str(source))
        array = SimpleITK.GetArrayFromImage(written)
        np.testing.assert_array_equal(array, labels)
        assert array.dtype == dtype
        # The last bits of oblique cosines change in every NIfTI or NRRD file; they are not stored as such.
        digits = {"rtol": 0, "atol": 0 if direction in SIGNED_PERMUTATIONS or "mha" in ending else 1e-7}
        np.testing.assert_allclose(written.GetSpacing(), given.GetSpacing(), **digits)
        np.testing.assert_array_equal(written.GetOrigin(), given.GetOrigin())
        np.testing.assert_allclose(written.GetDirection(), given.GetDirection(), **digits)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, f"labels{ending}"])

    def test_a_real_scan(self, tmp_path):
        path = SHARED / "data" / "mr_0000.nii.gz"
        if not path.exists():
            pytest.skip("the shared real scans are not here")
        volume = read_volume(path)
        write_segmentation(tmp_path / "s.nii.gz", (volume.array[0] > 100).astype(np.uint8), volume.geometry)
        written, given = SimpleITK.ReadImage(str(tmp_path / "s.nii.gz")), SimpleITK.ReadImage(str(path))
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(written, get)() == getattr(given, get)()

    def test_compresses_and_replaces(self, tmp_path, geometry):
        path = tmp_path / "s.nii.gz"
        path.write_text("an older result")
        write_segmentation(str(path), np.zeros((50, 50, 50), np.uint8), geometry)
        assert 0 < path.stat().st_size < 5000
        assert read_volume(path).array.shape == (1, 50, 50, 50)
        assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()

    @pytest.mark.parametrize(
        ("name", "labels", "error", "text"),
        [
            ("s.jpg", np.zeros((2, 2, 2), np.uint8), ValueError, "s.jpg: .*one of .nii.gz, .nii, .nrrd, .nhdr, .mha"),
            ("s.png", np.zeros((2, 2, 2), np.uint8), ValueError, "with one slice if it is 2D"),
            ("s.gz", np.zeros((2, 2, 2), np.uint8), ValueError, "must end with one of"),
            ("s.nii", np.zeros((2, 2, 2), np.int16), TypeError, "uint8 or uint16, got int16"),
            ("s.nii", np.zeros((2, 2, 2), np.dtype(">u2")), TypeError, "uint8 or uint16"),
            ("s.nii", [[[1]]], TypeError, "uint8 or uint16, got list"),
            ("s.nii", np.zeros((2, 2), np.uint8), ValueError, r"\(Z, Y, X\).*got shape \(2, 2\)"),
            ("s.nii", np.zeros((2, 0, 2), np.uint8), ValueError, "not empty"),
        ],
    )
    def test_refuses_other_arguments(self, tmp_path, geometry, name, labels, error, text):
        with pytest.raises(error, match=text):
            write_segmentation(tmp_path / name, labels, geometry)
        assert list(tmp_path.iterdir()) == []

    def test_tells_why_a_folder_cannot_be_written(self, tmp_path, geometry, monkeypatch, capfd):
        labels = np.zeros((2, 2, 2), np.uint8)
        (tmp_path / "file").write_text("")
        (tmp_path / "taken.nii.gz").mkdir()
        for target, reason in [
            ("missing/s.nii.gz", "No such file or directory"),
            ("file/s.nii.gz", "Not a directory"),
            ("taken.nii.gz", "(Is a directory|Permission denied)"),  # the latter on Windows
        ]:
            with pytest.raises(OutputError, match=f"{target} cannot be written: {reason}"):
                write_segmentation(tmp_path / target, labels, geometry)

        def deny(**options):
            raise PermissionError(13, "Permission denied", options["dir"])

        monkeypatch.setattr("tempfile.mkdtemp", deny)  # the tests may run as root, whom no folder refuses
        with pytest.raises(OutputError, match=r"Permission denied$"):
            write_segmentation(tmp_path / "s.nii.gz", labels, geometry)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.nii.gz"]
        assert capfd.readouterr() == ("", "")

    @pytest.mark.posix("limits of resources")
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
    def test_a_full_disk_leaves_the_old_file(self, tmp_path, geometry, ending):
        """The size limit for files stands for the full disk: writing fails midway in the same way."""
        import resource

        labels = np.random.default_rng(0).integers(0, 255, (50, 50, 50)).astype(np.uint8)
        path = tmp_path / f"s{ending}"
        path.write_text("an older result")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        try:
            with pytest.raises(OutputError, match=r"cannot be written: .+") as error:
                write_segmentation(path, labels, geometry)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(error.value)
        assert path.read_text() == "an older result"
        assert list(tmp_path.iterdir()) == [path]

    def test_an_interrupt_leaves_nothing(self, tmp_path, geometry, monkeypatch):
        def interrupt(path, *arguments, **names):
            path.write_text("half a file")
            raise KeyboardInterrupt

        monkeypatch.setattr(volume_module, "write_label_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_segmentation(tmp_path / "s.nii.gz", np.zeros((2, 2, 2), np.uint8), geometry)
        assert list(tmp_path.iterdir()) == []


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
