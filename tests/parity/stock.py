"""Run nnU-Net itself, file in and file out, in this process and step by step."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor

AnyPredictor = TypeVar("AnyPredictor", bound=nnUNetPredictor)


@dataclass(frozen=True, slots=True, kw_only=True)
class StockCase:
    """A scan after nnU-Net's preprocessing.

    Attributes:
        data: Input of the network, (C, Z, Y, X) on the network's grid; labels of the previous stage are channels.
        properties: What nnU-Net keeps to find the way back.
    """

    data: Tensor
    properties: dict[str, Any]

    @property
    def box(self) -> tuple[slice, ...]:
        """Part of the transposed scan that the network saw."""
        return tuple(slice(*bounds) for bounds in self.properties["bbox_used_for_cropping"])


@dataclass(frozen=True, slots=True, kw_only=True)
class StockPrediction:
    """What nnU-Net makes of logits.

    Attributes:
        segmentation: Labels on the grid of nnU-Net's reader, which may have turned the scan.
        probabilities: (K, Z, Y, X) on the same grid.
        scan_logits: (K, Z, Y, X) resampled to the cropped, transposed scan.
    """

    segmentation: np.ndarray
    probabilities: np.ndarray
    scan_logits: np.ndarray


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep nnU-Net's prints and warnings to itself; its errors pass."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def load_predictor(
    predictor_class: type[AnyPredictor],
    folder: Path,
    *,
    folds: tuple[int | str, ...] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    mirror: bool = True,
    tile_step_size: float = 0.5,
) -> AnyPredictor:
    """Load a model folder as nnU-Net does, for the CPU.

    Args:
        predictor_class: `nnUNetPredictor` or a variant of it.
        folder: Model folder.
        folds: Folds whose logits are averaged; None takes those that nnU-Net finds.
        checkpoint: File name in each fold.
        mirror: Average over mirrored views, where the checkpoint allows it.
        tile_step_size: Step between tiles in units of the patch.

    Returns:
        The predictor, ready to predict.
    """
    with quiet():
        predictor = predictor_class(
            tile_step_size=tile_step_size,
            use_gaussian=True,
            use_mirroring=mirror,
            perform_everything_on_device=False,
            device=torch.device("cpu"),
            verbose=False,
            allow_tqdm=False,
        )
        predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    return predictor


def preprocess(predictor: nnUNetPredictor, files: Sequence[Path], previous_stage: Path | None = None) -> StockCase:
    """Read and preprocess a scan as nnU-Net's `preprocess_fromfiles_save_to_queue` does.

    Args:
        predictor: A loaded predictor.
        files: One file per channel.
        previous_stage: Labels that the previous stage of a cascade gave, or None.

    Returns:
        The preprocessed scan.
    """
    with quiet():
        preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
        data, labels, properties = preprocessor.run_case(
            [str(file) for file in files],
            None if previous_stage is None else str(previous_stage),
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.dataset_json,
        )
    if previous_stage is not None:
        one_hot = convert_labelmap_to_one_hot(labels[0], predictor.label_manager.foreground_labels, data.dtype)
        data = np.vstack((data, one_hot))
    return StockCase(data=torch.from_numpy(data).float().contiguous(), properties=properties)


def predict_logits(predictor: nnUNetPredictor, case: StockCase) -> Tensor:
    """Predict the logits (K, Z, Y, X) on the network's grid, in the type of the predictor's sums."""
    with quiet():
        return predictor.predict_logits_from_preprocessed_data(case.data)


def to_scan_grid(predictor: nnUNetPredictor, case: StockCase, logits: Tensor) -> np.ndarray:
    """Resample logits (K, Z, Y, X) to the cropped, transposed scan by the plan's own function."""
    scan_spacing = [case.properties["spacing"][axis] for axis in predictor.plans_manager.transpose_forward]
    plan_spacing = list(predictor.configuration_manager.spacing)
    network_spacing = scan_spacing[: 3 - len(plan_spacing)] + plan_spacing
    shape = case.properties["shape_after_cropping_and_before_resampling"]
    resample = predictor.configuration_manager.resampling_fn_probabilities
    with quiet():
        return np.asarray(resample(logits.numpy(), shape, network_spacing, scan_spacing))


def finish(predictor: nnUNetPredictor, case: StockCase, logits: Tensor) -> StockPrediction:
    """Turn logits into labels by nnU-Net's path without probabilities, and into probabilities by the other."""

    def convert(return_probabilities: bool) -> Any:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.numpy(),
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.label_manager,
            case.properties,
            return_probabilities=return_probabilities,
            num_threads_torch=torch.get_num_threads(),
        )

    with quiet():
        segmentation = convert(return_probabilities=False)
        _, probabilities = convert(return_probabilities=True)
    return StockPrediction(
        segmentation=segmentation,
        probabilities=probabilities,
        scan_logits=to_scan_grid(predictor, case, logits),
    )


def write_labels(predictor: nnUNetPredictor, case: StockCase, segmentation: np.ndarray, file: Path) -> None:
    """Write labels by the model's own writer."""
    with quiet():
        predictor.plans_manager.image_reader_writer_class().write_seg(segmentation, str(file), case.properties)


def read_volume(predictor: nnUNetPredictor, file: Path) -> np.ndarray:
    """Read a file by the model's own reader, which may turn it: (Z, Y, X) float32, on the grid of `segmentation`."""
    with quiet():
        volume, _ = predictor.plans_manager.image_reader_writer_class().read_seg(str(file))
    return volume[0]
