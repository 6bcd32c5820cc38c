"""A real CT and a model that stock trained on it, against the labels that stock's own command wrote."""

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine import Engine

from tests.parity.report import ParityRow
from tests.paths import SHARED, TRAINED_MODEL

DISAGREEMENT = 1 / 50_000
MARGIN = 2.0**-7
"""Spacing of fp16 numbers from 8 to 16, where the model's largest logits lie."""

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs real scans and a trained model in {SHARED}")


@pytest.mark.parametrize(
    ("reference", "mirror"),
    [
        pytest.param("abdomen_ct_notta.nii.gz", False, marks=pytest.mark.thorough),  # 150 tiles: half a minute
        pytest.param("abdomen_ct_tta.nii.gz", True, marks=pytest.mark.slow),  # eight views: minutes of network
    ],
)
def test_labels_are_those_of_the_stock_command(reference: str, mirror: bool, parity_rows: list[ParityRow]):
    engine = Engine.load(TRAINED_MODEL, folds=("all",), device="cpu", precision="fp32", backend="torch", mirror=mirror)
    prediction = engine.predict(SHARED / "data" / "abdomen_ct_0000.nii.gz", save_probabilities=True)
    stock = sitk.GetArrayFromImage(sitk.ReadImage(SHARED / "reference" / reference))
    assert prediction.segmentation.dtype == stock.dtype
    differs = prediction.segmentation != stock
    parity_rows.append(ParityRow(name=reference, voxels=stock.size, differ_from_stock=int(differs.sum())))
    assert differs.sum() <= DISAGREEMENT * stock.size

    log_probabilities = np.log(prediction.probabilities[:, differs])
    ours = np.take_along_axis(log_probabilities, prediction.segmentation[differs][None].astype(int), axis=0)
    theirs = np.take_along_axis(log_probabilities, stock[differs][None].astype(int), axis=0)
    assert np.abs(ours - theirs).max(initial=0) <= MARGIN
