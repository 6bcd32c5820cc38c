"""The report: one HTML page with a table of cases, and outlines of labels on slices of each."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, EngineError, VolumeError
from ..files import written_atomically
from ..model.labels import LabelScheme, parse_labels
from ..model.plans import DATASET, PLANS, read_channel_names, read_reader
from ..overlap import overlapped
from ..scans.volume import Volume, read_volume
from .case_record import DONE, FAILED, KEPT, WRITING, Record
from .records import RecordFolder

CT_WINDOW_HU = (-160.0, 240.0)
MOST_SLICES = 24
MOST_PIXELS = 240
MARGIN_MM = 25.0
LEAST_EXTENT_MM = 120.0
MOST_BYTES = 1_400_000
"""Largest size of the pictures of one case."""

COLOURS = ("#ffb000", "#ff3c78", "#38c6f4", "#7ddc4a", "#b78bff", "#ff7f2a", "#34d9a5", "#f06ee0")
LESION = re.compile(r"lesion|tumou?r|cyst|mass|cancer|metasta|nodule|carcinoma", re.IGNORECASE)
PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))
QUALITIES = (80, 65, 50, 35, 20)


def write_report(output: Path, path: Path, *, only: str | None = None) -> None:
    """Write the report of the cases in an output folder; their scans are read again.

    Args:
        output: Folder to which `nnturbo predict` wrote.
        path: File for the page.
        only: Name of a single case to show.

    Raises:
        BackendUnavailable: Where Pillow or SciPy are not installed.
        OutputError: Where the page cannot be written.
        VolumeError: Where there are no predictions.
    """
    require_packages()
    labels, channel, file_ending, reader = _read_settings(output)
    record_folder = RecordFolder(output=output, file_ending=file_ending, class_names=None)
    known = [record for record in record_folder.records() if only in (None, record.name) and record.status != WRITING]
    if only is not None and not known:
        raise VolumeError(f"{output} has no record of {only}")

    def pictures(record: Record) -> str:
        if record.status == FAILED:
            return ""
        try:
            shown = case_pictures(record, output / f"{record.name}{file_ending}", labels, channel, reader)
        except (EngineError, OSError, ValueError) as error:
            shown = {"name": record.name, "labels": [], "colours": [], "planes": [], "note": f"no pictures: {error}"}
        return json.dumps(shown).replace("<", "\\u003c")

    before, after = _frame(output.resolve().name, known)
    with (
        written_atomically(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(before)
        for index, content in enumerate(overlapped(pictures, known, threads=2, name="nnturbo-report")):
            if content:
                file.write(f'<script type="application/json" id="case-{index}">{content}</script>\n')
        file.write(after)


def _read_settings(output: Path) -> tuple[LabelScheme, str, str, str]:
    """Read labels, name of the first channel, file ending and reader from the JSON files beside predictions."""
    try:
        dataset = json.loads((output / DATASET).read_bytes())
        labels, channel = parse_labels(dataset), read_channel_names(dataset)[0]
        file_ending = dataset["file_ending"]
        reader = read_reader(json.loads((output / PLANS).read_bytes()))
    except (OSError, ValueError, KeyError) as error:
        raise VolumeError(
            f"{output} must be where nnturbo predict wrote, with {DATASET} and {PLANS}: {error}"
        ) from error
    return labels, channel, file_ending, reader


def _frame(name: str, records: Sequence[Record]) -> tuple[str, str]:
    """Write the page's parts before and after the pictures."""
    template = resources.files("nnturbo.engine.jobs").joinpath("report.html").read_text(encoding="utf-8")
    before, after = template.split("<!-- cases -->")
    counts = Counter(KEPT if record.kept is not None else record.status for record in records)
    summary = f"{counts[DONE]} cases done, {counts[FAILED]} failed"
    summary += f", labels of {kept} left as they were" if (kept := counts[KEPT]) else ""
    before = before.replace("<!-- title -->", html.escape(f"nnturbo: {name}"))
    before = before.replace("<!-- summary -->", summary)
    return before.replace("<!-- rows -->", _table(records)), after


def case_pictures(record: Record, mask: Path, labels: LabelScheme, channel: str, reader: str) -> dict[str, Any]:
    """Cut slices in three planes through a case's labels, around its largest lesion; one slice of a 2D scan.

    Returns:
        Data for the script of the page.

    Raises:
        VolumeError: Where the scan or its labels cannot be read, or do not fit together.
    """
    images = record.images
    # From here on, axes run from superior to inferior, anterior to posterior, and the patient's right to left.
    scan = _for_display(read_volume(images[0] if Path(images[0]).is_dir() else images[:1], reader=reader))
    segmentation = _for_display(read_volume(mask, channels=1, reader=reader))
    if scan.array.shape != segmentation.array.shape:
        raise VolumeError(
            f"{mask.name}: labels must have the scan's size {scan.array.shape[1:]}, got {segmentation.array.shape[1:]}"
        )
    values = np.rint(segmentation.array[0]).astype(np.int64)
    spacing = scan.geometry.spacing
    written = sorted({value for each in labels.written.values() for value in each})
    present = [value for value in written if (values == value).any()]
    centre, box = _centre(values, present, labels), _box(values, spacing)
    low, high = _window(scan.array[0], box, channel)
    names = {value: _name(labels, value) for value in present}
    index_of = np.zeros(max(present, default=0) + 1, np.uint8)
    index_of[present] = np.arange(1, len(present) + 1)
    cut = tuple(slice(*bounds) for bounds in box)
    grey = np.clip((scan.array[0][cut].astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    indices = index_of[values[cut].clip(0, len(index_of) - 1)]
    start = [centre[axis] - box[axis][0] for axis in range(3)]
    planes: list[dict[str, Any]] = []
    shown = PLANES[:1] if scan.geometry.is_2d else PLANES
    for quality in QUALITIES:
        planes = [_plane(name, axis, grey, indices, spacing, start[axis], quality) for name, axis in shown]
        if sum(len(plane["image"]) + len(plane["mask"]) for plane in planes) <= MOST_BYTES:
            break
    volumes = record.volumes_ml or {}
    return {
        "name": record.name,
        "labels": [f"{name} {volumes[name]:.1f} ml" if name in volumes else name for name in names.values()],
        "colours": [COLOURS[index % len(COLOURS)] for index in range(len(names))],
        "planes": planes,
        "note": "" if present else "no label was found; the middle of the scan is shown",
    }


def require_packages() -> None:
    """Check that the packages for pictures are installed.

    Raises:
        BackendUnavailable: Where one is missing.
    """
    try:
        import PIL  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable("pictures need Pillow and SciPy: pip install 'nnturbo[report]'") from error


def _for_display(volume: Volume) -> Volume:
    turned = volume.reoriented()
    return Volume(array=turned.array[:, ::-1, ::-1, ::-1], geometry=turned.geometry, name=volume.name)


def _name(labels: LabelScheme, value: int) -> str:
    """Name a label; if regions share it, the smallest region."""
    holds = {name: len(values) for name, values in labels.written.items() if value in values}
    return min(holds, key=lambda name: holds[name])


def _centre(values: np.ndarray, present: Sequence[int], labels: LabelScheme) -> tuple[int, int, int]:
    """Find the middle of the largest lesion; without a lesion, of the largest part of the greatest label."""
    from scipy import ndimage

    if not present:
        return tuple(size // 2 for size in values.shape)  # type: ignore[return-value]
    lesions = [value for value in present if LESION.search(_name(labels, value))] or [max(present)]
    parts = np.asarray(ndimage.label(np.isin(values, lesions))[0])  # type: ignore[index]
    largest = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    # For each plane, the slice with most of its voxels.
    return tuple(  # type: ignore[return-value]
        int(np.argmax(largest.sum(axis=tuple(other for other in range(3) if other != axis)))) for axis in range(3)
    )


def _box(values: np.ndarray, spacing: Sequence[float]) -> list[tuple[int, int]]:
    """Choose the box to show: all labels with a margin, or the whole scan if there are none."""
    box = []
    for axis, size in enumerate(values.shape):
        there = np.flatnonzero(values.any(axis=tuple(other for other in range(3) if other != axis)))
        if len(there) == 0:
            box.append((0, size))
            continue
        margin = MARGIN_MM / spacing[axis]
        least = LEAST_EXTENT_MM / spacing[axis]
        low, high = there[0] - margin, there[-1] + 1 + margin
        more = max(0.0, least - (high - low)) / 2
        box.append((max(0, math.floor(low - more)), min(size, math.ceil(high + more))))
    return box


def _window(image: np.ndarray, box: Sequence[tuple[int, int]], channel: str) -> tuple[float, float]:
    """Choose the values that become black and white."""
    if channel == "CT":
        return CT_WINDOW_HU
    sample = image[tuple(slice(low, high, 1 + (high - low) // 64) for low, high in box)]
    low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
    return (low, high) if high > low else (low, low + 1)


def _plane(
    name: str, axis: int, grey: np.ndarray, indices: np.ndarray, spacing: Sequence[float], start: int, quality: int
) -> dict[str, Any]:
    """Make strips of slices of one plane, one below the other, with pixels that are square in mm."""
    from PIL import Image

    rows, columns = [other for other in range(3) if other != axis]
    extents = [grey.shape[each] * spacing[each] for each in (rows, columns)]
    pixel_mm = max(max(extents) / MOST_PIXELS, min(spacing[rows], spacing[columns]))
    height, width = (max(1, round(extent / pixel_mm)) for extent in extents)
    chosen = _chosen(grey.shape[axis], start)
    strips = []
    for array, filter_ in ((grey, Image.Resampling.BILINEAR), (indices, Image.Resampling.NEAREST)):
        strip = Image.new("L", (width, height * len(chosen)))
        for place, index in enumerate(chosen):
            picture = Image.fromarray(np.ascontiguousarray(array.take(index, axis)))
            strip.paste(picture.resize((width, height), filter_), (0, place * height))
        strips.append(strip)
    return {
        "name": name,
        "size": [width, height],
        "slices": len(chosen),
        "start": chosen.index(start),
        "at_mm": [round(float((index - start) * spacing[axis]), 1) for index in chosen],
        "image": _encoded(strips[0], "webp", quality=quality, method=4),
        "mask": _encoded(strips[1], "png", optimize=True),
    }


def _chosen(count: int, start: int) -> list[int]:
    """Choose slices at equal distances; the slice that is shown first is among them."""
    step = math.ceil(count / MOST_SLICES)
    return list(range(start % step, count, step))


def _encoded(picture: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(records: Sequence[Record]) -> str:
    """Write the table's head and body."""
    volumes = list(dict.fromkeys(name for record in records for name in record.volumes_ml or {}))
    answers = (record.classification for record in records if record.classification is not None)
    classes = list(dict.fromkeys(name for answer in answers for name in answer.class_names))
    heads = [("case", False), ("status", False)]
    heads += [("class", False), *((f"p({name})", True) for name in classes)] if classes else []
    heads += [(f"{name}, ml", True) for name in volumes] + [("seconds", True), ("notes", False)]
    cells = "".join(f"<th{' class=number' if number else ''}>{html.escape(name)}</th>" for name, number in heads)
    body = "\n".join(_row(index, record, volumes, classes) for index, record in enumerate(records))
    return f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody>"


def _row(index: int, record: Record, volumes: Sequence[str], classes: Sequence[str]) -> str:
    answer = record.classification
    seconds = sum(record.timings_ms.values()) / 1000 if record.timings_ms else None
    cells = [_text(record.name), _text(record.status)]
    if classes:
        probability_of = {} if answer is None else answer.probability_of
        cells.append(_text("" if answer is None else answer.name))
        cells += [_number(probability_of.get(name), 3) for name in classes]
    cells += [_number((record.volumes_ml or {}).get(name), 2) for name in volumes]
    kept = None if record.kept is None else f"labels left as they were: {record.kept}"
    notes = (record.error, kept, *record.warnings)
    cells += [_number(seconds, 2), _text("; ".join(note for note in notes if note))]
    return f'<tr class="{html.escape(record.status)}" data-case="{index}">{"".join(cells)}</tr>'


def _text(value: str) -> str:
    return f'<td class="text">{html.escape(value)}</td>'


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return '<td class="number" data-sort=""></td>'
    return f'<td class="number" data-sort="{value!r}">{value:.{digits}f}</td>'
