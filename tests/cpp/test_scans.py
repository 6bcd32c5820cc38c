"""C++ and the whole path in one file, on a phantom and a real CT, against Python."""

import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import Engine, build, read_volume
from nnturbo.engine.export.build import build_whole_path
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset

from tests.paths import DEMO_MODEL, SHARED, TRAINED_MODEL

pytestmark = pytest.mark.thorough  # the C++ library is built for a minute


@pytest.fixture(scope="module", params=["phantom", "real"])
def task(request, tmp_path_factory):
    """A trained model, a scan, what to do beside, and Python's answer."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "phantom":
        model = DEMO_MODEL
        (case,) = write_dataset(folder, counts={"test": 1}, seed=3, settings=SMALL_SETTINGS)
        scan = case.image
    else:
        model = TRAINED_MODEL
        if not model.is_dir():
            pytest.skip(f"needs a real scan and a trained model in {SHARED}")
        whole = sitk.ReadImage(SHARED / "data" / "abdomen_ct_0000.nii.gz")
        scan = folder / "scan_0000.nii.gz"
        sitk.WriteImage(whole[30:90, 20:84, 20:64], scan)
    return model, scan, Engine.load(model, device="cpu", backend="torch", mirror=False).predict(scan)


def test_cpp_gives_pythons_labels(command, task, tmp_path):
    model, scan, expected = task
    bundle = build(model, tmp_path / "bundle", backend="torchscript", device="cpu")
    result = command(bundle, scan, tmp_path / "labels.nii.gz", "--disable-tta")
    assert result.returncode == 0, result.stderr
    labels = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "labels.nii.gz"))
    assert np.array_equal(labels, expected.segmentation)
    assert len(np.unique(labels)) > 2
    assert (
        (f'"label":{expected.classification.label}' in result.stdout) if expected.classification else not result.stdout
    )


def test_one_file_gives_pythons_labels(task, tmp_path):
    model, scan, expected = task
    path = build_whole_path(model, tmp_path / "model.ts", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
        whole_path = torch.jit.load(path)
    volume = read_volume(scan, channels=1)
    labels, classes = whole_path(torch.from_numpy(volume.array), list(volume.geometry.spacing), 0.5, False)
    assert np.array_equal(labels.numpy(), expected.segmentation)
    if expected.classification is None:
        assert len(classes) == 0
    else:
        assert np.allclose(classes, expected.classification.probabilities, atol=1e-5)
