"""File formats beside the usual: 2D images, detached headers, upper-case endings, and formats of two files."""

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine import Engine
from nnturbo.engine.cli import main
from nnturbo.engine.errors import OutputError, VolumeError
from nnturbo.engine.scans.geometry import Geometry
from nnturbo.engine.scans.label_file import is_whole, second_file
from nnturbo.engine.scans.volume import Volume, read_volume, write_segmentation

from tests.engine.factory import dataset_json, plans_2d, plans_json, smooth_scan, write_model
from tests.engine.scans.refusals import refusal

STACK = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
TURNED = (0.6, 0.8, -0.8, 0.6)
PLAIN = {"origin": (0, 0, 0), "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}


def write_2d(path, array=STACK[0], direction=TURNED):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75))
    image.SetOrigin((-10.5, 20.25))
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


class TestTwoDimensions:
    @pytest.mark.parametrize("direction", [(1, 0, 0, 1), (-1, 0, 0, -1), (0, 1, 1, 0), TURNED])
    @pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"])
    def test_labels_are_written_in_2d_on_the_grid_of_the_image(self, tmp_path, ending, dtype, direction):
        path = write_2d(tmp_path / f"a{ending}", STACK[0].astype(dtype), direction)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, STACK[:1].astype(dtype)[None])
        assert volume.array.dtype == dtype
        assert volume.geometry.is_2d
        given = sitk.ReadImage(str(path))
        spacing = given.GetSpacing()
        assert volume.geometry.spacing == (999 * max(spacing), *spacing[::-1])
        write_segmentation(tmp_path / f"labels{ending}", STACK[:1].astype(np.uint8), volume.geometry)
        written = sitk.ReadImage(str(tmp_path / f"labels{ending}"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(written), STACK[0])
        for get in ("GetSize", "GetSpacing", "GetOrigin"):
            assert getattr(written, get)() == getattr(given, get)()
        np.testing.assert_allclose(written.GetDirection(), given.GetDirection(), rtol=0, atol=1e-7)

    @pytest.mark.parametrize(
        ("dim", "is_2d"),
        [((2, 6, 5), True), ((2, 6, 5, 1), True), ((3, 6, 5, 1), False), ((4, 6, 5, 1, 1), False)],
    )
    def test_only_nifti_of_two_axes_is_2d(self, tmp_path, dim, is_2d):
        image = nibabel.Nifti1Image(STACK[0].T, np.diag([-0.5, -0.75, 2, 1]))
        image.header.structarr["dim"][: len(dim)] = dim
        content = bytearray(image.to_bytes())
        content[40:56] = np.array([*dim, *[1] * (8 - len(dim))], "<i2").tobytes()
        (tmp_path / "a.nii").write_bytes(content)
        volume = read_volume(tmp_path / "a.nii")
        assert volume.geometry.is_2d == is_2d
        assert len(sitk.ReadImage(str(tmp_path / "a.nii")).GetSize()) == (2 if is_2d else 3)
        np.testing.assert_array_equal(volume.array, STACK[:1][None])

    def test_damaged_ones_are_refused(self, tmp_path):
        for ending in (".nii.gz", ".nii", ".nrrd", ".mha"):
            path = write_2d(tmp_path / f"a{ending}")
            path.write_bytes(path.read_bytes()[:-9])
            assert any(text in refusal(path) for text in ("cut off", "damaged", "cannot be read", "are there"))

    def test_headers_of_2d_are_checked(self, tmp_path):
        content = write_2d(tmp_path / "a.mha").read_bytes()
        for old, new, text in [
            (b"DimSize = 6 5", b"DimSize = 6 5 1", "DimSize must be 2 finite"),
            (b"Offset = -10.5 20.25", b"Offset = nan 20.25", "Offset must be 2 finite"),
            (b"DimSize = 6 5", b"DimSize = 60000 50000", "too much for|must fit into memory, but 60000 x 50000 voxels"),
        ]:
            (tmp_path / "a.mha").write_bytes(content.replace(old, new))
            with pytest.raises(VolumeError, match=text):
                read_volume(tmp_path / "a.mha")

    def test_2d_and_3d_channels_do_not_mix(self, tmp_path):
        flat = write_2d(tmp_path / "a_0000.mha")
        sitk.WriteImage(sitk.GetImageFromArray(STACK[:1]), str(tmp_path / "a_0001.mha"))
        with pytest.raises(VolumeError, match="same number of dimensions, got 3, but a_0000.mha has 2"):
            read_volume([flat, tmp_path / "a_0001.mha"])

    @pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
    def test_readers_that_take_none_in_nnunet_are_named(self, tmp_path, reader):
        path = write_2d(tmp_path / "a.nii.gz")
        with pytest.raises(VolumeError, match=rf"^a\.nii\.gz: .*{reader} take no 2D images.*one slice$"):
            read_volume(path, reader=reader)

    def test_labels_of_several_slices_do_not_fit(self, tmp_path):
        geometry = read_volume(write_2d(tmp_path / "a.nrrd")).geometry
        with pytest.raises(ValueError, match=r"with one slice if it is 2D, got shape \(4, 5, 6\)"):
            write_segmentation(tmp_path / "b.nrrd", STACK.astype(np.uint8), geometry)

    def test_turning_one_keeps_it_2d(self, tmp_path):
        volume = read_volume(write_2d(tmp_path / "a.nrrd", direction=(-1, 0, 0, 1)))
        assert volume.reoriented().geometry.is_2d

    def test_a_2d_model_predicts_one_and_a_3d_model_says_that_it_does_not(self, tmp_path):
        path = write_2d(tmp_path / "a.nii.gz", smooth_scan((1, 30, 34))[0])
        settings = {"device": "cpu", "backend": "torch", "mirror": False}
        prediction = Engine.load(write_model(tmp_path / "flat", plans=plans_2d()), **settings).predict(
            path, save_probabilities=True
        )
        assert prediction.segmentation.shape == (1, 30, 34)
        assert prediction.probabilities is not None
        assert prediction.probabilities.shape == (3, 1, 30, 34)
        assert prediction.volumes_ml == {}
        stuff = prediction.properties["sitk_stuff"]
        assert [len(stuff[key]) for key in ("spacing", "origin", "direction")] == [2, 2, 4]
        prediction.save(tmp_path / "labels.nii.gz")
        assert sitk.ReadImage(str(tmp_path / "labels.nii.gz")).GetSize() == (34, 30)
        engine = Engine.load(write_model(tmp_path / "deep", plans=plans_json()), **settings)
        with pytest.raises(
            VolumeError, match=r"^a\.nii\.gz: the configuration 3d_fullres takes 3D scans, got a 2D image"
        ):
            engine.predict(path)


RAW = STACK.tobytes()
HEADERS = {
    ".mhd": "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
    "ElementSpacing = 1 1 1\nDimSize = 6 5 4\nElementType = MET_SHORT\nElementDataFile = {}\n",
    ".nhdr": "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 6 5 4\nspace directions: "
    "(1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: (0,0,0)\n"
    "data file: {}\n\n",
}


def write_header(folder, ending, named):
    (folder / f"v{ending}").write_text(HEADERS[ending].format(named), encoding="utf-8")
    return folder / f"v{ending}"


@pytest.mark.parametrize("ending", HEADERS)
class TestDetachedHeaders:
    @pytest.mark.parametrize(
        "named",
        ["x.raw", "./x.raw", ".//x.raw", "sub/x.raw", "./sub/../x.raw", "../beside/x.raw", "sub/my x.raw", "zwölf.raw"],
    )
    def test_relative_paths_of_any_form(self, tmp_path, monkeypatch, ending, named):
        home = tmp_path / "home"
        for folder in (home / "sub", tmp_path / "beside"):
            folder.mkdir(parents=True)
        (home / named).write_bytes(RAW)
        path = write_header(home, ending, named)
        monkeypatch.chdir(tmp_path)  # a file of that name in the working folder is not meant
        Path("x.raw").write_bytes(bytes(len(RAW)))
        for given in (path, "home/v" + ending):
            np.testing.assert_array_equal(read_volume(given).array[0], STACK)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), STACK)

    def test_links_to_the_data_and_to_its_folder(self, tmp_path, ending):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "x.raw").write_bytes(RAW)
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "link.raw").symlink_to(tmp_path / "store" / "x.raw")
        (tmp_path / "home" / "sub").symlink_to(tmp_path / "store")
        for named in ("link.raw", "sub/x.raw"):
            np.testing.assert_array_equal(read_volume(write_header(tmp_path / "home", ending, named)).array[0], STACK)

    @pytest.mark.parametrize(
        ("named", "text"),
        [
            ("LIST", "the header names several"),
            ("LIST 2", "the header names several"),
            ("x%03d.raw 1 4 1", "the header names several"),
            ("/dev/zero", "by a path relative to its own folder"),
            ("/etc/passwd", "by a path relative to its own folder"),
            ("none.raw", "no such regular file"),
            ("sub\\x.raw", "no such regular file"),
            ("sub", "no such regular file"),
            ("zero", "no such regular file"),
            ("pipe", "no such regular file"),
            ("../" * 20 + "dev/zero", "no such regular file"),
            ("../" * 20 + "proc/self/environ", "too much for"),
            ("short.raw", "too much for"),
        ],
    )
    @pytest.mark.posix("pipes with names")
    def test_what_no_header_may_name(self, tmp_path, ending, named, text):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "x.raw").write_bytes(RAW)
        (tmp_path / "x001.raw").write_bytes(RAW)
        (tmp_path / "zero").symlink_to("/dev/zero")
        (tmp_path / "short.raw").write_bytes(RAW[:-1])
        os.mkfifo(tmp_path / "pipe")
        found = refusal(write_header(tmp_path, ending, named))
        assert text in found
        assert found.startswith(f"v{ending}: ")

    def test_names_with_a_percent_sign_are_patterns_to_one_format_only(self, tmp_path, ending):
        (tmp_path / "100%.raw").write_bytes(RAW)
        path = write_header(tmp_path, ending, "100%.raw")
        if ending == ".mhd":
            assert "the header names several ('100%.raw')" in refusal(path)
        else:
            np.testing.assert_array_equal(read_volume(path).array[0], STACK)

    def test_labels_come_as_header_and_data_under_their_own_names(self, tmp_path, ending):
        geometry = replace(Volume.from_array(STACK, (3, 2, 1)).geometry, origin=(1, 2, 3))
        data = "case.zraw" if ending == ".mhd" else "case.raw.gz"
        assert second_file(tmp_path / f"case{ending}", "SimpleITKIO") == tmp_path / data
        for labels in (STACK, STACK[::-1]):  # and replace what is there
            write_segmentation(tmp_path / f"case{ending}", labels.astype(np.uint8), geometry)
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"case{ending}", data])
            assert data in (tmp_path / f"case{ending}").read_text()
            volume = read_volume(tmp_path / f"case{ending}")
            np.testing.assert_array_equal(volume.array[0], labels)
            assert volume.geometry == geometry
            image = sitk.ReadImage(str(tmp_path / f"case{ending}"))
            np.testing.assert_array_equal(sitk.GetArrayFromImage(image), labels)

    def test_the_header_comes_last(self, tmp_path, monkeypatch, ending):
        moved, replacing = [], Path.replace

        def recorded(path, target):
            moved.append(Path(target).name)
            return replacing(path, target)

        monkeypatch.setattr(Path, "replace", recorded)
        geometry = Volume.from_array(STACK, (3, 2, 1)).geometry
        write_segmentation(tmp_path / f"case{ending}", STACK.astype(np.uint8), geometry)
        assert moved[-1] == f"case{ending}"
        assert len(moved) == 3


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nhdr", ".gipl", ".nii", ".nii.gz"])
def test_labels_that_are_cut_off_anywhere_are_not_whole(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_segmentation(path, np.ones((3, 4, 5), np.uint8), Geometry(spacing=(1, 1, 1), **PLAIN))
    content = path.read_bytes()
    assert is_whole(path)
    for length in {0, 1, 5, 11, 40, len(content) // 2, len(content) - 2}:
        path.write_bytes(content[:length])
        assert not is_whole(path), length
    path.write_bytes(bytes(len(content)))
    assert not is_whole(path)
    path.write_bytes(b"these are no labels, but somebody's own file\n" * 20)
    assert is_whole(path)


class TestEndings:
    @pytest.mark.parametrize(
        "ending",
        [".NII.GZ", ".Nii.gz", ".nii.GZ", ".NII", ".NRRD", ".NHDR", ".MHA", ".MHD", ".gipl", ".GIPL"],
    )
    @pytest.mark.parametrize("axes", [2, 3])
    def test_labels_keep_the_ending_as_it_is_spelt(self, tmp_path, ending, axes):
        """ITK itself writes no .NII.GZ, and for .MHA another file."""
        if axes == 2:
            geometry = read_volume(write_2d(tmp_path / "a.mha", direction=(1, 0, 0, 1))).geometry
        else:
            geometry = Geometry(spacing=(2.5, 0.75, 0.5), **PLAIN)
        out = tmp_path / "out"
        out.mkdir()
        labels = STACK[: 1 if axes == 2 else 4].astype(np.uint8)
        write_segmentation(out / f"case{ending}", labels, geometry)
        names = sorted(path.name for path in out.iterdir())
        assert f"case{ending}" in names
        assert len(names) == (2 if ending in (".NHDR", ".MHD") else 1)
        volume = read_volume(out / f"case{ending}")
        np.testing.assert_array_equal(volume.array[0], labels)
        if ending.lower() != ".gipl":  # which always has three axes
            assert volume.geometry.is_2d == (axes == 2)

    @pytest.mark.parametrize("ending", [".NII.GZ", ".Nii.gz", ".gipl", ".GIPL", ".NRRD", ".MHA", ".mhd", ".nhdr"])
    def test_a_model_of_them_predicts(self, tmp_path, ending):
        model = write_model(tmp_path / "model", dataset=dataset_json(file_ending=ending))
        scans, out = tmp_path / "scans", tmp_path / "out"
        scans.mkdir()
        image = sitk.GetImageFromArray(smooth_scan((8, 14, 16)))
        image.SetSpacing((1.5, 1.5, 2.0))
        sitk.WriteImage(image, str(scans / f"a_0000{ending.lower()}"))
        if ending != ending.lower():
            (scans / f"a_0000{ending.lower()}").rename(scans / f"a_0000{ending}")
        given = ["-i", str(scans), "-o", str(out), "-m", str(model), "-device", "cpu", "--backend", "torch"]
        assert main(["predict", *given, "--disable_tta"]) == 0
        assert (out / f"a{ending}").is_file()
        assert read_volume(out / f"a{ending}").array.shape == (1, 8, 14, 16)


class TestWhatFormatsDoNotHold:
    @pytest.mark.parametrize(
        ("ending", "changed"),
        [
            (".gipl", {"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}),
            (".tif", {"origin": (0, 0, 5)}),
            (".tif", {"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}),
            (".png", {}),
            (".bmp", {"spacing": (999, 1, 1), "origin": (1, 0, 0)}),
        ],
    )
    def test_is_not_lost_without_a_word(self, tmp_path, ending, changed):
        geometry = Geometry(**{"spacing": (2.5, 0.75, 0.5), **PLAIN, **changed})
        with pytest.raises(OutputError, match=rf"{ending} does not hold Geometry.*save it as \.nrrd"):
            write_segmentation(tmp_path / f"a{ending}", STACK[:1].astype(np.uint8), geometry)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_the_line_that_mends_voxels_works(tmp_path, ending):
    """What the error says is Python that can be run."""
    array = STACK.astype(np.float32)
    array[1, 2, 3], array[0, 0, 0] = np.nan, np.inf
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"v{ending}"))
    with pytest.raises(VolumeError) as error:
        read_volume(tmp_path / f"v{ending}")
    line = str(error.value).partition(" by ")[2].partition(" (")[0]
    exec(line, {"array": array, "numpy": np})
    assert np.isfinite(array).all()
    assert read_volume(Volume.from_array(array, (1, 1, 1))).array[0, 1, 2, 3] == 0


def test_a_cut_off_companion_is_found(tmp_path):
    geometry = Volume.from_array(STACK, (3, 2, 1)).geometry
    for ending, data in ((".mhd", "case.zraw"), (".nhdr", "case.raw.gz")):
        write_segmentation(tmp_path / f"case{ending}", STACK.astype(np.uint8), geometry)
        content = (tmp_path / data).read_bytes()
        assert is_whole(tmp_path / f"case{ending}")
        (tmp_path / data).write_bytes(content[:-5])
        refusal(tmp_path / f"case{ending}")
        assert not is_whole(tmp_path / f"case{ending}")
        (tmp_path / data).unlink()
        assert not is_whole(tmp_path / f"case{ending}")


def test_all_channels_of_a_2d_scan(tmp_path):
    paths = [write_2d(tmp_path / f"a_{i:04d}.nrrd", STACK[i]) for i in range(3)]
    np.testing.assert_array_equal(read_volume(paths, channels=3).array[:, 0], STACK[:3])
    for one, other in itertools.permutations(paths[:2]):
        shutil.copy(one, tmp_path / "copy.nrrd")
        assert read_volume([one, other]).geometry.is_2d
