"""From painted anatomy to a scan: resolution, slices of a thickness, noise, and whole Hounsfield units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .painting import Grid, Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquisitionParameters:
    """The scanner.

    Attributes:
        in_plane_fwhm_mm: Full width at half maximum of the reconstruction kernel in plane: sharp or soft.
        slice_fwhm_mm: The same across slices, beside the slice thickness itself.
        noise_hu: Standard deviation of the noise.
        offset_hu: Error of calibration.
    """

    in_plane_fwhm_mm: float
    slice_fwhm_mm: float
    noise_hu: float
    offset_hu: float


def draw_acquisition(rng: np.random.Generator, noise_hu: tuple[float, float]) -> AcquisitionParameters:
    """Draw a scanner whose noise lies in a range; a soft kernel leaves less of it."""
    fwhm = float(rng.uniform(0.8, 1.7))
    lowest, highest = noise_hu
    level = float(np.clip(rng.beta(1.5, 2.5) + 0.35 * (1.2 - fwhm), 0, 1))
    return AcquisitionParameters(
        in_plane_fwhm_mm=fwhm,
        slice_fwhm_mm=float(rng.uniform(0.8, 1.6)),
        noise_hu=lowest + (highest - lowest) * level,
        offset_hu=float(rng.normal(0, 2)),
    )


def acquire(
    rng: np.random.Generator, anatomy: Volume, grid: Grid, layers: int, acquisition: AcquisitionParameters
) -> NDArray[np.int16]:
    """Scan painted anatomy.

    Args:
        rng: Source of the noise.
        anatomy: (Z * layers, Y, X) float32 HU.
        grid: Where the anatomy was painted.
        layers: Layers of anatomy that make one slice.
        acquisition: The scanner.

    Returns:
        (Z, Y, X) int16 HU.

    Note:
        The kernel is a Gaussian. The noise passes a kernel a little narrower, so that it is correlated over about a
        millimetre in plane and weakly across slices, as filtered backprojection leaves it.
    """
    fwhm = acquisition.in_plane_fwhm_mm / grid.spacing[1]
    scan = average_layers(_blur(anatomy, (acquisition.slice_fwhm_mm / grid.spacing[0], fwhm, fwhm)), layers)
    # Drawn in double precision: a last-digit difference between mathematical libraries then reaches no voxel.
    grain = _blur(rng.standard_normal(scan.shape).astype(np.float32), (1.0, 0.9 * fwhm, 0.9 * fwhm))
    grain *= np.float32(acquisition.noise_hu / grain.std(dtype=np.float64))
    scan += grain + np.float32(acquisition.offset_hu)
    return np.clip(np.rint(scan), -1024, 3071).astype(np.int16)


def average_layers(volume: Volume, layers: int) -> Volume:
    """Average every `layers` layers (Z * layers, Y, X) to one slice (Z, Y, X)."""
    parts = volume.reshape(-1, layers, *volume.shape[1:])
    total = parts[:, 0].copy()
    for layer in range(1, layers):
        total += parts[:, layer]
    total *= np.float32(1 / layers)
    return total


def _blur(volume: Volume, fwhm_voxels: tuple[float, float, float]) -> Volume:
    """Convolve with a Gaussian of a width per axis; the border repeats."""
    for axis, fwhm in enumerate(fwhm_voxels):
        sigma = fwhm / 2.3548
        reach = int(np.ceil(2.5 * sigma))
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        blurred = np.empty_like(volume)
        ndimage.correlate1d(volume, taps / taps.sum(), axis, blurred, mode="nearest")
        volume = blurred
    return volume
