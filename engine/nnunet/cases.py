"""What nnU-Net's predictor is given, as cases that an engine can prepare: files, arrays, preprocessed arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import VolumeError
from ..model.plans import Plan
from ..pipeline.loading import ExactLoader, Scan
from ..pipeline.normalization import Normalization
from ..pipeline.preprocessing import Case
from ..pipeline.resampling import GridMap, grid_map
from ..pipeline.steps import Prepared, Request
from ..pipeline.timing import Timings
from ..scans.volume import Volume

RAS = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
"""Direction of an array whose axes (z, y, x) run to Superior, Anterior and Right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCase:
    """A case in files.

    Args:
        files: One for each channel.
        previous: Label file of a cascade's previous stage.
        output: Path of the results without ending; None gives them back.
    """

    files: Sequence[str]
    previous: str | None
    output: str | None

    def prepare(self, loader: ExactLoader, plan: Plan) -> Prepared:
        """Read and preprocess it."""
        files = [os.fspath(file) for file in self.files]
        return loader.load(Request(files if len(files) > 1 else files[0], self.previous))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayCase:
    """A case in memory, on the axes of nnU-Net's reader.

    Args:
        image: (C, Z, Y, X).
        properties: nnU-Net's; "spacing" in mm (z, y, x) is enough. What preprocessing finds is added, as nnU-Net does.
        previous: (Z, Y, X) or (1, Z, Y, X) labels of a cascade's previous stage.
        output: Path of the results without ending; None gives them back.
    """

    image: np.ndarray
    properties: dict[str, Any]
    previous: np.ndarray | None
    output: str | None

    def prepare(self, loader: ExactLoader, plan: Plan) -> Prepared:
        """Preprocess it."""
        if "spacing" not in self.properties:
            raise ValueError("properties must have 'spacing', in mm (z, y, x), got " + _names(self.properties))
        volume = Volume.from_array(
            np.asarray(self.image),
            self.properties["spacing"],
            name="image",
            **({"direction": RAS} if plan.reorient else {}),
        )
        if volume.array.shape[0] != len(plan.channels):
            raise VolumeError(
                f"an image must have {len(plan.channels)} channels, (C, Z, Y, X), got shape {np.shape(self.image)}"
            )
        prepared = loader.prepare(
            Scan(stored=volume, volume=volume, previous=self._previous(plan, volume)), Timings(loader.device)
        )
        for name in ("shape_before_cropping", "bbox_used_for_cropping", "shape_after_cropping_and_before_resampling"):
            self.properties[name] = prepared.properties[name]
        return prepared

    def _previous(self, plan: Plan, volume: Volume) -> np.ndarray | None:
        if plan.previous_stage is None or self.previous is None:
            if plan.previous_stage is not None:
                raise VolumeError(f"this model continues from the labels of {plan.previous_stage}; give them too")
            return None
        labels = np.asarray(self.previous)
        labels = labels[0] if labels.ndim == 4 else labels
        if labels.shape != volume.array.shape[1:]:
            raise VolumeError(
                f"labels of the previous stage must lie on the image's grid, {volume.array.shape[1:]}; "
                f"got {labels.shape}"
            )
        return labels.astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessedCase:
    """A case that nnU-Net's preprocessing has been through.

    Args:
        data: (C, Z, Y, X) on the network's grid and axes, labels of a previous stage as channels.
        properties: nnU-Net's, or None where only logits are wanted.
        output: Path of the results without ending; None gives them back.
    """

    data: Tensor
    properties: Mapping[str, Any] | None
    output: str | None = None

    @classmethod
    def of_item(cls, item: Mapping[str, Any]) -> PreprocessedCase:
        """Take what one of nnU-Net's iterators gives: data may be the name of a file, which is removed."""
        data = item["data"]
        if isinstance(data, str):
            file, data = data, np.load(data)
            os.remove(file)
        return cls(data=torch.as_tensor(data), properties=item["data_properties"], output=item["ofile"])

    def prepare(self, loader: ExactLoader, plan: Plan) -> Prepared:
        """Put it where planes are made."""
        timings = Timings(loader.device)
        with timings("preprocess"):
            case = case_of(self.data, self.properties, plan).to(loader.device)
        volume = Volume.from_array(np.empty((1, *case.full_shape), np.uint8), (1.0, 1.0, 1.0))
        return Prepared(
            geometry=volume.geometry, properties=self.properties or {}, warnings=(), case=case, wait=lambda: None,
            timings=timings,
        )  # fmt: skip


def lists_of_folder(folder: str, ending: str) -> list[list[str]]:
    """Find the cases in a folder, and the files of the channels of each, as nnU-Net does.

    Note:
        nnU-Net: create_lists_from_splitted_dataset_folder, which starts twelve processes for it; to fork a process that
        has threads may never end.
    """
    cases: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(ending) and os.path.isfile(os.path.join(folder, name)):
            files = cases.setdefault(name[: -len(ending) - 5], [])
            if re.fullmatch(r"_\d\d\d\d", name[len(name) - len(ending) - 5 : -len(ending)]):
                files.append(os.path.join(folder, name))
    return [cases[name] for name in sorted(cases)]


AnyCase = FileCase | ArrayCase | PreprocessedCase


class Cases:
    """What stands for nnU-Net's iterators of preprocessed cases: nothing is done before it is needed.

    Args:
        cases: The cases.
        loader: Prepares them.
        plan: The model's.
        readers: How many are prepared at once, ahead of the network.
    """

    def __init__(self, cases: Sequence[FileCase | ArrayCase], loader: ExactLoader, plan: Plan, readers: int) -> None:
        self._left = iter(cases)
        self._loader, self._plan, self.readers = loader, plan, readers

    def take(self) -> Iterator[AnyCase]:
        """Give the cases that are left."""
        yield from self._left

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """Preprocess the next case whole.

        Returns:
            "data" (C, Z, Y, X) float32, "data_properties" and "ofile", as nnU-Net's iterators give them.
        """
        case = next(self._left)
        prepared = case.prepare(self._loader, self._plan)
        prepared.wait()
        of_case = prepared.case
        data = torch.cat([planes.cpu() for planes in of_case.planes([(0, of_case.shape[0])])], dim=1)
        properties = case.properties if isinstance(case, ArrayCase) else dict(prepared.properties)
        return {"data": data, "data_properties": properties, "ofile": case.output}


def case_of(data: Tensor, properties: Mapping[str, Any] | None, plan: Plan) -> Case:
    """Describe what nnU-Net's preprocessing has been through, so that nothing is left to do but to come back.

    Args:
        data: (C, Z, Y, X) on the network's grid and axes.
        properties: nnU-Net's; None where no label is wanted, and the way back need not be known.
        plan: The model's.

    Raises:
        ValueError: Where the properties lack something.
    """
    grid = GridMap.identity(data.shape[1:])
    full_shape = cropped_shape = grid.shape
    box = [(0, n) for n in grid.shape]
    spacing = (1.0, 1.0, 1.0)
    if properties is not None:
        try:
            spacing = [properties["spacing"][axis] for axis in plan.transpose_forward]
            full_shape = tuple(map(int, properties["shape_before_cropping"]))
            cropped_shape = tuple(map(int, properties["shape_after_cropping_and_before_resampling"]))
            box = [(int(start), int(stop)) for start, stop in properties["bbox_used_for_cropping"]]
        except KeyError as error:
            raise ValueError(
                f"properties must have what nnU-Net's preprocessing notes, such as {error}; got {_names(properties)}"
            ) from error
    back = grid
    if properties is not None:
        back = grid_map(plan.resampling_logits, grid.shape, cropped_shape, plan.spacing_3d(spacing[0]), spacing)
    return Case(
        image=data if data.dtype in (torch.float32, torch.int16, torch.uint8) else data.float(),
        normalizations=(Normalization(),) * len(data), mask=None, grid=grid, limits=(None, None), previous=None,
        previous_labels=(), logits_grid=back, box=tuple(box), full_shape=full_shape,  # type: ignore[arg-type]
        transpose_forward=plan.transpose_forward, device=data.device,
    )  # fmt: skip


def _names(properties: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, properties)) or "nothing"
