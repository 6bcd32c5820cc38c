"""The suite's own tools: models that nnU-Net and a safe reader both read, and a rounding bound that holds."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="compares with nnU-Net itself, which is not installed")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from tests.parity.fp32 import Fp32Predictor
from tests.parity.model_folders import build_model_folder
from tests.parity.stock import finish, load_predictor, predict_logits, preprocess, quiet
from tests.parity.tasks import SYNTHETIC, synthetic_task

NUMPY_SCALARS = (
    np._core.multiarray.scalar,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
)


@pytest.mark.parametrize(
    "name",
    [
        "plain_ct-plan_spacing",
        "random_weights-isotropic",
        "2d-coarse_first",
        "two_folds-coarse_first",
        "step_0.3-small",
    ],
)
def test_bound_on_rounding_holds_everywhere_and_is_sharp(name: str, tmp_path: Path):
    kind, scan = SYNTHETIC[name]
    task = synthetic_task(name, kind, scan, build_model_folder(kind, tmp_path), tmp_path)
    stock = load_predictor(nnUNetPredictor, task.stock_model, tile_step_size=task.tile_step_size)
    case = preprocess(stock, task.files)
    stock_logits = predict_logits(stock, case).float()
    with quiet():
        logits, bounds = load_predictor(
            Fp32Predictor, task.stock_model, tile_step_size=task.tile_step_size
        ).predict_logits_and_bounds(case.data)
    used = (stock_logits - logits).abs() / bounds
    assert used.max() <= 1
    assert used.max() >= 0.8
    assert bounds.median() <= 0.02


def test_fitted_models_give_each_label_a_structure(tmp_path: Path):
    kind, scan = SYNTHETIC["plain_ct-isotropic"]
    task = synthetic_task(kind.name, kind, scan, build_model_folder(kind, tmp_path), tmp_path)
    predictor = load_predictor(Fp32Predictor, task.stock_model)
    case = preprocess(predictor, task.files)
    segmentation = finish(predictor, case, predict_logits(predictor, case)).segmentation
    fractions = np.bincount(segmentation.ravel(), minlength=3) / segmentation.size
    assert fractions.min() > 0.05
    same_as_neighbour = np.mean(segmentation[..., 1:] == segmentation[..., :-1])
    assert same_as_neighbour > 0.75


@pytest.mark.parametrize("name", ["plain_ct-tiny", "module_prefix-small", "batch_norm-small"])
def test_checkpoints_load_without_pickle(name: str, tmp_path: Path):
    kind, _ = SYNTHETIC[name]
    folder = build_model_folder(kind, tmp_path).path
    with torch.serialization.safe_globals(list(NUMPY_SCALARS)):
        checkpoint = torch.load(folder / "fold_0" / kind.checkpoint, weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["init_args"]["configuration"] == kind.configuration
    assert all(key.startswith(kind.weights_prefix) for key in checkpoint["network_weights"])
