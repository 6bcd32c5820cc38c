"""Cross-validation: predicts every held-out case by the fold that did not see it, and calibrates the class logits."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from ..engine.errors import OutputError
from ..engine.files import check_writable, write_json, written_atomically
from ..engine.jobs.class_table import write_class_table
from ..engine.model.checkpoint import TEMPERATURE_KEY, read_checkpoint
from ..engine.model.folder import read_model, with_classifier
from ..engine.options import DEFAULT_CHECKPOINT
from .data.references import RESULTS_FILE
from .evaluation.calibration import ProbabilityMetrics, fit_temperature, probability_metrics
from .evaluation.metrics import Interval, bootstrap_macro_f1, classification_metrics
from .held_out import HEAD, LDA, HeldOutNetwork, cases_of_folds, check_model
from .whole_cases import LabelledCase

logger = logging.getLogger(__name__)

ANSWERS = "answers"
"""Folder of the class logits of each case; a case that is there is not predicted again."""
REPORT_FILE = "cross_validation.json"
RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutQuality:
    """How one classifier answers for cases that neither its network nor it has seen.

    Attributes:
        macro_f1: Over all cases.
        macro_f1_interval: Bootstrap 95 % interval.
        temperature: By which the logits were divided, fitted on all cases.
        before: Quality of the probabilities without it.
        after: With it. Of several folds, each has the temperature that the others give, so that it does not flatter.
    """

    macro_f1: float
    macro_f1_interval: Interval
    temperature: float
    before: ProbabilityMetrics
    after: ProbabilityMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidation:
    """What was predicted and found.

    Attributes:
        cases: Number of cases.
        classifier: What answers in the table of classes.
        by_classifier: Of "head" and, where every fold has one, "lda".
    """

    cases: int
    classifier: str
    by_classifier: Mapping[str, HeldOutQuality]


# Its parameters are the flags of `nnturbo crossvalidate`.
def cross_validate(
    model_folder: str | os.PathLike[str],
    raw_dataset: Path,
    preprocessed_dataset: Path,
    folds: Sequence[int],
    out: Path,
    *,
    classifier: str = "auto",
    aggregation: str = "foreground",
    checkpoint: str = DEFAULT_CHECKPOINT,
    mirror: bool = True,
    device: str = "auto",
    progress: Callable[[int, int, object], None] | None = None,
) -> CrossValidation:
    """Predict held-out cases, write masks and classes, and store in the checkpoints what they show.

    Every fold gets the temperatures. Where all have a fitted classifier, it answers by default from then on if it is
    better than the head over the cases of all folds.

    Args:
        model_folder: Folder of a multi-task model.
        raw_dataset: `nnUNet_raw/DatasetXXX_Name`.
        preprocessed_dataset: The same in `nnUNet_preprocessed`.
        folds: Trained folds; each predicts the cases that it holds out.
        out: Folder for the masks, `subtype_results.csv` with probabilities, and `cross_validation.json`.
        classifier: What answers in the table of classes: "head", "lda", or "auto" for the better one.
        aggregation: As in `nnturbo predict`.
        checkpoint: File name in each fold.
        mirror: Whether to average over mirrored views.
        device: Device of the network.
        progress: Called with the number done, the number of all, and the case.

    Raises:
        ValueError: Where two folds hold out the same case.
        ModelError: Where the model has no classification head or lacks the classifier, or the held-out cases do not
            measure it, see `held_out.check_model`.
        OutputError: Where `out` holds something else, or the checkpoints cannot be replaced.
    """
    # Refuses "lda" where a fold has no fitted classifier.
    model = with_classifier(read_model(model_folder, folds=folds, checkpoint=checkpoint), classifier)
    cases = cases_of_folds(raw_dataset, preprocessed_dataset, folds)
    check_model(model_folder, checkpoint, preprocessed_dataset, cases)
    for fold in folds:
        check_writable(Path(model_folder) / f"fold_{fold}" / checkpoint)
    if out.is_dir() and any(out.iterdir()) and not (out / ANSWERS).is_dir():
        raise OutputError(f"{out} holds other files: choose another folder")
    (out / ANSWERS).mkdir(parents=True, exist_ok=True)
    answers = _predict(Path(model_folder), cases, out, model.plan.file_ending, checkpoint, mirror, device, progress)
    scheme = model.plan.classification
    assert scheme is not None  # `_predict` refuses other models
    truth = {case.name: case.subtype for of_fold in cases.values() for case in of_fold}
    fold_of = np.array([fold for fold, of_fold in cases.items() for _ in of_fold])
    labels, found = np.array(list(truth.values())), {}
    shares: dict[str, NDArray[np.float64]] = {}
    for kind in (HEAD, LDA) if all(f"{LDA} {aggregation}" in of for of in answers.values()) else (HEAD,):
        logits = np.array([answers[name][f"{kind} {aggregation}"] for name in truth])
        shares[kind], found[kind] = _calibrate(logits, labels, fold_of)
    is_better = LDA in found and found[LDA].macro_f1 > found[HEAD].macro_f1
    chosen = (LDA if is_better else HEAD) if classifier == "auto" else classifier
    write_class_table(
        out / RESULTS_FILE,
        {
            f"{name}{model.plan.file_ending}": (int(row.argmax()), row.tolist())
            for name, row in zip(truth, shares[chosen], strict=True)
        },
        scheme.class_names,
        with_probabilities=True,
    )
    for fold in folds:
        path = Path(model_folder) / f"fold_{fold}" / checkpoint
        store_evidence(path, {kind: of.temperature for kind, of in found.items()}, prefer_fitted=is_better)
    result = CrossValidation(cases=len(truth), classifier=chosen, by_classifier=found)
    write_json(out / REPORT_FILE, {**asdict(result), "folds": list(folds), "class_names": list(scheme.class_names)})
    return result


def _predict(
    model_folder: Path,
    cases: Mapping[int, Sequence[LabelledCase]],
    out: Path,
    file_ending: str,
    checkpoint: str,
    mirror: bool,
    device: str,
    progress: Callable[[int, int, object], None] | None,
) -> dict[str, dict[str, list[float]]]:
    """Predict what an earlier run has not.

    Returns:
        For every case its class logits by classifier and aggregation, not divided by any temperature.
    """
    answers: dict[str, dict[str, list[float]]] = {}
    total = sum(map(len, cases.values()))
    for fold, of_fold in cases.items():
        made_of = {
            "weights": _hash_weights(model_folder / f"fold_{fold}" / checkpoint),
            "fold": fold,
            "mirror": mirror,
        }
        network: HeldOutNetwork | None = None
        for case in of_fold:
            record = out / ANSWERS / f"{case.name}.json"
            mask = out / f"{case.name}{file_ending}"
            known = _read_answer(record, made_of) if mask.is_file() else None
            if known is None:
                if network is None:
                    network = HeldOutNetwork(model_folder, fold, checkpoint=checkpoint, device=device, mirror=mirror)
                answer = network.predict(case)
                answer.prediction.save(mask)
                known = {
                    f"{kind} {aggregation}": (network.temperatures[kind] * values).tolist()
                    for (kind, aggregation), values in answer.logits.items()
                }
                write_json(record, {"made_of": made_of, "logits": known})
            answers[case.name] = known
            if progress is not None:
                progress(len(answers), total, case.name)
    return answers


def _hash_weights(path: Path) -> str:
    """Hash what decides the logits before they are divided by a temperature."""
    loaded = read_checkpoint(path)
    fitted = loaded.pooled_classifier
    tensors = [*loaded.weights.values(), *(() if fitted is None else (fitted.weight, fitted.bias))]
    digest = hashlib.sha256(repr(None if fitted is None else fitted.stages).encode())
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _read_answer(path: Path, made_of: Mapping[str, Any]) -> dict[str, list[float]] | None:
    """Read the class logits of a case that the same network has predicted before, if it has."""
    try:
        content = json.loads(path.read_bytes())
        return content["logits"] if content["made_of"] == made_of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _calibrate(
    logits: NDArray[np.float64], labels: NDArray[np.integer], folds: NDArray[np.integer]
) -> tuple[NDArray[np.float64], HeldOutQuality]:
    """Fit the temperature; give the probabilities of all cases, (N, S), and their quality."""
    temperature = fit_temperature(logits, labels)
    divisors = np.full(len(labels), temperature)
    if len(np.unique(folds)) > 1:
        for fold in np.unique(folds):
            divisors[folds == fold] = fit_temperature(logits[folds != fold], labels[folds != fold])
    plain, calibrated = softmax(logits, axis=1), softmax(logits / divisors[:, None], axis=1)
    truth, predicted, classes = labels.tolist(), logits.argmax(1).tolist(), logits.shape[1]
    return calibrated, HeldOutQuality(
        macro_f1=classification_metrics(truth, predicted, classes).macro_f1,
        macro_f1_interval=bootstrap_macro_f1(truth, predicted, resamples=RESAMPLES, seed=0, classes=classes),
        temperature=temperature,
        before=probability_metrics(truth, plain.tolist(), resamples=RESAMPLES, seed=0),
        after=probability_metrics(truth, calibrated.tolist(), resamples=RESAMPLES, seed=0),
    )


def store_evidence(path: Path, temperatures: Mapping[str, float], *, prefer_fitted: bool) -> None:
    """Write into a checkpoint what divides its class logits wherever it is predicted with, and what answers by default.

    Args:
        path: The checkpoint, which the caller trained.
        temperatures: Of "head" and, if it has a fitted classifier, of "lda".
        prefer_fitted: Whether the fitted classifier answers unless the head is asked for.
    """
    content = torch.load(path, map_location="cpu", weights_only=False)
    content[TEMPERATURE_KEY] = temperatures[HEAD]
    if LDA in temperatures:
        content["pooled_classifier"] |= {"temperature": temperatures[LDA], "preferred": prefer_fitted}
    with written_atomically(path) as temporary:
        torch.save(content, temporary)
    logger.info("%s: class logits are divided by %s", path, dict(temperatures))


def quality_table(result: CrossValidation) -> str:
    """Markdown table of what was found about each classifier."""
    lines = [
        f"| over {result.cases} held-out cases | macro-F1 | 95 % interval | AUC | temperature "
        "| calibration error before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, found in result.by_classifier.items():
        interval = f"{found.macro_f1_interval.low:.3f} to {found.macro_f1_interval.high:.3f}"
        auc = "not defined" if found.after.macro_auc is None else f"{found.after.macro_auc:.3f}"
        errors = [f"{part.calibration_error:.3f}" for part in (found.before, found.after)]
        lines.append(
            f"| {kind} | {found.macro_f1:.3f} | {interval} | {auc} | {found.temperature:.3g} | {' | '.join(errors)} |"
        )
    return "\n".join(lines) + "\n"
