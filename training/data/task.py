"""What a data set is about: channels, labels or regions, classes and file ending, as dataset.json says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ...engine.errors import ModelError
from ...engine.model.labels import LabelScheme, parse_labels
from ...engine.scans.image_header import DETACHED_ENDINGS, IMAGE_ENDINGS
from .tables import DatasetError, class_order

DATASET_FILE = "dataset.json"
WHOLE = "whole"
"""Name of all foreground labels together."""

_ENDINGS = tuple(ending for ending in IMAGE_ENDINGS if ending not in DETACHED_ENDINGS)  # a link needs one file
_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Channels, labels, classes and file ending of a data set.

    Attributes:
        channel_names: In the order of their numbers; nnU-Net normalises a channel by its name.
        labels: `labels` of dataset.json: value by name, or the values of a region.
        regions_class_order: As in dataset.json; `None` without regions.
        file_ending: Of images and masks, with the dot.
        class_names: Numbers ascending, or texts in alphabetical order; empty where only the cases tell.
        class_folder: What comes before the class in the name of a class's folder.
        quiz_names: Whether cases must be named as in the pancreas task, `quiz_<class>_<number>`.
    """

    channel_names: tuple[str, ...]
    labels: Mapping[str, Any]
    regions_class_order: tuple[int, ...] | None
    file_ending: str
    class_names: tuple[str, ...]
    class_folder: str = ""
    quiz_names: bool = False

    def __post_init__(self) -> None:
        """Check what nnU-Net and the readers need."""
        if self.file_ending not in _ENDINGS:
            raise DatasetError(f"file_ending must be one of {', '.join(_ENDINGS)}, got {self.file_ending!r:.80}")
        if not self.channel_names:
            raise DatasetError("channel_names must name at least one channel, got none")
        foreground = self.scheme.foreground
        if foreground != tuple(range(1, len(foreground) + 1)):
            raise DatasetError(
                f"labels must be numbered 0, 1, 2, ... without gaps, as nnU-Net needs, got {self.labels}"
            )

    @property
    def scheme(self) -> LabelScheme:
        """Labels or regions, without the ignore label."""
        order = {} if self.regions_class_order is None else {"regions_class_order": list(self.regions_class_order)}
        return parse_labels({"labels": dict(self.labels), **order})

    @property
    def ignore_label(self) -> int | None:
        """Value of voxels that nobody labelled."""
        return self.labels.get("ignore")

    @property
    def mask_values(self) -> tuple[int, ...]:
        """All values that a mask may hold."""
        return (0, *self.scheme.foreground, *([] if self.ignore_label is None else [self.ignore_label]))

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """What is compared with the truth: all foreground labels together, then every label or region.

        A region of all foreground labels is not named twice. In the pancreas task the lesion is the only other one.
        """
        foreground = self.scheme.foreground
        named = {name: value if isinstance(value, tuple) else (value,) for name, value in self.scheme.labels.items()}
        parts = {name: tuple(sorted({*values} - {0})) for name, values in named.items()}
        others = {name: values for name, values in parts.items() if values not in ((), foreground)}
        if self.is_pancreas:
            others = {"lesion": others["lesion"]}
        return {WHOLE: foreground, **others}

    @property
    def is_pancreas(self) -> bool:
        """Whether labels and classes are those of the pancreas task, which has targets; regions may be used."""
        others = [name for name in self.labels if name not in ("background", "lesion", "ignore")]
        return (
            self.scheme.labels.get("lesion") in (2, (2,))
            and self.scheme.foreground == (1, 2)
            and len(others) == 1
            and "pancreas" in others[0]
            and self.class_names in ((), PANCREAS_CLASSES)
        )

    @property
    def image_ending(self) -> str:
        """How the name of a case's first channel ends."""
        return f"_0000{self.file_ending}"

    def image_endings(self) -> list[str]:
        """How the names of a case's channels end."""
        return [f"_{channel:04d}{self.file_ending}" for channel in range(len(self.channel_names))]

    def case_name(self, filename: str) -> str:
        """Name of a case from the name of its first image or its mask, with or without folders."""
        name = PurePosixPath(filename.replace("\\", "/")).name
        return name.removesuffix(self.image_ending).removesuffix(self.file_ending)

    def files_by_case(self, paths: Iterable[Path]) -> tuple[dict[str, dict[int, list[Path]]], dict[str, list[Path]]]:
        """Tell images and masks apart by their names.

        A name that ends like a channel's belongs to a mask if it has an image of its own, or no first channel is there.

        Args:
            paths: Files that have the file ending.

        Returns:
            The images of each case by channel, and the masks of each case.
        """
        images: dict[str, dict[int, list[Path]]] = {}
        masks: dict[str, list[Path]] = {}
        by_stem = [(path.name.removesuffix(self.file_ending), path) for path in paths]
        stems = {stem for stem, _ in by_stem}
        for stem, path in by_stem:
            match = _CHANNEL.fullmatch(stem)
            is_image = match and int(match[2]) < len(self.channel_names) and f"{match[1]}_0000" in stems
            if match and is_image and f"{stem}_0000" not in stems:
                images.setdefault(match[1], {}).setdefault(int(match[2]), []).append(path)
            else:
                masks.setdefault(stem, []).append(path)
        return images, masks

    def with_classes(self, classes: Iterable[str]) -> Task:
        """Take the classes of the cases where none are given."""
        return self if self.class_names else replace(self, class_names=class_order(classes))

    def with_regions(self, regions: Mapping[str, Sequence[str]]) -> Task:
        """Replace labels by regions.

        Args:
            regions: Labels of each region, by name; of regions that overlap, the larger one first.

        Raises:
            ValueError: For labels that are not there or already regions, or where no label is painted by a region.
        """
        if self.regions_class_order is not None:
            raise ValueError("regions must be given once: the labels of dataset.json are regions already")
        known = {name: value for name, value in self.labels.items() if name not in ("background", "ignore")}
        if unknown := [label for labels in regions.values() for label in labels if label not in known]:
            raise ValueError(f"regions must consist of the labels {', '.join(known)}, got {', '.join(unknown)}")
        values = [sorted({known[label] for label in labels}) for labels in regions.values()]
        order = []
        for place, region in enumerate(values):
            painted = [value for value in region if not any(value in later for later in values[place + 1 :])]
            if len(painted) != 1:
                raise ValueError(
                    f"each region must have one label that no later region has, and paints it; {list(regions)[place]} "
                    f"has {len(painted)}: give larger regions first"
                )
            order += painted
        if set(order) != set(known.values()):
            raise ValueError(f"every label must be painted by a region; these are not: {_unpainted(known, order)}")
        kept = {name: value for name, value in self.labels.items() if name in ("background", "ignore")}
        labels = {"background": 0, **dict(zip(regions, values, strict=True)), **kept}
        return replace(self, labels=labels, regions_class_order=tuple(order))

    def describe(self) -> dict[str, Any]:
        """Give the entries of dataset.json."""
        order = {} if self.regions_class_order is None else {"regions_class_order": list(self.regions_class_order)}
        return {
            "channel_names": {str(number): name for number, name in enumerate(self.channel_names)},
            "labels": dict(self.labels),
            **order,
            "file_ending": self.file_ending,
            "class_names": list(self.class_names),
        }


def _unpainted(known: Mapping[str, int], order: Sequence[int]) -> str:
    return ", ".join(name for name, value in known.items() if value not in order)


PANCREAS_CLASSES = ("0", "1", "2")

PANCREAS = Task(
    channel_names=("CT",),
    labels={"background": 0, "pancreas": 1, "lesion": 2},
    regions_class_order=None,
    file_ending=".nii.gz",
    class_names=PANCREAS_CLASSES,
    class_folder="subtype",
    quiz_names=True,
)


def read_task(path: Path) -> Task:
    """Read a dataset.json, as nnU-Net wants it; an entry `class_names` lists the classes.

    Raises:
        DatasetError: Where it cannot be read, or an entry is missing or not supported.
    """
    try:
        content = json.loads(path.read_bytes())
        channels = content["modality" if "modality" in content else "channel_names"]
        order = content.get("regions_class_order")
        classes = content.get("class_names", [])
        if not isinstance(classes, list) or len(set(map(str, classes))) != len(classes) or len(classes) == 1:
            raise DatasetError(f"class_names must be a list of two or more different names, got {classes!r:.80}")
        return Task(
            channel_names=tuple(str(channels[key]) for key in sorted(channels, key=int)),
            labels=content["labels"],
            regions_class_order=None if order is None else tuple(order),
            file_ending=str(content["file_ending"]),
            class_names=class_order(map(str, classes)),
        )
    except OSError as error:
        raise DatasetError(f"{path}: it cannot be read: {error.strerror or error}; check the path") from error
    except (DatasetError, ModelError) as error:
        raise DatasetError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path}: it must be JSON with channel_names, labels and file_ending, as nnU-Net's dataset.json: "
            f"{type(error).__name__}: {error}"
        ) from error


def find_task(source: Path, given: Path | None = None) -> Task:
    """Read the dataset.json that is given or lies in a folder; without one it is the pancreas task."""
    own = source / DATASET_FILE
    return read_task(given or own) if given is not None or own.is_file() else PANCREAS
