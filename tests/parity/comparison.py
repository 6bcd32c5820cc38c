"""Run stock nnU-Net and nnturbo on the same model and scan, and hold their results side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk
import torch
from nnturbo.engine import Engine
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from tests.parity.fp32 import Fp32Predictor, fp16_rounding
from tests.parity.stock import (
    StockCase,
    StockPrediction,
    finish,
    load_predictor,
    predict_logits,
    preprocess,
    quiet,
    read_volume,
    to_scan_grid,
    write_labels,
)
from tests.parity.tasks import Task

if TYPE_CHECKING:
    from nnturbo.engine import Prediction

FP32_DISAGREEMENT = 1e-5
"""Fraction of voxels that may differ from nnU-Net with fp32 sums; always at least one voxel."""
FP32_NOISE = 1e-4
"""Relative difference of logits that two fp32 implementations of the same sums may show."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Comparison:
    """What stock nnU-Net and nnturbo give for a task.

    Arrays are on the grid of nnU-Net's reader, (Z, Y, X), unless they are said to lie on the network's box: that is
    the cropped scan with its axes transposed.

    Attributes:
        task: The task.
        predictor: Stock, for its knowledge of the model.
        case: The scan as stock preprocessed it.
        stock: Stock's result.
        exact: The result of stock with fp32 sums.
        rounding: Bound on how far stock's logits are from the exact ones, (K, Z, Y, X) on the network's box.
        stock_file: Labels as stock writes them.
        prediction: nnturbo's prediction, labels only.
        prediction_with_probabilities: nnturbo's prediction, asked for probabilities.
        file: Labels as nnturbo writes them.
        labels: Labels in `file`.
        probabilities: nnturbo's probabilities, (K, Z, Y, X).
    """

    task: Task
    predictor: nnUNetPredictor
    case: StockCase
    stock: StockPrediction
    exact: StockPrediction
    rounding: np.ndarray
    stock_file: Path
    prediction: "Prediction"
    prediction_with_probabilities: "Prediction"
    file: Path
    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def differs_from_exact(self) -> np.ndarray:
        """Voxels whose label is not that of stock with fp32 sums."""
        return self.labels != self.exact.segmentation

    @property
    def differs_from_stock(self) -> np.ndarray:
        """Voxels whose label is not that of stock."""
        return self.labels != self.stock.segmentation

    def on_network_box(self, array: np.ndarray) -> np.ndarray:
        """Transpose and crop an array as the model's preprocessing does."""
        return array.transpose(self.predictor.plans_manager.transpose_forward)[self.case.box]


def compare(task: Task, folder: Path) -> Comparison:
    """Predict a task with stock, with stock in fp32, and with nnturbo.

    Args:
        task: What to predict.
        folder: Existing folder for the files of labels.

    Returns:
        All results.
    """
    settings = {
        "folds": task.folds,
        "checkpoint": task.checkpoint,
        "mirror": task.mirror,
        "tile_step_size": task.tile_step_size,
    }
    predictor = load_predictor(nnUNetPredictor, task.stock_model, **settings)
    case = preprocess(predictor, task.files, task.previous_stage)
    stock = finish(predictor, case, predict_logits(predictor, case))
    ending = predictor.dataset_json["file_ending"]
    write_labels(predictor, case, stock.segmentation, folder / f"stock{ending}")
    exact, rounding = _predict_exactly(load_predictor(Fp32Predictor, task.stock_model, **settings), case)

    engine = Engine.load(task.model, device="cpu", precision="fp32", backend="torch", **settings)
    files, previous_stage = list(task.files), task.previous_stage
    prediction = engine.predict(files, previous_stage=previous_stage)
    prediction.save(folder / f"nnturbo{ending}")
    with_probabilities = engine.predict(files, previous_stage=previous_stage, save_probabilities=True)
    return Comparison(
        task=task,
        predictor=predictor,
        case=case,
        stock=stock,
        exact=exact,
        rounding=rounding,
        stock_file=folder / f"stock{ending}",
        prediction=prediction,
        prediction_with_probabilities=with_probabilities,
        file=folder / f"nnturbo{ending}",
        labels=read_volume(predictor, folder / f"nnturbo{ending}"),
        probabilities=_on_reader_grid(with_probabilities.probabilities, predictor, task.files[0], folder),
    )


def _on_reader_grid(array: np.ndarray, predictor: nnUNetPredictor, scan_file: Path, folder: Path) -> np.ndarray:
    """Bring an array (K, Z, Y, X) from the scan's grid to that of nnU-Net's reader, by way of a file in `folder`."""
    scan = sitk.ReadImage(scan_file)
    channels = []
    for channel in array:
        image = sitk.GetImageFromArray(channel)
        image.CopyInformation(scan)
        sitk.WriteImage(image, folder / "channel.nii")
        channels.append(read_volume(predictor, folder / "channel.nii"))
    return np.stack(channels)


def _predict_exactly(predictor: Fp32Predictor, case: StockCase) -> tuple[StockPrediction, np.ndarray]:
    with quiet():
        logits, bounds = predictor.predict_logits_and_bounds(case.data)
    exact = finish(predictor, case, logits)
    stored = fp16_rounding(torch.from_numpy(exact.scan_logits)).numpy()
    return exact, to_scan_grid(predictor, case, bounds) + stored


def allowed_voxels(n_voxels: int) -> int:
    """Say how many voxels may differ from nnU-Net with fp32 sums."""
    return max(1, int(FP32_DISAGREEMENT * n_voxels))


def beyond_rounding(comparison: Comparison) -> np.ndarray:
    """Find voxels whose label differs from stock's by more than stock's rounding explains.

    Args:
        comparison: Results for a task.

    Returns:
        Voxels on the network's box, bool. Outside the box labels may not differ at all: see `differs_from_stock`.

    Note:
        Of labels a and b, with exact logits L and stock's logits within e of them (`Fp16Sums`), stock can have swapped
        the two if |L_a - L_b| <= e_a + e_b. Among regions it can have swapped one if |L| <= e for any of them. Both
        sides get the noise between two fp32 implementations on top.
    """
    logits = comparison.exact.scan_logits
    slack = comparison.rounding + FP32_NOISE * np.maximum(1, np.abs(logits))
    differs = comparison.on_network_box(comparison.differs_from_stock)
    if comparison.predictor.label_manager.has_regions:
        return differs & (np.abs(logits) > slack).all(axis=0)

    def of_label(array: np.ndarray, labels: np.ndarray) -> np.ndarray:
        chosen = comparison.on_network_box(labels)[None].astype(np.int64)
        return np.take_along_axis(array, chosen, axis=0)[0]

    margin = np.abs(of_label(logits, comparison.labels) - of_label(logits, comparison.stock.segmentation))
    allowed = of_label(slack, comparison.labels) + of_label(slack, comparison.stock.segmentation)
    return differs & (margin > allowed)
