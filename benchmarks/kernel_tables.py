"""The tables of nnturbo's kernels for CPUs: layers against the machine's limits, and the C program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from .native_command import BUNDLE, MODEL, PROGRAM, STOCK
from .tables import differing, instructions, load, markdown, times

LAYERS = ("layers_plain", "layers_resenc", "layers_2d")
FEW_CHANNELS = 32
ORDER = (
    "convolution by fewer products",
    "convolution, 3 taps",
    "convolution with a stride",
    f"convolution of less than {FEW_CHANNELS} channels",
    "convolution of single voxels",
    "transposed_convolution",
    "projection",
    "norm",
    "average_pooling",
    "concatenation",
)


def kind_of(layer: dict[str, Any]) -> str:
    """Sort a layer by what limits it."""
    kind = layer["kind"]
    if not kind.startswith("convolution"):
        return kind
    if layer["channels"][0] < FEW_CHANNELS:
        return f"convolution of less than {FEW_CHANNELS} channels"
    if math.prod(layer["stride"]) > 1:
        return "convolution with a stride"
    if math.prod(layer["taps"]) == 1:
        return "convolution of single voxels"
    return kind if "fewer" in kind else "convolution, 3 taps"


def layers() -> str:
    """Layers of networks by their kind: time, share of the peak of products, and of the bandwidth of copies."""
    rows = []
    for name in LAYERS:
        stored = load(name)
        total = sum(layer["milliseconds"] for layer in stored["layers"])
        ordered = sorted(stored["layers"], key=lambda layer: ORDER.index(kind_of(layer)))
        for kind, group in itertools.groupby(ordered, kind_of):
            of_kind = list(group)
            spent = sum(layer["milliseconds"] for layer in of_kind)

            def share(what: str, of_kind: list[dict[str, Any]] = of_kind, spent: float = spent) -> float:
                return sum(layer[what] * layer["milliseconds"] for layer in of_kind) / spent

            worst = min(layer["share_of_peak"] for layer in of_kind)
            computes = any(layer["gflops"] for layer in of_kind)
            rows.append(
                [
                    stored["model"],
                    kind.replace("_", " "),
                    str(len(of_kind)),
                    f"{spent / total:.0%}",
                    f"{share('share_of_peak'):.0%}" if computes else "-",
                    f"{worst:.0%}" if computes else "-",
                    f"{share('share_of_bandwidth'):.0%}",
                ]
            )
    header = ["network", "kind of layer", "layers", "share of the time", "share of the peak", "of the slowest layer",
              "share of the bandwidth"]  # fmt: skip
    return markdown(header, rows)


def native() -> str:
    """The C program against `nnturbo predict` and nnU-Net."""
    stored, rows = load("native_command"), []
    for row in stored["rows"]:
        seconds, peaks = row["median_seconds"], row["median_peak_bytes"]
        rows.append(
            [
                f"{row['what']}{', mirrored' if row['mirroring'] else ''}",
                *(f"{seconds[side]:.1f} s" for side in (STOCK, MODEL, BUNDLE, PROGRAM)),
                times(seconds[STOCK] / seconds[MODEL]),
                times(seconds[BUNDLE] / seconds[PROGRAM]),
                *(f"{peaks[side] / 2**20:.0f} MiB" for side in (STOCK, BUNDLE, PROGRAM)),
                differing(row["voxels_differing"], row["voxels"]),
            ]
        )
    header = [f"whole command, on two cores with {instructions(stored)}", "nnU-Net 2.8.1", "`nnturbo predict`",
              "`nnturbo predict`, bundle", "`nnturbo-native`", "nnU-Net / `nnturbo predict`",
              "`nnturbo predict` / `nnturbo-native`, both with the bundle", "peak memory of nnU-Net",
              "of `nnturbo predict`, bundle", "of `nnturbo-native`",
              "voxels with another label than nnU-Net"]  # fmt: skip
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {"layers": layers, "native": native}
