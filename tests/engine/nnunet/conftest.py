"""What the tests of the predictor begin with."""

import multiprocessing
import queue
import threading
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
from nnturbo.engine.nnunet import nnUNetPredictor
from nnunetv2.inference import data_iterators
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as StockPredictor
from nnunetv2.utilities import utils

from tests.engine.factory import smooth_scan
from tests.engine.nnunet.predictors import SHAPE, TWO_FOLDS, load, write_model, write_scan


@pytest.fixture(autouse=True)
def nnunet_works_in_threads(monkeypatch):
    """Give nnU-Net threads in place of processes.

    Each process would import it, for seconds, and to fork a process with threads, as this one, may never end.
    """
    threads = SimpleNamespace(Process=threading.Thread, Pool=ThreadPool)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: threads)
    monkeypatch.setattr(data_iterators, "Manager", lambda: SimpleNamespace(Queue=queue.Queue, Event=threading.Event))
    monkeypatch.setattr(utils, "Pool", ThreadPool)


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
