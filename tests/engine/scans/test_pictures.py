"""Pictures and TIFF stacks: the arrays of nnU-Net's readers, damaged files, and what is written."""

import json
import logging
import struct
import sys
import threading
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine import Engine
from nnturbo.engine.errors import BackendUnavailable, OutputError, VolumeError
from nnturbo.engine.scans import pictures
from nnturbo.engine.scans.label_file import is_whole, second_file
from nnturbo.engine.scans.volume import Geometry, Volume, files_of, read_volume, write_segmentation

from tests.engine.factory import plans_json, write_model

imageio = pytest.importorskip("imageio.v3", reason="needs what reads pictures")
tifffile = pytest.importorskip("tifffile", reason="needs what reads TIFF files")
from PIL import Image  # noqa: E402

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
RGBA = RNG.integers(0, 256, (20, 30, 4), np.uint8)
RGB = RGBA[..., :3]
STACK = RNG.integers(0, 256, (7, 20, 30), np.uint8)
PLAIN = {"origin": (0, 0, 0), "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}


def picture(path, mode="RGB", **options):
    Image.fromarray(RGBA).convert(mode).save(path, **options)
    return path


def tiff(path, array, **options):
    tifffile.imwrite(path, array, **options)
    return path


def pages(path, arrays):
    with tifffile.TiffWriter(path) as writer:
        for array in arrays:
            writer.write(array, contiguous=False, metadata=None)
    return path


PICTURES = {
    "rgb.png": picture,
    "rgb.bmp": picture,
    "rgba.png": lambda path: picture(path, "RGBA"),
    "rgba.bmp": lambda path: picture(path, "RGBA"),
    "grey.png": lambda path: picture(path, "L"),
    "grey.bmp": lambda path: picture(path, "L"),
    "bits.png": lambda path: picture(path, "1"),
    "bits.bmp": lambda path: picture(path, "1"),
    "palette.png": lambda path: Image.fromarray(RGB).quantize(16).save(path),
    "palette.bmp": lambda path: picture(path, "P"),
    "transparent_palette.png": lambda path: Image.fromarray(RGB).quantize(16).save(path, transparency=3),
    "transparent_grey.png": lambda path: picture(path, "L", transparency=3),
    "16_bits.png": lambda path: imageio.imwrite(path, GREY.astype(np.uint16) * 257),
    "jpeg_inside.png": lambda path: picture(path, format="JPEG"),
    "UPPER.PNG": picture,
    "grey.tif": lambda path: tiff(path, GREY),
    "16_bits.tif": lambda path: tiff(path, GREY.astype(">u2"), byteorder=">"),
    "floats.tif": lambda path: tiff(path, GREY.astype(np.float32) / 3),
    "halves.tif": lambda path: tiff(path, GREY.astype(np.float16)),
    "signed.tif": lambda path: tiff(path, GREY.astype(np.int32) - 99),
    "bits.tif": lambda path: tiff(path, GREY > 99),
    "palette.tif": lambda path: tiff(path, GREY, photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
    "rgb.tif": lambda path: tiff(path, RGB, photometric="rgb"),
    "rgba.tif": lambda path: tiff(path, RGBA, photometric="rgb", extrasamples=["unassalpha"]),
    "planar.tif": lambda path: tiff(path, np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate"),
    "three_pages.tif": lambda path: pages(path, STACK[:3]),
    "four_pages.tif": lambda path: pages(path, STACK[:4]),
    "deflated.tif": lambda path: tiff(path, RGB, photometric="rgb", compression="zlib"),
    "lzw.tif": lambda path: tiff(path, RGB, photometric="rgb", compression="lzw", predictor=True),
    "tiled.tif": lambda path: tiff(path, GREY, tile=(16, 16), compression="zlib"),
    "UPPER.TIF": lambda path: tiff(path, GREY),
}
STACKS = {
    "plain.tif": lambda path: tiff(path, STACK, photometric="minisblack"),
    "deflated.tif": lambda path: tiff(path, STACK, photometric="minisblack", compression="zlib"),
    "16_bits.tiff": lambda path: tiff(path, STACK.astype(">u2") * 9, byteorder=">"),
    "floats.tif": lambda path: tiff(path, STACK.astype(np.float64) / 3),
    "one.tif": lambda path: tiff(path, STACK[:1]),
    "three.tif": lambda path: tiff(path, STACK[:3], photometric="minisblack"),
    "pages.tif": lambda path: pages(path, STACK),
    "imagej.tif": lambda path: tiff(path, STACK, imagej=True),
    "ome.ome.tif": lambda path: tiff(path, STACK, metadata={"axes": "ZYX"}, photometric="minisblack"),
    "UPPER.TIFF": lambda path: tiff(path, STACK),
}


def refusal(path, reader="NaturalImage2DIO"):
    with pytest.raises(VolumeError) as error:
        read_volume(path, reader=reader)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{path.name}: ")
    return text


class TestReading:
    @pytest.mark.parametrize("name", PICTURES)
    def test_pictures_are_those_of_nnunet(self, tmp_path, name):
        module = pytest.importorskip("nnunetv2.imageio.natural_image_reader_writer", reason="compares with nnU-Net")
        PICTURES[name](tmp_path / name)
        expected, properties = module.NaturalImage2DIO().read_images([str(tmp_path / name)])
        volume = read_volume(tmp_path / name, reader="NaturalImage2DIO")
        np.testing.assert_array_equal(volume.array, expected)
        assert volume.geometry == Geometry(spacing=properties["spacing"], is_2d=True, **PLAIN)
        assert volume.warnings == ()

    @pytest.mark.parametrize("name", STACKS)
    def test_stacks_are_those_of_nnunet(self, tmp_path, name):
        module = pytest.importorskip("nnunetv2.imageio.tif_reader_writer", reason="compares with nnU-Net")
        stem, ending = name.rsplit(".", 1)
        path = tmp_path / f"{stem}_0000.{ending}"
        STACKS[name](path)
        for spacing in (None, [2.5, 0.75, 0.5]):
            if spacing is not None:
                (tmp_path / f"{stem}.json").write_text(json.dumps({"spacing": spacing}))
            expected, properties = module.Tiff3DIO().read_images([str(path)])
            volume = read_volume(path, reader="Tiff3DIO")
            np.testing.assert_array_equal(volume.array.astype(np.float32), expected)
            assert volume.geometry == Geometry(spacing=tuple(properties["spacing"]), **PLAIN)
            assert ("1 mm along each axis is assumed" in "".join(volume.warnings)) == (spacing is None)

    def test_pictures_of_one_channel_each_are_stacked(self, tmp_path):
        paths = [tmp_path / f"a_{i:04d}.png" for i in range(3)]
        for path, channel in zip(paths, np.moveaxis(RGB, -1, 0), strict=True):
            imageio.imwrite(path, channel)
        volume = read_volume(paths, channels=3, reader="NaturalImage2DIO")
        np.testing.assert_array_equal(volume.array[:, 0], np.moveaxis(RGB, -1, 0))

    def test_channels_and_not_files_are_counted(self, tmp_path):
        colour, grey = picture(tmp_path / "a_0000.png"), picture(tmp_path / "b_0000.png", "L")
        assert read_volume(colour, channels=3, reader="NaturalImage2DIO").array.shape == (3, 1, 20, 30)
        with pytest.raises(VolumeError, match=r"takes 3 channel\(s\), got 1: .*3 for RGB"):
            read_volume(grey, channels=3, reader="NaturalImage2DIO")
        with pytest.raises(VolumeError, match=r"takes 1 channel\(s\), got 3"):
            read_volume(colour, channels=1, reader="NaturalImage2DIO")

    def test_pictures_of_another_size_do_not_fit(self, tmp_path):
        imageio.imwrite(tmp_path / "a_0000.png", GREY)
        imageio.imwrite(tmp_path / "a_0001.png", GREY[:-1])
        with pytest.raises(VolumeError, match="same shape"):
            read_volume([tmp_path / "a_0000.png", tmp_path / "a_0001.png"], reader="NaturalImage2DIO")

    def test_the_side_file_of_labels_has_their_own_name(self, tmp_path):
        tiff(tmp_path / "case.tif", STACK)
        (tmp_path / "case.json").write_text('{"spacing": [3, 2, 1]}')
        assert read_volume(tmp_path / "case.tif", reader="Tiff3DIO").geometry.spacing == (3, 2, 1)

    def test_a_channel_has_no_side_file_of_its_own(self, tmp_path):
        """nnU-Net looks for that of the case alone."""
        path = tiff(tmp_path / "case_0000.tif", STACK)
        (tmp_path / "case_0000.json").write_text('{"spacing": [9, 1, 1]}')
        volume = read_volume(path, reader="Tiff3DIO")
        assert volume.geometry.spacing == (1, 1, 1)
        assert "there is no case.json with its spacing" in volume.warnings[0]
        assert files_of(path, "Tiff3DIO") == [path]

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ("{}", "case.json must hold three numbers"),
            ('{"spacing": [1, 2]}', "case.json must hold three numbers"),
            ('{"spacing": [1, 2, "x"]}', "case.json must hold three numbers"),
            ('{"spacing": 3}', "case.json must hold three numbers"),
            ("[1, 2, 3]", "case.json must hold three numbers"),
            ("{", "case.json must hold three numbers"),
            ("[" * 100_000, "case.json must hold three numbers"),
            ('{"spacing": [1, 0, 1]}', "spacing must be above 0 mm"),
            ('{"spacing": [1, NaN, 1]}', "spacing must be finite"),
        ],
    )
    def test_a_bad_side_file_is_named(self, tmp_path, content, text):
        tiff(tmp_path / "case_0000.tif", STACK)
        (tmp_path / "case.json").write_text(content)
        assert text in refusal(tmp_path / "case_0000.tif", "Tiff3DIO")


def cut(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    return path


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
        assert "cannot be read" in refusal(tmp_path / name)

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
        assert "three axes, got the shape (20, 30)" in refusal(tmp_path / "a.tif", "Tiff3DIO")
        tiff(tmp_path / "a.tif", np.stack([RGB] * 2), photometric="rgb")
        assert "three axes, got the shape (2, 20, 30, 3)" in refusal(tmp_path / "a.tif", "Tiff3DIO")

    def test_a_tiff_file_is_refused_by_its_size(self, tmp_path, monkeypatch):
        """Before anything is decoded."""
        path = tiff(tmp_path / "a.tif", STACK, photometric="minisblack")
        monkeypatch.setattr(tifffile, "imread", lambda *arguments: pytest.fail("must not be decoded"))
        cut(path, 0.3)
        assert "damaged or cut off" in refusal(path, "Tiff3DIO")
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
            assert "too much for" in refusal(path, "NaturalImage2DIO")

    def test_what_this_machine_cannot_hold(self, tmp_path, monkeypatch):
        monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 10}.get)
        for name in ("rgb.png", "rgb.tif"):
            PICTURES[name](tmp_path / name)
            assert "a scan must fit into memory, but 20 x 30 x 3" in refusal(tmp_path / name)

    def test_voxels_that_are_not_finite(self, tmp_path):
        array = STACK.astype(np.float32)
        array[1, 2, 3] = np.nan
        tiff(tmp_path / "a.tif", array)
        assert "voxels must be finite" in refusal(tmp_path / "a.tif", "Tiff3DIO")

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


class TestWriting:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    @pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".tiff", ".PNG", ".TIF"])
    def test_pictures_are_read_by_nnunet(self, tmp_path, ending, dtype):
        module = pytest.importorskip("nnunetv2.imageio.natural_image_reader_writer", reason="compares with nnU-Net")
        labels = STACK[:1].astype(dtype) * (1 if dtype is np.uint8 or ending == ".bmp" else 257)
        geometry = Geometry(spacing=(999, 1, 1), is_2d=True, **PLAIN)
        write_segmentation(tmp_path / f"a{ending}", labels, geometry)
        stored, _ = module.NaturalImage2DIO().read_seg(str(tmp_path / f"a{ending}"))
        np.testing.assert_array_equal(stored[0], labels)
        assert [path.name for path in tmp_path.iterdir()] == [f"a{ending}"]
        volume = read_volume(tmp_path / f"a{ending}", reader="NaturalImage2DIO")
        np.testing.assert_array_equal(volume.array[0], labels)
        assert volume.geometry == geometry

    @pytest.mark.parametrize("shape", [(7, 20, 30), (1, 20, 30), (3, 20, 30), (4, 20, 3), (20, 4, 4), (1, 1, 1)])
    @pytest.mark.parametrize("ending", [".tif", ".tiff", ".TIF"])
    def test_stacks_and_their_spacing_are_read_by_nnunet(self, tmp_path, ending, shape):
        module = pytest.importorskip("nnunetv2.imageio.tif_reader_writer", reason="compares with nnU-Net")
        labels = RNG.integers(0, 9, shape, np.uint8)
        geometry = Geometry(spacing=(2.5, 0.75, 0.5), **PLAIN)
        write_segmentation(tmp_path / f"a.b{ending}", labels, geometry)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.b.json", f"a.b{ending}"])
        assert second_file(tmp_path / f"a.b{ending}", "Tiff3DIO") == tmp_path / "a.b.json"
        assert second_file(tmp_path / f"a.b{ending}", "NaturalImage2DIO") is None
        stored, properties = module.Tiff3DIO().read_seg(str(tmp_path / f"a.b{ending}"))
        np.testing.assert_array_equal(stored[0], labels)
        assert properties["spacing"] == [2.5, 0.75, 0.5]
        volume = read_volume(tmp_path / f"a.b{ending}", reader="Tiff3DIO")
        np.testing.assert_array_equal(volume.array[0], labels)
        assert volume.geometry == geometry

    @pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
    def test_half_of_a_file_is_known_from_what_was_written_by_others(self, tmp_path, name, monkeypatch):
        path = tmp_path / name
        write_segmentation(path, STACK[:1], Geometry(spacing=(999, 1, 1), is_2d=True, **PLAIN))
        assert is_whole(path)
        assert not is_whole(cut(path, 0.6))
        path.write_bytes(b"")
        assert not is_whole(path)
        path.write_text("a note that somebody left under this name")
        assert is_whole(path)
        monkeypatch.setitem(sys.modules, "imageio.v3", None)
        monkeypatch.setitem(sys.modules, "tifffile", None)
        assert is_whole(path)

    def test_half_of_a_stack_is_known(self, tmp_path):
        for compression in ("none", "zlib", "lzw"):
            path = tiff(tmp_path / "a.tif", STACK, photometric="minisblack", compression=compression)
            assert is_whole(path)
            for kept in (0.02, 0.3, 0.6, 0.8):
                content = path.read_bytes()
                assert not is_whole(cut(path, kept)), kept
                path.write_bytes(content)

    def test_a_format_without_16_bits_refuses_great_labels(self, tmp_path):
        geometry = Geometry(spacing=(999, 1, 1), is_2d=True, **PLAIN)
        with pytest.raises(OutputError, match="cannot be written: .*BMP"):
            write_segmentation(tmp_path / "a.bmp", np.full((1, 4, 4), 256, np.uint16), geometry)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_scan_for_models_of_pictures(tmp_path):
    (tmp_path / "slices").mkdir()
    assert "files for Tiff3DIO must end with one of .tif, .tiff" in refusal(tmp_path / "slices", "Tiff3DIO")


def test_tifffile_is_heard_by_the_thread_that_reads_alone(caplog):
    logger, heard_inside = logging.getLogger("tifffile"), []

    def read():
        with pictures._COMPLAINTS.collected() as heard:
            logger.error("of the other thread")
            heard_inside.extend(heard)

    with pictures._COMPLAINTS.collected() as heard:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        logger.warning("of this thread")
    logger.error("of nobody")
    assert [record.getMessage() for record in heard] == ["of this thread"]
    assert [record.getMessage() for record in heard_inside] == ["of the other thread"]
    assert caplog.messages == ["of nobody"]


def test_what_tifffile_warns_of_is_told_with_the_scan(tmp_path):
    description = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels '
    description += 'DimensionOrder="XYZCT" ID="Pixels:0" SizeC="1" SizeT="1" SizeX="30" SizeY="20" SizeZ="5" '
    description += 'Type="uint8"><TiffData/></Pixels></Image></OME>'
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for index, array in enumerate(STACK):
            writer.write(array, contiguous=False, metadata=None, description=description if index == 0 else None)
    volume = read_volume(tmp_path / "a.tif", reader="Tiff3DIO")
    assert volume.array.shape == (1, 5, 20, 30)
    assert any("expected 5 frames" in warning for warning in volume.warnings)


def test_the_engine_predicts_a_stack(tmp_path):
    plans = {**plans_json(), "image_reader_writer": "Tiff3DIO"}
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".tif"}
    engine = Engine.load(
        write_model(tmp_path / "m", plans=plans, dataset=dataset), device="cpu", backend="torch", mirror=False
    )
    tiff(tmp_path / "a_0000.tif", STACK)
    prediction = engine.predict(tmp_path / "a_0000.tif")
    assert prediction.segmentation.shape == STACK.shape
    assert "1 mm along each axis is assumed" in prediction.warnings[0]
    prediction.save(tmp_path / "a.tif")
    assert json.loads((tmp_path / "a.json").read_text()) == {"spacing": [1.0, 1.0, 1.0]}


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
