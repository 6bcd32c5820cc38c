"""The tables of docs/gpu.md, from the results of `gpu.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from .figures import RESULTS
from .tables import differing, markdown, times


def load() -> dict[str, Any]:
    """The stored result."""
    return json.loads((RESULTS / "gpu.json").read_bytes())


def megabytes(count: float | None) -> str:
    """Write bytes."""
    return "-" if count is None else f"{count / 1e6:,.0f} MB"


def machine() -> str:
    """What the other tables were measured on."""
    found = load()["versions"]
    names = {
        "GPU": f"{found['device']}, driver {found['driver']}",
        "at best, measured": f"copies {found['copy_gb_per_s'] / 1e3:.2f} TB/s, read and written; products of matrices "
        f"{found['matmul_fp16_tflop_per_s']:.0f} TFLOP/s in fp16",
        "processor": found["machine"]["processor"],
        "libraries": ", ".join(f"{name} {version}" for name, version in found["installed"].items() if version)
        + f", CUDA {found['cuda']}, cuDNN {found['cudnn']}",
    }
    return markdown(["", ""], [[name, value] for name, value in names.items()])


def forward() -> str:
    """Ways to run the network on eight views of a tile."""
    rows = [
        [
            row["network"],
            row["way"],
            f"{1e3 * row['seconds']:.1f} ms",
            times(row["ratio"]),
            f"{row['tflop_per_s']:.0f} TFLOP/s",
            f"{row['of_matmul']:.0%}",
            megabytes(row["peak_bytes"]),
            f"{row['voxels_differing']:.2%}",
        ]
        for row in load()["forward"]
        if "failed" not in row
    ]
    header = ["network", "eight views of 64 x 128 x 192", "time", "nnU-Net / this", "operations", "of a matrix product",
              "memory", "voxels unlike fp32"]  # fmt: skip
    return markdown(header, rows)


def whole() -> str:
    """Scan to labels, and files to files."""
    found, rows = load(), []
    cases = list(found["whole"])
    if "long" in found:
        # nnU-Net's stages on the CPU were timed beside the others.
        stages = found["long_on_cpu"]
        stock_s = found["long"]["stock_network_s"] + stages["preprocessing_s"] + stages["export_s"]
        cases.append({**found["long"], "stock_s": stock_s, "ratio": stock_s / found["long"]["nnturbo_s"]})
    for row in cases:
        rows.append(
            [
                f"a scan of {' x '.join(map(str, row['scan']))}",
                f"{row['stock_s']:.2f} s",
                f"{row['nnturbo_s']:.3f} s",
                times(row["ratio"]),
                megabytes(row["stock_held_bytes"]),
                megabytes(row["nnturbo_held_bytes"]),
                differing(row["voxels_differing"], row["voxels"]) if "voxels" in row else "not compared",
            ]
        )
    if many := found.get("many"):
        rows.append(
            [
                f"{many['cases']} scans, from file to file",
                f"{many['stock_s']:.1f} s",
                f"{many['nnturbo_s']:.2f} s",
                times(many["ratio"]),
                "-",
                megabytes(many["nnturbo_held_bytes"]),
                "not compared",
            ]
        )
    header = ["what, mirrored", "nnU-Net 2.8.1", "nnturbo", "nnU-Net / nnturbo", "GPU memory of nnU-Net",
              "GPU memory of nnturbo", "voxels with another label"]  # fmt: skip
    return markdown(header, rows)


def labels() -> str:
    """Labels of trained models."""
    found = load()
    named = [(f"demo model, phantom {row['phantom']}", row) for row in found.get("labels", [])]
    if "trained" in found:
        named.append(("a model that nnU-Net trained, a real CT, mirrored", found["trained"]))
    rows = []
    for name, row in named:
        for other, key in (("fp32 on the CPU", "against_cpu"), ("nnU-Net on the same GPU", "against_stock")):
            if compared := row.get(key):
                count = differing(compared["voxels_differing"], compared["voxels"])
                rows.append([name, other, count, f"{min(compared['dice'].values()):.4f}"])
    return markdown(["model and scan", "compared with", "voxels that differ", "Dice of the worst label"], rows)


def kernels() -> str:
    """Bytes per second of each kernel."""
    rows = [
        [
            row["kernel"],
            row["type"],
            " x ".join(map(str, row["size"])),
            f"{1e6 * row['seconds']:.0f} us",
            f"{row['of_copy']:.0%}",
            times(row["twin_seconds"] / row["seconds"]),
        ]
        for row in load()["kernels"]
        if "failed" not in row
    ]
    header = ["kernel", "number type", "tile", "time", "bytes per second, of a copy", "torch's twin / this"]
    return markdown(header, rows)


def views() -> str:
    """Views per call of the network."""
    rows = [
        [
            str(row["views"]),
            "one graph" if row["graph"] else "one by one",
            f"{1e3 * row['seconds_per_view']:.2f} ms",
            megabytes(row["peak_bytes"]),
            megabytes(row["reserved_bytes"]),
        ]
        for row in load()["views"]
        if "failed" not in row
    ]
    header = ["views per call", "launches", "time of a view", "memory of tensors", "memory that torch holds"]
    return markdown(header, rows)


def training() -> str:
    """Epochs of the multi-task trainer."""
    rows = [
        [
            "compiled" if row["compiled"] else "as it is",
            f"{row['batch_s']:.3f} s",
            megabytes(row["peak_bytes"]),
            _course(row["train_loss"]),
            _course(value for value in row["class_loss"] if value),
        ]
        for row in load()["training"]
    ]
    header = ["network", "time of a batch", "memory", "loss of the segmentation, by epoch", "of the class, by epoch"]
    return markdown(header, rows)


def _course(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


TABLES: dict[str, Callable[[], str]] = {
    "gpu_machine": machine,
    "gpu_forward": forward,
    "gpu_whole": whole,
    "gpu_labels": labels,
    "gpu_kernels": kernels,
    "gpu_views": views,
    "gpu_training": training,
}
