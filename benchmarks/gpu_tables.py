"""The tables of docs/gpu.md; `gpu_first` is the first run of `gpu.py`, on an H100, before kernels were made faster."""

from __future__ import annotations

from collections.abc import Callable

from .figures import RESULTS
from .gpu_cases import MORE_VIEWS
from .gpu_networks import SINGLY
from .tables import differing, load, markdown, model_and_scans, times


def megabytes(count: float | None) -> str:
    """Write bytes."""
    return "-" if count is None else f"{count / 1e6:,.0f} MB"


def machine() -> str:
    """What the other tables were measured on."""
    runs = [load(name)["versions"] for name in ("gpu", "gpu_first")]
    rows = [
        ["GPU", *(f"{of['device']}, driver {of['driver']}" for of in runs)],
        ["copies, read and written, at best", *(f"{of['copy_gb_per_s'] / 1e3:.2f} TB/s" for of in runs)],
        ["products of matrices in fp16, at best", *(f"{of['matmul_fp16_tflop_per_s']:.0f} TFLOP/s" for of in runs)],
        ["processor", *(of["machine"]["processor"] for of in runs)],
        [
            "libraries",
            *(
                ", ".join(f"{name} {version}" for name, version in of["installed"].items() if version)
                + f", CUDA {of['cuda']}, cuDNN {of['cudnn']}"
                for of in runs
            ),
        ],
    ]
    return markdown(["what", "the results below", "the first run"], rows)


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
            "see above" if row["way"] == SINGLY else megabytes(row["peak_bytes"]),  # a graph has memory of its own
            f"{row['voxels_differing']:.2%}",
        ]
        for row in load("gpu")["forward"]
        if "failed" not in row
    ]
    header = ["network", "eight views of 64 x 128 x 192", "time", "nnU-Net / this", "operations", "of a matrix product",
              "memory", "voxels unlike fp32"]  # fmt: skip
    return markdown(header, rows)


def whole() -> str:
    """Scan to labels, and files to files."""
    found = load("gpu")
    # nnU-Net's stages on the CPU were timed beside the others.
    stages, longest = found["long_on_cpu"], found["long"]
    stock_s = longest["stock_network_s"] + stages["preprocessing_s"] + stages["export_s"]
    longest = {**longest, "stock_s": stock_s, "ratio": stock_s / longest["nnturbo_s"]}
    rows = []
    for row in (*found["whole"], longest):
        for name, ours in (("", row), (f", {MORE_VIEWS} views at a time", row.get("more_views"))):
            if ours is not None:
                rows.append(
                    [
                        f"a scan of {' x '.join(map(str, row['scan']))}{name}",
                        f"{row['stock_s']:.2f} s",
                        f"{ours['nnturbo_s']:.2f} s",
                        times(row["stock_s"] / ours["nnturbo_s"]),
                        megabytes(row["stock_held_bytes"]),
                        megabytes(ours["nnturbo_held_bytes"]),
                        differing(row["voxels_differing"], row["voxels"]) if "voxels" in ours else "not compared",
                    ]
                )
    many, of = load("gpu_first")["many"], " x ".join(map(str, found["whole"][0]["scan"]))
    rows.append(
        [
            f"{many['cases']} scans of {of}, from file to file, on the H100",
            f"{many['stock_s']:.1f} s",
            f"{many['nnturbo_s']:.2f} s",
            times(many["ratio"]),
            "-",
            "-",
            "not compared",
        ]
    )
    header = ["what, mirrored", "nnU-Net 2.8.1", "nnturbo", "nnU-Net / nnturbo", "GPU memory of nnU-Net",
              "GPU memory of nnturbo", "voxels with another label"]  # fmt: skip
    return markdown(header, rows)


def views() -> str:
    """Forwards by the number of views at a time."""
    by_count: dict[int, dict[bool, dict[str, float]]] = {}
    for row in load("gpu")["views"]:
        by_count.setdefault(row["views"], {})[row["graph"]] = row
    rows = [
        [
            str(count),
            *(f"{1e3 * of[graph]['seconds_per_view']:.2f} ms" for graph in (False, True)),
            megabytes(of[True]["reserved_bytes"]),
        ]
        for count, of in by_count.items()
    ]
    header = ["views of 64 x 128 x 192 at a time", "time of a view", "as a CUDA graph", "memory held with the graph"]
    return markdown(header, rows)


def labels() -> str:
    """Labels of trained models."""
    named = [(f"demo model, phantom {row['phantom']}", row) for row in load("gpu")["labels"]]
    named.append(("a model that nnU-Net trained, a real CT, mirrored", load("gpu")["trained"]))
    rows = []
    for name, row in named:
        for other, key in (("fp32 on the CPU", "against_cpu"), ("nnU-Net on the same GPU", "against_stock")):
            compared = row[key]
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
        for row in load("gpu")["kernels"]
        if "seconds" in row
    ]
    header = ["kernel", "number type", "tile", "time", "bytes per second, of a copy", "torch's twin / this"]
    return markdown(header, rows)


def registers() -> str:
    """Registers of every kernel on every architecture."""
    rows = load("kernels")["rows"]
    architectures = sorted({row["sm"] for row in rows})
    registers: dict[str, dict[int, int]] = {}
    for row in rows:
        of_lines = {"resample_axis": (" along y, z", " along x"), "convolve": ("", " of a scan")}.get(row["kernel"])
        name = row["kernel"] + ("" if of_lines is None else of_lines[row["lines"]])
        registers.setdefault(f"{name}, {row['type']}", {})[row["sm"]] = row["registers"]
    return markdown(
        ["kernel and number type", *(f"registers on sm_{sm}" for sm in architectures)],
        [[name, *(str(of.get(sm, "none")) for sm in architectures)] for name, of in registers.items()],
    )


def loaders() -> str:
    """DALI's loader against the exact one."""
    rows = []
    for path in sorted(RESULTS.glob("loaders_*.json")):
        result = load(path.stem)
        rows += [
            [
                model_and_scans(result, row),
                row["loader"], f"{row['waiting_s']:.2f} s",
                f"{row['different']} of {row['voxels']}", f"{row['lowest_dice']:.4f}",
            ]
            for row in result["rows"]
        ]  # fmt: skip
    header = ["model and scans", "loader", "time the network waits, on two CPU cores", "voxels that differ",
              "Dice of the worst label"]  # fmt: skip
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "kernels": registers,
    "loaders": loaders,
    "gpu_machine": machine,
    "gpu_forward": forward,
    "gpu_whole": whole,
    "gpu_views": views,
    "gpu_labels": labels,
    "gpu_kernels": kernels,
}
