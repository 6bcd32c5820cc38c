"""What a network's encoder tells about the class in tiles around the lesion, in place of the sliding window's tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnturbo.engine.model.heads import FocusPooling, focus_map
from nnturbo.engine.model.plans import Plan
from nnturbo.engine.pipeline.preprocessing import Case
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

BOX_MM = 48.0
FLIPS = ((3,), (4,), (3, 4))
SHIFTS = ((-0.2, 0.0, 0.0), (0.2, 0.0, 0.0), (0.0, 0.2, 0.2))
"""Of tiles beside the one around the lesion, as shares of the patch."""

AROUND = "a tile around the predicted lesion"
BOX = f"the same tile, averages over {BOX_MM:.0f} mm in place of the whole tile"
VIEWS = "the same tile, mean over four mirror views"
SEVERAL = "mean over four tiles around the predicted lesion"
TRUE_CENTRE = "a tile around the true lesion, predicted outline"
TRUE_OUTLINE = "a tile around the true lesion, true outline"


class LesionTiles:
    """Pools features of tiles around the lesion of a scan, as a classifier fitted on them would get them.

    Args:
        network: `MultiTaskUNet` in evaluation mode.
        plan: Of the network.
        stages: Stages of the encoder to pool.
    """

    def __init__(self, network: Any, plan: Plan, stages: Sequence[int]) -> None:
        self._network, self._patch, self._stages = network, plan.patch_size_3d, stages
        self._box = [max(1, round(BOX_MM / side)) for side in plan.spacing]
        self._pooling = FocusPooling(stages)

    @torch.inference_mode()
    def features(self, case: Case, ours: NDArray[Any], truth: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
        """Pool by way.

        Args:
            case: The preprocessed scan, without a crop.
            ours: (Z, Y, X) predicted segmentation of the scan; the lesion is 2.
            truth: The true one.

        Returns:
            Features (F,) of each way; 3 times the channels of all stages.
        """
        if case.full_shape != tuple(stop - start for start, stop in case.box) or case.transpose_forward != (0, 1, 2):
            raise ValueError("tiles around the lesion are made for scans without a crop, in the network's axis order")
        scan, outline = torch.cat(list(case.planes([(0, case.shape[0])])), 1), _to_grid(truth == 2, case.shape)
        missing = [max(0, patch - size) for patch, size in zip(self._patch, case.shape, strict=True)]
        pad = [width for total in reversed(missing) for width in (total // 2, total - total // 2)]
        scan, outline = F.pad(scan, pad), F.pad(outline, pad)
        scale = np.array(case.shape) / ours.shape
        predicted, true = (_centre(labels) * scale + np.array(missing) // 2 for labels in (ours, truth))
        beside = [predicted + np.array(shift) * self._patch for shift in SHIFTS]
        places = [self._tile(centre, scan.shape[1:]) for centre in (predicted, *beside, true)]
        tiles = torch.stack([scan[(slice(None), *place)] for place in places])
        features = self._network.encoder(torch.cat([*(tiles[:1].flip(axes) for axes in FLIPS), tiles]))
        focus = focus_map(self._network.decoder(features).float(), self._network.scheme)
        pooled = self._pooling(features, focus)
        views, around, at_truth = pooled[: len(FLIPS) + 1], pooled[len(FLIPS) : -1], pooled[-1]
        exact = self._pooling([feature[-1:] for feature in features], outline[places[-1]][None, None])[0]
        box = self._box_around(predicted - [place.start for place in places[0]])
        first = [feature[len(FLIPS)] for feature in features]
        found = {
            AROUND: around[0],
            BOX: self._with_box(first, around[0], box),
            VIEWS: views.mean(0),
            SEVERAL: around.mean(0),
            TRUE_CENTRE: at_truth,
            TRUE_OUTLINE: exact,
        }
        return {way: values.double().numpy() for way, values in found.items()}

    def _tile(self, centre: NDArray[np.float64], shape: Sequence[int]) -> tuple[slice, ...]:
        """The tile around a place, moved into the grid."""
        starts = np.clip(np.rint(centre - np.array(self._patch) / 2).astype(int), 0, np.array(shape) - self._patch)
        return tuple(slice(start, start + patch) for start, patch in zip(starts.tolist(), self._patch, strict=True))

    def _box_around(self, centre: NDArray[np.float64]) -> Tensor:
        """1 within the box around a place of a tile, else 0; (1, *patch)."""
        box, middle = torch.zeros(1, *self._patch), np.clip(centre, 0, np.array(self._patch) - 1)
        start, stop = (np.rint(middle + sign * np.array(self._box) / 2).astype(int) for sign in (-1, 1))
        box[(0, *(slice(max(0, low), high) for low, high in zip(start.tolist(), stop.tolist(), strict=True)))] = 1
        return box

    def _with_box(self, features: Sequence[Tensor], pooled: Tensor, box: Tensor) -> Tensor:
        """Replace the averages over a tile, in its pooled features, by averages over a box."""
        parts, at = [], 0
        for stage in self._stages:
            feature = features[stage].float()
            width, (z, y, x) = feature.shape[0], feature.shape[1:]
            weights = F.adaptive_avg_pool3d(box, (z, y, x))
            parts += [(feature * weights).sum((1, 2, 3)) / weights.sum(), pooled[at + width : at + 3 * width]]
            at += 3 * width
        return torch.cat(parts)


def _centre(segmentation: NDArray[Any]) -> NDArray[np.float64]:
    """Centre of the lesion in voxels; of the pancreas where there is no lesion, of the scan where there is neither."""
    for mask in (segmentation == 2, segmentation > 0):
        if mask.any():
            return np.array([axis.mean() + 0.5 for axis in np.nonzero(mask)])
    return np.array(segmentation.shape) / 2


def _to_grid(mask: NDArray[np.bool_], shape: Sequence[int]) -> Tensor:
    """Resample a mask to shares in 0 to 1."""
    return F.interpolate(torch.from_numpy(mask)[None, None].float(), list(shape), mode="trilinear")[0, 0]


def columns(rows: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """Stack the features of many scans by way, (N, F) each."""
    return {way: np.array([row[way] for row in rows]) for way in rows[0]}
