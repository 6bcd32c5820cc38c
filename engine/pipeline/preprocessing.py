"""Turns a scan into planes of the network's grid: transpose, crop to non-zero, normalise, resample.

Planes are made when the sliding window needs them, so the whole resampled scan is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...kernels import normalize
from ..errors import VolumeError
from ..model.plans import Plan
from ..scans.volume import Volume
from .device_statistics import extremes as extremes_on_device
from .label_maps import resample_label_map
from .normalization import Normalization, choose_normalization, normalize_within
from .resampling import GridMap, grid_map, resample_rows

LARGEST_GROWTH = 1000
"""Largest growth of the number of voxels in resampling; more means that a spacing is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A cropped scan with all that is needed to make planes of the network's grid, and to map logits back.

    Args:
        image: (C, Z, Y, X), the cropped scan in the network's axis order, on the device, of any number type and
            strides.
        normalizations: One per channel.
        mask: (Z, Y, X) bool on the device, the non-zero region with holes filled; None if no channel is normalised
            within it.
        grid: Map from the cropped scan to the network's grid.
        limits: Normalised range to which resampling clips (`resampling.value_range`).
        previous: (Z, Y, X) labels of the previous stage on the network's grid, for cascades.
        previous_labels: Foreground labels of the previous stage, which become input channels.
        logits_grid: Map from the network's grid back to the cropped scan.
        box: Half-open (start, stop) of the crop along each axis.
        full_shape: Shape before cropping.
        transpose_forward: For each axis of `full_shape`, the axis of the scan.
        device: Device on which planes are made.
    """

    image: Tensor
    normalizations: tuple[Normalization, ...]
    mask: Tensor | None
    grid: GridMap
    limits: tuple[Tensor | None, Tensor | None]
    previous: Tensor | None
    previous_labels: tuple[int, ...]
    logits_grid: GridMap
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    full_shape: tuple[int, int, int]
    transpose_forward: tuple[int, int, int]
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size of the network's grid."""
        return self.grid.shape

    @property
    def num_channels(self) -> int:
        """Channels of the network's input."""
        return len(self.image) + (0 if self.previous is None else len(self.previous_labels))

    def to(self, device: torch.device) -> Case:
        """Move the case to another device, in a type that the device can read."""
        low, high = self.limits
        return replace(
            self,
            image=self.image.to(device, _readable_type(self.image.dtype, device)),
            mask=None if self.mask is None else self.mask.to(device),
            limits=(None if low is None else low.to(device), None if high is None else high.to(device)),
            previous=None if self.previous is None else self.previous.to(device),
            device=device,
        )

    def planes(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Make the planes of each half-open z range of the network's grid, in ascending order.

        Yields:
            (C, stop - start, Y, X) float32 on the device.
        """
        for start, stop in ranges:
            low, high = self.grid.operators[0].inputs_of(start, stop)
            image, normalization = self.image[:, low:high], tuple(channel.numbers for channel in self.normalizations)
            if self.mask is not None:
                masked = [channel.masked for channel in self.normalizations]
                image = normalize_within(image, list(normalization), masked, self.mask[low:high])
                normalization = None
            image = resample_rows(
                image, self.grid, rows=(start, stop), offset=low, limits=self.limits, normalization=normalization
            )
            if self.previous is not None:
                labels = self.previous[start:stop]
                image = torch.cat([image, *((labels == label)[None].float() for label in self.previous_labels)])
            yield image


def to_device(image: np.ndarray, device: torch.device) -> Tensor:
    """Turn a scan or a mask into a tensor on a device; on a CPU without a copy, if torch can read the array."""
    if not image.dtype.isnative or image.dtype == np.longdouble:
        image = image.astype(np.float32)
    if not image.flags.writeable or any(stride < 0 for stride in image.strides):
        image = image.copy()
    tensor = torch.from_numpy(image)
    if device.type == "cpu":
        return tensor
    dtype = _readable_type(tensor.dtype, device)
    staged = torch.empty(tensor.shape, dtype=dtype, pin_memory=device.type == "cuda").copy_(tensor)
    return staged.to(device, non_blocking=True)


def _readable_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the type of a scan on a device: CUDA kernels read few types; int16 needs half of float32's transfer."""
    return dtype if device.type == "cpu" or dtype in (torch.int16, torch.uint8, torch.bool) else torch.float32


def nonzero_box(image: np.ndarray) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Smallest box around all voxels with a channel that is not zero; the whole array if all voxels are zero.

    Planes are checked from each end until one is not empty, so a scan without a zero border costs six planes.

    Args:
        image: (C, Z, Y, X).

    Note:
        nnU-Net fills holes in the non-zero mask first (crop_to_nonzero); that cannot change its box.
    """
    box: list[tuple[int, int]] = []
    for axis in range(3):
        planes = np.moveaxis(image, axis + 1, 0)
        start = next((i for i in range(len(planes)) if planes[i].any()), None)
        if start is None:
            return tuple((0, n) for n in image.shape[1:])  # type: ignore[return-value]
        stop = next(i for i in range(len(planes), 0, -1) if planes[i - 1].any())
        box.append((start, stop))
    return tuple(box)  # type: ignore[return-value]


def filled_mask(image: np.ndarray) -> np.ndarray:
    """(Z, Y, X) bool: voxels with a channel that is not zero, and enclosed holes (nnU-Net: create_nonzero_mask)."""
    import SimpleITK as sitk

    mask = sitk.GetImageFromArray(np.any(image != 0, axis=0).astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryFillhole(mask, fullyConnected=False, foregroundValue=1)).astype(bool)


def _limits(
    image: np.ndarray | Tensor,
    mask: np.ndarray | Tensor | None,
    normalizations: Sequence[Normalization],
    grid: GridMap,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Least and greatest normalised value, per channel and, where the grid map clips by slice, per slice.

    Normalising keeps the order of values, so it is enough to normalise the raw extremes. None if nothing is clipped.
    """
    if grid.clip == "none":
        return None, None
    axes = tuple(axis for axis in range(3) if grid.clip == "volume" or axis != grid.last_axis)
    lows, highs = [], []
    for channel, of_channel in zip(image, normalizations, strict=True):
        *extremes, outside = _extremes(channel, mask if of_channel.masked else None, axes)
        low, high = (
            normalize(to_device(e[None], torch.device("cpu")), [of_channel.numbers])[0].numpy() for e in extremes
        )
        if outside is not None:
            low, high = np.where(outside, np.minimum(low, 0), low), np.where(outside, np.maximum(high, 0), high)
        lows.append(low)
        highs.append(high)
    return torch.from_numpy(np.stack(lows)).to(device), torch.from_numpy(np.stack(highs)).to(device)


def _extremes(
    channel: np.ndarray | Tensor, inside: np.ndarray | Tensor | None, axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Compute what `device_statistics.extremes` computes, with numpy if the scan lies in main memory."""
    if isinstance(channel, Tensor):
        assert inside is None or isinstance(inside, Tensor)  # they lie on the same device
        return extremes_on_device(channel, inside, axes)
    if inside is None:
        return channel.min(axes, keepdims=True), channel.max(axes, keepdims=True), None
    low, high = (np.where(inside, channel, fill).astype(np.float32) for fill in (np.inf, -np.inf))
    outside = np.logical_not(np.all(np.asarray(inside), axis=axes, keepdims=True))
    return low.min(axes, keepdims=True), high.max(axes, keepdims=True), outside


def _measures_on(device: torch.device) -> bool:
    """Whether a scan is measured on the device, which needs float64 there."""
    return device.type == "cuda"


def shape_at_spacing(
    shape: list[int], spacing: list[float], new_spacing: list[float], most: int = LARGEST_GROWTH
) -> list[int]:
    """Compute the size of a scan at another spacing (nnU-Net: compute_new_shape); TorchScript can compile this.

    Args:
        shape: (z, y, x) voxels.
        spacing: mm.
        new_spacing: mm, of the model.
        most: Largest growth of the number of voxels.

    Raises:
        ValueError: Where an axis would have no voxel, or the scan would become too large.
    """
    # Python's round is half to even, as in nnU-Net; TorchScript's is too, and gives a float.
    new_shape = [int(round(spacing[axis] / new_spacing[axis] * shape[axis])) for axis in range(3)]  # noqa: RUF046
    if min(new_shape) < 1:
        raise ValueError(
            f"at the model's spacing of {new_spacing} mm the scan must have at least one voxel along each axis; "
            f"{shape} voxels of {spacing} mm become {new_shape}"
        )
    if 1.0 * new_shape[0] * new_shape[1] * new_shape[2] > 1.0 * most * shape[0] * shape[1] * shape[2]:
        raise ValueError(
            f"at the model's spacing of {new_spacing} mm a scan must grow at most {most} times; {shape} voxels of "
            f"{spacing} mm become {new_shape}: check the spacing"
        )
    return new_shape


def preprocess(volume: Volume, plan: Plan, device: torch.device, previous: np.ndarray | None = None) -> Case:
    """Find how a scan maps to the network's grid (nnU-Net: DefaultPreprocessor.run_case_npy).

    Args:
        volume: The scan, with the channels of the plan.
        plan: The model's plan.
        device: Device on which its planes will be made.
        previous: (Z, Y, X) labels of the previous stage on the scan's grid, for cascades.

    Raises:
        VolumeError: Where the scan does not fit the plan.
    """
    _check_dimensions(volume, plan)
    order = plan.transpose_forward
    image = volume.array.transpose(0, *(axis + 1 for axis in order))
    full_shape = image.shape[1:]
    spacing = tuple(volume.spacing[axis] for axis in order)
    box = nonzero_box(image)
    crop = tuple(slice(start, stop) for start, stop in box)
    image = image[(slice(None), *crop)]
    shape = image.shape[1:]

    new_spacing = plan.spacing_3d(spacing[0])
    try:
        new_shape = shape_at_spacing(list(shape), list(spacing), list(new_spacing))
    except ValueError as error:
        raise VolumeError(f"{volume.name}: {error}") from error
    grid = grid_map(plan.resampling_data, shape, new_shape, spacing, new_spacing)

    masked = previous is not None or any(channel.use_mask for channel in plan.channels)
    mask = filled_mask(image) if masked else None
    labels = None
    if previous is not None and mask is not None:
        cropped, mask = _previous_labels(previous.transpose(order)[crop], mask)
        labels = resample_label_map(cropped, plan.resampling_segmentation, new_shape, spacing, new_spacing).to(device)
    on_device = to_device(image, device)
    mask_on_device = None if mask is None else to_device(mask, device)
    measured = (on_device, mask_on_device) if _measures_on(device) else (image, mask)
    normalizations = tuple(
        choose_normalization(channel, data, measured[1], volume.name)
        for channel, data in zip(plan.channels, measured[0], strict=True)
    )
    return Case(
        image=on_device,
        normalizations=normalizations,
        mask=mask_on_device if any(channel.masked for channel in normalizations) else None,
        grid=grid,
        limits=_limits(*measured, normalizations, grid, device),
        previous=labels,
        previous_labels=plan.labels.foreground if previous is not None else (),
        logits_grid=grid_map(plan.resampling_logits, grid.shape, shape, new_spacing, spacing),
        box=box,
        full_shape=full_shape,
        transpose_forward=order,
        device=device,
    )


def _check_dimensions(volume: Volume, plan: Plan) -> None:
    if volume.geometry.is_2d and len(plan.patch_size) != 2:
        raise VolumeError(
            f"{volume.name}: the configuration {plan.configuration} takes 3D scans, got a 2D image: pass a 3D scan, or "
            "use a 2d configuration"
        )


def _previous_labels(cropped: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give a previous stage's labels with -1 around the body, as in nnU-Net, and the body that includes all labels."""
    labels = cropped.astype(np.int32)
    labels[(labels == 0) & ~mask] = -1
    return labels, labels >= 0
