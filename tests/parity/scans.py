"""Small synthetic scans: smooth structure, odd shapes, every spacing and orientation that takes its own path."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

Triple = tuple[float, float, float]
Matrix = tuple[float, float, float, float, float, float, float, float, float]

IDENTITY: Matrix = (1, 0, 0, 0, 1, 0, 0, 0, 1)
TWO_FLIPS: Matrix = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
ONE_FLIP: Matrix = (1, 0, 0, 0, 1, 0, 0, 0, -1)
SAGITTAL: Matrix = (0, 0, 1, 1, 0, 0, 0, -1, 0)
OBLIQUE: Matrix = (0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1)

STRUCTURE_MM = 4.0
"""Width of the Gaussian that makes the scans smooth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a synthetic scan looks like.

    Attributes:
        name: Name in test ids; also seeds the content.
        shape: Voxels (z, y, x).
        spacing: Voxel size in mm (z, y, x).
        content: `smooth` everywhere; `bordered` is zero outside a box and in holes inside it; `blank` is zero.
        direction: Direction cosines as SimpleITK orders them.
        slope_inter: Slope and intercept of the stored integers (NIfTI only), or None.
    """

    name: str
    shape: tuple[int, int, int]
    spacing: Triple
    content: Literal["smooth", "bordered", "blank"] = "smooth"
    direction: Matrix = IDENTITY
    slope_inter: tuple[float, float] | None = None


ALL_SCANS = (
    Scan(name="isotropic", shape=(22, 24, 26), spacing=(1.5, 1.5, 1.5)),
    Scan(name="small", shape=(18, 18, 20), spacing=(1.5, 1.5, 1.5)),
    # The spacing of the default plan: nothing is resampled.
    Scan(name="plan_spacing", shape=(25, 37, 29), spacing=(1.5, 1.0, 1.0)),
    # 27 and 25 voxels of 1.5 mm are 40.5 and 37.5 voxels of 1 mm: the shape is rounded half to even.
    Scan(name="half_voxels", shape=(21, 27, 25), spacing=(1.5, 1.5, 1.5)),
    Scan(name="coarse_first", shape=(9, 30, 28), spacing=(5.0, 1.25, 1.1)),
    Scan(name="coarse_middle", shape=(28, 8, 28), spacing=(1.2, 4.0, 1.25)),
    Scan(name="coarse_last", shape=(28, 28, 8), spacing=(1.2, 1.25, 4.5)),
    # Two axes share the coarse spacing, and a ratio of exactly three: neither is resampled slice by slice.
    Scan(name="two_coarse", shape=(9, 9, 30), spacing=(4.0, 4.0, 1.0)),
    Scan(name="ratio_three", shape=(11, 28, 31), spacing=(3.0, 1.0, 1.0)),
    # Slices as thick as in the coarse plan: only the plane is resampled.
    Scan(name="coarse_as_planned", shape=(10, 32, 28), spacing=(4.0, 1.25, 1.25)),
    Scan(name="tiny", shape=(7, 11, 9), spacing=(1.5, 1.5, 1.5)),
    Scan(name="flat", shape=(5, 32, 37), spacing=(1.5, 1.0, 1.2)),
    Scan(name="single_slice", shape=(1, 40, 44), spacing=(3.0, 1.0, 1.2)),
    Scan(name="bordered", shape=(27, 36, 32), spacing=(1.5, 1.5, 1.5), content="bordered"),
    Scan(name="bordered_coarse", shape=(9, 36, 34), spacing=(5.0, 1.1, 1.25), content="bordered"),
    Scan(name="blank", shape=(16, 20, 18), spacing=(1.5, 1.2, 1.2), content="blank"),
    Scan(name="two_flips", shape=(20, 22, 24), spacing=(1.5, 1.2, 1.3), direction=TWO_FLIPS),
    Scan(name="one_flip", shape=(20, 22, 24), spacing=(1.5, 1.2, 1.3), direction=ONE_FLIP),
    Scan(name="sagittal", shape=(20, 22, 24), spacing=(1.5, 1.2, 1.3), direction=SAGITTAL),
    Scan(name="oblique", shape=(20, 22, 24), spacing=(1.5, 1.2, 1.3), direction=OBLIQUE),
    Scan(name="scaled_integers", shape=(20, 22, 24), spacing=(1.5, 1.2, 1.2), slope_inter=(0.3, -100.7)),
)
SCANS = {scan.name: scan for scan in ALL_SCANS}


def smooth_field(shape: tuple[int, ...], spacing: tuple[float, ...], seed: int) -> np.ndarray:
    """Draw structure of a few millimetres with a little noise on it.

    Args:
        shape: Voxels per axis.
        spacing: Voxel size in mm, the same order.
        seed: The same seed gives the same field.

    Returns:
        Field of zero mean and unit deviation, plus noise of a tenth of it; float64.
    """
    generator = np.random.default_rng(seed)
    field = gaussian_filter(generator.standard_normal(shape), [STRUCTURE_MM / mm for mm in spacing], mode="nearest")
    field = (field - field.mean()) / field.std()
    return field + 0.1 * generator.standard_normal(shape)


def nonzero_region(shape: tuple[int, int, int], channel: int) -> np.ndarray:
    """Mark a box that is off centre, with a closed hole, an open notch, and another border for each channel."""
    region = np.zeros(shape, dtype=bool)
    depth, height, width = shape
    region[2 : depth - 1, 5 + channel : height - 3, 4 : width - 6 - channel] = True
    region[depth // 2 - 1 : depth // 2 + 1, height // 2 - 4 : height // 2 + 3, width // 2 - 3 : width // 2 + 3] = False
    region[depth // 2 :, height // 2 : height // 2 + 4, width // 3 : width // 3 + 2] = False
    return region


def intensities(field: np.ndarray, channel_name: str) -> np.ndarray:
    """Turn a field of unit deviation into what a scanner of this kind stores.

    Args:
        field: Field of about zero mean and unit deviation.
        channel_name: `CT` gives Hounsfield units (int16), `R`, `G` and `B` bytes, anything else MR (float32).

    Returns:
        Intensities, of the field's shape.
    """
    if channel_name == "CT":
        return np.rint(40 + 90 * field).astype(np.int16)
    if channel_name in ("R", "G", "B"):
        return np.rint(np.clip(120 + 45 * field, 0, 255)).astype(np.uint8)
    return (400 + 90 * field).astype(np.float32)


def channel_array(scan: Scan, channel: int, channel_name: str) -> np.ndarray:
    """Make one channel of a scan, (z, y, x)."""
    if scan.content == "blank":
        return np.zeros(scan.shape, dtype=np.int16)
    field = smooth_field(scan.shape, scan.spacing, seed=zlib.crc32(f"{scan.name} {channel}".encode()))
    array = intensities(field, channel_name)
    if scan.content == "bordered":
        array[~nonzero_region(scan.shape, channel)] = 0
    return array


def to_image(array: np.ndarray, scan: Scan) -> sitk.Image:
    """Attach the scan's geometry to an array (z, y, x)."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(scan.spacing[::-1])
    image.SetOrigin((-31.5, 12.25, 107.0))
    image.SetDirection(scan.direction)
    return image


def write_channels(scan: Scan, channel_names: tuple[str, ...], folder: Path, file_ending: str) -> list[Path]:
    """Write a scan as nnU-Net expects it, one file `case_0000`, `case_0001`, ... for each channel.

    Args:
        scan: What to write.
        channel_names: Kind of intensities of each channel, see `intensities`.
        folder: Existing folder.
        file_ending: For example `.nii.gz`.

    Returns:
        The files, in order of the channels.
    """
    paths = []
    for i, channel_name in enumerate(channel_names):
        path = folder / f"case_{i:04d}{file_ending}"
        sitk.WriteImage(to_image(channel_array(scan, i, channel_name), scan), path)
        if scan.slope_inter is not None:
            _store_as_scaled_integers(path, *scan.slope_inter)
        paths.append(path)
    return paths


def write_previous_stage(scan: Scan, n_labels: int, folder: Path, file_ending: str) -> Path:
    """Write labels 0 to `n_labels - 1` as a previous stage would have predicted them for the scan."""
    field = smooth_field(scan.shape, scan.spacing, seed=zlib.crc32(f"{scan.name} previous stage".encode()))
    edges = np.quantile(field, np.linspace(0.5, 1, n_labels, endpoint=False)[: n_labels - 1])
    path = folder / f"previous_stage{file_ending}"
    sitk.WriteImage(to_image(np.digitize(field, edges).astype(np.uint8), scan), path)
    return path


def _store_as_scaled_integers(path: Path, slope: float, inter: float) -> None:
    image = nibabel.load(path)
    scaled = nibabel.Nifti1Image(image.get_fdata(), image.affine, image.header)
    scaled.header.set_data_dtype(np.int16)
    scaled.header.set_slope_inter(slope, inter)
    nibabel.save(scaled, path)
