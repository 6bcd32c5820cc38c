"""The tables of time and memory."""

from __future__ import annotations

from collections.abc import Callable

from .figures import RESULTS, STAGE_COLOURS
from .startup import OUR_IMPORT, STOCK_IMPORT
from .tables import differing, instructions, load, markdown, times
from .task_models import DATASET


def gains() -> str:
    """The gains of nnturbo over nnU-Net, in five rows."""
    memory, folder = load("memory"), load("throughput")
    peaks = {(row["side"], row["depth"]): row for row in memory["rows"]}
    depth = max(depth for _, depth in peaks)
    stock, ours = peaks["stock", depth], peaks["nnturbo", depth]
    rows = [
        _whole_command("benchmark_abdomen_avx2", "a small trained model on a real CT, without mirroring"),
        _whole_command("benchmark_task_avx2", "a PlainConvUNet of usual size on one tile, mirrored, fp32"),
        _whole_command("benchmark_task_int8", "the same network and tile, with a bundle in int8"),
        [
            f"a folder of {folder['cases']} generated CT, a grid of 6 mm, without mirroring",
            instructions(folder),
            f"{folder['median_s']['nnU-Net']:.1f} s",
            f"{folder['median_s']['nnturbo predict']:.1f} s",
            times(folder["median_s"]["nnU-Net"] / folder["median_s"]["nnturbo predict"]),
            differing(folder["voxels_differing_from_one_by_one"]["nnU-Net"], folder["voxels"]),
        ],
        [
            f"peak memory, a scan of {depth} x 512 x 512 voxels, {memory['classes']} classes",
            instructions(memory),
            f"{stock['peak_bytes'] / 2**30:.1f} GiB",
            f"{ours['peak_bytes'] / 2**30:.1f} GiB",
            times(stock["peak_bytes"] / ours["peak_bytes"]),
            differing(stock["voxels_differing"], depth * 512 * 512),
        ],
    ]
    header = ["what runs, on two CPU cores", "processor", "nnU-Net 2.8.1", "nnturbo", "nnU-Net / nnturbo",
              "voxels with another label"]  # fmt: skip
    return markdown(header, rows)


def _whole_command(name: str, what: str) -> list[str]:
    """Make the row of one measured command."""
    stored = load(name)
    result, *_ = stored["results"]
    return [
        what,
        instructions(stored),
        f"{result['median_s']['stock']:.1f} s",
        f"{result['median_s']['nnturbo']:.1f} s",
        times(result["ratio"]),
        differing(result["voxels_differing"], result["voxels"]),
    ]


def around() -> str:
    """The stages around the network: preprocessing, labels, and imports."""
    stages, startup = load("stages"), load("startup")
    stock_s = sum(stages["stock_s"].values())
    ours_s = stages["nnturbo_s"]["preprocess"] + stages["nnturbo_s"]["labels"]
    medians, shape = startup["median_s"], " x ".join(map(str, stages["shape"]))
    return markdown(
        [
            "what runs, on two CPU cores",
            "processor",
            "time of nnU-Net 2.8.1",
            "time of nnturbo",
            "nnU-Net / nnturbo",
            "voxels with another label",
        ],
        [
            [
                f"scan to network and logits to labels, CT of {shape} voxels, {stages['classes']} classes",
                instructions(stages),
                f"{stock_s:.1f} s",
                f"{ours_s:.2f} s",
                times(stages["ratio"]),
                differing(stages["agreement"]["labels_differing"], stages["agreement"]["voxels"]),
            ],
            [
                f"importing the predictor (importing torch alone takes {medians['import torch']:.1f} s)",
                instructions(startup),
                f"{medians[STOCK_IMPORT]:.1f} s",
                f"{medians[OUR_IMPORT]:.1f} s",
                times(medians[STOCK_IMPORT] / medians[OUR_IMPORT]),
                "-",
            ],
        ],
    )


def backends(name: str = "backends") -> str:
    """Every backend's forward on one tile, against nnU-Net's."""
    rows = [
        [
            row["model"],
            row["way"],
            f"{row['median_s']:.2f} s",
            f"{row['ratio']:.2f} x",
            f"{row['voxels_differing'] / row['voxels']:.0e}",
            *(
                [
                    f"{row['build_s']:.0f} s",
                    f"{row['load_s']:.1f} s",
                    f"{row['file_bytes'] / 2**20:.0f} MiB",
                    f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else "-",
                ]
                if "build_s" in row
                else ["-"] * 4
            ),
        ]
        for row in load(name)["rows"]
    ]
    header = ["network", "backend and precision", "time of one tile", "speed (nnU-Net = 1)",
              "share of voxels with another label", "time to build", "time to load", "size of files",
              "peak memory"]  # fmt: skip
    return markdown(header, rows)


def int16() -> str:
    """The same for products in int16, beside others on the same day."""
    return backends("backends_int16")


def avx2() -> str:
    """The same on a processor with AVX2 alone, in float32."""
    return backends("backends_avx2")


def commands() -> str:
    """Whole commands against nnU-Net's."""
    rows = []
    for path in sorted(RESULTS.glob("benchmark_*.json")):
        stored = load(path.stem)
        for result in stored["results"]:
            seconds, peaks, cpu_s = result["median_s"], result["median_peak_bytes"], result["median_cpu_s"]
            random_weights = result["dataset"] == DATASET
            dice = [of for of in result["dice"].values() if of is not None]
            classes = [f"{result['classes_differing']} of {result['classes']} classes"] if "classes" in result else []
            rows.append(
                [
                    f"{result['what']}{', mirrored' if result['mirroring'] else ''}"
                    f"{', bundle ' + result['bundle'] if result['bundle'] else ''}",
                    instructions(stored),
                    f"{seconds['stock']:.1f} s",
                    f"{seconds['nnturbo']:.1f} s",
                    f"{result['ratio']:.1f} x",
                    " and ".join(f"{cpu_s[side] / seconds[side]:.1f}" for side in ("stock", "nnturbo")),
                    f"{peaks['stock'] / 2**30:.1f} GiB",
                    f"{peaks['nnturbo'] / 2**30:.1f} GiB",
                    "; ".join([f"{result['voxels_differing']} of {result['voxels']} voxels", *classes]),
                    "random weights" if random_weights else f"{min(dice):.4f}" if dice else "-",
                ]
            )
    header = ["whole command, on two CPU cores", "processor", "time of nnU-Net 2.8.1", "time of nnturbo",
              "nnU-Net / nnturbo", "cores at work (nnU-Net and nnturbo)", "peak memory of nnU-Net",
              "peak memory of nnturbo", "what differs", "Dice of the worst label"]  # fmt: skip
    return markdown(header, rows)


def waterfall() -> str:
    """The gain of each technique on one scan."""
    result = load("waterfall")
    table = []
    for row in result["rows"]:
        stages = row["stages_s"]
        table.append([
            row["step"], f"{row['median_s']:.1f} s", f"{row['ratio']:.2f} x", f"{row['peak_bytes'] / 2**30:.1f} GiB",
            *(f"{stages[stage]:.2f} s" if stage in stages else "-" for stage in STAGE_COLOURS),
            f"{row['voxels_differing']} of {row['voxels']}",
        ])  # fmt: skip
    floor = {"network": f"{result['floor']['network_s']:.2f} s"}
    table.append(["floor", *"---", *(floor.get(stage, "-") for stage in STAGE_COLOURS), "-"])
    header = ["step", "time of one scan", "speed (nnU-Net = 1)", "peak memory"]
    return markdown([*header, *(f"time: {stage}" for stage in STAGE_COLOURS), "voxels with another label"], table)


def peers() -> str:
    """Other libraries on the same array."""
    result = load("peers")
    versions = {"MONAI": "monai", "OpenVINO, naive": "openvino", "nnU-Net": "nnunetv2"}
    rows = [
        [
            f"{row['way']} {result['peers'].get(versions.get(row['way'], ''), '')}".strip(),
            f"{row['median_s']:.1f} s",
            f"{row['ratio']:.2f} x",
            f"{row['voxels_differing']} of {result['voxels']}",
        ]
        for row in result["rows"]
    ]
    header = ["from the scan on the network's grid to logits", "time", "speed (nnU-Net = 1)",
              "voxels with another label than nnU-Net"]  # fmt: skip
    return markdown(header, rows)


def growth() -> str:
    """The cost of one more plane, class, view or case, from fitted lines."""
    result = load("growth")
    table = []
    for what, sides in result["lines"].items():
        rows = [row for row in result["rows"] if row["what"] == what]
        (stock_s, our_s), (stock_bytes, our_bytes) = (
            [sides[side][key]["slope"] for side in ("stock", "nnturbo")] for key in ("seconds", "peak_bytes")
        )
        least_r2 = min(of["seconds"]["r2"] for of in sides.values())
        table.append([
            f"{what}, {rows[0][what]} to {rows[-1][what]}",
            f"{stock_s:.3f} s", f"{our_s:.3f} s", f"{stock_s / our_s:.1f} x",
            f"{stock_bytes / 2**20:.1f} MiB", f"{our_bytes / 2**20:.1f} MiB", f"{least_r2:.3f}",
        ])  # fmt: skip
    header = ["one more of", "time of nnU-Net 2.8.1", "time of nnturbo", "nnU-Net / nnturbo", "memory of nnU-Net",
              "memory of nnturbo", "least r2 of the times"]  # fmt: skip
    return markdown(header, table)


def programs() -> str:
    """Programs of other people, on nnU-Net and on nnturbo."""
    stored, rows = load("programs"), []
    for row in stored["rows"]:
        seconds, peaks = row["median_seconds"], row["median_peak_bytes_together"]
        name, _, flags = row["program"].partition(" ")
        rows.append(
            [
                f"{name} {row['version']} {f'`{flags}`' if flags else ''}".strip(),
                f"{seconds['stock']:.0f} s",
                f"{seconds['nnturbo']:.0f} s",
                times(row["seconds_ratio"]),
                times(row["cpu_seconds_ratio"]),
                f"{peaks['stock'] / 2**30:.1f} GiB",
                f"{peaks['nnturbo'] / 2**30:.1f} GiB",
                times(row["peak_bytes_together_ratio"]),
                differing(row["voxels_differing"], row["voxels"]),
            ]
        )
    header = [f"program, on two cores with {instructions(stored)}", "time on nnU-Net 2.8.1", "time with `nnturbo run`",
              "ratio of times", "ratio of processor times", "peak memory on nnU-Net", "peak memory with `nnturbo run`",
              "ratio of memory", "voxels that differ"]  # fmt: skip
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "gains": gains,
    "around": around,
    "backends": backends,
    "int16": int16,
    "backends_avx2": avx2,
    "commands": commands,
    "waterfall": waterfall,
    "growth": growth,
    "peers": peers,
    "programs": programs,
}
