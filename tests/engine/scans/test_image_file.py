"""Image files of every format, whole, and changed anywhere: a volume or one error."""

import gzip
import re
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

from tests.engine.scans.image_files import VOXELS, nifti, write_image
from tests.paths import SHARED


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
