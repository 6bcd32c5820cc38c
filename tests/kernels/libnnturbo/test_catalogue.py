"""libnnturbo on each kind of model of the parity catalogue: labels of Python's native backend, or a refusal."""

import logging

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the catalogue's models are made with nnU-Net, which is not installed")

from nnturbo.engine import BackendUnavailable, Engine, build
from nnturbo.engine.scans.volume import read_volume

from tests.kernels.libnnturbo.library import BAD_BUNDLE, LibraryError, Model
from tests.parity.catalogue import ALL_KINDS, CASCADES
from tests.parity.comparison import allowed_voxels
from tests.parity.fp32 import Fp32Predictor
from tests.parity.model_folders import build_model_folder
from tests.parity.stock import finish, load_predictor, predict_logits, preprocess
from tests.parity.tasks import SYNTHETIC, synthetic_task

NO_PROGRAM = {
    "batch_norm": "has no instance norm with weights",
    "norm_without_affine": "has no instance norm with weights",
    "norm_not_there": "has no instance norm with weights",
    "another_activation": r"has no \(leaky\) ReLU",
    "nonlin_not_there_residual": r"has no \(leaky\) ReLU",
}
"""Kinds whose network the kernels do not run, in Python neither, and why."""
OF_CASCADE = "takes a scan alone; this configuration continues from the labels of 3d_lowres"
OF_ORIENTATION = "takes a scan without its orientation; this model was trained on reoriented scans"
NO_PATH = {kind.name: OF_CASCADE for kind in CASCADES} | {
    "nibabel_reorient": OF_ORIENTATION,
    "simpleitk_reorient": OF_ORIENTATION,
}
"""Kinds whose bundles Python alone runs, and why."""
KINDS = {kind.name: kind for kind in ALL_KINDS}
RUN = [name for name, (kind, _) in SYNTHETIC.items() if kind.name not in NO_PROGRAM | NO_PATH]


def make_bundle(kind, folder):
    """Build the model of a kind into a native bundle, and return both."""
    model = build_model_folder(kind, folder)
    options = {"folds": kind.use_folds, "checkpoint": kind.checkpoint}
    return model, build(model.path, folder / "bundle", backend="native", device="cpu", **options)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Give the model and the bundle of a kind, built when a test first needs them."""
    made = {}

    def of(kind):
        if kind.name not in made:
            made[kind.name] = make_bundle(kind, tmp_path_factory.mktemp("model"))
        return made[kind.name]

    return of


def of_nnunet(task):
    """Predict with nnU-Net and fp32 sums."""
    options = {"folds": task.folds, "checkpoint": task.checkpoint, "mirror": task.mirror}
    predictor = load_predictor(Fp32Predictor, task.stock_model, tile_step_size=task.tile_step_size, **options)
    case = preprocess(predictor, task.files)
    return finish(predictor, case, predict_logits(predictor, case)).segmentation


@pytest.mark.thorough  # the library is built for half a minute
@pytest.mark.parametrize("name", RUN)
def test_labels_are_pythons_and_nnunets(name, built, bundles, tmp_path):
    kind, scan = SYNTHETIC[name]
    folder, bundle = bundles(kind)
    task = synthetic_task(name, kind, scan, folder, tmp_path)
    options = {"mirror": task.mirror, "tile_step_size": task.tile_step_size}
    expected = Engine.load(bundle, device="cpu", **options).predict(list(task.files))
    volume = read_volume(list(task.files), channels=len(kind.channels), reader=kind.reader)
    model = Model(built / "libnnturbo" / "libnnturbo.so", bundle)
    array, threads = np.ascontiguousarray(volume.array), torch.get_num_threads()
    labels, volumes, probabilities = model.predict(array, volume.spacing, threads=threads, **options)
    model.close()
    assert labels.dtype == expected.segmentation.dtype
    assert np.count_nonzero(labels != expected.segmentation) == 0
    assert volumes == pytest.approx(expected.volumes_ml)
    assert probabilities == []
    assert np.count_nonzero(labels != of_nnunet(task)) <= allowed_voxels(labels.size)


def refused(names, quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.thorough) for name in names]


@pytest.mark.parametrize("name", refused(NO_PROGRAM, {"batch_norm"}))
def test_networks_that_the_kernels_do_not_run(name, tmp_path):
    with pytest.raises(BackendUnavailable, match=NO_PROGRAM[name]):
        make_bundle(KINDS[name], tmp_path)


@pytest.mark.parametrize("name", refused(NO_PATH, {"cascade", "nibabel_reorient"}))
def test_a_bundle_that_python_alone_runs_is_built_with_a_warning(name, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="nnturbo"):
        _, bundle = make_bundle(KINDS[name], tmp_path)
    assert f"so the C library cannot use this bundle: the C library {NO_PATH[name]}" in caplog.text
    assert not (bundle / "path.json").exists()


@pytest.mark.thorough  # the library is built for half a minute
@pytest.mark.parametrize("name", NO_PATH)
def test_a_bundle_that_python_alone_runs_is_refused(name, built, bundles):
    _, bundle = bundles(KINDS[name])
    with pytest.raises(LibraryError, match="only Python can run") as raised:
        Model(built / "libnnturbo" / "libnnturbo.so", bundle)
    assert raised.value.status == BAD_BUNDLE
