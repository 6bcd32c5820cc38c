"""Several models that answer together: probabilities on the scan's own grid, averaged."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .engine import Engine
from .errors import ModelError
from .model.choice import follow_choice
from .model.classification import Classification
from .model.labels import LabelScheme
from .options import ModelChoice
from .overlap import overlapped
from .pipeline.labels import segment_probabilities
from .pipeline.prediction import Prediction
from .pipeline.steps import PreviousStage, Request, caught
from .pipeline.timing import Timings
from .predictor import Predictor, Progress
from .scans.volume import Volume, read_volume


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadScan:
    """A scan that was read.

    Args:
        volumes: By the class of nnU-Net's that read it; models of one ensemble may have been trained through several.
        previous_stage: As in `Request`.
        timings: Of what was done so far.
    """

    volumes: Mapping[str, Volume]
    previous_stage: PreviousStage
    timings: Timings


class Ensemble(Predictor[ReadScan, Prediction]):
    """Models for the same labels, such as a 2d and a 3d_fullres one; used like an `Engine`.

    It takes 8 bytes per class and voxel of a scan, however many models there are.

    Args:
        engines: One or more. Labels, channels, file ending and previous stage must be the same, and so must be classes
            of those that have a classification head; the others take no part in the classification.

    Raises:
        ModelError: Where two of them differ.

    Note:
        nnU-Net: nnunetv2/ensembling/ensemble.py. There, models write probabilities to files first.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise ValueError("an ensemble must have one or more models, got none")
        self.engines = tuple(engines)
        for other in self.engines[1:]:
            _check_agreement(self.engines[0], other)
        heads = [engine for engine in self.engines if engine.class_names is not None]
        for other in heads[1:]:
            _refuse_difference("classes", heads[0], other, heads[0].class_names, other.class_names)
        self.class_names = heads[0].class_names if heads else None
        self.model = self.engines[0].model
        self.provenance = tuple(each for engine in self.engines for each in engine.provenance)

    @classmethod
    def load(cls, models: Sequence[str | os.PathLike[str]], **arguments: Any) -> Ensemble:
        """Load several trained models.

        Args:
            models: Model folders or export zips; or the choice.json of `nnturbo choose` alone.
            arguments: Of `Engine.load`, the same for each.

        Raises:
            ModelError: Where one cannot be used, or two do not fit together.
            ValueError: For another loader than the exact one, which reads a scan once for all models.
        """
        names = {field.name for field in fields(ModelChoice)}
        asked = {name: value for name, value in arguments.items() if name in names and value is not None}
        models, choice = follow_choice(models, ModelChoice(**asked))
        if len(models) > 1 and choice.options.loader != "exact":
            raise ValueError(
                f"an ensemble reads with the exact loader, got {choice.options.loader!r}: leave the loader out"
            )
        others = {name: value for name, value in arguments.items() if name not in names}
        return cls([Engine.load(model, **choice.arguments(), **others) for model in models])

    def _prepare(self, requests: Iterable[Request], *, readers: int) -> Generator[ReadScan | Exception, None, None]:
        """Read scans; each model preprocesses them for itself."""
        return overlapped(
            lambda request: caught(lambda: self._read(request)), requests, threads=readers, name="nnturbo-read"
        )

    def _read(self, request: Request) -> ReadScan:
        timings = Timings()
        plans = {engine.model.plan.reader: engine.model.plan for engine in self.engines}
        with timings("read"):
            volumes = {
                reader: read_volume(request.image, channels=len(plan.channels), reader=reader)
                for reader, plan in plans.items()
            }
        return ReadScan(volumes=volumes, previous_stage=request.previous_stage, timings=timings)

    def _segment(self, prepared: ReadScan, save_probabilities: bool, progress: Progress | None) -> Prediction:
        """Predict with each model; all give probabilities on the axes in which the scan is stored."""
        total: np.ndarray | None = None
        answers: list[Prediction] = []
        for index, engine in enumerate(self.engines):
            share = None if progress is None else _share(progress, index, len(self.engines))
            volume = prepared.volumes[engine.model.plan.reader]
            answer, total = _add(engine, Request(volume, prepared.previous_stage), share, total)
            answers.append(answer)
        with prepared.timings("ensemble"):
            assert total is not None  # there is one model at least
            total /= len(answers)
            segmentation = segment_probabilities(total, self.model.plan.labels)
        classifications = [answer.classification for answer in answers if answer.classification is not None]
        return replace(
            answers[0],
            segmentation=segmentation,
            probabilities=total if save_probabilities else None,
            timings=_added([prepared.timings.as_dict(), *(answer.timings for answer in answers)]),
            warnings=tuple(dict.fromkeys(warning for answer in answers for warning in answer.warnings)),
            provenance=tuple(each for answer in answers for each in answer.provenance),
            classification=Classification.average(classifications) if classifications else None,
        )

    def _answer(self, segmented: Prediction) -> Prediction:
        return segmented


def _add(
    engine: Engine, request: Request, progress: Progress | None, total: np.ndarray | None
) -> tuple[Prediction, np.ndarray]:
    """Predict with one model and add its probabilities to the sum; they are forgotten before the next one runs."""
    answer = engine.predict(request, save_probabilities=True, progress=progress)
    assert answer.probabilities is not None  # they were asked for
    total = answer.probabilities if total is None else np.add(total, answer.probabilities, out=total)
    return replace(answer, probabilities=None), total


def _share(progress: Progress, index: int, models: int) -> Progress:
    """Report the tiles of one model as its share of a case, in thousandths: models have different numbers of tiles."""
    return lambda done, total: progress((1000 * index + 1000 * done // total) // models, 1000)


def _added(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add milliseconds up by stage."""
    stages = dict.fromkeys(stage for part in timings for stage in part)
    return {stage: sum(part.get(stage, 0.0) for part in timings) for stage in stages}


def _check_agreement(one: Engine, other: Engine) -> None:
    """Refuse models whose probabilities mean different things."""
    plans = (one.model.plan, other.model.plan)
    _refuse_difference("labels", one, other, *(_meaning(plan.labels) for plan in plans))
    _refuse_difference("channels", one, other, *(plan.channel_names for plan in plans))
    _refuse_difference("the file ending", one, other, *(plan.file_ending for plan in plans))
    _refuse_difference("the previous stage", one, other, *(plan.previous_stage for plan in plans))


def _meaning(labels: LabelScheme) -> list[tuple[str, Any]]:
    """What the channels of probabilities stand for, in a form to compare."""
    order = labels.regions_class_order
    if order is None:
        return sorted(labels.labels.items())  # channels are sorted by value, whatever the order of names
    return [*labels.labels.items(), ("regions_class_order", order)]


def _refuse_difference(what: str, one: Engine, other: Engine, of_one: Any, of_other: Any) -> None:
    if of_one != of_other:
        raise ModelError(
            f"the models of an ensemble must agree on {what}: {one.model.source} has {of_one!s:.200}, "
            f"{other.model.source} has {of_other!s:.200}. Predict with each alone, or choose models of one data set"
        )
