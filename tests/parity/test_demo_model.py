"""The demo model in nnU-Net's own predictor and in the engine, on phantoms that no training saw."""

import numpy as np
import pytest
from nnturbo.engine import Engine
from nnturbo.engine.model.folder import read_model
from nnturbo.training.demo import DEMO_SEED
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset

from tests.parity.report import ParityRow

pytest.importorskip("nnunetv2", reason="compares with nnU-Net, which is not installed")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from tests.parity import stock
from tests.parity.fp32 import Fp32Predictor
from tests.paths import DEMO_MODEL

DISAGREEMENT = 1 / 50_000


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    return [case.image for case in write_dataset(folder, counts={"test": 3}, seed=DEMO_SEED, settings=SMALL_SETTINGS)]


@pytest.mark.thorough
@pytest.mark.parametrize("mirror", [False, pytest.param(True, marks=pytest.mark.slow)])  # eight views: a minute
def test_labels_are_those_of_nnunet(phantoms, found_by_nnunet, parity_rows: list[ParityRow], mirror: bool):
    engine = Engine.load(DEMO_MODEL, device="cpu", precision="fp32", backend="torch", mirror=mirror)
    predictors = [
        stock.load_predictor(predictor, DEMO_MODEL, folds=(0,), mirror=mirror)
        for predictor in (nnUNetPredictor, Fp32Predictor)
    ]
    voxels, differing = 0, np.zeros(3, dtype=int)
    for phantom in phantoms if not mirror else phantoms[:1]:
        ours = engine.predict(phantom)
        assert ours.classification is not None
        plain, exact = (
            stock.finish(predictor, case, stock.predict_logits(predictor, case)).segmentation
            for predictor in predictors
            for case in [stock.preprocess(predictor, [phantom])]
        )
        pairs = ((ours.segmentation, plain), (ours.segmentation, exact), (plain, exact))
        differing += [np.count_nonzero(one != other) for one, other in pairs]
        voxels += ours.segmentation.size
        assert set(np.unique(ours.segmentation)) == {0, 1, 2}
    name = f"demo model, phantoms{', mirrored' if mirror else ''}"
    parity_rows.append(
        ParityRow(
            name=name,
            voxels=voxels,
            differ_from_stock=int(differing[0]),
            differ_from_fp32_stock=int(differing[1]),
            stock_differs_from_fp32_stock=int(differing[2]),
        )
    )
    assert differing[0] <= DISAGREEMENT * voxels
    assert differing[1] <= DISAGREEMENT * voxels


def test_checkpoint_is_small_and_holds_weights_alone():
    checkpoint = DEMO_MODEL / "fold_0" / "checkpoint_final.pth"
    assert checkpoint.stat().st_size <= 15e6
    assert 2e6 <= read_model(DEMO_MODEL).num_parameters <= 6e6
