"""Validation on whole cases, with the engine's path from scan to labels and class."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..engine.backends.choose import choose_precision
from ..engine.backends.torch import TorchRunner
from ..engine.engine import Engine
from ..engine.model.folder import Model
from ..engine.model.folds import InferenceNetwork
from ..engine.model.plans import parse_plan
from ..engine.pipeline.window import SlidingWindow
from ..engine.scans.volume import read_volume
from .data.tables import DatasetError
from .evaluation.metrics import classification_metrics, dice


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledCase:
    """One case of a raw data set: files of all channels, file of the labels, index of the class."""

    name: str
    images: tuple[Path, ...]
    labels: Path
    subtype: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationResult:
    """Scores on whole cases.

    Attributes:
        foreground_dsc: Mean DSC of everything that is not background.
        focus_dsc: Mean DSC of the focus, such as the lesion.
        label_dsc: Mean DSC by label value.
        macro_f1: Over the classes; NaN for a network without classification.
    """

    foreground_dsc: float
    focus_dsc: float
    label_dsc: Mapping[int, float]
    macro_f1: float

    @property
    def score(self) -> float:
        """Score that decides when training stops: mean of the DSC of foreground and focus, and the macro-F1."""
        parts = [self.foreground_dsc, self.focus_dsc, *([] if math.isnan(self.macro_f1) else [self.macro_f1])]
        return sum(parts) / len(parts)


def find_labelled_cases(
    folder: Path, names: Sequence[str], dataset: Mapping[str, Any], subtypes: Mapping[str, int]
) -> list[LabelledCase]:
    """Find the raw scans and labels of cases.

    Args:
        folder: nnUNet_raw/DatasetXXX_Name.
        names: Names of the cases.
        dataset: Content of `dataset.json`.
        subtypes: Class of each case.

    Raises:
        DatasetError: Where there are no cases, or scans, labels or classes are missing.
    """
    if not names:
        raise DatasetError(f"{folder}: the split must have cases, it has none: prepare the data set again")
    if unknown := sorted(set(names) - set(subtypes)):
        raise DatasetError(
            f"{folder}: the class of every case must be known, {len(unknown)} are missing: {', '.join(unknown)[:200]}"
        )
    ending = dataset["file_ending"]
    channels = range(len(dataset["modality" if "modality" in dataset else "channel_names"]))
    listed = dataset.get("dataset", {})  # dataset.json may name scans in other folders
    cases = []
    for name in names:
        images = [f"imagesTr/{name}_{channel:04d}{ending}" for channel in channels]
        files = listed.get(name, {"images": images, "label": f"labelsTr/{name}{ending}"})
        cases.append(
            LabelledCase(
                name=name,
                images=tuple(folder / os.path.expandvars(image) for image in files["images"]),
                labels=folder / os.path.expandvars(files["label"]),
                subtype=subtypes[name],
            )
        )
    if absent := [str(path) for case in cases for path in (*case.images, case.labels) if not path.is_file()]:
        raise DatasetError(f"{absent[0]} is missing: whole cases are read from the raw scans and labels")
    return cases


def network_engine(
    network: nn.Module, plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str, device: torch.device
) -> Engine:
    """Make an engine that runs an existing network, without mirroring; in fp32 on a CPU and fp16 on a GPU.

    Args:
        network: Network in evaluation mode, without deep supervision.
        plans: Content of `plans.json`.
        dataset: Content of `dataset.json`.
        configuration: Such as 3d_fullres.
        device: Device of the network.
    """
    plan = parse_plan(plans, dataset, configuration)
    model = Model(
        plan=plan,
        weights=(network.state_dict(),),
        folds=("training",),
        mirror_axes=(),
        trainer="nnUNetTrainerMultiTask",
        source=Path(),
        plans=plans,
        dataset=dataset,
    )
    # Without CUDA graphs: their memory would stay, and each training step changes the weights.
    runner = TorchRunner(InferenceNetwork([network]), device, choose_precision("auto", device), graphs=False)
    return Engine(model, runner, window=SlidingWindow.of_plan(plan), sums_device=device)


def validate(engine: Engine, cases: Sequence[LabelledCase], focus_labels: Sequence[str]) -> ValidationResult:
    """Predict whole cases and compare.

    Args:
        engine: Predicts.
        cases: At least one.
        focus_labels: Names of labels or regions of the data set, which together are the focus.

    Raises:
        EngineError: Where a case cannot be read or predicted.
    """
    labels = engine.model.plan.labels.foreground
    named = engine.model.dataset["labels"]
    ignored = named.get("ignore")
    focus_values = np.unique(np.concatenate([np.atleast_1d(named[name]) for name in focus_labels]))
    foreground: list[float] = []
    focus: list[float] = []
    by_label: dict[int, list[float]] = {label: [] for label in labels}
    predicted: list[int] = []
    for case in cases:
        images = list(case.images)
        prediction = engine.predict(images if len(images) > 1 else images[0])
        reference = np.rint(read_volume(case.labels, channels=1).array[0])
        known = np.ones(reference.shape, bool) if ignored is None else reference != ignored
        segmentation, reference = prediction.segmentation[known], reference[known]
        foreground.append(dice(segmentation > 0, reference > 0))
        focus.append(dice(np.isin(segmentation, focus_values), np.isin(reference, focus_values)))
        for label in labels:
            by_label[label].append(dice(segmentation == label, reference == label))
        if prediction.classification is not None:
            predicted.append(prediction.classification.label)
    macro_f1 = math.nan
    if engine.class_names is not None:
        truth = [case.subtype for case in cases]
        macro_f1 = classification_metrics(truth, predicted, len(engine.class_names)).macro_f1
    return ValidationResult(
        foreground_dsc=float(np.mean(foreground)),
        focus_dsc=float(np.mean(focus)),
        label_dsc={label: float(np.mean(values)) for label, values in by_label.items()},
        macro_f1=macro_f1,
    )
