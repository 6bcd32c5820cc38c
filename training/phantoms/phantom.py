"""Generate CT-like abdominal regions with a pancreas and one lesion, and data sets of them.

Everything is drawn from a seed. Geometry, patient, lesion and scanner have separate random streams, so that a single
case can be made again, and its geometry is known without painting it. The stages are in `phantom_settings` (what is
drawn from), `anatomy` (the patient), `organs` (what surrounds the pancreas), `lesions` (the pancreas, its lesion, the
labels), `acquisition` (the scanner) and, under them all, `painting` (shapes on a grid).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ...engine.errors import OutputError
from ...engine.files import written_atomically
from .acquisition import AcquisitionParameters, acquire, average_layers, draw_acquisition
from .anatomy import AnatomyParameters, draw_anatomy, draw_pancreas
from .lesions import LesionParameters, draw_lesion, outline, paint_pancreas
from .organs import paint_abdomen
from .painting import Grid, Point, draw_noise
from .phantom_settings import (
    DEFAULT_SETTINGS,
    SMALL_SETTINGS,
    PhantomSettings,
    Streams,
    check_seed,
    draw_geometry,
    draw_subtype,
    shares_of,
)

__all__ = [
    "DEFAULT_SETTINGS",
    "PANCREAS_COUNTS",
    "SMALL_SETTINGS",
    "Phantom",
    "PhantomCase",
    "PhantomParameters",
    "PhantomSettings",
    "case_seed",
    "draw_geometry",
    "draw_subtype",
    "generate_phantom",
    "write_dataset",
]

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
PANCREAS_COUNTS: Mapping[str, int] = {"train": 252, "validation": 36, "test": 72}

# Masks that were scaled as 16-bit numbers hold 1.0000153 for 1 and 2.0000305 for 2.
SCALED_ONE = 65536 / 65535
# Bytes per voxel of a gzipped case, image and mask, with some reserve; measured 1.1 to 1.3.
BYTES_PER_VOXEL = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomParameters:
    """Everything drawn for one phantom."""

    anatomy: AnatomyParameters
    lesion: LesionParameters
    acquisition: AcquisitionParameters


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Phantom:
    """One generated scan.

    Attributes:
        image: (Z, Y, X) int16 HU.
        mask: (Z, Y, X) uint8: 0 background, 1 pancreas, 2 lesion.
        spacing: Millimetres (z, y, x).
        subtype: 0, 1 or 2.
        seed: Seed of the phantom.
        parameters: All drawn values.
    """

    image: NDArray[np.int16]
    mask: NDArray[np.uint8]
    spacing: Point
    subtype: int
    seed: int
    parameters: PhantomParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomCase:
    """One case of a data set: `generate_phantom(seed, subtype=subtype)` makes it again.

    Attributes:
        split: "train", "validation" or "test".
        subtype: 0, 1 or 2.
        seed: Seed of this case alone.
        image: File of the scan.
        mask: File of the labels; `None` if they are not written.
    """

    split: str
    subtype: int
    seed: int
    image: Path
    mask: Path | None


def generate_phantom(seed: int, *, subtype: int | None = None, settings: PhantomSettings = DEFAULT_SETTINGS) -> Phantom:
    """Generate one scan with its labels.

    Args:
        seed: Non-negative integer of any size.
        subtype: 0, 1 or 2; drawn by `settings.subtype_shares` if `None`. It changes the lesion and what the lesion
            does to the gland, not the patient or the geometry.
        settings: Geometry and statistics.

    Returns:
        The phantom. The same arguments give the same arrays, on any machine.

    Raises:
        ValueError: If the seed or the subtype is not valid.
    """
    streams = Streams.of(seed)
    grid = draw_geometry(seed, settings)
    subtype = draw_subtype(seed, settings) if subtype is None else subtype
    if subtype not in (0, 1, 2):
        raise ValueError(f"subtype must be 0, 1, 2 or None, got {subtype!r}")

    (depth, *plane), (slice_mm, *pixel_mm) = grid.shape, grid.spacing
    layers = int(np.ceil(slice_mm / settings.painting_mm))
    fine = Grid(shape=(depth * layers, plane[0], plane[1]), spacing=(slice_mm / layers, pixel_mm[0], pixel_mm[1]))
    anatomy = draw_anatomy(streams.anatomy, fine)
    pancreas = draw_pancreas(streams.anatomy, anatomy)
    lesion = draw_lesion(streams.lesion, fine, anatomy, pancreas, subtype=subtype, separation=settings.separation)
    scanner = draw_acquisition(streams.acquisition, settings.noise_hu)

    noise = draw_noise(streams.texture, fine)
    painted = paint_abdomen(streams.anatomy, fine, noise, anatomy, pancreas)
    in_gland, in_lesion = paint_pancreas(painted, fine, noise, anatomy, pancreas, lesion)
    return Phantom(
        image=acquire(streams.acquisition, painted, fine, layers, scanner),
        mask=outline(average_layers(in_gland, layers), average_layers(in_lesion, layers)),
        spacing=grid.spacing,
        subtype=subtype,
        seed=check_seed(seed),
        parameters=PhantomParameters(anatomy=anatomy, lesion=lesion, acquisition=scanner),
    )


def case_seed(seed: int, split: str, index: int) -> int:
    """Seed of one case of a data set; it does not depend on the number of cases."""
    entropy = [check_seed(seed), SPLITS.index(split), index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


# Its parameters are the flags of `nnturbo phantom`.
def write_dataset(
    folder: str | os.PathLike[str],
    *,
    counts: Mapping[str, int] = PANCREAS_COUNTS,
    seed: int = 0,
    settings: PhantomSettings = DEFAULT_SETTINGS,
    answers: bool = False,
    scaled_mask_share: float = 214 / 288,
    overwrite: bool = False,
    workers: int = 1,
    progress: Callable[[int, int, Path], None] | None = None,
) -> tuple[PhantomCase, ...]:
    """Write a data set with the folders and names of the pancreas data set.

    `train|validation/subtype<s>/quiz_<s>_<nnn>_0000.nii.gz` hold the scans, the same name without `_0000` the labels,
    and `test/quiz_<nnn>_0000.nii.gz` scans alone. Numbers are unique over the splits and depend, like the seeds, only
    on the split and the place in it: a larger data set contains the smaller one.

    Args:
        folder: Folder of the data set; made if it does not exist.
        counts: Cases per split, of "train", "validation" and "test". The subtypes of any first n labelled cases hold
            `settings.subtype_shares` as closely as n allows; those of the test split are drawn.
        seed: Non-negative integer.
        settings: Geometry and statistics.
        answers: Whether to write the test split's labels and `subtype_results.csv` (header `Names,Subtype`) to
            `test_answers/`.
        scaled_mask_share: Share of the labelled masks that are stored as float64 with 1.0000153 for 1, as 214 of 288
            real ones are, so that a reader must round; 0 for none.
        overwrite: Whether existing files may be replaced; files of other names stay, so none may be in the way.
        workers: Processes that generate cases.
        progress: Called after each case with the number done, the number of all, and the scan's path.

    Returns:
        The cases, split by split.

    Raises:
        ValueError: If an argument is out of its range.
        OutputError: If a file exists and `overwrite` is false, a folder holds other cases, which would be mixed with
            these, or the disk has too little room, and then nothing is written; or if a file cannot be written.

    Note:
        A file appears under its name when it is complete. A real case takes some 2 MB and a second.
    """
    _check_request(counts, scaled_mask_share, workers)
    root = Path(folder)
    cases = tuple(_plan(root, counts, seed, settings, answers))
    files = [path for case in cases for path in (case.image, case.mask) if path is not None]
    results = root / "test_answers" / "subtype_results.csv"
    if answers:
        files.append(results)
    _check_room(files, cases, settings, overwrite)
    logger.info("Writing %d phantoms to %s", len(cases), root)
    for parent in {path.parent for path in files}:
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{parent} cannot be made: {error.strerror}; choose another folder") from error
    write = partial(_write_case, settings=settings, scaled_mask_share=scaled_mask_share)
    for done, case in enumerate(_finished(write, cases, workers), start=1):
        logger.debug("%d of %d: %s", done, len(cases), case.image)
        if progress is not None:
            progress(done, len(cases), case.image)
    if answers:
        rows = [f"{c.mask.name},{c.subtype}" for c in cases if c.split == "test" and c.mask is not None]
        with written_atomically(results) as partial_file:
            partial_file.write_text("\n".join(["Names,Subtype", *rows]) + "\n", encoding="utf-8")
    return cases


def _check_request(counts: Mapping[str, int], scaled_mask_share: float, workers: int) -> None:
    if unknown := set(counts) - set(SPLITS):
        raise ValueError(f"counts must name splits of {SPLITS}, got {sorted(unknown)}")
    if not all(isinstance(n, int) and n >= 0 for n in counts.values()) or not sum(counts.values()):
        raise ValueError(f"counts must be non-negative integers with a positive sum, got {dict(counts)}")
    if not 0 <= scaled_mask_share <= 1:
        raise ValueError(f"scaled_mask_share must lie in 0 to 1, got {scaled_mask_share}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def _plan(
    root: Path, counts: Mapping[str, int], seed: int, settings: PhantomSettings, answers: bool
) -> Iterator[PhantomCase]:
    """Name the cases of a data set. Numbers alternate between the splits, so that none depends on a count."""
    for position, split in enumerate(SPLITS):
        balanced = _balanced_subtypes(counts.get(split, 0), settings)
        for index, subtype in enumerate(balanced):
            own, number = case_seed(seed, split, index), f"{len(SPLITS) * index + position + 1:03d}"
            if split == "test":
                # A fixed order would give the answers away.
                subtype = draw_subtype(own, settings)
                folder, name, labels = root / split, f"quiz_{number}", root / "test_answers"
            else:
                folder, name = root / split / f"subtype{subtype}", f"quiz_{subtype}_{number}"
                labels = folder
            mask = labels / f"{name}.nii.gz" if split != "test" or answers else None
            yield PhantomCase(split=split, subtype=subtype, seed=own, image=folder / f"{name}_0000.nii.gz", mask=mask)


def _balanced_subtypes(count: int, settings: PhantomSettings) -> Iterator[int]:
    """Give each place the subtype that lags most behind its share."""
    given = np.zeros(3)
    for place in range(count):
        subtype = int(np.argmax(shares_of(settings.subtype_shares) * (place + 1) - given))
        given[subtype] += 1
        yield subtype


def _check_room(files: list[Path], cases: tuple[PhantomCase, ...], settings: PhantomSettings, overwrite: bool) -> None:
    """Refuse to begin what would replace files, mix data sets or fill the disk."""
    present = [path for path in files if path.exists()]
    if present and not overwrite:
        raise OutputError(
            f"{len(present)} of {len(files)} files exist, the first is {present[0]}; choose another folder, or allow "
            "replacing them (--overwrite, overwrite=True)"
        )
    splits = {case.split: case.image.parent if case.split == "test" else case.image.parents[1] for case in cases}
    if others := {path for folder in splits.values() for path in folder.rglob("quiz_*.nii.gz")} - set(files):
        raise OutputError(
            f"{len(others)} other files lie in the folders, the first is {min(others)}; choose another folder, or "
            "remove them"
        )
    voxels = sum(int(np.prod(draw_geometry(case.seed, settings).shape)) for case in cases)
    needed = int(voxels * BYTES_PER_VOXEL)
    existing = next(parent for parent in files[0].absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{len(cases)} phantoms need about {needed / 1e6:.0f} MB, {existing} has {free / 1e6:.0f} MB free; make "
            "room, or ask for fewer cases"
        )


def _finished(
    write: Callable[[PhantomCase], PhantomCase], cases: tuple[PhantomCase, ...], workers: int
) -> Iterator[PhantomCase]:
    """Write the cases here or in processes, and yield each when it is done."""
    if workers == 1:
        yield from map(write, cases)
        return
    # A fresh process inherits no threads of the parent, with which a forked one could hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(write, case) for case in cases]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_case(case: PhantomCase, *, settings: PhantomSettings, scaled_mask_share: float) -> PhantomCase:
    """Generate and write one case; the labels come first, so that a scan never lacks them."""
    phantom = generate_phantom(case.seed, subtype=case.subtype, settings=settings)
    rng = np.random.default_rng([case.seed, 1])
    scaled = bool(rng.random() < scaled_mask_share) and case.split != "test"
    # Scans lie anywhere in their scanner's room; a reader that drops the origin shows.
    origin = tuple(round(float(mm), 2) for mm in rng.uniform((-180, -180, -900), (40, 40, 200)))
    if case.mask is not None:
        mask = phantom.mask * SCALED_ONE if scaled else phantom.mask
        _write_image(mask, phantom.spacing, origin, case.mask)
    _write_image(phantom.image, phantom.spacing, origin, case.image)
    return case


def _write_image(voxels: NDArray[np.generic], spacing: Point, origin: tuple[float, ...], path: Path) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    with written_atomically(path, ending=".nii.gz") as temporary:
        try:
            sitk.WriteImage(image, str(temporary))
        except RuntimeError as error:
            raise OutputError(f"{path} cannot be written: {error}") from error
