"""Predicts cases by networks that were not trained on them, once, and keeps all that can answer for the class."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.backends.choose import choose_device, choose_precision
from ..engine.backends.torch import TorchRunner
from ..engine.engine import Engine
from ..engine.errors import ModelError
from ..engine.model.folder import Model, read_model
from ..engine.model.folds import InferenceNetwork
from ..engine.model.heads import Head
from ..engine.model.labels import parse_labels
from ..engine.model.multi_task_unet import MultiTaskUNet
from ..engine.model.network import build_network
from ..engine.pipeline.prediction import Prediction, answer
from ..engine.pipeline.steps import engine_errors, requests_of
from ..engine.pipeline.window import SlidingWindow, usual_views_per_call
from .data.cases import LABELS_FILE, SPLITS_FILE
from .data.multi_task_plans import read_classes
from .data.tables import DatasetError
from .data.task import DATASET_FILE
from .trainer_state import trained_cases
from .whole_cases import LabelledCase, find_labelled_cases

logger = logging.getLogger(__name__)

HEAD, LDA = "head", "lda"
FOREGROUND, ALIKE = "foreground", "mean"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What one network says about one case.

    Attributes:
        prediction: Segmentation and, if asked for, probabilities of labels; without a class.
        logits: (S,) class logits, calibrated where the checkpoint is, by classifier ("head", "lda") and aggregation.
    """

    prediction: Prediction
    logits: Mapping[tuple[str, str], NDArray[np.float64]]


def held_out_cases(raw_dataset: Path, preprocessed_dataset: Path, fold: int) -> list[LabelledCase]:
    """Find the cases that a fold was not trained on.

    Args:
        raw_dataset: `nnUNet_raw/DatasetXXX_Name`.
        preprocessed_dataset: The same in `nnUNet_preprocessed`.
        fold: Number of a split of `splits_final.json`.

    Raises:
        DatasetError: Where a file or the split is missing.
    """
    subtypes, _ = read_classes(preprocessed_dataset / LABELS_FILE)
    dataset = json.loads((preprocessed_dataset / DATASET_FILE).read_bytes())
    splits = json.loads((preprocessed_dataset / SPLITS_FILE).read_bytes())
    if not 0 <= fold < len(splits):
        raise DatasetError(
            f"{preprocessed_dataset / SPLITS_FILE} has {len(splits)} splits, fold {fold} is none of them"
        )
    return find_labelled_cases(raw_dataset, sorted(splits[fold]["val"]), dataset, subtypes)


def cases_of_folds(
    raw_dataset: Path, preprocessed_dataset: Path, folds: Sequence[int]
) -> dict[int, list[LabelledCase]]:
    """Find the held-out cases of several folds, none of which may be in two.

    Raises:
        DatasetError: Where a file or a split is missing.
        ValueError: Where a fold comes twice, or two folds hold out the same case.
    """
    if len(set(folds)) < len(folds):
        raise ValueError(f"each fold must be given once, got {', '.join(map(str, folds))}")
    cases = {fold: held_out_cases(raw_dataset, preprocessed_dataset, fold) for fold in folds}
    names = [case.name for of_fold in cases.values() for case in of_fold]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"folds must hold out different cases; {', '.join(twice)[:200]} are held out by two of {folds}"
        )
    return cases


def check_model(
    folder: str | os.PathLike[str],
    checkpoint: str,
    preprocessed_dataset: Path,
    cases: Mapping[int, Sequence[LabelledCase]],
) -> None:
    """Refuse a model that held-out cases do not measure, before any is predicted.

    Args:
        folder: Model folder.
        checkpoint: File name in each fold.
        preprocessed_dataset: The data set in `nnUNet_preprocessed`.
        cases: Held-out cases of each fold.

    Raises:
        ModelError: Where a fold is missing or was trained on a case that it holds out, or the model has other labels or
            classes than the data set.
    """
    model = read_model(folder, folds=list(cases), checkpoint=checkpoint)
    _, class_names = read_classes(preprocessed_dataset / LABELS_FILE)
    labels = parse_labels(json.loads((preprocessed_dataset / DATASET_FILE).read_bytes()))
    scheme = model.plan.classification
    for what, its, wanted in (
        ("labels", dict(model.plan.labels.labels), dict(labels.labels)),
        ("classes", class_names if scheme is None else scheme.class_names, class_names),
    ):
        if its != wanted:
            raise ModelError(
                f"{folder} must have the {what} of {preprocessed_dataset.name}, {wanted}, it has {its}: give a model "
                f"of that data set"
            )
    for fold, of_fold in cases.items():
        path = Path(folder) / f"fold_{fold}" / checkpoint
        trained = trained_cases(path)
        if trained is None:
            logger.warning(
                "%s does not say on which cases it was trained: they must not be those of fold %s", path, fold
            )
        elif seen := sorted(trained & {case.name for case in of_fold}):
            raise ModelError(
                f"{path} must not have been trained on cases that fold {fold} holds out, it was on {len(seen)}, such "
                f"as {seen[0]}: train that fold again with the splits as they are"
            )


class _BothHeads(Head):
    """Gives the class logits of several heads, one after the other."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.stages = tuple(stage for head in heads for stage in head.stages)
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor], focus: Tensor) -> Tensor:
        """Answer for each tile, (N, heads * S)."""
        return torch.cat([head(features, focus) for head in self.heads], 1)


class HeldOutNetwork:
    """One fold of a model, whose head and fitted classifier answer in one pass.

    Args:
        folder: Model folder.
        fold: The fold.
        checkpoint: File name of the checkpoint.
        device: "auto", "cpu", "cuda" or "mps".
        mirror: Whether to average over mirrored views.

    Raises:
        ModelError: Where the model has no classification head.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fold: int, *, checkpoint: str, device: str, mirror: bool
    ) -> None:
        self.model = read_model(folder, folds=[fold], checkpoint=checkpoint)
        self.engine = _engine(self.model, choose_device(device), mirror)
        scheme = self.model.plan.classification
        assert scheme is not None  # `_engine` refuses other models
        self.class_names = scheme.class_names
        self.temperatures = {HEAD: self.model.temperatures[0]}
        """By which the checkpoint divides the logits of each classifier."""
        if (fitted := next(iter(self.model.pooled_classifiers), None)) is not None:
            self.temperatures[LDA] = fitted.temperature

    def predict(self, case: LabelledCase, *, save_probabilities: bool = False) -> Answer:
        """Predict a case.

        Raises:
            EngineError: Where it cannot be read or predicted.
        """
        engine = self.engine
        images = case.images if len(case.images) != 1 else case.images[0]
        with engine_errors(), contextlib.closing(engine.loader(requests_of([images], None), readers=0)) as loaded:
            prepared = next(loaded)
            if isinstance(prepared, Exception):
                raise prepared
            segmented = engine.segmenter(prepared, save_probabilities, None)
            assert segmented.votes is not None  # the plan has classes
            by_tiles = {FOREGROUND: segmented.votes.mean_logits(), ALIKE: segmented.votes.mean_logits(alike=True)}
            prediction = answer(replace(segmented, votes=None), self.model.plan, engine.provenance)
        logits = {}
        for aggregation, values in by_tiles.items():
            for classifier, part in zip(self.temperatures, values.split(len(self.class_names)), strict=True):
                logits[classifier, aggregation] = part.numpy()
        return Answer(prediction=prediction, logits=logits)


def _engine(model: Model, device: torch.device, mirror: bool) -> Engine:
    """Make an engine whose class logits are those of the head and of the fitted classifier, if there is one."""
    network = build_network(model.plan, model.weights[0], None, model.trainer)
    if not isinstance(network, MultiTaskUNet):
        raise ModelError(f"{model.source}: only models with a classification head answer for the class of a case")
    if (fitted := next(iter(model.pooled_classifiers), None)) is not None:
        if not isinstance(network.head, Head):
            raise ModelError(
                f"{model.source}: a head of another program and a fitted classifier cannot answer together"
            )
        network.head = _BothHeads([network.head, fitted.make_head(network.encoder.output_channels)])
    runner = TorchRunner(InferenceNetwork([network]).to(device).eval(), device, choose_precision("auto", device))
    window = SlidingWindow.of_plan(
        model.plan,
        views=model.views if mirror else ((),),
        views_per_call=usual_views_per_call(model.plan, device),
        tiles_dtype=runner.tiles_dtype,
    )
    return Engine(model, runner, window=window, sums_device=device)
