"""Small files in the folders of the pancreas task, for tests to prepare and to spoil."""

import numpy as np
import SimpleITK
from nnturbo.training.data.prepare import prepare_dataset

SHAPE = (4, 6, 8)
CASES = {
    "quiz_0_001": "train",
    "quiz_1_002": "train",
    "quiz_1_003": "validation",
    "quiz_0_004": "validation",
}


def write_image(path, array, *, spacing=(0.5, 0.75, 2.0), origin=(10.25, -20.5, 300.0), direction=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))
    return path


def scan(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(-100, 200, shape).astype(np.int16)


def labels(shape=SHAPE):
    mask = np.zeros(shape, np.uint8)
    mask[1:, 1:-1, 1:-1] = 1
    mask[2, 2:4, 2:5] = 2
    return mask


def image_of(source, name):
    return source / CASES[name] / f"subtype{name[5]}" / f"{name}_0000.nii.gz"


def mask_of(source, name):
    return image_of(source, name).with_name(f"{name}.nii.gz")


def prepare(source, raw, **arguments):
    return prepare_dataset(source, raw, **{"dataset_id": 7, "dataset_name": "Pancreas", **arguments})


def assert_nothing_written(raw):
    assert not raw.exists() or not list(raw.iterdir())
