"""Pictures and TIFF stacks of every kind."""

import numpy as np
import pytest
from PIL import Image

imageio = pytest.importorskip("imageio.v3", reason="needs what reads pictures")

tifffile = pytest.importorskip("tifffile", reason="needs what reads TIFF files")

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


def cut(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    return path
