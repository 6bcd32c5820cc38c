"""A task unlike the pancreas: three labels, four classes by name, two channels, .nrrd; small enough to train on."""

import csv
import json

import numpy as np
import SimpleITK

CLASSES = ("adenoma", "cyst", "metastasis", "primary")
LABELS = {"background": 0, "liver": 1, "vessel": 2, "tumour": 3}
SHAPE = (16, 32, 36)
DESCRIPTION = {"channel_names": {"0": "T1", "1": "T2"}, "labels": LABELS, "file_ending": ".nrrd"}


def ellipsoid(centre, radii, shape=SHAPE):
    """Voxels within an ellipsoid."""
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radii, strict=True)) < 1


def generate(seed, subtype):
    """Make two channels and a mask; the class shows in the tumour's brightness in each channel."""
    random = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.uint8)
    mask[ellipsoid((8, 16, 18), (7, 13, 15))] = LABELS["liver"]
    mask[ellipsoid((8, 16, 24), (6, 2, 2))] = LABELS["vessel"]
    mask[ellipsoid((8, 14 + random.integers(5), 11 + random.integers(3)), (4, 5, 5))] = LABELS["tumour"]
    place = CLASSES.index(subtype)
    brightness = np.array([[0, 60, 130, 20 + 70 * (place % 2)], [0, 90, 20, 10 + 110 * (place // 2)]])
    channels = [levels[mask] + random.normal(0, 8, SHAPE) for levels in brightness]
    return [channel.astype(np.float32) for channel in channels], mask


def write_task(folder, *, train=2, validation=1, description=DESCRIPTION):
    """Write cases of each class into folders of their classes, beside dataset.json; gives the classes of all cases."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(description))
    classes = {}
    for split, count in (("train", train), ("validation", validation)):
        for subtype in CLASSES:
            (folder / split / subtype).mkdir(parents=True)
            for number in range(count):
                name = f"{split[0]}_{subtype}_{number}"
                channels, mask = generate(len(classes), subtype)
                for channel, voxels in enumerate(channels):
                    write(folder / split / subtype / f"{name}_{channel:04d}.nrrd", voxels)
                write(folder / split / subtype / f"{name}.nrrd", mask)
                classes[name] = subtype
    return classes


def write(path, voxels):
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((2.0, 2.0, 3.0))
    SimpleITK.WriteImage(image, str(path))


def write_table(folder, path):
    """Say in a table what the folders say."""
    rows = [(mask.name, mask.parent.name, mask.parents[1].name) for mask in sorted(folder.rglob("*.nrrd"))
            if not mask.stem.endswith(("_0000", "_0001"))]  # fmt: skip
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "subtype", "split"), *rows])
    return path
