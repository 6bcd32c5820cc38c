"""Pictures and TIFF stacks that are damaged or none: one clear error each."""

import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine.errors import BackendUnavailable, VolumeError
from nnturbo.engine.scans.geometry import Geometry
from nnturbo.engine.scans.volume import Volume, read_volume, write_segmentation
from PIL import Image

from tests.engine.scans.picture_files import GREY, PICTURES, PLAIN, RGB, STACK, STACKS, cut, picture, tiff, tifffile
from tests.engine.scans.refusals import refusal


def png_claiming(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


OME = (
    '<?xml version="1.0" encoding="UTF-8"?>'
    '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
    '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="30" SizeY="20" SizeZ="2" '
    'SizeC="1" SizeT="1"><TiffData IFD="0" FirstZ="0" PlaneCount="1"><UUID FileName="a_0000.tif">urn:uuid:1</UUID>'
    '</TiffData><TiffData IFD="0" FirstZ="1" PlaneCount="1"><UUID FileName="b.tif">urn:uuid:2</UUID></TiffData>'
    "</Pixels></Image></OME>"
)


class TestRefusals:
    def test_pictures_that_are_too_large_are_to_be_split(self, tmp_path, monkeypatch):
        picture(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(VolumeError, match="a.png: the picture is larger than Pillow reads .*: split it"):
            read_volume(tmp_path / "a.png", reader="NaturalImage2DIO")

    @pytest.mark.parametrize("is_there", [True, False])
    def test_slices_in_other_files(self, tmp_path, is_there, caplog):
        """Tifffile goes and reads them, or gives zeros for those that it does not find."""
        path = tiff(tmp_path / "a_0000.tif", STACK[:1], description=OME, metadata=None)
        if is_there:
            other = OME.replace('UUID="urn:uuid:1"', 'UUID="urn:uuid:2"')
            tiff(tmp_path / "b.tif", STACK[:1], description=other, metadata=None)
        text = "the slices must be in this file, but some are in others" if is_there else "Missing data are zeroed"
        with pytest.raises(VolumeError, match=text):
            read_volume(path, reader="Tiff3DIO")
        assert caplog.records == []

    @pytest.mark.parametrize("kept", [0.0001, 0.02, 0.3, 0.9, 0.99, -4, -13, -16])
    @pytest.mark.parametrize("name", ["rgb.png", "rgb.bmp", "grey.tif", "deflated.tif", "lzw.tif", "three_pages.tif"])
    def test_cut_off(self, tmp_path, name, kept, capfd, caplog):
        PICTURES[name](tmp_path / name)
        whole = read_volume(tmp_path / name, reader="NaturalImage2DIO")
        if name == "rgb.png" and kept == -4:  # the checksum of nothing
            kept = -5
        try:
            volume = read_volume(cut(tmp_path / name, kept), reader="NaturalImage2DIO")
        except VolumeError as error:
            assert "\n" not in str(error)
        else:  # tags behind the last pixel
            assert name.endswith(".tif")
            np.testing.assert_array_equal(volume.array, whole.array)
        assert capfd.readouterr() == ("", "")
        assert caplog.records == []

    @pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.7, 0.9, 0.99, -1, -30])
    @pytest.mark.parametrize("name", STACKS)
    def test_cut_off_stacks(self, tmp_path, name, kept, capfd):
        """Tifffile itself gives fewer slices of some of them."""
        STACKS[name](tmp_path / name)
        (tmp_path / f"{(tmp_path / name).stem}.json").write_text('{"spacing": [1, 1, 1]}')
        whole = read_volume(tmp_path / name, reader="Tiff3DIO")
        try:
            volume = read_volume(cut(tmp_path / name, kept), reader="Tiff3DIO")
        except VolumeError as error:
            assert "\n" not in str(error)
        else:
            np.testing.assert_array_equal(volume.array, whole.array)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
    @pytest.mark.parametrize("name", ["rgb.png", "deflated.tif"])
    def test_flipped_bits(self, tmp_path, name, place):
        PICTURES[name](tmp_path / name)
        content = bytearray((tmp_path / name).read_bytes())
        content[int(len(content) * place)] ^= 0x55
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in refusal(tmp_path / name, reader="NaturalImage2DIO")

    @pytest.mark.parametrize(
        ("name", "write", "text"),
        [
            (
                "a.png",
                lambda path: picture(path, "LA"),
                r"grey, RGB or RGBA with one frame, got the shape \(20, 30, 2\)",
            ),
            (
                "a.png",
                lambda path: picture(path, save_all=True, append_images=[Image.fromarray(GREY)]),
                r"with one frame, got the shape \(2, 20, 30, 3\)",
            ),
            ("a.png", lambda path: picture(path, "L", format="GIF"), "with one frame"),
            ("a.tif", lambda path: tiff(path, STACK, photometric="minisblack"), r"got the shape \(7, 20, 30\)"),
            (
                "a.tif",
                lambda path: tiff(path, GREY.astype(np.complex64)),
                "plain integers or floats of up to 64 bits, got complex64",
            ),
            ("a.png", lambda path: path.write_bytes(b""), "the file is empty"),
            ("a.bmp", lambda path: path.write_text("no picture"), "not a picture"),
            ("a.tif", lambda path: path.write_text("no picture"), "not a TIFF file"),
            ("a.tif", lambda path: path.write_bytes(b""), "the file is empty"),
            ("a.tif", lambda path: picture(path, format="PNG"), "not a TIFF file"),
            ("a.png", lambda path: path.write_bytes(png_claiming(100_000, 100_000)), "exceeds limit|must fit into"),
            ("a.png", lambda path: path.write_bytes(png_claiming(5_000, 5_000)), "truncated|broken"),
            ("a.png", lambda path: path.write_bytes(png_claiming(0, 5)), "not a picture"),
            ("a.jpg", picture, r"files for NaturalImage2DIO must end with one of \.png, \.bmp, \.tif"),
            ("a.nii.gz", lambda path: picture(path, format="PNG"), "must end with one of"),
            ("a.png", lambda path: path.mkdir(), "Is a directory"),
        ],
    )
    def test_what_is_no_picture(self, tmp_path, capfd, name, write, text):
        write(tmp_path / name)
        with pytest.raises(VolumeError, match=rf"^{name}: .*({text})"):
            read_volume(tmp_path / name, reader="NaturalImage2DIO")
        assert capfd.readouterr() == ("", "")

    def test_stacks_must_have_three_axes(self, tmp_path):
        tiff(tmp_path / "a.tif", GREY)
        assert "three axes, got the shape (20, 30)" in refusal(tmp_path / "a.tif", reader="Tiff3DIO")
        tiff(tmp_path / "a.tif", np.stack([RGB] * 2), photometric="rgb")
        assert "three axes, got the shape (2, 20, 30, 3)" in refusal(tmp_path / "a.tif", reader="Tiff3DIO")

    def test_a_tiff_file_is_refused_by_its_size(self, tmp_path, monkeypatch):
        """Before anything is decoded."""
        path = tiff(tmp_path / "a.tif", STACK, photometric="minisblack")
        monkeypatch.setattr(tifffile, "imread", lambda *arguments: pytest.fail("must not be decoded"))
        cut(path, 0.3)
        assert "damaged or cut off" in refusal(path, reader="Tiff3DIO")
        for compression, claimed in (("none", 40_000), ("zlib", 1_000_000)):
            tiff(path, np.zeros((1, 100, 30), np.uint8), compression=compression)
            content = bytearray(path.read_bytes())
            with tifffile.TiffFile(path) as file:
                tags = file.pages[0].tags
                places = [tags[name].valueoffset for name in ("ImageLength", "RowsPerStrip")]
                description = tags["ImageDescription"].valueoffset
            for place in places:
                content[place : place + 4] = struct.pack("<I", claimed)
            content[description : description + 1] = b"?"  # which says the shape too
            path.write_bytes(content)
            assert "too much for" in refusal(path, reader="NaturalImage2DIO")

    @pytest.mark.posix("sysconf")
    def test_what_this_machine_cannot_hold(self, tmp_path, monkeypatch):
        monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 10}.get)
        for name in ("rgb.png", "rgb.tif"):
            PICTURES[name](tmp_path / name)
            assert "a scan must fit into memory, but 20 x 30 x 3" in refusal(tmp_path / name, reader="NaturalImage2DIO")

    def test_voxels_that_are_not_finite(self, tmp_path):
        array = STACK.astype(np.float32)
        array[1, 2, 3] = np.nan
        tiff(tmp_path / "a.tif", array)
        assert "voxels must be finite" in refusal(tmp_path / "a.tif", reader="Tiff3DIO")

    def test_without_the_libraries_their_extra_is_named(self, tmp_path, monkeypatch):
        picture(tmp_path / "a.png")
        tiff(tmp_path / "a.tif", STACK)
        for name in ("imageio", "imageio.v3", "tifffile"):
            monkeypatch.setitem(sys.modules, name, None)
        for name, reader in (("a.png", "NaturalImage2DIO"), ("a.tif", "Tiff3DIO")):
            with pytest.raises(BackendUnavailable, match=r"pip install 'nnturbo\[pictures\]'"):
                read_volume(tmp_path / name, reader=reader)
            geometry = Geometry(spacing=(999, 1, 1), is_2d=True, **PLAIN)
            with pytest.raises(BackendUnavailable, match=r"pip install 'nnturbo\[pictures\]'"):
                write_segmentation(tmp_path / f"labels_{name}", STACK[:1], geometry)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.tif"]


def test_a_folder_is_no_scan_for_models_of_pictures(tmp_path):
    (tmp_path / "slices").mkdir()
    assert "files for Tiff3DIO must end with one of .tif, .tiff" in refusal(tmp_path / "slices", reader="Tiff3DIO")


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    contents = {}
    for name, write in {**PICTURES, **{f"stack_{name}": write for name, write in STACKS.items()}}.items():
        write(folder / name)
        contents[name] = (folder / name).read_bytes()
    return folder, contents


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("rgb.png", "NaturalImage2DIO"),
        ("rgb.bmp", "NaturalImage2DIO"),
        ("palette.bmp", "NaturalImage2DIO"),
        ("rgb.tif", "NaturalImage2DIO"),
        ("lzw.tif", "NaturalImage2DIO"),
        ("stack_deflated.tif", "Tiff3DIO"),
        ("stack_pages.tif", "Tiff3DIO"),
        ("stack_imagej.tif", "Tiff3DIO"),
        ("stack_ome.ome.tif", "Tiff3DIO"),
    ],
)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutations_give_a_volume_or_one_error(small_files, name, reader, data):
    folder, contents = small_files
    content = bytearray(contents[name])
    for _ in range(data.draw(st.integers(1, 4), "mutations")):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 9), "cut") == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    path = folder / f"mutant.{name.partition('.')[2]}"
    path.write_bytes(content)
    try:
        volume = read_volume(path, reader=reader)
    except VolumeError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(volume, Volume)
        assert zlib.crc32(np.ascontiguousarray(volume.array).data) >= 0  # touch every voxel
