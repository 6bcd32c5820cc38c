"""Predictions for DICOM series, and how dcmqi reads the objects written for them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnturbo.engine.model.labels import LabelScheme
from nnturbo.engine.pipeline.prediction import Prediction
from nnturbo.engine.scans.volume import read_volume

from tests.engine.factory import provenance


def labelled(folder, segmentation=None, regions_class_order=None, **labels):
    """Make the prediction for a series: by default two blocks, one of them in one slice only."""
    volume = read_volume(folder)
    if segmentation is None:
        segmentation = np.zeros(volume.array.shape[1:], np.uint8)
        segmentation[2:6, 3:9, 4:12] = 1
        segmentation[4, 5:7, 6:15] = 2
    scheme = LabelScheme(
        labels={"background": 0, **(labels or {"pancreas": 1, "lesion": 2})}, regions_class_order=regions_class_order
    )
    return Prediction(
        segmentation=segmentation,
        probabilities=None,
        geometry=volume.geometry,
        labels=scheme,
        timings={},
        warnings=(),
        provenance=(provenance(dataset="Dataset777_Test"),),
        properties={},
    )


def read_with_dcmqi(path, folder, like):
    """Let dcmqi turn an object into images; gives each segment by name on the grid of a scan."""
    folder.mkdir()
    command = Path(sys.executable).with_name("segimage2itkimage")
    run = subprocess.run(
        [command, "--inputDICOM", path, "--outputDirectory", folder, "--outputType", "nrrd"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    x, y, z = (like.geometry.spacing[axis] for axis in (2, 1, 0))
    grid = sitk.GetImageFromArray(like.array[0])
    grid.SetSpacing((x, y, z))
    grid.SetOrigin(like.geometry.origin)
    grid.SetDirection(like.geometry.direction)
    images = [sitk.ReadImage(str(file)) for file in folder.glob("*.nrrd")]  # of segments that overlap, several
    images = [sitk.Resample(image, grid, sitk.Transform(), sitk.sitkNearestNeighbor) for image in images]
    arrays = [sitk.GetArrayFromImage(image) for image in images]
    found = {}
    for group in json.loads((folder / "meta.json").read_text())["segmentAttributes"]:
        for segment in group:
            found[segment["SegmentLabel"]] = np.any([array == segment["labelID"] for array in arrays], axis=0)
    return found
