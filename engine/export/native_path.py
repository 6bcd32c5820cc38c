"""Describes the path around the network as data, for the C library: `path.json` in bundles of the native backend."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..files import write_json
from ..model.mirroring import mirror_views
from ..model.plans import NormalizationScheme, Plan
from ..model.resampling_function import Resampling

logger = logging.getLogger(__name__)

SCHEMA = 1
NATIVE_PATH_FILE = "path.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedChannel:
    """How one channel is normalised; numbers that are None do not count for the scheme."""

    scheme: str
    use_mask: bool
    low: float | None
    high: float | None
    mean: float | None
    std: float | None

    @classmethod
    def of(cls, channel: NormalizationScheme) -> DescribedChannel:
        """Describe a plan's channel."""
        numbers = (channel.low, channel.high, channel.mean, channel.std)
        low, high, mean, std = numbers if channel.scheme == "CTNormalization" else (None,) * 4
        return cls(scheme=channel.scheme, use_mask=channel.use_mask, low=low, high=high, mean=mean, std=std)


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedResampling:
    """As `Resampling`, of which labels alone need `majority`.

    Attributes:
        threshold: None for infinity, which JSON does not have.
    """

    function: str
    order: int
    order_coarse: int
    separate: bool | None
    threshold: float | None
    mode: str
    mode_coarse: str

    @classmethod
    def of(cls, resampling: Resampling) -> DescribedResampling:
        """Describe one of a plan's functions.

        Raises:
            ModelError: For a threshold that is minus infinity, which nobody means.
        """
        threshold = resampling.threshold
        if threshold == -math.inf:
            raise ModelError("separate_z_anisotropy_threshold must be above minus infinity for a native bundle")
        return cls(
            function=resampling.function,
            order=resampling.order,
            order_coarse=resampling.order_coarse,
            separate=resampling.separate,
            threshold=threshold if math.isfinite(threshold) else None,
            mode=resampling.mode,
            mode_coarse=resampling.mode_coarse,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedLabel:
    """A label or region, and its values in a segmentation."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedLabels:
    """The meaning of the network's outputs, as in `LabelScheme`; `bits` of a segmentation's voxels are 8 or 16."""

    num_outputs: int
    regions_class_order: tuple[int, ...] | None
    bits: int
    names: tuple[DescribedLabel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedClasses:
    """The classes of a case, and the channels of the segmentation output whose voxels decide it."""

    class_names: tuple[str, ...]
    focus_channels: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedPath:
    """Content of `path.json`.

    Attributes:
        schema: Version of this format.
        patch_size, spacing, transpose_forward, reader: As in `Plan`.
        channels: One per image channel.
        views: Mirror views of a tile, the unflipped one first; spatial axes of a 3D tile, counted from 0.
        resampling_data, resampling_logits: Functions of the plan.
        labels: Meaning of the logits.
        classification: Meaning of the class logits, or None.
    """

    schema: int
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    transpose_forward: tuple[int, int, int]
    channels: tuple[DescribedChannel, ...]
    views: tuple[tuple[int, ...], ...]
    resampling_data: DescribedResampling
    resampling_logits: DescribedResampling
    labels: DescribedLabels
    classification: DescribedClasses | None
    reader: str


def describe_path(plan: Plan, mirror_axes: Sequence[int]) -> DescribedPath:
    """Describe the path of a plan.

    Args:
        plan: The model's plan.
        mirror_axes: Axes of the patch that the model was trained to be mirrored along.

    Raises:
        ModelError: For a plan that needs more than a scan and its spacing.
    """
    if plan.previous_stage is not None:
        raise ModelError(
            f"the C library takes a scan alone; this configuration continues from the labels of {plan.previous_stage}: "
            "use nnturbo predict, or a model that is no cascade"
        )
    if plan.reorient:
        raise ModelError(
            "the C library takes a scan without its orientation; this model was trained on reoriented scans: use "
            "nnturbo predict"
        )
    if plan.head is not None:
        raise ModelError(
            "the C library runs nnturbo's own classification heads; this model's head is of another program: use "
            "nnturbo predict"
        )
    labels, scheme = plan.labels, plan.classification
    return DescribedPath(
        schema=SCHEMA,
        patch_size=plan.patch_size,
        spacing=plan.spacing,
        transpose_forward=plan.transpose_forward,
        channels=tuple(map(DescribedChannel.of, plan.channels)),
        views=mirror_views(mirror_axes, len(plan.patch_size)),
        resampling_data=DescribedResampling.of(plan.resampling_data),
        resampling_logits=DescribedResampling.of(plan.resampling_logits),
        labels=DescribedLabels(
            num_outputs=labels.num_outputs,
            regions_class_order=labels.regions_class_order,
            bits=8 * np.dtype(labels.dtype).itemsize,
            names=tuple(DescribedLabel(name=name, values=values) for name, values in labels.written.items()),
        ),
        classification=scheme
        and DescribedClasses(class_names=scheme.class_names, focus_channels=scheme.focus_channels),
        reader=plan.reader,
    )


def write_native_path(plan: Plan, mirror_axes: Sequence[int], folder: Path) -> None:
    """Write `path.json` into a bundle, unless only Python can run the model."""
    try:
        described = describe_path(plan, mirror_axes)
    except ModelError as error:
        logger.warning("no %s, so the C library cannot use this bundle: %s", NATIVE_PATH_FILE, error)
        return
    write_json(folder / NATIVE_PATH_FILE, asdict(described))
