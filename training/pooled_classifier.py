"""A shrinkage discriminant analysis on pooled encoder features, fitted after training and stored in the checkpoint."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..engine.backends.choose import choose_device, choose_precision
from ..engine.backends.torch import TorchRunner
from ..engine.errors import EngineError, ModelError
from ..engine.files import written_atomically
from ..engine.model.classification import is_indices
from ..engine.model.folder import Model, read_model
from ..engine.model.folds import InferenceNetwork
from ..engine.model.heads import FocusPooling, Head
from ..engine.model.multi_task_unet import MultiTaskUNet
from ..engine.model.network import build_network
from ..engine.model.plans import Plan
from ..engine.pipeline.preprocessing import preprocess
from ..engine.pipeline.sliding_window import predict_logits
from ..engine.pipeline.timing import Timings
from ..engine.pipeline.voting import Votes
from ..engine.pipeline.window import SlidingWindow
from ..engine.scans.volume import read_volume
from .data.cases import LABELS_FILE, SPLITS_FILE
from .data.multi_task_plans import read_classes
from .data.tables import DatasetError
from .evaluation.metrics import Interval, bootstrap_macro_f1, classification_metrics
from .whole_cases import find_labelled_cases

logger = logging.getLogger(__name__)

RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifiedScan:
    """A scan whose class is known: files of all channels, and the index of the class."""

    images: tuple[Path, ...]
    subtype: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledFit:
    """Quality of a fitted classifier.

    Attributes:
        cases: Number of cases on which it was fitted.
        macro_f1: Macro-F1 of a five-fold cross-validation over them. It is too high, because the network was trained on
            all of them.
        validated: Macro-F1 on cases that neither the network nor the classifier saw; `None` without such cases.
    """

    cases: int
    macro_f1: float
    validated: ValidatedFit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedFit:
    """A fitted classifier and the network's head on the same validation cases.

    Attributes:
        cases: Number of the cases.
        fitted, head: Macro-F1 of each.
        fitted_interval, head_interval: Bootstrap 95 % intervals of these.
    """

    cases: int
    fitted: float
    head: float
    fitted_interval: Interval
    head_interval: Interval

    @property
    def better(self) -> bool:
        """Whether the fitted classifier is better than the head."""
        return self.fitted > self.head


def training_scans(
    raw_dataset: Path, preprocessed_dataset: Path, fold: int | str, *, part: str = "train"
) -> list[ClassifiedScan]:
    """Find scans and classes of the training cases of a fold.

    Args:
        raw_dataset: `nnUNet_raw/DatasetXXX_Name`.
        preprocessed_dataset: The same in `nnUNet_preprocessed`.
        fold: Number of a split, or "all" for every labelled case.
        part: "train", or "val" for the validation cases of a split.

    Raises:
        DatasetError: Where a file or the split is missing.
    """
    subtypes, _ = read_classes(preprocessed_dataset / LABELS_FILE)
    dataset = json.loads((preprocessed_dataset / "dataset.json").read_bytes())
    if fold == "all":
        ending = dataset["file_ending"]
        cases = sorted(path.name.removesuffix(ending) for path in (raw_dataset / "labelsTr").glob(f"*{ending}"))
    else:
        splits = json.loads((preprocessed_dataset / SPLITS_FILE).read_bytes())
        if not 0 <= int(fold) < len(splits):
            raise DatasetError(
                f"{preprocessed_dataset / SPLITS_FILE} has {len(splits)} splits, fold {fold} is not one of them"
            )
        cases = sorted(splits[int(fold)][part])
    found = find_labelled_cases(raw_dataset, cases, dataset, subtypes)
    return [ClassifiedScan(images=case.images, subtype=case.subtype) for case in found]


def fit_pooled_classifier(
    model_folder: str | os.PathLike[str],
    fold: int | str,
    scans: Sequence[ClassifiedScan],
    *,
    stages: Sequence[int],
    validation: Sequence[ClassifiedScan] = (),
    checkpoint: str = "checkpoint_final.pth",
    device: str = "auto",
    progress: Callable[[int, int, object], None] | None = None,
) -> PooledFit:
    """Fit a classifier on scans, and write it into the checkpoint of a fold, where the engine finds it.

    It answers by default only if it is better than the network's head on the validation scans.

    Args:
        model_folder: Folder of a multi-task model.
        fold: Fold whose checkpoint is used.
        scans: Training scans of the network.
        stages: Stages of the encoder to pool, counted from the finest, 0.
        validation: Scans that neither the network nor the classifier saw.
        checkpoint: File name of the checkpoint.
        device: Device of the network.
        progress: Called with the number done, the number of all, and the scan.

    Raises:
        ModelError: Where the model has no classification head, or no such stages.
        EngineError: Where scikit-learn is not installed, or a scan cannot be read.
        ValueError: Where a class has fewer than two scans.
    """
    model = read_model(model_folder, folds=[fold], checkpoint=checkpoint)
    everything = [*scans, *validation]
    outputs = []
    for done, vector in enumerate(_outputs(model, everything, stages, device), start=1):
        outputs.append(vector)
        if progress is not None:
            progress(done, len(everything), everything[done - 1].images[0])
    scheme = model.plan.classification
    assert scheme is not None  # a network with a head has one
    labels = np.array([scan.subtype for scan in scans])
    of_head, features = np.split(np.array(outputs), [scheme.num_classes], axis=1)
    weight, bias = fit_discriminant(features[: len(scans)], labels, scheme.num_classes)
    macro_f1 = _cross_validate(features[: len(scans)], labels, scheme.num_classes)
    validated = None
    if validation:
        by_fit = features[len(scans) :] @ weight.numpy().T + bias.numpy()
        truth = [scan.subtype for scan in validation]
        validated = _compare(truth, by_fit, of_head[len(scans) :])
    path = Path(model_folder) / f"fold_{fold}" / checkpoint
    content = torch.load(path, map_location="cpu", weights_only=False)  # the caller trained this checkpoint
    content["pooled_classifier"] = {
        "kind": "lda",
        "stages": list(stages),
        "weight": weight,
        "bias": bias,
        "preferred": validated is not None and validated.better,
    }
    with written_atomically(path) as temporary:
        torch.save(content, temporary)
    logger.info("%s: fitted on %d scans, cross-validated macro-F1 %.3f", path, len(scans), macro_f1)
    return PooledFit(cases=len(scans), macro_f1=macro_f1, validated=validated)


def _compare(
    truth: Sequence[int], by_fit: NDArray[np.floating[Any]], by_head: NDArray[np.floating[Any]]
) -> ValidatedFit:
    """Measure both classifiers, each by its class logits (N, S)."""
    classes = by_fit.shape[1]
    answers = {"fitted": by_fit.argmax(1).tolist(), "head": by_head.argmax(1).tolist()}
    scores: dict[str, Any] = {}
    for name, predicted in answers.items():
        scores[name] = classification_metrics(truth, predicted, classes).macro_f1
        scores[f"{name}_interval"] = bootstrap_macro_f1(truth, predicted, resamples=RESAMPLES, seed=0, classes=classes)
    return ValidatedFit(cases=len(truth), **scores)


class _HeadAndPooling(Head):
    """The network's head, and the features that a classifier is fitted on, in one output."""

    def __init__(self, head: Head, stages: Sequence[int]) -> None:
        super().__init__()
        self.stages = (*head.stages, *stages)
        self.parts = nn.ModuleList([head, FocusPooling(stages)])

    def forward(self, features: Sequence[torch.Tensor], focus: torch.Tensor) -> torch.Tensor:
        """Run both."""
        return torch.cat([part(features, focus) for part in self.parts], 1)


def _outputs(
    model: Model, scans: Sequence[ClassifiedScan], stages: Sequence[int], device: str
) -> Iterator[NDArray[np.float64]]:
    network = build_network(model.plan, model.weights[0])
    if not isinstance(network, MultiTaskUNet):
        raise ModelError(f"{model.source}: only models with a classification head can have a fitted classifier")
    deepest = len(network.encoder.output_channels) - 1
    if not is_indices(tuple(stages)) or max(stages) > deepest:
        raise ModelError(f"stages must be different ones among the encoder's 0 to {deepest}, got {list(stages)}")
    network.head = _HeadAndPooling(network.head, stages)
    return case_outputs(network, model.plan, scans, choose_device(device))


def case_outputs(
    network: MultiTaskUNet, plan: Plan, scans: Sequence[ClassifiedScan], device: torch.device
) -> Iterator[NDArray[np.float64]]:
    """Compute the output of a network's head for whole scans as the engine does: a weighted mean over tiles.

    Args:
        network: Network with any head.
        plan: Plan of the network.
        scans: Scans to predict.
        device: Device of the network.

    Yields:
        One vector, as long as the head's output, for each scan.
    """
    scheme = plan.classification
    assert scheme is not None  # a MultiTaskUNet's plan has one
    runner = TorchRunner(InferenceNetwork([network]).to(device), device, choose_precision("auto", device))
    window = SlidingWindow.of_plan(plan)
    for scan in scans:
        volume = read_volume(list(scan.images), channels=len(plan.channels), reader=plan.reader)
        case = preprocess(volume.reoriented() if plan.reorient else volume, plan, device, None)
        votes = Votes(scheme, views=1, aggregation="foreground")
        for _ in predict_logits(case, runner, window, plan.labels.num_outputs, timings=Timings(), votes=votes):
            pass  # the segmentation is not needed
        yield votes.mean_logits().numpy()


def fit_discriminant(
    features: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a linear discriminant analysis with Ledoit-Wolf shrinkage and equal priors.

    Args:
        features: (N, F).
        labels: (N,) in 0 to `num_classes` - 1.
        num_classes: S, at least 2.

    Returns:
        Weight (S, F) and bias (S,), float32: `features @ weight.T + bias` are class logits.

    Raises:
        EngineError: Where scikit-learn is not installed.
        ValueError: Where a class has fewer than two cases.
    """
    try:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    except ImportError as error:
        raise EngineError(f"the classifier needs scikit-learn ({error}): pip install 'nnturbo[training]'") from error
    check_counts(labels, num_classes)
    analysis = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage="auto", priors=np.full(num_classes, 1 / num_classes)
    ).fit(features, labels)
    weight, bias = analysis.coef_, analysis.intercept_
    if num_classes == 2:  # scikit-learn gives the second class's logit less the first one's
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.concatenate([[0.0], bias])
    return torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32))


def check_counts(labels: NDArray[np.integer[Any]] | Sequence[int], num_classes: int) -> None:
    """Refuse classes with too few cases.

    Raises:
        ValueError: Where a class has fewer than two cases.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() < 2:
        raise ValueError(f"every class needs at least two cases to fit a classifier, got {counts.tolist()}")


def _cross_validate(features: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], num_classes: int) -> float:
    """Macro-F1 of predictions by classifiers that did not see the case; every fifth case of a class is left out."""
    parts = np.zeros(len(labels), dtype=int)
    for label in range(num_classes):
        parts[labels == label] = np.arange((labels == label).sum()) % 5
    predicted = np.zeros(len(labels), dtype=int)
    for part in np.unique(parts):
        left = parts == part
        if np.bincount(labels[~left], minlength=num_classes).min() < 2:
            return float("nan")
        weight, bias = fit_discriminant(features[~left], labels[~left], num_classes)
        predicted[left] = (features[left] @ weight.numpy().T + bias.numpy()).argmax(1)
    return classification_metrics(labels.tolist(), predicted.tolist(), num_classes).macro_f1
