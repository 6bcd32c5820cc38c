"""The description of a classification head, and its answer for a case."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ModelError
from .json_values import check_object

HEADS = ("gap_linear", "gap_mlp", "attention")
DESCRIBED = "described"
"""Kind of a head that another program trained, see `HeadDescription`."""
MOST_CLASSES = 1024
WIDEST_HEAD = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationScheme:
    """Classes and layers of a multi-task network's classification head.

    Args:
        kind: "gap_linear", "gap_mlp" or "attention"; "described" for the head of another program.
        stages: Encoder stages that the head reads, counted from the finest, 0.
        class_names: One per class, in the order of the class logits.
        focus_channels: Channels of the segmentation output whose voxels decide the class, such as the lesion's. A
            tile's weight is its share of such voxels, and heads can pool over them.
        regions: Whether the segmentation output has regions (sigmoid) instead of labels (softmax).
        hidden: Width of the hidden layer ("gap_mlp") or of keys and values ("attention").
        queries: Number of learned queries ("attention").
        dropout: Share of features dropped before the last layer while training.
    """

    kind: str
    stages: tuple[int, ...]
    class_names: tuple[str, ...]
    focus_channels: tuple[int, ...]
    regions: bool = False
    hidden: int = 64
    queries: int = 4
    dropout: float = 0.2

    def __post_init__(self) -> None:
        """Check all values, because plans may come from strangers."""
        checks = {
            f"kind must be one of {', '.join(HEADS)}": self.kind in (*HEADS, DESCRIBED),
            "stages must be different numbers from 0": is_indices(self.stages),
            f"class_names must be 2 to {MOST_CLASSES} different texts": 2 <= len(self.class_names) <= MOST_CLASSES
            and all(isinstance(name, str) for name in self.class_names)
            and len(set(self.class_names)) == len(self.class_names),
            "focus_channels must be different numbers from 0": is_indices(self.focus_channels),
            "regions must be true or false": isinstance(self.regions, bool),
            f"hidden must be 1 to {WIDEST_HEAD}": type(self.hidden) is int and 1 <= self.hidden <= WIDEST_HEAD,
            f"queries must be 1 to {WIDEST_HEAD}": type(self.queries) is int and 1 <= self.queries <= WIDEST_HEAD,
            "dropout must be a number from 0 to below 1": isinstance(self.dropout, (int, float))
            and 0 <= self.dropout < 1,
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise ModelError(f"classification head: {'; '.join(broken)}; got {self!s:.300}")

    @property
    def num_classes(self) -> int:
        """S, the number of class logits."""
        return len(self.class_names)

    @classmethod
    def parse(cls, description: Mapping[str, Any]) -> ClassificationScheme:
        """Read the `head` of a plan's architecture.

        Raises:
            ModelError: Where something is missing, unknown or out of range.
        """
        known = {field.name for field in fields(cls)}
        if isinstance(description, Mapping) and description.get("kind") == DESCRIBED:
            raise ModelError(f"classification head: kind must be one of {', '.join(HEADS)}, got {DESCRIBED!r}")
        if not isinstance(description, Mapping) or not set(description) <= known:
            raise ModelError(
                f"classification head must have some of {', '.join(sorted(known))}, got {description!r:.200}"
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in description.items()
        }
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelError(f"classification head: {error}; got {description!r:.200}") from error

    def describe(self) -> dict[str, Any]:
        """Give the plain values that `parse` reads, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """The class of a case.

    Args:
        label: Index of the most probable class.
        name: Its name.
        probabilities: One per class; they add up to 1.
        logits: One per class; `probabilities` is their softmax.
        class_names: Names of the classes, in the order of `probabilities`.
    """

    label: int
    name: str
    probabilities: tuple[float, ...]
    logits: tuple[float, ...]
    class_names: tuple[str, ...]

    @classmethod
    def from_logits(cls, logits: Sequence[float], class_names: Sequence[str]) -> Classification:
        """Choose the class of the greatest logit, the first of equal ones."""
        greatest = max(logits)
        shares = [math.exp(logit - greatest) for logit in logits]
        total = math.fsum(shares)
        label = list(logits).index(greatest)
        return cls(
            label=label,
            name=class_names[label],
            probabilities=tuple(share / total for share in shares),
            logits=tuple(map(float, logits)),
            class_names=tuple(class_names),
        )

    @property
    def probability_of(self) -> dict[str, float]:
        """Probabilities by the name of the class."""
        return dict(zip(self.class_names, self.probabilities, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Give the class, and the probability of each by its name."""
        return {
            "label": self.label,
            "name": self.name,
            "probabilities": self.probability_of,
            "logits": list(self.logits),
        }

    @classmethod
    def from_json(cls, content: Any) -> Classification:
        """Read what `to_json` gave.

        Raises:
            ValueError: For anything else.
        """
        check_object(content, {"label": int, "name": str, "probabilities": dict, "logits": list}, "a classification")
        names = tuple(content["probabilities"])
        if not 0 <= content["label"] < len(names) or content["name"] != names[content["label"]]:
            raise ValueError(f"a classification: label and name must be of one class, got {content!r:.200}")
        return cls(
            label=content["label"],
            name=content["name"],
            probabilities=tuple(map(float, content["probabilities"].values())),
            logits=tuple(map(float, content["logits"])),
            class_names=names,
        )

    @classmethod
    def average(cls, answers: Sequence[Classification]) -> Classification:
        """Average the probabilities of several models; the logits are their logarithms."""
        columns = zip(*(answer.probabilities for answer in answers), strict=True)
        means = [math.fsum(column) / len(answers) for column in columns]
        smallest = sys.float_info.min  # a probability of 0 has no logarithm
        return cls.from_logits([math.log(max(mean, smallest)) for mean in means], answers[0].class_names)


def is_indices(values: Any) -> bool:
    """Whether a value is a tuple of one or more different indices of stages or channels."""
    return (
        isinstance(values, tuple)
        and len(values) > 0
        and all(type(value) is int and 0 <= value < MOST_CLASSES for value in values)
        and len(set(values)) == len(values)
    )
