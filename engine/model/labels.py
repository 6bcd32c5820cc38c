"""The meaning of a network's outputs: labels and regions as in `dataset.json`, and the values that nnU-Net writes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelError
from .json_values import take


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScheme:
    """The meaning of the network's outputs.

    Args:
        labels: Name -> value in dataset.json, or values of a region; without "ignore". Segmentations hold `written`.
        regions_class_order: Label that each region paints, in painting order; None for plain labels.
    """

    labels: Mapping[str, int | tuple[int, ...]]
    regions_class_order: tuple[int, ...] | None

    @property
    def foreground(self) -> tuple[int, ...]:
        """Every label value but background, ascending."""
        return tuple(sorted({value for label in self.labels.values() for value in _values(label)} - {0}))

    @property
    def written(self) -> dict[str, tuple[int, ...]]:
        """Name -> its values in a predicted segmentation, ascending; without background.

        Note:
            nnU-Net: LabelManager.convert_probabilities_to_segmentation. Plain labels are numbered without gaps, in the
            order of their values. A region consists of its own label and the labels of regions inside it.
        """
        if self.regions_class_order is None:
            numbers = {value: (number,) for number, value in enumerate(self.foreground, 1)}
            return {name: numbers[value] for name, value in self.labels.items() if isinstance(value, int) and value}
        regions = {name: _values(value) for name, value in self.labels.items() if any(_values(value))}
        painted = list(zip(regions.values(), self.regions_class_order, strict=True))
        return {
            name: tuple(sorted({value for part, value in painted if set(part) <= set(region)} - {0}))
            for name, region in regions.items()
        }

    @property
    def renumbered(self) -> dict[str, tuple[int, ...]]:
        """Entries of `written` whose values differ from dataset.json."""
        written = self.written
        present = {value for values in written.values() for value in values}
        return {
            name: values for name, values in written.items() if set(values) != present & set(_values(self.labels[name]))
        }

    @property
    def remarks(self) -> tuple[str, ...]:
        """Warnings about labels that are written with other values than in dataset.json."""
        listed = ", ".join(f"{name} as {' or '.join(map(str, values))}" for name, values in self.renumbered.items())
        return (f"as in nnU-Net, labels are written by other values than dataset.json's: {listed}",) if listed else ()

    @property
    def num_outputs(self) -> int:
        """Channels of the network's segmentation output."""
        return len(self.foreground) + 1 if self.regions_class_order is None else len(self.regions_class_order)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Data type of a segmentation (nnU-Net: uint16 for 255 or more foreground labels)."""
        return np.uint8 if len(self.foreground) < 255 else np.uint16


def _values(label: int | tuple[int, ...]) -> tuple[int, ...]:
    """Give the values of a label or a region."""
    return label if isinstance(label, tuple) else (label,)


def _label_value(value: Any, what: str, kind: str = "an integer") -> int:
    """Read a label's value; nnU-Net applies int(), so that 1, 1.0 and "1" are the same."""
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = int(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 2**16 or number % 1:
        raise ModelError(f"dataset.json: {what} must be {kind} from 0 to 65535, got {value!r:.80}")
    return int(number)


def _by_name(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Turn labels in the form value -> name, as in nnU-Net v1, into name -> value."""
    if "background" in labels or not all(isinstance(name, str) for name in labels.values()):
        return dict(labels)
    if not all(value.isdecimal() for value in labels):
        return dict(labels)
    named = {"background" if int(value) == 0 else name: int(value) for value, name in labels.items()}
    if len(named) != len(labels):
        raise ModelError(f"dataset.json: labels must have a name of their own each, got {dict(labels)!r:.200}")
    return named


def parse_labels(dataset: Mapping[str, Any]) -> LabelScheme:
    """Read the `labels` and `regions_class_order` of a `dataset.json`.

    Note:
        nnU-Net: LabelManager. It applies int() to each value; fractions, which it cuts off, are refused here. Labels
        in the form value -> name are read here although nnU-Net v2 refuses them, because their meaning is clear.
    """
    raw = _by_name(take(dataset, "labels", dict, "dataset.json"))
    ignore = raw.pop("ignore", None)
    labels: dict[str, int | tuple[int, ...]] = {}
    for name, value in raw.items():
        what, kind = f"label {name!r:.80}", "an integer or a list of them,"
        if isinstance(value, list) and value:
            labels[str(name)] = tuple(_label_value(each, what, kind) for each in value)
        else:
            labels[str(name)] = _label_value(value, what, kind)
    if labels.get("background") != 0:
        raise ModelError(f"dataset.json: labels must have 'background': 0, got {labels.get('background')!r}")
    _check_ignore(ignore, labels)
    if not any(isinstance(value, tuple) and len(value) > 1 for value in labels.values()):
        return LabelScheme(
            labels={n: v[0] if isinstance(v, tuple) else v for n, v in labels.items()}, regions_class_order=None
        )
    scheme = LabelScheme(labels=labels, regions_class_order=_regions_class_order(dataset, raw, labels))
    highest = np.iinfo(scheme.dtype).max
    if max(scheme.regions_class_order or ()) > highest:
        raise ModelError(
            f"dataset.json: regions_class_order must hold values up to {highest}, which nnU-Net writes with so few "
            f"labels, got {list(scheme.regions_class_order or ())!r:.200}: train with smaller values"
        )
    return scheme


def _check_ignore(ignore: Any, labels: Mapping[str, int | tuple[int, ...]]) -> None:
    """Refuse the values of the label "ignore" that nnU-Net refuses."""
    highest = max(max(_values(value)) for value in labels.values())
    if ignore is not None and not (type(ignore) is int and ignore == highest + 1):
        raise ModelError(
            f"dataset.json: label 'ignore' must be the integer after the highest other label, {highest + 1}, got "
            f"{ignore!r:.80}"
        )


def _regions_class_order(
    dataset: Mapping[str, Any], raw: Mapping[str, Any], labels: Mapping[str, int | tuple[int, ...]]
) -> tuple[int, ...]:
    """Read the label that each region paints; `raw` holds the values of `labels` as they are in the file."""
    given = take(dataset, "regions_class_order", list, "dataset.json with regions")
    order = tuple(_label_value(value, "regions_class_order", "integers") for value in given)
    background = [name for name, value in labels.items() if not any(_values(value))]
    for name in background:
        if any(isinstance(value, str) for value in (raw[name] if isinstance(raw[name], list) else [raw[name]])):
            raise ModelError(
                f"dataset.json: beside regions, label {name!r:.80} must be the number 0, got {raw[name]!r:.80}, which "
                f"nnU-Net takes for a region"
            )
    if len(order) != len(labels) - len(background):
        raise ModelError(
            f"dataset.json: regions_class_order must hold one label per region ({len(labels) - len(background)}), "
            f"got {given!r:.200}"
        )
    return order
