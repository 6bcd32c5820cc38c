"""What the tests of the predictor begin with."""

import numpy as np
import pytest
from nnturbo.engine.nnunet import nnUNetPredictor
from nnturbo.engine.nnunet.cases import lists_of_folder
from nnunetv2.inference import predict_from_raw_data as stock_module
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as StockPredictor

from tests.engine.factory import smooth_scan
from tests.engine.nnunet.predictors import SHAPE, TWO_FOLDS, load, write_model, write_scan


@pytest.fixture(autouse=True)
def nothing_is_forked(monkeypatch):
    """Find cases without nnU-Net's processes: to fork a process with threads, as this one, may never end."""
    monkeypatch.setattr(
        stock_module, "create_lists_from_splitted_dataset_folder", lambda *arguments: lists_of_folder(*arguments[:2])
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), TWO_FOLDS)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate("ab"):
        write_scan(folder / f"{name}_0000.nii.gz", seed)
    return folder


@pytest.fixture(scope="module")
def predictors(model):
    return load(nnUNetPredictor, model), load(StockPredictor, model)


@pytest.fixture
def image():
    return smooth_scan(SHAPE)[None].astype(np.float32)
