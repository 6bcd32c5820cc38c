"""NIfTI for models trained through nibabel: place, spacing and values are those of nnU-Net's own readers."""

import gzip
import logging
import re

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nnturbo.engine.errors import OutputError, VolumeError
from nnturbo.engine.scans.geometry import Geometry
from nnturbo.engine.scans.label_file import is_whole
from nnturbo.engine.scans.nifti import NIBABEL_READERS
from nnturbo.engine.scans.volume import read_volume, restore_orientation, write_segmentation

stock = pytest.importorskip("nnunetv2.imageio.nibabel_reader_writer", reason="nnU-Net's own readers are the oracle")

SHAPE = (5, 4, 3)  # x, y, z
TYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
HEADERS = {1: nibabel.Nifti1Header, 2: nibabel.Nifti2Header}
SPACING = (0.7, 1.1, 2.5)


def nifti(affine=None, *, version=1, order="<", dtype="i2", voxels=None, sform_code=1, qform_code=0, **fields):
    """Make the bytes of a .nii file; `fields` are put into its header as they are."""
    if voxels is None:
        voxels = np.random.default_rng(0).integers(0, 100, SHAPE)
    voxels = np.asarray(voxels).astype(np.dtype(order + dtype))
    header = HEADERS[version](endianness=order)
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header["pixdim"][1:4] = SPACING
    header["magic"] = f"n+{version}".encode()
    header["vox_offset"] = {1: 352, 2: 544}[version]
    header["scl_slope"], header["scl_inter"] = 1, 0
    if affine is None:
        affine = np.diag([*SPACING, 1.0])
    header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
    header["sform_code"], header["qform_code"] = sform_code, qform_code
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4) + voxels.tobytes(order="F")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nifti")


def rotation(degrees, axis):
    turned = np.eye(3)
    first, second = [other for other in range(3) if other != axis]
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned[[first, first, second, second], [first, second, first, second]] = cosine, -sine, sine, cosine
    return turned


@st.composite
def affines(draw):
    """Flips, permutations, rotations (45 degrees too, where two axes are equally near), shears, any steps."""
    steps = np.eye(3)[list(draw(st.permutations(range(3))))] * draw(st.tuples(*[st.sampled_from([1, -1])] * 3))
    for axis in range(3):
        steps = rotation(draw(st.sampled_from([0, 0, 0, 1e-4, 10, 45, 80, -130])), axis) @ steps
    if draw(st.booleans()):
        steps[0, draw(st.integers(0, 2))] += draw(st.sampled_from([1e-5, 0.02, 0.3, -0.4]))
    assume(abs(np.linalg.det(steps)) > 0.05)
    affine = np.eye(4)
    affine[:3, :3] = steps * draw(st.sampled_from([(1, 1, 1), SPACING, (2.2, 2.2, 2.5), (0.0022, 0.001, 0.5)]))
    affine[:3, 3] = draw(st.sampled_from([(0, 0, 0), (-123.4, 55.1, 1e3)]))
    return affine


@st.composite
def headers(draw):
    """Any combination of what decides place, spacing and values; some that nibabel refuses."""
    quaternion = draw(
        st.sampled_from([(0, 0, 0), (1, 0, 0), (0.5, 0.5, 0.5), (0.1, -0.7, 0.2), (0.6, 0.8, 1e-4), (1, 1, 0)])
    )
    code, step = st.sampled_from([0, 0, 1, 2, 3, 4, 5, 6, -1]), st.sampled_from([0.7, 2.5, -1.2, 0])
    return nifti(
        draw(affines()),
        version=draw(st.sampled_from([1, 1, 2])),
        order=draw(st.sampled_from("<>")),
        dtype=draw(st.sampled_from(TYPES)),
        sform_code=draw(code),
        qform_code=draw(code),
        pixdim=[draw(st.sampled_from([1, -1, 0, 5])), *(draw(step) for _ in range(3)), 0, 1, 1, 1],
        quatern_b=quaternion[0],
        quatern_c=quaternion[1],
        quatern_d=quaternion[2],
        qoffset_x=draw(st.sampled_from([0, -87.3])),
        scl_slope=draw(st.sampled_from([1, 0, 2, 0.3, -1, np.nan, np.inf])),
        scl_inter=draw(st.sampled_from([0, -1024, 0.7, np.nan])),
        xyzt_units=draw(st.sampled_from([0, 1, 2, 3, 10])),
    )


class TestAsNnunetReads:
    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(content=headers(), reader=st.sampled_from(NIBABEL_READERS), is_compressed=st.booleans())
    def test_every_combination(self, folder, content, reader, is_compressed):
        path = folder / ("v.nii.gz" if is_compressed else "v.nii")
        path.write_bytes(gzip.compress(content, 1) if is_compressed else content)
        own = getattr(stock, reader)()
        try:
            expected, properties = own.read_images([str(path)])
        except (ValueError, nibabel.spatialimages.HeaderDataError):
            with pytest.raises(VolumeError, match="quaternion|scl_inter"):
                read_volume(path, reader=reader)
            return
        scan = read_volume(path, reader=reader)
        volume = scan.reoriented() if reader == "NibabelIOWithReorient" else scan
        np.testing.assert_array_equal(volume.array.astype(np.float32), expected)
        assert list(volume.spacing) == properties["spacing"]
        stuff = properties["nibabel_stuff"]
        close = {"rtol": 1e-12, "atol": 1e-9}
        np.testing.assert_allclose(scan.geometry.affine, stuff["original_affine"], **close)
        np.testing.assert_allclose(
            volume.geometry.affine, stuff.get("reoriented_affine", scan.geometry.affine), **close
        )
        if volume is not scan:
            np.testing.assert_array_equal(restore_orientation(volume.array, scan.geometry), scan.array)

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(affine=affines(), ending=st.sampled_from([".nii", ".nii.gz"]), dtype=st.sampled_from(["u1", "u2"]))
    def test_labels_lie_where_the_scan_lies(self, folder, affine, ending, dtype):
        (folder / f"v{ending}").write_bytes((gzip.compress if ending == ".nii.gz" else bytes)(nifti(affine)))
        labels = np.arange(60).reshape(SHAPE[::-1]).astype(dtype)
        for reader in NIBABEL_READERS:
            scan = read_volume(folder / f"v{ending}", reader=reader)
            write_segmentation(folder / f"labels{ending}", labels, scan.geometry, reader=reader)
            written = nibabel.load(folder / f"labels{ending}")
            np.testing.assert_array_equal(written.affine, nibabel.load(folder / f"v{ending}").affine)
            np.testing.assert_array_equal(np.asanyarray(written.dataobj), labels.T)
            assert written.get_data_dtype() == dtype
            assert (written.header["sform_code"], written.header["qform_code"]) == (2, 0)
            steps = np.linalg.norm(affine[:3, :3], axis=0)
            np.testing.assert_allclose(written.header.get_zooms(), steps, rtol=1e-6)
            assert read_volume(folder / f"labels{ending}", reader=reader).geometry.matches(scan.geometry)

    @pytest.mark.parametrize("reader", NIBABEL_READERS)
    def test_channels_are_stacked_and_compared(self, tmp_path, reader):
        for name, changes in {"a": {}, "b": {"dtype": "f4"}, "c": {"pixdim": [1, 0.7, 1.1, 2.6, 1, 1, 1, 1]}}.items():
            (tmp_path / f"{name}.nii").write_bytes(nifti(**changes))
        paths = [tmp_path / "a.nii", tmp_path / "b.nii"]
        expected, _ = getattr(stock, reader)().read_images([str(path) for path in paths])
        volume = read_volume(paths, channels=2, reader=reader)
        np.testing.assert_array_equal(volume.array.astype(np.float32), expected)
        with pytest.raises(
            VolumeError, match=r"c\.nii: all channels must have the same pixdim .* got \(0\.69.*, 2\.59"
        ):
            read_volume([tmp_path / "a.nii", tmp_path / "c.nii"], reader=reader)

    @pytest.mark.parametrize("ending", [".nrrd", ".mha"])
    def test_other_formats_keep_the_place_that_itk_reads(self, tmp_path, ending):
        image = SimpleITK.GetImageFromArray(np.zeros((3, 4, 5), np.int16))
        image.SetSpacing((0.5, 0.75, 2.5))
        image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
        SimpleITK.WriteImage(image, str(tmp_path / f"v{ending}"))
        by_itk, by_nibabel = (
            read_volume(tmp_path / f"v{ending}", reader=each) for each in ("SimpleITKIO", "NibabelIO")
        )
        assert by_itk.geometry == by_nibabel.geometry
        assert by_itk.spacing == by_nibabel.spacing == (2.5, 0.75, 0.5)

    def test_nifti_2_is_not_for_models_of_simpleitk(self, tmp_path):
        """SimpleITK cannot read it, so that nnU-Net refuses it too."""
        (tmp_path / "v.nii").write_bytes(nifti(version=2))
        with pytest.raises(RuntimeError, match="Unable to determine ImageIO reader"):
            SimpleITK.ReadImage(str(tmp_path / "v.nii"))
        with pytest.raises(VolumeError, match="must be NIfTI-1, got NIfTI-2: save it as NIfTI-1"):
            read_volume(tmp_path / "v.nii")

    def test_a_sheared_scan_is_refused_by_what_is_wrong_with_it_for_models_of_simpleitk(self, tmp_path):
        affine = np.diag([*SPACING, 1.0])
        affine[0, 1] = 0.3
        (tmp_path / "v.nii").write_bytes(nifti(affine))
        with pytest.raises(VolumeError, match="orthonormal.*the scan's axes are sheared, resample it"):
            read_volume(tmp_path / "v.nii")


FLIPPED = np.diag([-0.7, 1.1, 2.5, 1.0])
FLIPPED_AND_MOVED = {"affine": FLIPPED, "qoffset_x": 3}  # the latter only by the qform
SHEARED = np.array([[0.7, 0.11, 0, 0], [0, 1.1, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]])
MOVED = np.diag([*SPACING, 1.0])
MOVED[0, 3] = 0.3
TURNED = np.diag([0.0, 0, 0, 1])
TURNED[:3, :3] = rotation(0.5, 2) * SPACING
APART = r"the sform and the qform place the scan differently, by up to {} mm and {} degrees: the {} is used"
TWO_SPACINGS = (
    "the header holds two spacings, 0.7 x 1.1 x 5 mm \\(pixdim\\) and 0.7 x 1.1 x 2.5 mm \\(sform\\): {} is used"
)
THICK = {"pixdim": [1, 0.7, 1.1, 5, 1, 1, 1, 1]}
ITK = "SimpleITKIO"


class TestWarnings:
    @pytest.mark.parametrize(
        ("reader", "changes", "expected"),
        [
            *((reader, {"qform_code": 1}, []) for reader in (ITK, *NIBABEL_READERS)),
            (ITK, {**FLIPPED_AND_MOVED, "qform_code": 1, "sform_code": 2}, [APART.format(8.6, 180, "qform")]),
            (ITK, {**FLIPPED_AND_MOVED, "qform_code": 2, "sform_code": 1}, [APART.format(8.6, 180, "sform")]),
            ("NibabelIO", {"affine": FLIPPED, "qform_code": 1, "sform_code": 2}, [APART.format(5.6, 180, "sform")]),
            (ITK, {"affine": FLIPPED, "qform_code": 0}, []),
            ("NibabelIO", {"affine": FLIPPED, "qform_code": 0}, []),
            ("NibabelIO", {"affine": FLIPPED, "qform_code": 1, "sform_code": 0}, []),
            ("NibabelIO", {"affine": FLIPPED, "qform_code": 1, "sform_code": 6}, [APART.format(5.6, 180, "qform")]),
            (ITK, {"affine": MOVED, "qform_code": 1, "sform_code": 2}, [APART.format(0.3, 0, "qform")]),
            ("NibabelIO", {"affine": MOVED, "qform_code": 1}, [APART.format(0.3, 0, "sform")]),
            ("NibabelIO", {"affine": TURNED, "qform_code": 1}, [APART.format("0.03777", "0.5", "sform")]),
            ("NibabelIO", {"affine": SHEARED, "qform_code": 1}, [APART.format("0.33", "5.711", "sform")]),
            ("NibabelIO", {"quatern_b": 2, "qform_code": 1}, []),  # a qform that says nothing
            (ITK, THICK, [TWO_SPACINGS.format("pixdim")]),
            ("NibabelIO", {**THICK}, [TWO_SPACINGS.format("pixdim")]),
            ("NibabelIOWithReorient", THICK, [TWO_SPACINGS.format("pixdim")]),
            (
                "NibabelIOWithReorient",
                {**THICK, "affine": FLIPPED},
                [TWO_SPACINGS.format("sform")],
            ),
            (
                "NibabelIO",
                {**THICK, "qform_code": 1},
                [APART.format(5, 0, "sform"), TWO_SPACINGS.format("pixdim")],
            ),
            (ITK, {"xyzt_units": 2 + 8}, []),
            (ITK, {"xyzt_units": 1, "qform_code": 1}, []),  # ITK converts
            ("NibabelIO", {"xyzt_units": 2 + 8}, []),
            ("NibabelIO", {"xyzt_units": 1 + 8}, ["the header's unit is metres, and lengths are taken as mm"]),
            ("NibabelIO", {"xyzt_units": 3}, ["the header's unit is micrometres, and lengths are taken as mm"]),
        ],
    )
    def test_what_a_header_says_twice(self, tmp_path, caplog, reader, changes, expected):
        changes = {"affine": np.diag([*SPACING, 1.0]), **changes}
        (tmp_path / "v.nii").write_bytes(nifti(**changes))
        with caplog.at_level(logging.WARNING, "nnturbo"):
            found = read_volume(tmp_path / "v.nii", reader=reader).warnings
        assert len(found) == len(expected), found
        for text, pattern in zip(found, expected, strict=True):
            assert text.startswith("v.nii: ")
            assert re.search(pattern, text), text

    def test_lengths_that_itk_converts_are_compared_in_mm(self, tmp_path):
        (tmp_path / "v.nii").write_bytes(nifti(**FLIPPED_AND_MOVED, qform_code=1, sform_code=2, xyzt_units=1))
        (text,) = read_volume(tmp_path / "v.nii").warnings
        assert "by up to 8600 mm and 180 degrees: the qform is used" in text

    @pytest.mark.parametrize(("code", "chosen"), [(1, "sform"), (2, "qform")])
    def test_2d_images(self, tmp_path, code, chosen):
        flat = {"dim": [2, 5, 4, 1, 1, 1, 1, 1], "voxels": np.zeros((5, 4))}
        (tmp_path / "v.nii").write_bytes(nifti(**FLIPPED_AND_MOVED, qform_code=1, sform_code=code, **flat))
        (text,) = read_volume(tmp_path / "v.nii").warnings
        assert f"by up to 8.6 mm and 180 degrees: the {chosen} is used" in text
        (tmp_path / "v.nii").write_bytes(nifti(qform_code=1, **flat))
        assert read_volume(tmp_path / "v.nii").warnings == ()

    @pytest.mark.parametrize("seed", range(20))
    def test_rounding_is_no_difference(self, tmp_path, seed):
        """As nibabel writes both forms; a quaternion in 32 bits rounds most near half a turn."""
        rng = np.random.default_rng(seed)
        axis = rng.normal(size=3)
        angle = np.pi - rng.choice([0, 1e-4, 1e-3, 0.02, 1])
        affine = np.eye(4)
        affine[:3, :3] = nibabel.quaternions.angle_axis2mat(angle, axis) * SPACING
        affine[:3, 3] = rng.uniform(-500, 500, 3)
        image = nibabel.Nifti1Image(np.zeros((512, 512, 3), np.uint8), affine)
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        nibabel.save(image, tmp_path / "v.nii.gz")
        for reader in (ITK, *NIBABEL_READERS):
            assert read_volume(tmp_path / "v.nii.gz", reader=reader).warnings == ()


def cut(content, count):
    return content[: len(content) - count]


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"", "the file is cut off"),
            (b"Dear colleague" * 50, "this is not a NIfTI-1 file"),
            (nifti(magic=b"ni1"), "not a NIfTI-1 file"),
            (nifti(version=2, magic=b"n+1"), "not a NIfTI-2 file"),
            (nifti(version=2, eol_check=(10, 26, 10, 0)), "damaged, as by a transfer in text mode"),
            (nifti(dim=[2, 5, 4, 1, 1, 1, 1, 1]), "models trained through NibabelIO take no 2D images, as in nnU-Net"),
            (nifti(dim=[4, 5, 4, 3, 2, 1, 1, 1]), "must be 3D, or 2D, got 4D"),
            (nifti(dim=[3, 5, 0, 3, 1, 1, 1, 1]), "length of at least 1"),
            (nifti(dim=[3, 5, 4, 30, 1, 1, 1, 1]), "too much for|are there"),
            (nifti(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), "must fit into memory|too much for"),
            (nifti(version=2, voxels=np.zeros((1, 1, 32768), np.int16)), "every axis must have at most 32767 voxels"),
            (nifti(datatype=32), "got complex"),
            (nifti(pixdim=[1, np.nan, 1, 1, 1, 1, 1, 1]), "spacing must be finite"),
            (nifti(vox_offset=0), "voxels must begin at byte 352 or behind it, the header says byte 0"),
            (nifti(version=2, vox_offset=352), "voxels must begin at byte 544"),
            (nifti(vox_offset=1e9), "within 16 MiB"),
            (nifti(np.full((4, 4), np.nan)), "the affine must be finite"),
            (nifti(np.zeros((4, 4))), "steps above 0"),
            (nifti(np.diag([1.0, 1, 1, 1])[[0, 0, 2, 3]]), "not singular|steps above 0"),
            (cut(nifti(), 1), "too much for|are there"),
            (nifti(dtype="f4", voxels=np.full(SHAPE, np.nan)), "voxels must be finite, got NaN"),
            (nifti(dtype="f4", voxels=np.full(SHAPE, 3e38), scl_slope=10), "voxels must be finite"),
        ],
    )
    @pytest.mark.parametrize("is_compressed", [True, False])
    def test_headers_and_voxels(self, tmp_path, content, text, is_compressed):
        path = tmp_path / ("v.nii.gz" if is_compressed else "v.nii")
        path.write_bytes(gzip.compress(content) if is_compressed else content)
        with pytest.raises(VolumeError, match=text) as error:
            read_volume(path, reader="NibabelIO")
        assert str(error.value).startswith(f"{path.name}: ")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("damage", ["checksum", "bits", "cut", "short"])
    def test_damage_that_nibabel_does_not_see(self, tmp_path, damage):
        content = gzip.compress(nifti(voxels=np.random.default_rng(0).integers(0, 999, (40, 30, 20))))
        content = {
            "checksum": content[:-6] + b"\0\0" + content[-4:],
            "bits": content[:9000] + bytes([content[9000] ^ 0x55]) + content[9001:],
            "cut": content[:-20],
            "short": gzip.compress(gzip.decompress(content)[:-100]),
        }[damage]
        (tmp_path / "v.nii.gz").write_bytes(content)
        with pytest.raises(VolumeError, match=r"v\.nii\.gz: .*(damaged or cut off|voxels, \d+ are there)"):
            read_volume(tmp_path / "v.nii.gz", reader="NibabelIO")

    @pytest.mark.posix("sysconf")
    def test_what_this_machine_cannot_hold(self, tmp_path, monkeypatch):
        (tmp_path / "v.nii").write_bytes(nifti())
        monkeypatch.setattr("nnturbo.engine.scans.itk.os.sysconf", {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": 10}.get)
        with pytest.raises(VolumeError, match="a scan must fit into memory"):
            read_volume(tmp_path / "v.nii", reader="NibabelIO")


class TestWriting:
    @pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
    def test_half_a_sheared_file_is_seen_for_what_it_is(self, tmp_path, ending):
        """Its header alone, which ITK refuses, says nothing about that."""
        geometry = Geometry(spacing=(2, 1, 1), origin=(1, 2, 3), direction=(1, 0.28, 0, 0, 0.96, 0, 0, 0, 1))
        path = tmp_path / f"labels{ending}"
        write_segmentation(path, np.arange(60, dtype=np.uint8).reshape(3, 4, 5), geometry, reader="NibabelIO")
        assert is_whole(path)
        path.write_bytes(path.read_bytes()[:-9])
        assert not is_whole(path)

    def test_a_sheared_grid_is_never_straightened(self, tmp_path):
        """ITK's NIfTI writer does that, and its reader refuses what others write."""
        geometry = Geometry(spacing=(2, 1, 1), origin=(1, 2, 3), direction=(1, 0.28, 0, 0, 0.96, 0, 0, 0, 1))
        labels = np.ones((3, 4, 5), np.uint8)
        with pytest.raises(OutputError, match=r"axes are sheared, which ITK does not read from \.nii\.gz: save it as"):
            write_segmentation(tmp_path / "labels.nii.gz", labels, geometry)
        assert list(tmp_path.iterdir()) == []
        write_segmentation(tmp_path / "labels.nrrd", labels, geometry)
        assert read_volume(tmp_path / "labels.nrrd").geometry.matches(geometry)
        write_segmentation(tmp_path / "labels.nii.gz", labels, geometry, reader="NibabelIO")
        np.testing.assert_allclose(nibabel.load(tmp_path / "labels.nii.gz").affine, geometry.affine, rtol=1e-6)
        assert geometry.voxel_mm3 == pytest.approx(2 * 0.96)

    def test_an_axis_too_long_for_the_format(self, tmp_path):
        geometry = Geometry(spacing=(1, 1, 1), origin=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1))
        with pytest.raises(OutputError, match=r"at most 32767 voxels along an axis, got \(1, 1, 40000\)"):
            write_segmentation(tmp_path / "s.nii", np.zeros((1, 1, 40000), np.uint8), geometry, reader="NibabelIO")
        assert list(tmp_path.iterdir()) == []
