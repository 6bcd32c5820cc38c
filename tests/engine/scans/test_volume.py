"""Volumes in memory: geometry, channels, orientation, and writing segmentations."""

import gc
import logging
import os

import nibabel
import numpy as np
import pytest
import SimpleITK
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans import volume as volume_module
from nnturbo.engine.scans.geometry import Geometry
from nnturbo.engine.scans.volume import Volume, read_volume, restore_orientation

from tests.engine.scans.image_files import IDENTITY, SIGNED_PERMUTATIONS, oblique_direction, ramp, write_image
from tests.paths import SHARED


class TestGeometry:
    @pytest.mark.parametrize(
        ("field", "value", "text"),
        [
            ("spacing", (0, 1, 1), "above 0 mm"),
            ("spacing", (1, -1, 1), "above 0 mm"),
            ("spacing", (1, 1, np.nan), "must be finite"),
            ("spacing", (1, np.inf, 1), "must be finite"),
            ("spacing", (1, 1e30, 1), "must be finite"),
            ("origin", (np.nan, 0, 0), "must be finite"),
            ("origin", (0, 0, -np.inf), "must be finite"),
            ("direction", (np.nan, *IDENTITY[1:]), "must be finite"),
            ("direction", (1, 0, 0, 1, 0, 0, 0, 0, 1), "not singular"),
            ("direction", (0,) * 9, "not singular"),
            ("direction", (2, *IDENTITY[1:]), "nine cosines"),
        ],
    )
    def test_refuses_what_is_no_grid(self, geometry, field, value, text):
        fields = {name: getattr(geometry, name) for name in ("spacing", "origin", "direction")}
        with pytest.raises(VolumeError, match=f"{field} .*{text}.*correct the header"):
            Geometry(**{**fields, field: value})

    @pytest.mark.parametrize(("field", "value"), [("spacing", (1, 1)), ("origin", (0,) * 4), ("direction", (1, 0))])
    def test_refuses_a_wrong_count(self, geometry, field, value):
        fields = {name: getattr(geometry, name) for name in ("spacing", "origin", "direction")}
        with pytest.raises(ValueError, match=f"{field} must be . numbers, got {len(value)}"):
            Geometry(**{**fields, field: value})

    def test_holds_plain_floats_and_no_negative_zero(self):
        geometry = Geometry(spacing=np.array([1, 2, 3]), origin=(-0.0, 1, 2), direction=np.eye(3).ravel())
        assert geometry.spacing == (1.0, 2.0, 3.0)
        assert all(type(number) is float for number in (*geometry.spacing, *geometry.origin, *geometry.direction))
        assert str(geometry.origin[0]) == "0.0"


class TestVolume:
    def test_from_array_adds_a_channel_axis_and_copies_nothing(self):
        array = ramp()
        volume = Volume.from_array(array, (3, 2, 1), origin=(1, 2, 3), name="mine")
        assert volume.array.shape == (1, 4, 5, 6)
        assert np.shares_memory(volume.array, array)
        assert volume.geometry == Geometry(spacing=(3, 2, 1), origin=(1, 2, 3), direction=IDENTITY)
        assert (volume.name, volume.warnings) == ("mine", ())
        assert Volume.from_array(np.zeros((2, 4, 5, 6)), (1, 1, 1)).array.shape == (2, 4, 5, 6)

    @pytest.mark.parametrize(
        ("array", "error", "text"),
        [
            ([[[1]]], TypeError, "must be a numpy.ndarray, got list"),
            (np.zeros((2, 2, 2), complex), TypeError, "got <c16"),
            (np.zeros((2, 2, 2), np.dtype(">i2")), TypeError, "native byte order, got >i2"),
            (np.zeros((2, 2, 2), object), TypeError, "up to 64 bits"),
            (np.zeros((2, 2)), VolumeError, r"must be \(C, Z, Y, X\) and not empty, got shape \(2, 2\)"),
            (np.zeros((1, 1, 2, 2, 2)), VolumeError, r"got shape \(1, 1, 2, 2, 2\)"),
            (np.zeros((3, 0, 2)), VolumeError, r"not empty, got shape \(1, 3, 0, 2\)"),
        ],
    )
    def test_refuses_other_arrays(self, array, error, text):
        with pytest.raises(error, match=text):
            Volume.from_array(array, (1, 1, 1))


class TestReadVolume:
    def test_passes_a_volume_through(self):
        volume = Volume.from_array(ramp(), (1, 1, 1))
        assert read_volume(volume, channels=1) is volume

    def test_checks_a_volume(self):
        with pytest.raises(VolumeError, match=r"mine: the model takes 2 channel\(s\), got 1: pass one"):
            read_volume(Volume.from_array(ramp(), (1, 1, 1), name="mine"), channels=2)
        for bad in (np.nan, np.inf, -np.inf):
            array = ramp(dtype=np.float32)
            array[1, 2, 3] = bad
            with pytest.raises(VolumeError, match="mine: voxels must be finite"):
                read_volume(Volume.from_array(array, (1, 1, 1), name="mine"))

    def test_reads_one_file(self, tmp_path):
        path = write_image(tmp_path / "v.nii.gz", ramp(), direction=SIGNED_PERMUTATIONS[9])
        for given in (path, str(path), [path]):
            volume = read_volume(given, channels=1)
            assert volume.name == "v.nii.gz"
            assert volume.array.dtype == np.int16
            np.testing.assert_array_equal(volume.array, ramp()[None])
            expected = SimpleITK.ReadImage(str(path))
            assert volume.geometry.spacing == expected.GetSpacing()[::-1]
            assert volume.geometry.origin == expected.GetOrigin()
            assert volume.geometry.direction == expected.GetDirection()

    def test_array_owns_its_memory(self, tmp_path):
        """SimpleITK's own view reads freed memory once the image is gone."""
        expected = ramp((40, 50, 60), np.int32)
        path = write_image(tmp_path / "v.nrrd", expected)
        for _ in range(5):
            array = read_volume(path).array[:, 1:]  # a view of the view
            gc.collect()
            litter = [np.full(expected.shape, -1, np.int32) for _ in range(4)]
            np.testing.assert_array_equal(array[0], expected[1:])
            array[0, 0, 0, 0] = 7  # nobody else uses the memory, and torch warns of arrays that are read-only
            assert litter[0].max() == -1

    def test_stacks_channels_in_the_given_order(self, tmp_path):
        first = write_image(tmp_path / "a_0000.nii.gz", ramp())
        second = write_image(tmp_path / "a_0001.nii.gz", ramp(dtype=np.float32) + 0.5)
        volume = read_volume([second, first], channels=2)
        assert volume.array.dtype == np.float32
        np.testing.assert_array_equal(volume.array, np.stack([ramp() + np.float32(0.5), ramp()]))

    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            ({"shape": (4, 5, 7)}, r"same shape \(x, y, z\), got \(7, 5, 4\), but a.nrrd has \(6, 5, 4\)"),
            ({"spacing": (0.7, 0.8, 2.51)}, r"same spacing \(z, y, x\), got \(2.51, "),
            ({"origin": (-10.4, 20.25, 30.125)}, "same origin"),
            ({"direction": SIGNED_PERMUTATIONS[1]}, "same direction"),
        ],
    )
    def test_refuses_channels_on_different_grids(self, tmp_path, changed, text):
        first = write_image(tmp_path / "a.nrrd", ramp())
        second = write_image(tmp_path / "b.nrrd", ramp(changed.pop("shape", (4, 5, 6))), **changed)
        with pytest.raises(VolumeError, match=f"b.nrrd: all channels must have the {text}.*resample the channels"):
            read_volume([first, second])

    def test_accepts_rounding_between_channels(self, tmp_path):
        """The same grid, once in doubles and once in the floats of NIfTI."""
        grid = {"spacing": (0.7123456789, 0.8, 2.5), "origin": (-123.456789, 1, 2), "direction": oblique_direction(0)}
        files = [write_image(tmp_path / name, ramp(), **grid) for name in ("a.nrrd", "b.nii.gz")]
        assert read_volume(files).array.shape == (2, 4, 5, 6)

    def test_refuses_a_wrong_number_of_channels_before_reading(self, tmp_path, monkeypatch):
        monkeypatch.setattr(volume_module, "read_channels", lambda sources: pytest.fail("must not be read"))
        files = [write_image(tmp_path / name, ramp()) for name in ("a.nii.gz", "b.nii.gz")]
        with pytest.raises(VolumeError, match=r"takes 3 channel\(s\), got 2: .*_0000\.nii\.gz, case_0001\.nii\.gz"):
            read_volume(files, channels=3)
        with pytest.raises(VolumeError, match="at least one file, got an empty list"):
            read_volume([])

    def test_refuses_what_is_no_file(self, tmp_path):
        with pytest.raises(VolumeError, match=r"none\.nii\.gz': there is no such file or folder: check the path"):
            read_volume(tmp_path / "none.nii.gz")
        with pytest.raises(VolumeError, match=r"none\.nii\.gz': there is no such file"):
            read_volume([write_image(tmp_path / "a.nii.gz", ramp()), tmp_path / "none.nii.gz"], channels=2)
        with pytest.raises(VolumeError, match="there is no such file"):
            read_volume("a\0b.nii.gz")
        with pytest.raises(TypeError):
            read_volume(3)

    @pytest.mark.posix("pipes with names")
    def test_refuses_pipes(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.nii.gz")
        with pytest.raises(VolumeError, match="got a device, pipe or socket"):
            read_volume(tmp_path / "pipe.nii.gz")

    def test_tells_warnings_and_logs_them(self, tmp_path, caplog):
        image = nibabel.Nifti1Image(ramp(), np.diag([1.0, 1, 1, 1]))
        image.header.set_zooms((1, 1, 3))  # and the sform keeps 1 mm
        nibabel.save(image, tmp_path / "v.nii.gz")
        with caplog.at_level(logging.WARNING, "nnturbo.engine.scans.volume"):
            volume = read_volume(tmp_path / "v.nii.gz")
        assert volume.geometry.spacing == (3, 1, 1)
        assert "1 x 1 x 3 mm (pixdim) and 1 x 1 x 1 mm (sform)" in volume.warnings[0]
        assert volume.warnings[0].startswith("v.nii.gz: ")
        assert caplog.messages == list(volume.warnings)


def ras_affine(geometry):
    """Voxel (x, y, z) to RAS, as nibabel has it."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(geometry.direction, (3, 3)) * geometry.spacing[::-1]
    affine[:3, 3] = geometry.origin
    return np.diag([-1, -1, 1, 1]) @ affine


class TestOrientation:
    @pytest.mark.parametrize("direction", SIGNED_PERMUTATIONS + [oblique_direction(seed) for seed in range(20)])
    def test_equals_nibabel(self, tmp_path, direction):
        path = write_image(tmp_path / "v.nii", ramp(), direction=direction)
        expected = nibabel.as_closest_canonical(nibabel.load(path))
        original = read_volume(path)
        volume = original.reoriented()
        np.testing.assert_array_equal(volume.array[0].transpose(2, 1, 0), np.asanyarray(expected.dataobj))
        np.testing.assert_allclose(volume.geometry.spacing[::-1], expected.header.get_zooms(), rtol=1e-6)
        np.testing.assert_allclose(ras_affine(volume.geometry), expected.affine, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(restore_orientation(volume.array[0], original.geometry), original.array[0])
        np.testing.assert_array_equal(restore_orientation(volume.array, original.geometry), original.array)

    @pytest.mark.parametrize("direction", SIGNED_PERMUTATIONS[::5] + [oblique_direction(seed) for seed in range(20)])
    def test_equals_simpleitk(self, direction):
        image = SimpleITK.GetImageFromArray(ramp())
        image.SetSpacing((0.7, 0.8, 2.5))
        image.SetOrigin((1, 2, 3))
        image.SetDirection(direction)
        expected = SimpleITK.DICOMOrient(image, "RAS")
        volume = Volume.from_array(ramp(), (2.5, 0.8, 0.7), origin=(1, 2, 3), direction=direction).reoriented()
        np.testing.assert_array_equal(volume.array[0], SimpleITK.GetArrayFromImage(expected))
        np.testing.assert_allclose(volume.geometry.spacing, expected.GetSpacing()[::-1])
        np.testing.assert_allclose(volume.geometry.origin, expected.GetOrigin(), atol=1e-9)
        np.testing.assert_allclose(volume.geometry.direction, expected.GetDirection(), atol=1e-12)

    @pytest.mark.parametrize("first", ["RAS", "LPS", "SAR"])
    @pytest.mark.parametrize("second", ["LPS", "SAR", "IPL"])
    @pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIOWithReorient"])
    def test_channels_may_be_stored_in_different_orientations(self, tmp_path, first, second, reader):
        """Labels go on the axes of the first; each is turned as nnU-Net turns it."""
        nnunet = pytest.importorskip(
            "nnunetv2.imageio.reader_writer_registry", reason="compares with nnU-Net's readers"
        )
        paths = []
        for number, orientation in enumerate((first, second)):
            image = SimpleITK.GetImageFromArray((-1) ** number * ramp())
            image.SetSpacing((0.7, 0.8, 2.5))
            image.SetOrigin((1, 2, 3))
            paths.append(tmp_path / f"v_000{number}.nii.gz")
            SimpleITK.WriteImage(SimpleITK.DICOMOrient(image, orientation), str(paths[-1]))
        volume = read_volume(paths, channels=2, reader=reader)
        alone = read_volume(paths[0], reader=reader)
        assert volume.geometry == alone.geometry
        np.testing.assert_array_equal(volume.array[0], alone.array[0])
        np.testing.assert_array_equal(volume.array[1], -volume.array[0])
        expected, properties = nnunet.recursive_find_reader_writer_by_name(reader)().read_images([*map(str, paths)])
        np.testing.assert_array_equal(volume.reoriented().array, expected)
        np.testing.assert_allclose(volume.reoriented().spacing, properties["spacing"], rtol=1e-6)
        if first != second:
            with pytest.raises(VolumeError, match="must have the same"):
                read_volume(paths, reader=reader.removesuffix("WithReorient"))

    def test_a_real_scan(self):
        path = SHARED / "data" / "abdomen_ct_0000.nii.gz"
        if not path.exists():
            pytest.skip("the shared real scans are not here")
        original = read_volume(path)
        assert original.array.shape == (1, 112, 101, 122)
        assert original.array.dtype == np.int32
        assert original.geometry.direction[0] == original.geometry.direction[4] == -1
        volume = original.reoriented()
        expected = nibabel.as_closest_canonical(nibabel.load(path))
        np.testing.assert_array_equal(volume.array[0].transpose(2, 1, 0), np.asanyarray(expected.dataobj))
        np.testing.assert_allclose(ras_affine(volume.geometry), expected.affine, atol=1e-4)
        np.testing.assert_array_equal(restore_orientation(volume.array[0], original.geometry), original.array[0])

    def test_keeps_what_it_does_not_turn(self):
        original = Volume.from_array(np.stack([ramp(), -ramp()]), (3, 2, 1), name="mine")
        volume = original.reoriented()
        np.testing.assert_array_equal(volume.array[1], -volume.array[0])
        assert np.shares_memory(volume.array, original.array)
        assert volume.name == "mine"
        twice = volume.reoriented()
        np.testing.assert_array_equal(twice.array, volume.array)
        assert twice.geometry == volume.geometry
