"""Whole predictions in one process, nnU-Net's predictor against nnturbo's engine, for pytest-benchmark.

python -m pytest benchmarks --benchmark-only
"""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import Engine
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset

from .task_models import DEMO_MODEL, ordinary_model

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # nnU-Net's own
    pytest.mark.skipif(not DEMO_MODEL.is_dir(), reason="needs the demo model of the source folder"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ordinary_model(DEMO_MODEL, tmp_path_factory.mktemp("model") / "demo")


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    (case,) = write_dataset(
        tmp_path_factory.mktemp("phantom"), counts={"test": 1}, seed=20261123, settings=SMALL_SETTINGS
    )
    return case.image


@pytest.fixture(scope="module")
def stock(model, scan):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    reader = predictor.plans_manager.image_reader_writer_class()

    def predict():
        return predictor.predict_single_npy_array(*reader.read_images([str(scan)]))

    return predict


@pytest.mark.benchmark(group="a scan of the demo model's kind", min_rounds=3)
@pytest.mark.parametrize("way", ["stock", "torch", "openvino", "native"])
def test_prediction(benchmark, model, scan, stock, way):
    engine = Engine.load(model, backend="auto" if way == "stock" else way, device="cpu", mirror=False)
    expected, got = stock(), engine.predict(scan).segmentation
    assert got.shape == sitk.GetArrayFromImage(sitk.ReadImage(str(scan))).shape
    assert (got != np.asarray(expected)).mean() < 1e-4
    benchmark(stock if way == "stock" else lambda: engine.predict(scan))
