"""What held-out cases show about trained models: DSC of every ensemble, and class logits, each case predicted once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..engine.ensemble import Ensemble
from ..engine.model.plans import Plan
from ..engine.options import DEFAULT_CHECKPOINT
from ..engine.pipeline.labels import segment_probabilities
from .data.masks import read_mask
from .data.task import DATASET_FILE, Task, read_task
from .evaluation.metrics import dice
from .held_out import Answer, HeldOutNetwork, cases_of_folds, check_model
from .whole_cases import LabelledCase

MOST_MODELS = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What held-out cases show, case by case.

    Attributes:
        truth: (N,) class of each case.
        class_names: One per class.
        dsc: By models of an ensemble (places in the list of models): (N, 2), of all foreground and of the focus.
        logits: By place of a model, classifier and aggregation: (N, S).
    """

    truth: NDArray[np.integer]
    class_names: tuple[str, ...]
    dsc: Mapping[tuple[int, ...], NDArray[np.float64]]
    logits: Mapping[tuple[int, str, str], NDArray[np.float64]]


# Its parameters are the flags of `nnturbo choose`.
def gather_evidence(
    models: Sequence[str | os.PathLike[str]],
    raw_dataset: Path,
    preprocessed_dataset: Path,
    folds: Sequence[int],
    *,
    checkpoint: str = DEFAULT_CHECKPOINT,
    mirror: bool = True,
    device: str = "auto",
    progress: Callable[[int, int, object], None] | None = None,
) -> Evidence:
    """Predict the held-out cases of every fold once with each model of that fold.

    Args:
        models: Model folders, trained on the same splits.
        raw_dataset: `nnUNet_raw/DatasetXXX_Name`.
        preprocessed_dataset: The same in `nnUNet_preprocessed`.
        folds: Trained folds.
        checkpoint: File name in each fold.
        mirror: Whether to average over mirrored views.
        device: Device of the networks.
        progress: Called with the number done, the number of all, and the case.

    Raises:
        ValueError: For no or more than five models, one that is given twice, or two folds that hold out the same case.
        ModelError: Where a model has no classification head, two do not fit together, or the held-out cases do not
            measure one, see `held_out.check_model`.
    """
    if not 1 <= len(models) <= MOST_MODELS:
        raise ValueError(f"models must be 1 to {MOST_MODELS} to choose among, got {len(models)}")
    if len({Path(model).resolve() for model in models}) < len(models):
        raise ValueError(f"each model must be given once, got {', '.join(map(str, models))}")
    cases = cases_of_folds(raw_dataset, preprocessed_dataset, folds)
    for model in models:
        check_model(model, checkpoint, preprocessed_dataset, cases)
    task = read_task(preprocessed_dataset / DATASET_FILE)
    places = range(len(models))
    subsets = [subset for size in places for subset in itertools.combinations(places, size + 1)]
    dsc: dict[tuple[int, ...], list[tuple[float, float]]] = {subset: [] for subset in subsets}
    logits: dict[tuple[int, str, str], list[NDArray[np.float64]]] = {}
    truth: list[int] = []
    class_names: tuple[str, ...] = ()
    for fold, of_fold in cases.items():
        networks = [HeldOutNetwork(m, fold, checkpoint=checkpoint, device=device, mirror=mirror) for m in models]
        Ensemble([network.engine for network in networks])  # refuses models that do not fit together
        class_names, plan = networks[0].class_names, networks[0].model.plan
        for case in of_fold:
            answers = [network.predict(case, save_probabilities=len(models) > 1) for network in networks]
            for subset, measured in compare_ensembles(answers, case, task, plan, subsets).items():
                dsc[subset].append(measured)
            for place, answer in enumerate(answers):
                for (kind, aggregation), values in answer.logits.items():
                    logits.setdefault((place, kind, aggregation), []).append(values)
            truth.append(case.subtype)
            if progress is not None:
                progress(len(truth), sum(map(len, cases.values())), case.name)
    # A classifier that only some folds have cannot be chosen.
    complete = {key: np.array(values) for key, values in logits.items() if len(values) == len(truth)}
    return Evidence(
        truth=np.array(truth),
        class_names=class_names,
        dsc={subset: np.array(values) for subset, values in dsc.items()},
        logits=complete,
    )


def compare_ensembles(
    answers: Sequence[Answer], case: LabelledCase, task: Task, plan: Plan, subsets: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Measure DSC of all foreground and of the focus, of some ensembles, where the truth is known.

    Args:
        answers: Of each model; those in an ensemble have probabilities.
        case: The case.
        task: Labels of its data set.
        plan: Plan of one of the models.
        subsets: Places in `answers` of each ensemble's models.
    """
    truth = read_mask(case.labels, task)[0].array[0]
    known = np.ones(truth.shape, bool) if task.ignore_label is None else truth != task.ignore_label
    focus = _focus_values(plan)
    measured = {}
    for subset in subsets:
        segmentation = answers[subset[0]].prediction.segmentation
        if len(subset) > 1:
            parts = [answers[place].prediction.probabilities for place in subset]
            segmentation = segment_probabilities(np.mean([part for part in parts if part is not None], 0), plan.labels)
        measured[subset] = (
            dice((segmentation > 0) & known, (truth > 0) & known),
            dice(np.isin(segmentation, focus) & known, np.isin(truth, focus) & known),
        )
    return measured


def _focus_values(plan: Plan) -> list[int]:
    """Label values of the focus of the class, such as the lesion."""
    assert plan.classification is not None
    foreground = [value for value in plan.labels.labels.values() if value not in (0, (0,))]
    if not plan.classification.regions:
        return list(plan.classification.focus_channels)
    regions = [value if isinstance(value, tuple) else (value,) for value in foreground]
    return sorted({value for channel in plan.classification.focus_channels for value in regions[channel]})
