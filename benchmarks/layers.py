"""Times each layer of a network in nnturbo's CPU kernels, against what this machine's matrix products and copies reach.

    python -m nnturbo.benchmarks.layers [--model FOLDER] [--precision int16] [--rounds 5] [--json FILE]

Operations are those that the kernels do, so a convolution by fewer products counts fewer than its definition has. Bytes
are those that must be read and written at least: inputs, output and weights, of which fewer products need two to five
times as many, and for a norm its input twice and its output once. Each number is the best of all rounds, since other
processes only add time.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from nnturbo.engine.backends.native import PRECISIONS, compiled_kernels
from nnturbo.engine.backends.native_program import network_program
from nnturbo.engine.model.folder import Model, read_model
from nnturbo.engine.model.folds import inference_network
from nnturbo.kernels.program import Executor, Operation, Program, variant

from .report import write_report
from .task_models import ARCHITECTURES, DATASET, FLAT, write_task_model

MATRIX, COPIED_BYTES = 2048, 2**28
NETWORKS = (*ARCHITECTURES, FLAT)
BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One operation, or the norm after it.

    Args:
        name, kind: Of the operation.
        grid: (z, y, x) of its output.
        channels: Of all inputs, and of the output.
        taps, stride: Of a convolution; ones elsewhere.
        milliseconds: On one tile.
        gflops: That it does, by second.
        share_of_peak: Of the matrix product's.
        megabytes: That it must move.
        share_of_bandwidth: Of the copy's.
    """

    name: str
    kind: str
    grid: tuple[int, ...]
    channels: tuple[int, int]
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    milliseconds: float
    gflops: float
    share_of_peak: float
    megabytes: float
    share_of_bandwidth: float


def best_seconds(run: Callable[[], object], rounds: int) -> float:
    """Shortest time of several."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_flops(rounds: int) -> float:
    """Operations by second of torch's matrix product in float32."""
    one, other = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    return 2 * MATRIX**3 / best_seconds(lambda: one @ other, rounds)


def copy_bandwidth(rounds: int) -> float:
    """Bytes by second that are read and written when memory is copied."""
    one = torch.zeros(COPIED_BYTES // BYTES)
    other = torch.zeros_like(one)
    return 2 * COPIED_BYTES / best_seconds(lambda: other.copy_(one), rounds)


def transformation(operation: Operation) -> tuple[int, int, tuple[int, int, int]]:
    """Say how a convolution computes a tile of outputs.

    Returns:
        Matrices of weights, taps that are summed with each, and the tile's size (z, y, x).
    """
    if not operation.transformed:
        return 1, math.prod(operation.taps), (1, 1, 1)
    if operation.along_z:
        return 6, math.prod(operation.taps[1:]), (4, 1, 1)
    if operation.taps[0] == 1:
        return 36, 1, (1, 4, 4)
    return (36, 3, (4, 4, 1)) if operation.in_int16 else (144, 1, (4, 4, 2))


def work(program: Program, operation: Operation) -> tuple[float, float]:
    """Operations that are done and bytes that are moved, but for the norm."""
    values = [program.values[value] for value in operation.inputs]
    to = program.values[operation.output]
    voxels, channels = math.prod(to.size), sum(value.channels for value in values)
    moved = sum(value.channels * math.prod(value.size) for value in values) + to.channels * voxels
    if operation.upsampling is not None:
        channels = to.channels + sum(value.channels for value in values[1:])
    upsampled = 0 if operation.upsampling is None else 2 * voxels * values[0].channels * to.channels
    positions, taps, tile = transformation(operation)
    if operation.kind not in ("convolution", "transposed_convolution", "projection"):
        positions = 0
    products = positions * taps * math.prod(math.ceil(n / step) for n, step in zip(to.size, tile, strict=True))
    spread = math.prod(operation.stride) if operation.kind == "transposed_convolution" else 1
    weights = positions * taps * spread * channels * to.channels
    return 2.0 * products * channels * to.channels + upsampled, float(BYTES * (moved + weights))


def measure(model: Model, rounds: int, precision: str) -> tuple[list[Layer], float, float]:
    """Time all layers of a model's first fold; gives them, the peak and the bandwidth."""
    program, weights = network_program(
        inference_network(model).networks[0],
        model.plan.input_channels,
        model.plan.patch_size,
        in_int16=precision == "int16",
    )
    threads = torch.get_num_threads()
    executor = Executor(compiled_kernels(), program, weights, threads)
    tile = torch.randn(1, program.values[0].channels, *program.values[0].size)
    executor.measure(tile, threads)
    runs, peak, bandwidth = [], 0.0, 0.0
    for _ in range(rounds):  # in turn: a busy moment must not lower the limits alone
        runs.append(executor.measure(tile, threads))
        peak, bandwidth = max(peak, peak_flops(2)), max(bandwidth, copy_bandwidth(2))
    layers = []
    for index, operation in enumerate(program.operations):
        to = program.values[operation.output]
        norm = 3.0 * BYTES * to.channels * math.prod(to.size)
        parts = [(operation.kind, *work(program, operation), min(run[index][0] for run in runs))]
        if operation.norm is not None:
            parts.append(("norm", 0.0, norm, min(run[index][1] for run in runs)))
        inputs = sum(program.values[value].channels for value in operation.inputs)
        for kind, flops, moved, seconds in parts:
            layers.append(
                Layer(
                    name=operation.name,
                    kind=f"{kind} by fewer products" if operation.transformed and kind != "norm" else kind,
                    grid=to.size,
                    channels=(inputs, to.channels),
                    taps=operation.taps,
                    stride=operation.stride,
                    milliseconds=1e3 * seconds,
                    gflops=flops / seconds / 1e9,
                    share_of_peak=flops / seconds / peak,
                    megabytes=moved / 1e6,
                    share_of_bandwidth=moved / seconds / bandwidth,
                )
            )
    return layers, peak, bandwidth


def opened(name: str, folder: Path) -> Model:
    """Read a model folder, or write one of the task's size with random weights."""
    return read_model(write_task_model(folder, name) if name in NETWORKS else name, folds=["0"])


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description="layers of a network on a CPU")
    parser.add_argument("--model", default="PlainConvUNet", help=f"folder, or {', '.join(NETWORKS)}")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layers, peak, bandwidth = measure(
            opened(options.model, Path(folder) / DATASET), options.rounds, options.precision
        )
    instructions = variant(compiled_kernels())
    print(f"{instructions}: peak {peak / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s")
    for layer in sorted(layers, key=lambda each: -each.milliseconds):
        print(
            f"{layer.milliseconds:8.2f} ms {layer.gflops:7.1f} GFLOP/s {layer.share_of_peak:5.0%} "
            f"{layer.megabytes:8.1f} MB {layer.share_of_bandwidth:5.0%}  {layer.kind:34} {layer.channels[0]:4} -> "
            f"{layer.channels[1]:4} {'x'.join(map(str, layer.grid)):12} {layer.name}"
        )
    rows = [asdict(layer) for layer in layers]
    found = {"instructions": instructions, "peak_flops": peak, "copy_bytes_per_second": bandwidth}
    write_report(
        options.json,
        {"benchmark": "layers", "model": options.model, "precision": options.precision, **found, "layers": rows},
    )


if __name__ == "__main__":
    main()
