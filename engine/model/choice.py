"""What `nnturbo choose` wrote and may be given as a model: models, folds, classifier and aggregation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import write_json
from ..options import AGGREGATIONS, CLASSIFIERS, DEFAULT_CHECKPOINT, ModelChoice

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to predict with.

    Args:
        models: Model folders; the probabilities of several are averaged.
        folds: Folds of each, whose logits are averaged.
        classifier: One of `CLASSIFIERS`.
        aggregation: One of `AGGREGATIONS`.
        checkpoint: File name in each fold.
    """

    models: tuple[str, ...]
    folds: tuple[str, ...]
    classifier: str
    aggregation: str
    checkpoint: str = DEFAULT_CHECKPOINT

    def __post_init__(self) -> None:
        """Check all values, because files may be edited."""
        for name in ("models", "folds"):
            values = getattr(self, name)
            if not values or not all(isinstance(value, str) for value in values):
                raise ModelError(f"a choice: {name} must be one or more texts, got {values!r:.120}")
        for name, known in (("classifier", CLASSIFIERS), ("aggregation", AGGREGATIONS)):
            if getattr(self, name) not in known:
                raise ModelError(f"a choice: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r:.80}")
        if not isinstance(self.checkpoint, str):
            raise ModelError(f"a choice: checkpoint must be a file name, got {self.checkpoint!r:.80}")


def write_choice(choice: Choice, evidence: Mapping[str, Any], path: Path) -> None:
    """Write a choice; models are named as seen from the file's folder, so that both can be moved together.

    Args:
        choice: What was chosen.
        evidence: What the choice rests on, for people.
        path: File whose name ends with .json.
    """
    models = [_as_seen_from(path.parent, model) for model in choice.models]
    write_json(path, {"schema": SCHEMA, **asdict(replace(choice, models=tuple(models))), "evidence": evidence})


def _as_seen_from(folder: Path, model: str) -> str:
    try:
        return Path(os.path.relpath(Path(model).resolve(), folder.resolve())).as_posix()
    except ValueError:  # on another drive of Windows
        return str(Path(model).resolve())


def read_choice(path: Path) -> Choice:
    """Read a choice.

    Raises:
        ModelError: Where the file is no choice.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} must be a choice that nnturbo choose wrote; it cannot be read: {error}") from error
    wanted = ("models", "folds", "classifier", "aggregation", "checkpoint")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not set(wanted) <= set(content):
        raise ModelError(
            f"{path} must be a choice of schema {SCHEMA} with {', '.join(wanted)}: run nnturbo choose again"
        )
    if not all(isinstance(content[name], list) for name in ("models", "folds")):
        raise ModelError(f"{path}: models and folds must be lists")
    values: dict[str, Any] = {name: content[name] for name in wanted}
    choice = Choice(**{**values, "models": tuple(values["models"]), "folds": tuple(values["folds"])})
    return replace(choice, models=tuple(str(path.parent / model) for model in choice.models))


def is_choice(model: str | os.PathLike[str]) -> bool:
    """Whether a choice is given as a model."""
    return Path(model).suffix == ".json" and Path(model).is_file()


def follow_choice(
    models: Sequence[str | os.PathLike[str]], asked: ModelChoice
) -> tuple[tuple[str | os.PathLike[str], ...], ModelChoice]:
    """Replace a choice that is given as the model by the models that it names, and take all that it says.

    Args:
        models: Models; or one choice alone.
        asked: What else is chosen of them; with a choice, all that it says must have its default.

    Returns:
        Models without a choice among them, and what is chosen of them.

    Raises:
        ModelError: Where the file is no choice, or a model that it names is not there.
        ValueError: Where a choice is not alone, or something is asked for that it says.
    """
    choices = [model for model in models if is_choice(model)]
    if not choices:
        return tuple(models), asked
    if len(models) > 1:
        raise ValueError(f"a choice must be given alone, without other models, got {', '.join(map(str, models))}")
    given = {
        "folds": asked.folds is not None,
        "checkpoint": asked.checkpoint is not None,
        "classifier": asked.options.classifier != "auto",
        "aggregation": asked.options.aggregation != "foreground",
    }
    if said := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"{choices[0]} says it already: leave out {', '.join(said)}, or give the models themselves")
    choice = read_choice(Path(choices[0]))
    if moved := [model for model in choice.models if not Path(model).exists()]:
        raise ModelError(
            f"{choices[0]} names the model {moved[0]}, which is not there: move both together, or run nnturbo "
            f"choose again"
        )
    options = replace(asked.options, classifier=choice.classifier, aggregation=choice.aggregation)
    return choice.models, replace(asked, folds=choice.folds, checkpoint=choice.checkpoint, options=options)


def follow_single(model: str | os.PathLike[str], asked: ModelChoice) -> tuple[str | os.PathLike[str], ModelChoice]:
    """Do what `follow_choice` does where one model is needed.

    Raises:
        ModelError: Where the file is no choice, or names several models.
        ValueError: Where something is asked for that a choice says.
    """
    models, chosen = follow_choice([model], asked)
    if len(models) != 1:
        raise ModelError(
            f"{model} must name one model here, it names {len(models)}, whose probabilities are averaged: predict with "
            "it, load it with Ensemble.load, or take one of its models"
        )
    return models[0], chosen
