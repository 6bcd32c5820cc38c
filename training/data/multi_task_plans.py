"""Plans for the multi-task network: nnU-Net's plans with a head on their network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.model.classification import ClassificationScheme
from ...engine.model.labels import parse_labels
from ...engine.model.plans import MULTI_TASK_NETWORK
from ..recipe import Recipe
from .tables import DatasetError, read_table

RECIPE_KEY = "nnturbo_recipe"
"""Key of the recipe in plans."""


def read_classes(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Read the class of every case.

    Args:
        path: csv with the columns case and subtype; a case without a subtype is left out.

    Returns:
        The class of each case, as an index, and the names of the classes: numbers ascending, or texts in alphabetical
        order.

    Raises:
        DatasetError: Where the file is missing or gives a case twice.
    """
    if not path.is_file():
        raise DatasetError(f"{path} must say the class of every case, it is missing: make it with nnturbo prepare")
    rows = [row.cells for row in read_table(path, ("case", "subtype")) if row.cells["subtype"]]
    cases = [row["case"] for row in rows]
    if twice := sorted({case for case in cases if cases.count(case) > 1}):
        raise DatasetError(f"{path} must say the class of every case once; twice it has {', '.join(twice)[:200]}")
    found = {row["subtype"] for row in rows}
    names = tuple(sorted(found, key=int if all(name.isdecimal() for name in found) else None))
    return {row["case"]: names.index(row["subtype"]) for row in rows}, names


def multi_task_plans(
    plans: Mapping[str, Any],
    configuration: str,
    dataset: Mapping[str, Any],
    recipe: Recipe,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Add a head to the network of a configuration; an existing head is replaced.

    Args:
        plans: Content of nnU-Net's plans file.
        configuration: Such as 3d_fullres.
        dataset: Content of `dataset.json`.
        recipe: Describes the head.
        class_names: One per class.

    Returns:
        A copy that names `MultiTaskUNet` and contains the recipe.

    Raises:
        ValueError: Where the plans lack the configuration or it has no network of its own, or the recipe's focus labels
            are not labels of the data set.
        ModelError: Where the head cannot be built, or there are fewer than two classes.
    """
    plans = copy.deepcopy(dict(plans))
    plans[RECIPE_KEY] = recipe.describe()
    if configuration not in plans["configurations"]:
        raise ValueError(f"configuration must be among {', '.join(plans['configurations'])}, got {configuration!r}")
    described = plans["configurations"][configuration].get("architecture")
    if described is None:
        raise ValueError(
            f"configuration {configuration!r} must have its own 'architecture' in the plans, as nnU-Net's planners "
            f"write it; train the one it inherits from, or plan again"
        )
    scheme = parse_labels(dataset)
    regions = scheme.regions_class_order is not None
    foreground = {name: value for name, value in scheme.labels.items() if value not in (0, (0,))}
    # A label's channel is its value, as nnU-Net wants labels consecutive; regions have channels in their order.
    channels = {name: index if regions else value for index, (name, value) in enumerate(foreground.items())}
    if unknown := [name for name in recipe.focus_labels if name not in channels]:
        raise ValueError(f"focus_labels must be among the labels {', '.join(channels)}, got {', '.join(unknown)}")
    head = ClassificationScheme(
        kind=recipe.head,
        stages=recipe.head_stages,
        class_names=tuple(class_names),
        focus_channels=tuple(channels[name] for name in recipe.focus_labels),  # type: ignore[misc]
        regions=regions,
        hidden=recipe.head_hidden,
        queries=recipe.head_queries,
        dropout=recipe.head_dropout,
    )
    if described["network_class_name"] != MULTI_TASK_NETWORK:
        described["arch_kwargs"]["backbone"] = described["network_class_name"]
    described["arch_kwargs"]["head"] = head.describe()
    described["network_class_name"] = MULTI_TASK_NETWORK
    return plans
