"""Pictures and TIFF stacks: the arrays of nnU-Net's readers, and what is written."""

import json
import logging
import sys
import threading

import numpy as np
import pytest
from nnturbo.engine import Engine
from nnturbo.engine.errors import OutputError, VolumeError
from nnturbo.engine.scans import pictures
from nnturbo.engine.scans.geometry import Geometry
from nnturbo.engine.scans.label_file import is_whole, second_file
from nnturbo.engine.scans.volume import files_of, read_volume, write_segmentation

from tests.engine.factory import plans_json, write_model
from tests.engine.scans.picture_files import (
    GREY,
    PICTURES,
    PLAIN,
    RGB,
    RNG,
    STACK,
    STACKS,
    cut,
    imageio,
    picture,
    tiff,
    tifffile,
)
from tests.engine.scans.refusals import refusal


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
        assert text in refusal(tmp_path / "case_0000.tif", reader="Tiff3DIO")


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


def test_tifffile_is_heard_by_the_thread_that_reads_alone(caplog):
    logger, records_inside = logging.getLogger("tifffile"), []

    def read():
        with pictures._TIFFFILE_LOG.collected() as records:
            logger.error("of the other thread")
            records_inside.extend(records)

    with pictures._TIFFFILE_LOG.collected() as records:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        logger.warning("of this thread")
    logger.error("of nobody")
    assert [record.getMessage() for record in records] == ["of this thread"]
    assert [record.getMessage() for record in records_inside] == ["of the other thread"]
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
