"""Image files, whole and damaged: one clear error each, nothing on stderr, no memory for what cannot be there."""

import gzip
import re
import struct
import threading
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans import image_file, itk
from nnturbo.engine.scans.volume import Volume, read_volume

from tests.paths import SHARED

SHAPE = (20, 30, 40)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def write_image(path, array=VOXELS, *, compressed=True):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((-10.5, 20.25, 30.125))
    SimpleITK.WriteImage(image, str(path), useCompression=compressed)
    return path


def nifti(**changes):
    """Make the bytes of a .nii file, with bytes of its header replaced: offset=(format, values...)."""
    image = nibabel.Nifti1Image(VOXELS.transpose(2, 1, 0), np.diag([-0.5, -0.75, 2.5, 1]))
    content = bytearray(image.to_bytes())
    for offset, (form, *values) in changes.items():
        struct.pack_into(form, content, int(offset.removeprefix("at_")), *values)
    return bytes(content)


def refusal(path, content=None):
    """Read what must be refused, and give the text, which must be one line that begins with the file's name."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VolumeError) as error:
        read_volume(path)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{path.name}: ")
    return text


@pytest.fixture
def voxels_stay_unread(monkeypatch):
    """Fail where a file is read that its header alone must rule out."""
    monkeypatch.setattr(image_file, "read_voxels", lambda *arguments: pytest.fail("voxels must not be read"))


def no_links(*arguments):
    raise OSError("this system has none")


class TestWholeFiles:
    @pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"])
    def test_types_and_values(self, tmp_path, ending, dtype):
        expected = VOXELS.astype(dtype)
        volume = read_volume(write_image(tmp_path / f"v{ending}", expected))
        assert volume.array.dtype == expected.dtype
        np.testing.assert_array_equal(volume.array, expected[None])
        assert volume.geometry.spacing == (2.5, 0.75, 0.5)
        assert volume.geometry.origin == (-10.5, 20.25, 30.125)

    @pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd", ".gipl"])
    def test_uncompressed(self, tmp_path, ending):
        volume = read_volume(write_image(tmp_path / f"v{ending}", compressed=False))
        np.testing.assert_array_equal(volume.array[0], VOXELS)

    @pytest.mark.parametrize(
        "name", ["shouted.NII.GZ", "Mixed.Nii.Gz", "V.NII", "V.NRRD", "V.MHA", "V.GIPL", "zwölf 12.nii.gz"]
    )
    def test_names(self, tmp_path, name):
        ending = re.search(r"\.(nii\.gz|\w+)$", name.lower())[0]
        write_image(tmp_path / f"v{ending}").rename(tmp_path / name)
        np.testing.assert_array_equal(read_volume(tmp_path / name).array[0], VOXELS)

    def test_files_that_itk_decompresses_to_other_bytes(self, tmp_path, capfd):
        """Their checksum is not that of the voxels in memory, but they are whole."""
        content = nifti()
        big_endian = nibabel.Nifti1Image(VOXELS.transpose(2, 1, 0), np.eye(4), nibabel.Nifti1Header(endianness=">"))
        cases = {
            "scaled": (gzip.compress(nifti(at_112=("<2f", 2.0, 1.0))), VOXELS * 2 + 1.0),
            "big-endian": (gzip.compress(big_endian.to_bytes()), VOXELS),
            "members": (gzip.compress(content[:5000]) + gzip.compress(content[5000:]), VOXELS),
            "members of one byte": (b"".join(gzip.compress(part) for part in (content[:-1], content[-1:])), VOXELS),
            "trailing voxels": (gzip.compress(content + b"x" * 100), VOXELS),
            "trailing garbage": (gzip.compress(content) + b"x" * 100, VOXELS),
            "zero padding": (gzip.compress(content) + b"\0" * 512, VOXELS),
            "no compression": (content, VOXELS),
            "long header": (gzip.compress(nifti(at_108=("<f", 1024.0))[:352] + bytes(672) + content[352:]), VOXELS),
        }
        for name, (stored, expected) in cases.items():
            path = tmp_path / f"{name}.nii.gz"
            path.write_bytes(stored)
            np.testing.assert_array_equal(read_volume(path).array[0], expected, err_msg=name)
        assert capfd.readouterr() == ("", "")

    def test_decompresses_the_usual_file_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr(image_file, "check_stored", lambda *arguments: pytest.fail("decompressed a second time"))
        for name in ("v.nii.gz", "v.nrrd", "v.mha"):
            read_volume(write_image(tmp_path / name))
        for name in ("abdomen_ct_0000.nii.gz", "mr_0000.nii.gz"):
            if (SHARED / "data" / name).exists():
                read_volume(SHARED / "data" / name)

    def test_further_axes_of_length_one(self, tmp_path):
        (tmp_path / "v.nii").write_bytes(nifti(at_40=("<6h", 5, 40, 30, 20, 1, 1)))
        np.testing.assert_array_equal(read_volume(tmp_path / "v.nii").array[0], VOXELS)

    @pytest.mark.parametrize("has_links", [True, False])
    def test_neighbours_of_the_same_name(self, tmp_path, monkeypatch, has_links):
        """ITK, asked for v.nii.gz, takes the voxels of v.nii."""
        if not has_links:
            monkeypatch.setattr(Path, "symlink_to", no_links)
        names = ("v.nii", "v.nii.gz", "v.hdr", "v.nrrd", "v.mha")
        arrays = {name: VOXELS + number for number, name in enumerate(names)}
        for name, array in arrays.items():
            write_image(tmp_path / name, array)
        for name in ("v.nii", "v.nii.gz", "v.nrrd", "v.mha"):
            np.testing.assert_array_equal(read_volume(tmp_path / name).array[0], arrays[name], err_msg=name)


class TestRefusals:
    def test_empty_text_and_foreign_files(self, tmp_path, capfd):
        for ending in image_file_endings():
            assert "the file is empty" in refusal(tmp_path / f"empty{ending}", b"")
            for content in (b"Dear colleague,\nhere it is.\n" * 20, b"\x89PNG\r\n\x1a\n" + bytes(5000), b"\x1f\x8b"):
                text = refusal(tmp_path / f"other{ending}", content)
                assert re.search(r"this is not an? |cut off|damaged|name ends with .nii", text), text
        for name in ("scan.png", "scan", "scan.nii.bz2", "slice.dcm"):
            assert "must end with one of .nii.gz, .nii," in refusal(tmp_path / name, b"x" * 100)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("kept", [0.02, 0.5, 0.99, -1, -4, -8, -20])
    @pytest.mark.parametrize(
        "name", ["v.nii.gz", "v.nii", "v.nrrd", "v.mha", "u.nrrd", "u.mha", "u.gipl", "scaled.nii.gz"]
    )
    def test_cut_off(self, tmp_path, name, kept, capfd):
        """ITK fills the rest of a .nii.gz with zeros, of a .gipl with whatever is in memory, and says nothing."""
        path = tmp_path / name
        if name.startswith("scaled"):
            path.write_bytes(gzip.compress(nifti(at_112=("<2f", 2.0, 1.0))))
        else:
            write_image(path, compressed=name.startswith("v"))
        content = path.read_bytes()
        text = refusal(path, content[: int(len(content) * kept) if kept > 0 else kept])
        assert re.search("cut off|cannot be read|are there", text), text
        assert capfd.readouterr() == ("", "")

    def test_decompresses_to_less_than_the_header_claims(self, tmp_path):
        content = nifti()
        assert "claims 48352 bytes, 48252 are there" in refusal(tmp_path / "v.nii.gz", gzip.compress(content[:-100]))
        assert "cut off" in refusal(tmp_path / "v.nii.gz", gzip.compress(content[:200]))

    @pytest.mark.parametrize("name", ["v.nii.gz", "v.nrrd", "v.mha"])
    @pytest.mark.parametrize("place", [0.1, 0.5, 0.9, "checksum"])
    def test_flipped_bits(self, tmp_path, name, place):
        """ITK gives wrong voxels for most of these without a word."""
        rng = np.random.default_rng(1)
        path = write_image(tmp_path / name, rng.integers(-1000, 1000, (60, 100, 100)).astype(np.int16))
        content = bytearray(path.read_bytes())
        at = int(len(content) * place) if place != "checksum" else len(content) - (2 if name == "v.mha" else 6)
        content[at] ^= 0x55
        assert re.search("damaged|cannot be read", refusal(path, bytes(content)))

    def test_flipped_bits_show_what_is_wrong_without_noise(self, tmp_path, capfd):
        rng = np.random.default_rng(1)
        path = write_image(tmp_path / "v.nii.gz", rng.integers(0, 99, (60, 100, 100)).astype(np.int16))
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 50] = b"\xff" * 50
        assert "compressed voxels are damaged or cut off" in refusal(path, bytes(content))
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"at_40": ("<4h", 1, 40, 30, 20)}, "must be 3D, or 2D, got 1D"),
            ({"at_40": ("<5h", 4, 40, 30, 10, 2)}, "must be 3D, or 2D, got 4D"),
            ({"at_40": ("<4h", 0, 40, 30, 20)}, "length of at least 1"),
            ({"at_40": ("<4h", 9, 40, 30, 20)}, "length of at least 1"),
            ({"at_40": ("<4h", 3, -40, 30, 20)}, "length of at least 1"),
            ({"at_40": ("<4h", 3, 40, 0, 20)}, "length of at least 1"),
            ({"at_40": ("<4h", 3, 32000, 32000, 32000)}, "must fit into memory|too much for"),
            ({"at_40": ("<4h", 3, 41, 30, 20)}, "too much for|are there"),
            ({"at_70": ("<h", 32)}, "plain integers or floats, got complex"),
            ({"at_70": ("<h", 128)}, "got colour"),
            ({"at_70": ("<h", 1)}, "got type code 1"),
            ({"at_80": ("<f", 0)}, r"spacing must be finite and above 0 mm, got \(0.0, "),
            ({"at_84": ("<f", -0.75)}, "spacing must be finite and above 0 mm"),
            ({"at_88": ("<f", np.nan)}, "spacing must be finite and above 0 mm"),
            ({"at_88": ("<f", 1e30)}, "spacing must be finite and below"),
            ({"at_108": ("<f", np.nan)}, "voxels must begin within 16 MiB"),
            ({"at_108": ("<f", -5)}, "voxels must begin within 16 MiB"),
            ({"at_108": ("<f", 1e6)}, "cut off"),
            ({"at_280": ("<f", np.nan)}, "origin and direction must be finite"),
            ({"at_280": ("<12f", *[0] * 12), "at_252": ("<h", 0)}, "header cannot be read|singular"),
            ({"at_280": ("<4f", -0.5, 0.4, 0, 0), "at_252": ("<h", 0)}, "header cannot be read: .*orthonormal"),
            ({"at_344": ("4s", b"ni1\0")}, "not a NIfTI-1 file"),
            ({"at_0": ("<i", 540)}, "must be NIfTI-1, got NIfTI-2"),
            ({"at_0": ("<i", 349)}, "not a NIfTI-1 file"),
        ],
    )
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
    def test_nifti_headers(self, tmp_path, voxels_stay_unread, capfd, ending, changes, text):
        content = nifti(**changes)
        found = refusal(tmp_path / f"v{ending}", gzip.compress(content) if ending == ".nii.gz" else content)
        assert re.search(text, found), found
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("key", "value", "text"),
        [
            ("NDims", "9999", "NDims must be 2 or 3, got '9999'"),  # ITK crashes
            ("NDims", "1", "must be 3D, or 2D, got 1D"),
            ("NDims", "2", "must be [24] finite"),
            ("NDims", "4", "must be 3D, or 2D, got 4D"),
            ("DimSize", "40 30", "DimSize must be 3 finite"),
            ("DimSize", "0 30 20", "length of at least 1"),
            ("DimSize", "-40 30 20", "length of at least 1"),
            ("DimSize", "100000 100000 100000", "must fit into memory"),
            ("DimSize", "4294967336 30 20", "DimSize must be 3 finite"),
            ("ElementSpacing", "0 1 1", "spacing must be above 0 mm|Zero-valued spacing"),
            ("ElementSpacing", "-1 1 1", "spacing must be above 0 mm"),
            ("ElementSpacing", "nan 1 1", "ElementSpacing must be 3 finite"),
            ("ElementSpacing", "1e-320 1 1", "spacing must be above 0 mm"),
            ("Offset", "nan 0 0", "Offset must be 3 finite"),
            ("TransformMatrix", "1 0 0 1 0 0 0 0 1", "not singular"),
            ("TransformMatrix", "nan 0 0 0 1 0 0 0 1", "TransformMatrix must be 9 finite"),
            ("TransformMatrix", "1 0 0 0 1 0 1e308 0 1", "direction must be finite"),  # ITK never returns
            ("TransformMatrix", "2 0 0 0 2 0 0 0 2", "nine cosines"),
            ("ElementType", "MET_FOO", "header cannot be read"),
            ("ElementType", "MET_SHORT\nElementNumberOfChannels = 3", "ElementNumberOfChannels must be 1, got '3'"),
            ("ElementType", "MET_SHORT\nHeaderSize = -1", "HeaderSize must be 0"),
            ("ElementType", "MET_SHORT\nNDims = 3", "bad line 'NDims = 3'"),
            ("ElementType", "MET_SHORT\nComment = " + "x" * 5000, "bad line 'Comment"),
            ("BinaryData", "False", "BinaryData must be True"),
            ("ElementDataFile", "/dev/zero", "by a path relative to its own folder, it names '/dev/zero'"),
            ("ElementDataFile", "../v.raw", "no such regular file"),
            ("ElementDataFile", "absent.raw", "names the data file 'absent.raw', and there is no such regular file"),
            ("ElementDataFile", "LIST", "the header names several \\('LIST'\\)"),
        ],
    )
    def test_metaimage_headers(self, tmp_path, voxels_stay_unread, capfd, key, value, text):
        content = write_image(tmp_path / "v.mha", compressed=False).read_bytes()
        changed = re.sub(rf"(?m)^{key} = .*$".encode(), f"{key} = {value}".encode(), content, count=1)
        assert changed != content
        found = refusal(tmp_path / "v.mha", changed)
        assert re.search(text, found), found
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("before", [b"", b"a header"])
    @pytest.mark.parametrize(("ending", "line"), [(".mhd", "HeaderSize = -1"), (".nhdr", "byte skip: -1")])
    def test_voxels_may_be_the_last_bytes_of_a_data_file(self, tmp_path, ending, line, before):
        voxels = np.arange(60, dtype="<i2").reshape(3, 4, 5)
        data = tmp_path / "v.raw"
        if ending == ".mhd":
            lines = ["ObjectType = Image", "NDims = 3", "DimSize = 5 4 3", "ElementType = MET_SHORT", line]
            lines.append("ElementDataFile = v.raw")
        else:
            lines = ["NRRD0004", "type: short", "dimension: 3", "sizes: 5 4 3", "encoding: raw", "endian: little", line]
            lines.append("data file: v.raw")
        path = tmp_path / f"v{ending}"
        path.write_text("\n".join(lines) + "\n")
        data.write_bytes(before + voxels.tobytes())
        np.testing.assert_array_equal(read_volume(path).array[0], voxels)
        np.testing.assert_array_equal(
            read_volume(path).array[0], SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
        )
        data.write_bytes(voxels.tobytes()[:-2])
        with pytest.raises(VolumeError, match="cut off|header cannot be read"):
            read_volume(path)

    def test_metaimage_without_what_it_needs(self, tmp_path, voxels_stay_unread):
        content = write_image(tmp_path / "v.mha").read_bytes()
        assert "incomplete" in refusal(tmp_path / "v.mha", content.replace(b"DimSize", b"Dimsize"))
        longer = content.replace(b"CompressedDataSize = ", b"CompressedDataSize = 9")
        assert "cut off" in refusal(tmp_path / "v.mha", longer)

    @pytest.mark.parametrize(
        ("key", "value", "text"),
        [
            ("sizes", "0 30 20", "header cannot be read: .*size is zero"),
            ("sizes", "100000 100000 100000", "must fit into memory"),
            ("dimension", "2", "header cannot be read"),
            ("type", "complex", "header cannot be read"),
            ("encoding", "bzip2", "encoding must be raw or gzip, got 'bzip2'"),
            ("encoding", "raw\nbyte skip: 10", "byteskip must be 0, got '10'"),
            ("encoding", "raw\nline skip: 1", "lineskip must be 0"),
            ("encoding", "raw\ndata file: /dev/zero", "relative to its own folder, it names '/dev/zero'"),
            ("space directions", "(0,0,0) (0,1,0) (0,0,1)", "Zero-valued|must be"),
            ("space directions", "(nan,0,0) (0,1,0) (0,0,1)", "spacedirections must be finite"),
            ("space directions", "(1,0,0) (1,0,0) (0,0,1)", "not singular"),
            ("space origin", "(inf,0,0)", "spaceorigin must be finite"),
        ],
    )
    def test_nrrd_headers(self, tmp_path, voxels_stay_unread, capfd, key, value, text):
        content = write_image(tmp_path / "v.nrrd", compressed=False).read_bytes()
        changed = re.sub(rf"(?m)^{key}: .*$".encode(), f"{key}: {value}".encode(), content, count=1)
        assert changed != content
        found = refusal(tmp_path / "v.nrrd", changed)
        assert re.search(text, found), found
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("ending", [".nrrd", ".mha"])
    def test_other_pixels_and_dimensions(self, tmp_path, voxels_stay_unread, ending):
        path = tmp_path / f"v{ending}"
        for image, text in [
            (SimpleITK.Image([4, 5, 6], SimpleITK.sitkVectorUInt8, 3), "one integer or float each, got 3 x|Channels"),
            (SimpleITK.Image([4, 5, 6, 2], SimpleITK.sitkInt16), "must be 3D, or 2D, got 4D"),
        ]:
            SimpleITK.WriteImage(image, str(path))
            assert re.search(text, refusal(path))
        SimpleITK.WriteImage(SimpleITK.Image([4, 5, 6], SimpleITK.sitkComplexFloat32), str(tmp_path / "c.nrrd"))
        assert "complex" in refusal(tmp_path / "c.nrrd")

    def test_gipl_headers(self, tmp_path, voxels_stay_unread):
        content = write_image(tmp_path / "v.gipl", compressed=False).read_bytes()
        assert "not a GIPL file" in refusal(tmp_path / "v.gipl", content[:252] + b"\0\0\0\0" + content[256:])
        assert "too much for" in refusal(tmp_path / "v.gipl", struct.pack(">3H", 400, 300, 20) + content[6:])
        assert "length of at least 1" in refusal(tmp_path / "v.gipl", struct.pack(">3H", 40, 0, 20) + content[6:])
        refusal(tmp_path / "v.gipl", struct.pack(">4H", 0, 30, 20, 1) + content[8:])
        spacing = struct.pack(">f", -1)
        assert "spacing must be above 0 mm" in refusal(tmp_path / "v.gipl", content[:10] + spacing + content[14:])

    @pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_voxels_that_are_not_finite(self, tmp_path, ending, value, dtype):
        """ITK's NIfTI reader gives 0 for them."""
        array = VOXELS.astype(dtype)
        array[-1, -1, -1] = value
        assert "voxels must be finite, got NaN or infinity" in refusal(write_image(tmp_path / f"v{ending}", array))

    @pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
    def test_hidden_voxels_that_are_not_finite(self, tmp_path, ending):
        """Big-endian, with an odd header, in several members, and with NaN where no voxel is."""
        array = np.zeros((200, 80, 30), np.float32)
        array[150, 70, 20] = np.nan
        for value, expected in ((np.nan, None), (1.0, array.shape[::-1])):
            array[150, 70, 20] = value
            header = nibabel.Nifti1Header(endianness=">")
            content = nibabel.Nifti1Image(array, np.eye(4), header).to_bytes()
            content = content[:108] + struct.pack(">f", 357) + content[112:352] + bytes(5) + content[352:]
            content += np.full(100, np.nan, ">f4").tobytes()
            parts = (content[:1001], content[1001:])
            path = tmp_path / f"v{ending}"
            path.write_bytes(content if ending == ".nii" else b"".join(map(gzip.compress, parts)))
            if expected is None:
                assert "voxels must be finite" in refusal(path)
            else:
                assert read_volume(path).array.shape[1:] == expected

    def test_a_bomb_is_refused_by_its_size(self, tmp_path, voxels_stay_unread):
        """A stream of zeros may claim a thousand times the file's size, and not more."""
        header = nifti(at_40=("<4h", 3, 2000, 2000, 1000))[:352]
        found = refusal(tmp_path / "v.nii.gz", gzip.compress(header + bytes(100_000)))
        assert re.search("too much for|must fit into memory", found)

    def test_what_the_system_cannot_read(self, tmp_path, monkeypatch):
        path = write_image(tmp_path / "v.nii.gz")

        def deny(*arguments):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(image_file, "locate_voxels", deny)
        assert "the system cannot read it: Permission denied" in refusal(path)

    def test_what_this_machine_cannot_hold(self, tmp_path, monkeypatch, voxels_stay_unread):
        path = write_image(tmp_path / "v.nii.gz")
        monkeypatch.setattr(itk.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.get)
        assert "40 x 30 x 20 voxels need 0.0 of 0.0 GiB: check the header, or crop" in refusal(path)

    def test_where_the_system_does_not_tell_its_memory(self, tmp_path, monkeypatch):
        monkeypatch.delattr(itk.os, "sysconf")
        assert read_volume(write_image(tmp_path / "v.nii.gz")).array.shape == (1, *SHAPE)

    def test_itk_failing_while_it_reads(self, monkeypatch):
        class Reader:
            def __init__(self, error):
                self.error = error

            def Execute(self):
                raise self.error

        error = RuntimeError("Exception thrown\nITK ERROR: NiftiImageIO(0x55ca391bfd0): no luck\nat all")
        for raised, reason in ((error, "no luck"), (MemoryError(), "MemoryError")):
            monkeypatch.setattr(itk, "_file_reader", lambda *arguments, raised=raised: Reader(raised))
            with pytest.raises(VolumeError, match=f"^the voxels cannot be read: {reason}; export or copy"):
                itk.read_voxels("v.nii", "NiftiImageIO")


def image_file_endings():
    return (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")


class TestWarningsOfItk:
    def test_are_off_inside_and_restored_after_the_last(self):
        display = SimpleITK.ProcessObject.GetGlobalWarningDisplay
        assert display()
        with itk._QUIET_ITK:
            assert not display()
            inside, leave = threading.Event(), threading.Event()

            def other_reader():
                with itk._QUIET_ITK:
                    inside.set()
                    leave.wait(10)

            thread = threading.Thread(target=other_reader)
            thread.start()
            inside.wait(10)
        assert not display()
        leave.set()
        thread.join()
        assert display()

    def test_a_failing_reader_restores_them(self, tmp_path):
        with pytest.raises(VolumeError):
            itk.read_information(str(tmp_path / "none.nii"), "NiftiImageIO")
        assert SimpleITK.ProcessObject.GetGlobalWarningDisplay()


WORDS = b"nan -1 0 1e308 1e-320 4294967297 LIST LOCAL %s%n MET_DOUBLE MET_LONG block vector True False gzip".split()
WORDS += [b"", b"\n", b"\0", b"x" * 300]


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """Files of 240 bytes of voxels, and how many bytes of each are header: most mutations go there."""
    folder = tmp_path_factory.mktemp("fuzz")
    array = VOXELS[:4, :5, :6]
    contents = {}
    for ending in (".nii", ".nrrd", ".mha", ".gipl"):
        contents[ending] = write_image(folder / f"v{ending}", array, compressed=False).read_bytes()
    for ending in (".nii.gz", ".nrrd", ".mha"):
        contents[f"compressed{ending}"] = write_image(folder / f"v{ending}", array).read_bytes()
    return folder, contents


@pytest.mark.parametrize(
    "kind",
    [".nii", ".nrrd", ".mha", ".gipl", "compressed.nii.gz", "inside.nii.gz", "compressed.nrrd", "compressed.mha"],
)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutations_give_a_volume_or_one_error(small_files, kind, data):
    """Whatever is in a file: a valid volume of the file's size, or a VolumeError; no crash, hang or other exception."""
    folder, contents = small_files
    content = bytearray(contents[".nii" if kind == "inside.nii.gz" else kind])
    for _ in range(data.draw(st.integers(1, 4), "mutations")):
        words = [match.span() for match in re.finditer(rb"[^\s:=(),]+", bytes(content[:-240]))] or [(0, 1)]
        if data.draw(st.booleans(), "word") and not kind.endswith((".nii", ".gipl", ".nii.gz")):
            start, stop = data.draw(st.sampled_from(words))
            content[start:stop] = data.draw(st.sampled_from(WORDS))
        elif content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 9), "cut") == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    path = folder / f"mutant.{kind.partition('.')[2]}"
    path.write_bytes(gzip.compress(content, 1) if kind == "inside.nii.gz" else content)
    try:
        volume = read_volume(path)
    except VolumeError:
        pass
    else:
        assert isinstance(volume, Volume)
        assert volume.array.nbytes <= len(content) * 1032 * 8
        assert zlib.crc32(np.ascontiguousarray(volume.array).data) >= 0  # touch every voxel
