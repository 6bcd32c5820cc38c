"""nnU-Net's `plans.json` and `dataset.json`, read into frozen dataclasses and checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..scans.image_header import IMAGE_ENDINGS
from ..scans.pictures import PICTURE_READERS
from .architecture import Architecture, parse_architecture
from .classification import ClassificationScheme
from .head_description import HEAD_KEY, HeadDescription
from .json_values import take
from .labels import LabelScheme, parse_labels
from .resampling_function import Resampling, parse_resampling

PLANS, DATASET = "plans.json", "dataset.json"
"""Names of the two files in a model folder; nnU-Net leaves both with its predictions."""

NORMALIZATIONS = (
    "CTNormalization",
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)

READERS = {
    "SimpleITKIO": False,
    "NibabelIO": False,
    "SimpleITKIOWithReorient": True,
    "NibabelIOWithReorient": True,
    "NaturalImage2DIO": False,
    "Tiff3DIO": False,
}
"""nnU-Net's readers, and whether they turn scans to RAS for the network."""

FILE_ENDINGS = {
    **dict.fromkeys(("SimpleITKIO", "SimpleITKIOWithReorient"), IMAGE_ENDINGS),
    **dict.fromkeys(("NibabelIO", "NibabelIOWithReorient"), (".nii.gz", ".nii")),
    **PICTURE_READERS,
}
"""File endings of each reader, in lower or upper case. A data set names one of them, and result files have it."""

LARGEST_PATCH_VOXELS = 2**31

MULTI_TASK_NETWORK = "nnturbo.engine.network.MultiTaskUNet"
"""The class that the plans of multi-task models name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizationScheme:
    """How one input channel is normalised.

    Args:
        scheme: One of `NORMALIZATIONS`.
        use_mask: Whether only the non-zero region is measured and changed (z-score only).
        low, high, mean, std: Clip bounds and statistics of the training set's foreground (CT only).
    """

    scheme: str
    use_mask: bool
    low: float = -math.inf
    high: float = math.inf
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that inference needs from `plans.json` and `dataset.json` for one configuration.

    Args:
        configuration: Its name, such as 3d_fullres.
        patch_size: (z, y, x) voxels; (y, x) for a 2d configuration.
        spacing: mm, in the order of `patch_size`.
        transpose_forward: Axis of the scan that becomes each axis of the network's grid.
        channels: One per image channel.
        channel_names: Their names.
        previous_stage: The configuration whose labels are further input channels, or None.
        reader: nnU-Net's class that read the training scans; one of `READERS`.
        file_ending: File ending of images and segmentations, with the dot.
        classification: Classes and head of a multi-task network, or None.
        head: Description of its head, if another program than nnturbo trained it.
    """

    dataset_name: str
    configuration: str
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    transpose_forward: tuple[int, int, int]
    channels: tuple[NormalizationScheme, ...]
    channel_names: tuple[str, ...]
    labels: LabelScheme
    resampling_data: Resampling
    resampling_segmentation: Resampling
    resampling_logits: Resampling
    architecture: Architecture
    previous_stage: str | None
    reader: str
    file_ending: str
    classification: ClassificationScheme | None = None
    head: HeadDescription | None = None

    @property
    def reorient(self) -> bool:
        """Whether the network expects the scan turned to RAS."""
        return READERS[self.reader]

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: images, and one per foreground label of a previous stage."""
        return len(self.channels) + (len(self.labels.foreground) if self.previous_stage else 0)

    @property
    def patch_size_3d(self) -> tuple[int, int, int]:
        """The patch as (z, y, x); one slice deep for a 2d configuration."""
        return (1, *self.patch_size)[-3:]  # type: ignore[return-value]

    def spacing_3d(self, slice_spacing: float) -> tuple[float, float, float]:
        """The network's spacing as (z, y, x) in mm; a 2d configuration keeps the scan's own slice spacing."""
        return (slice_spacing, *self.spacing)[-3:]  # type: ignore[return-value]


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def _numbers(source: Mapping[str, Any], key: str, where: str, *, whole: bool = False) -> tuple:
    """Take a list of positive numbers."""
    values = take(source, key, list, where)
    for value in values:
        number = _is_number(value) and value > 0
        if not number or (whole and value != int(value)):
            raise ModelError(
                f"{where}: {key!r} must hold positive {'integers' if whole else 'numbers'}, got {value!r:.80}"
            )
    return tuple(int(value) if whole else float(value) for value in values)


def read_channel_names(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the names of the channels from `dataset.json`, in their order."""
    key = "modality" if "modality" in dataset else "channel_names"
    names = take(dataset, key, (dict, list), "dataset.json")
    return tuple(str(name) for name in (names.values() if isinstance(names, dict) else names))


def _resolve(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Find a configuration, and fill in values that it inherits from others."""
    configurations = take(plans, "configurations", dict, "plans.json")
    chain: list[str] = []
    resolved: dict[str, Any] = {}
    while name not in chain:
        if name not in configurations:
            raise ModelError(f"plans.json must have the configuration {name!r}; it has {', '.join(configurations)}")
        chain.append(name)
        configuration = take(configurations, name, dict, "plans.json: configurations")
        resolved = {**configuration, **resolved}
        if "inherits_from" not in configuration:
            return resolved
        name = str(configuration["inherits_from"])
    raise ModelError(f"plans.json: configurations inherit from each other in a circle: {' -> '.join([*chain, name])}")


def _channel_normalizations(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], count: int
) -> tuple[NormalizationScheme, ...]:
    """Read how each channel is normalised; nnU-Net takes the first entries if there are more than channels."""
    schemes = take(configuration, "normalization_schemes", list, "plans.json")
    masks = take(configuration, "use_mask_for_norm", list, "plans.json")
    if len(schemes) < count or len(masks) < count:
        raise ModelError(
            f"plans.json must name one normalization and one use_mask_for_norm for each of the {count} "
            f"channels of dataset.json, it names {len(schemes)} and {len(masks)}"
        )
    schemes, masks = schemes[:count], masks[:count]
    if not all(isinstance(mask, bool) for mask in masks):
        raise ModelError(f"plans.json: use_mask_for_norm must hold true or false, got {masks!r:.80}")
    properties = plans.get(
        "foreground_intensity_properties_per_channel", plans.get("foreground_intensity_properties_by_modality", {})
    )
    channels = []
    for index, (scheme, mask) in enumerate(zip(schemes, masks, strict=True)):
        if scheme not in NORMALIZATIONS:
            raise ModelError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, the plan names {scheme!r}")
        use_mask = mask and scheme == "ZScoreNormalization"
        if scheme != "CTNormalization":
            channels.append(NormalizationScheme(scheme=scheme, use_mask=use_mask))
            continue
        where = f"plans.json: intensity properties of channel {index}"
        values = take(properties, str(index), dict, "plans.json: foreground_intensity_properties_per_channel")
        keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
        numbers = [take(values, key, (int, float), where) for key in keys]
        if not all(map(_is_number, numbers)) or numbers[-1] < 0:
            raise ModelError(f"{where} must be finite, with a std of at least 0; got {numbers!r:.120}")
        low, high, mean, std = map(float, numbers)
        channels.append(NormalizationScheme(scheme=scheme, use_mask=False, low=low, high=high, mean=mean, std=std))
    return tuple(channels)


def _head(plans: Mapping[str, Any], architecture: Architecture) -> HeadDescription | None:
    """Read the description of a head that another program trained, if there is one."""
    if plans.get(HEAD_KEY) is None:
        return None
    if architecture.class_name == MULTI_TASK_NETWORK:
        raise ModelError(
            f"plans.json: {HEAD_KEY} must be left out for nnturbo's own multi-task network, whose head is known"
        )
    return HeadDescription.from_json(plans[HEAD_KEY])


def _classification(
    architecture: Architecture, labels: LabelScheme, head: HeadDescription | None
) -> ClassificationScheme | None:
    """Say what a multi-task network answers; None for other networks."""
    regions = labels.regions_class_order is not None
    if head is not None:
        where, scheme = HEAD_KEY, head.scheme(len(architecture.encoder_channels), regions)
        shown = (*head.focus_channels, *head.mask_channels)
        if max(shown) >= labels.num_outputs:
            raise ModelError(
                f"{where}: focus_channels and mask must name channels 0 to {labels.num_outputs - 1} of dataset.json's "
                f"labels, got {max(shown)}"
            )
        return scheme
    if architecture.class_name != MULTI_TASK_NETWORK:
        return None
    where = "plans.json: arch_kwargs"
    scheme = ClassificationScheme.parse(take(architecture.arguments, "head", dict, where))
    if max(scheme.focus_channels) >= labels.num_outputs or scheme.regions != (labels.regions_class_order is not None):
        raise ModelError(
            f"{where}: the head's focus_channels {list(scheme.focus_channels)} and regions {scheme.regions} must fit "
            f"the {labels.num_outputs} {'regions' if labels.regions_class_order else 'labels'} of dataset.json"
        )
    return scheme


def _transpose(plans: Mapping[str, Any]) -> tuple[int, int, int]:
    forward = take(plans, "transpose_forward", list, "plans.json")
    if sorted(map(str, forward)) != ["0", "1", "2"] or not all(isinstance(axis, int) for axis in forward):
        raise ModelError(f"plans.json: transpose_forward must be an order of the axes 0, 1, 2, got {forward!r:.80}")
    return tuple(forward)  # type: ignore[return-value]


def parse_plan(plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration_name: str) -> Plan:
    """Read one configuration of a model.

    Args:
        plans: Content of `plans.json`.
        dataset: Content of `dataset.json`.
        configuration_name: Such as 3d_fullres.

    Raises:
        ModelError: Where something is missing, of the wrong kind, or not supported; the text names it.
    """
    configuration = _resolve(plans, configuration_name)
    patch_size, spacing = _patch_and_spacing(configuration)
    reader = read_reader(plans)
    _check_preprocessor(plans, configuration)
    file_ending = _file_ending(dataset, reader)
    names = read_channel_names(dataset)
    previous = configuration.get("previous_stage")
    data, segmentation, logits = (
        _resampling(configuration, kind, is_read=kind != "seg" or previous is not None)
        for kind in ("data", "seg", "probabilities")
    )
    labels, architecture = parse_labels(dataset), parse_architecture(configuration)
    head = _head(plans, architecture)
    return Plan(
        dataset_name=str(plans.get("dataset_name", "unnamed")),
        configuration=configuration_name,
        patch_size=patch_size,
        spacing=spacing,
        transpose_forward=_transpose(plans),
        channels=_channel_normalizations(plans, configuration, len(names)),
        channel_names=names,
        labels=labels,
        resampling_data=data,
        resampling_segmentation=segmentation,
        resampling_logits=logits,
        architecture=architecture,
        previous_stage=None if previous is None else str(previous),
        reader=reader,
        file_ending=file_ending,
        classification=_classification(architecture, labels, head),
        head=head,
    )


def _patch_and_spacing(configuration: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    patch_size = _numbers(configuration, "patch_size", "plans.json", whole=True)
    spacing = _numbers(configuration, "spacing", "plans.json")
    if len(patch_size) not in (2, 3) or len(spacing) != len(patch_size):
        raise ModelError(
            f"plans.json: patch_size and spacing must both have 2 or 3 entries, got {patch_size}, {spacing}"
        )
    if math.prod(patch_size) > LARGEST_PATCH_VOXELS:
        raise ModelError(f"plans.json: a patch must have at most 2^31 voxels, patch_size is {patch_size}")
    return patch_size, spacing


def read_reader(plans: Mapping[str, Any]) -> str:
    """Read which class of nnU-Net's reads scans and labels, one of `READERS`.

    Raises:
        ModelError: For another class.
    """
    reader = str(plans.get("image_reader_writer", "SimpleITKIO"))
    if reader not in READERS:
        raise ModelError(
            f"nnturbo reads volumes as {', '.join(READERS)} do; this model was trained with {reader!r:.80}"
        )
    return reader


def _check_preprocessor(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    for key, known in (("preprocessor_name", "DefaultPreprocessor"), ("label_manager", "LabelManager")):
        named = configuration.get(key, plans.get(key, known))
        if named != known:
            raise ModelError(f"nnturbo does what nnU-Net's {known} does; this model was trained with {named!r:.80}")


def _file_ending(dataset: Mapping[str, Any], reader: str) -> str:
    file_ending = take(dataset, "file_ending", str, "dataset.json")
    if file_ending.lower() not in FILE_ENDINGS[reader]:
        endings = ", ".join(FILE_ENDINGS[reader])
        raise ModelError(f"dataset.json: file_ending must be one of {endings} for {reader}, got {file_ending!r:.80}")
    return file_ending


def _resampling(configuration: Mapping[str, Any], kind: str, *, is_read: bool) -> Resampling:
    """Read how scans ("data"), labels ("seg") or logits ("probabilities") are resampled."""
    arguments = take(configuration, f"resampling_fn_{kind}_kwargs", dict, "plans.json")
    resampling = parse_resampling(take(configuration, f"resampling_fn_{kind}", str, "plans.json"), arguments)
    of_labels = kind == "seg"
    if is_read and resampling.function != "none" and bool(arguments.get("is_seg", False)) is not of_labels:
        raise ModelError(
            f"plans.json: resampling_fn_{kind}_kwargs must have is_seg {str(of_labels).lower()}, got "
            f"{arguments.get('is_seg')!r:.80}: nnturbo resamples {'labels' if of_labels else 'numbers'} there"
        )
    return resampling
