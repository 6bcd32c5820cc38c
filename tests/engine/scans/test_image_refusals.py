"""Image files that are damaged or cannot be: one clear error each, and no memory for what is not there."""

import gzip
import re
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans import image_file, itk
from nnturbo.engine.scans.volume import read_volume

from tests.engine.scans.image_files import SHAPE, VOXELS, nifti, write_image
from tests.engine.scans.refusals import refusal


@pytest.fixture
def voxels_stay_unread(monkeypatch):
    """Fail where a file is read that its header alone must rule out."""
    monkeypatch.setattr(image_file, "read_voxels", lambda *arguments: pytest.fail("voxels must not be read"))


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
            ("DimSize", "100000 100000 100000", "must fit into memory|too much for"),
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
            ("sizes", "100000 100000 100000", "must fit into memory|too much for"),
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

    @pytest.mark.posix("sysconf")
    def test_what_this_machine_cannot_hold(self, tmp_path, monkeypatch, voxels_stay_unread):
        path = write_image(tmp_path / "v.nii.gz")
        monkeypatch.setattr(itk.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.get)
        assert "40 x 30 x 20 voxels need 0.0 of 0.0 GiB: check the header, or crop" in refusal(path)

    @pytest.mark.posix("sysconf")
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
        unreadable = "the voxels cannot be read: no luck; export or copy"
        no_memory = "out of memory: the voxels need more than there is$"
        itk_without_memory = RuntimeError("Exception thrown\nitkImport.hxx:179:\nFailed to allocate memory for image.")
        for raised, message, transient in (
            (error, unreadable, False),
            (MemoryError(), no_memory, True),
            (itk_without_memory, no_memory, True),
        ):
            monkeypatch.setattr(itk, "_file_reader", lambda *arguments, raised=raised: Reader(raised))
            with pytest.raises(VolumeError, match=f"^{message}") as refused:
                itk.read_voxels("v.nii", "NiftiImageIO")
            assert refused.value.transient is transient


def image_file_endings():
    return (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")
