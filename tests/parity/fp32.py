"""nnU-Net with its fp16 sums made fp32, and a bound on what the fp16 sums can have moved a logit by."""

from collections.abc import Sequence

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor

CPU = torch.device("cpu")
SIGMA_SCALE = 1 / 8
PEAK_WEIGHT = 10.0
FP16_HALF_EPS = 2.0**-11
"""Largest relative error of rounding to fp16, where numbers are normal."""
FP16_HALF_QUANTUM = 2.0**-25
"""Largest absolute error of rounding to fp16, where they are subnormal."""
SECOND_ORDER = 1.02
"""Room for products of errors, at most 27 roundings of a sum each."""

Slicer = tuple[slice | int, ...]


class Fp32Predictor(nnUNetPredictor):
    """nnU-Net's predictor with the tile weights, the sums and so the resampled logits in fp32 instead of fp16."""

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Predict the logits (K, Z, Y, X) in fp32."""
        return self.predict_logits_and_bounds(data)[0]

    def predict_logits_and_bounds(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Predict in fp32, and bound how far nnU-Net's own logits are from that.

        Args:
            data: Preprocessed scan, (C, Z, Y, X).

        Returns:
            Logits, and the bound on nnU-Net's rounding of each; both (K, Z, Y, X), float32.
        """
        stacked = super().predict_logits_from_preprocessed_data(data)
        logits, bounds = stacked.chunk(2)
        return logits.contiguous(), bounds.contiguous()

    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[Slicer], do_on_device: bool = True
    ) -> Tensor:
        del do_on_device  # always the CPU
        weight, stock_weight = self._tile_weight(torch.float32), self._tile_weight(torch.float16)
        logits = torch.zeros(self.label_manager.num_segmentation_heads, *data.shape[1:])
        weights = torch.zeros(data.shape[1:])
        stock_sums = Fp16Sums(logits.shape)
        for slicer in slicers:
            tile = self._internal_maybe_mirror_and_predict(data[slicer][None].contiguous())[0]
            logits[slicer] += weight * tile
            weights[slicer[1:]] += weight
            stock_sums.add(slicer, tile, stock_weight)
        logits /= weights
        return torch.cat((logits, stock_sums.bounds(logits, n_folds=len(self.list_of_parameters))))

    def _tile_weight(self, dtype: torch.dtype) -> Tensor:
        patch_size = tuple(self.configuration_manager.patch_size)
        return compute_gaussian(patch_size, SIGMA_SCALE, PEAK_WEIGHT, dtype=dtype, device=CPU)


class Fp16Sums:
    r"""What bounds the rounding in nnU-Net's sums over tiles, kept in float64.

    Note:
        nnU-Net adds the n tiles p over a voxel with fp16 weights h, rounding each sum to fp16, and divides by the
        weights' sum, rounded likewise. Rounding x moves it by u(x) = max(2^-25, 2^-11 |x|) at most. With
        L the fp32 logit, S = sum(p h), H = sum(h) and A = sum(|p| h), exact, nnU-Net's logit is within

            |S/H - L|  +  1.02 (n u(A) / H + (n - 1) 2^-11 |S/H|)  +  r u(S/H)

        of L. The first term is the rounding of the weights, the second that of the two sums, the last that of the
        quotient, r = 1, and of adding and dividing F > 1 folds, r = F + 1. Near the scan's edges H falls below 2^-14,
        where fp16 numbers are subnormal: there u(A) / H, and so nnU-Net's error, can be as large as the logit.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.sums = torch.zeros(shape, dtype=torch.float64)
        self.absolute_sums = torch.zeros(shape, dtype=torch.float64)
        self.weights = torch.zeros(shape[1:], dtype=torch.float64)
        self.counts = torch.zeros(shape[1:], dtype=torch.float64)

    def add(self, slicer: Slicer, tile: Tensor, weight: Tensor) -> None:
        """Add a tile (K, *patch) with nnU-Net's weight for it."""
        weighted = tile.double() * weight.double()
        self.sums[slicer] += weighted
        self.absolute_sums[slicer] += weighted.abs()
        self.weights[slicer[1:]] += weight.double()
        self.counts[slicer[1:]] += 1

    def bounds(self, logits: Tensor, n_folds: int) -> Tensor:
        """Bound nnU-Net's distance from fp32 logits (K, Z, Y, X); float32."""
        means = self.sums / self.weights
        weighting = (means - logits).abs()
        summing = self.counts * fp16_rounding(self.absolute_sums) / self.weights
        norming = (self.counts - 1) * FP16_HALF_EPS * means.abs()
        roundings = 1 if n_folds == 1 else n_folds + 1
        return (weighting + SECOND_ORDER * (summing + norming) + roundings * fp16_rounding(means)).float()


def fp16_rounding(x: Tensor) -> Tensor:
    """Bound the error of rounding to fp16."""
    return (FP16_HALF_EPS * x.abs()).clamp_min(FP16_HALF_QUANTUM)
