"""Parts of `gpu.py` about the network: ways to run it on all mirror views of a tile, and where their time goes."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnturbo.engine.backends import cuda_graph
from nnturbo.engine.backends.channels_last import without_lost_biases
from nnturbo.engine.backends.choose import choose_precision
from nnturbo.engine.backends.torch import DTYPES, TorchBackend, TorchRunner, network_for_gpu
from nnturbo.engine.model.folder import Model, read_model
from nnturbo.engine.model.folds import InferenceNetwork, inference_network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .gpu_device import Bench
from .task_models import write_task_model

STOCK, AT_ONCE, OURS = "nnU-Net, one view at a time", "all views at once", "nnturbo, all views at once"
SINGLY = "nnturbo, one view at a time"
TELLING = (STOCK, AT_ONCE, OURS, SINGLY)
PROFILED = 25

Way = Callable[[Tensor], Tensor]
"""From tiles (N, C, *patch) float32 to logits."""


def forward(bench: Bench) -> list[dict[str, Any]]:
    """Measure the telling ways on each network, then the others on the first; a way that fails says so.

    The first call of a way lets cuDNN try its algorithms, which takes most of the time that this part has.
    """
    rows: list[dict[str, Any]] = []
    for telling in (True, False):
        for name, model, tiles in _models(bench, bench.sizes.networks if telling else bench.sizes.networks[:1]):
            expected, flops = _exact(bench, model, tiles)
            for way, make in ways(bench, model).items():
                if (way in TELLING) != telling:
                    continue
                row: dict[str, Any] = {"network": name, "way": way, "views": len(tiles), "flops": flops}
                rows.append(row)
                try:
                    row |= measured(bench, make, tiles, expected, flops)
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"[:500]
                _compare(rows, row)
                bench.keep(rows)
                print("  ", row, flush=True)
    return rows


def _models(bench: Bench, networks: Sequence[str]) -> Iterator[tuple[str, Model, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        for name in networks:
            model = read_model(write_task_model(Path(folder) / name, name, bench.sizes.patch))
            views = len(model.views) if bench.on_gpu else 2
            shape = (views, model.plan.input_channels, *model.plan.patch_size)
            yield name, model, torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(bench.device)


def _exact(bench: Bench, model: Model, tiles: Tensor) -> tuple[Tensor, int]:
    """Labels in float32, one view at a time, and the operations of all views."""
    run = TorchRunner(inference_network(model).to(bench.device), bench.device, "fp32")
    with FlopCounterMode(display=False) as counter:
        run._launched(tiles[:1])
    labels = torch.cat([run(tile[None]).seg_logits.argmax(1) for tile in tiles])
    return labels, len(tiles) * counter.get_total_flops()


def measured(
    bench: Bench, make: Callable[[], Way], tiles: Tensor, expected: Tensor, flops: int, rounds: int = 5
) -> dict[str, Any]:
    """Build one way, compare what it says, and time it."""
    start = time.perf_counter()
    run = make()
    differing = float((run(tiles).argmax(1) != expected).float().mean())
    first_s = time.perf_counter() - start
    peak = bench.peak_bytes(partial(run, tiles))
    seconds = bench.seconds(partial(run, tiles), rounds)
    rate = flops / seconds / 1e12
    return {
        "seconds": seconds, "first_s": first_s, "peak_bytes": peak, "voxels_differing": differing, "tflop_per_s": rate,
        "of_matmul": rate / bench.peak("matmul_fp16_tflop_per_s"),
    }  # fmt: skip


def _compare(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    stock = [each for each in rows if each["network"] == row["network"] and each["way"] == STOCK and "seconds" in each]
    if stock and "seconds" in row:
        row["ratio"] = stock[0]["seconds"] / row["seconds"]


def ways(bench: Bench, model: Model) -> dict[str, Callable[[], Way]]:
    """What builds each way by its name; all in the precision of the device."""
    precision = choose_precision("auto", bench.device)

    def network() -> InferenceNetwork:
        return inference_network(model).to(bench.device)

    def eager(made: InferenceNetwork, tiles: Tensor, at_once: int, search: bool) -> Tensor:
        """As nnU-Net runs it, some views at a time."""
        with torch.inference_mode(), _cudnn_searches(search), _autocast(bench, precision):
            return torch.cat([made(part)[0] for part in tiles.split(at_once)])

    def of_runner(runner: Any, at_once: int = len(model.views)) -> Way:
        return lambda tiles: torch.cat(
            [runner(part).seg_logits for part in tiles.to(runner.tiles_dtype).split(at_once)]
        )

    def of_network(change: Callable[[InferenceNetwork], InferenceNetwork]) -> Callable[[], Way]:
        return lambda: of_runner(TorchRunner(change(network()), bench.device, precision))

    count = len(model.views)

    def with_last(made: InferenceNetwork) -> InferenceNetwork:
        return without_lost_biases(made).to(memory_format=torch.channels_last_3d)

    return {
        STOCK: lambda: partial(eager, network(), at_once=1, search=True),
        AT_ONCE: lambda: partial(eager, network(), at_once=count, search=True),
        "all views, cuDNN's first choice": lambda: partial(eager, network(), at_once=count, search=False),
        "all views, without biases": of_network(without_lost_biases),
        "all views, channels last, torch's norm": of_network(with_last),
        OURS: lambda: of_runner(TorchBackend().load(model, None, bench.device, precision)),
        SINGLY: lambda: of_runner(TorchBackend().load(model, None, bench.device, precision), 1),
    }  # fmt: skip


@contextmanager
def _cudnn_searches(search: bool) -> Iterator[None]:
    """Say for each way whether cuDNN tries its algorithms: an earlier run may have left it on or off."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = search
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _autocast(bench: Bench, precision: str) -> torch.autocast:
    return torch.autocast(bench.device.type, DTYPES[precision], enabled=precision != "fp32")


def inductor(bench: Bench) -> list[dict[str, Any]]:
    """Compile the first network with torch's inductor, with channels first and last, which takes a minute or more."""
    rows: list[dict[str, Any]] = []
    precision = choose_precision("auto", bench.device)
    name, model, tiles = next(_models(bench, bench.sizes.networks))
    expected, flops = _exact(bench, model, tiles)
    for layout, memory_format in (("first", torch.contiguous_format), ("last", torch.channels_last_3d)):

        def make(memory_format: torch.memory_format = memory_format) -> Way:
            network = without_lost_biases(inference_network(model).to(bench.device)).to(memory_format=memory_format)
            compiled = torch.compile(network, dynamic=False)

            def run(batch: Tensor) -> Tensor:
                with torch.inference_mode(), _cudnn_searches(True), _autocast(bench, precision):
                    return compiled(batch)[0]

            return run

        row: dict[str, Any] = {"network": name, "way": f"inductor, channels {layout}", "views": len(tiles)}
        rows.append(row)
        try:
            row |= measured(bench, make, tiles, expected, flops)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:500]
        bench.keep(rows)
        print("  ", row, flush=True)
    return rows


def views(bench: Bench) -> list[dict[str, Any]]:
    """Measure nnturbo's forward of the first network by the number of views per call, launched singly and as a graph.

    `peak_bytes` are of tensors during a call, beyond weights and a graph's own memory; `reserved_bytes` are all that
    torch holds of the device after it.
    """
    _, model, tiles = next(_models(bench, bench.sizes.networks))
    precision = choose_precision("auto", bench.device)
    made = inference_network(model).to(bench.device)
    network = network_for_gpu(made, bench.device, precision) if bench.on_gpu else made
    run = TorchRunner(network, bench.device, precision, graphs=False)
    cuda_graph.LEAST_LAUNCHING, cuda_graph.WORTH_IT = 0, math.inf  # in this process all that can be recorded is
    expected = run(tiles[:1].to(run.tiles_dtype)).seg_logits.argmax(1)
    rows: list[dict[str, Any]] = []
    for count in (count for count in (1, 2, 4, 8) if count <= len(tiles)):
        batch = tiles[:count].to(run.tiles_dtype)
        for graph in (False, True) if bench.on_gpu else (False,):
            # One runner, so that cuDNN searches once.
            run._run = cuda_graph.GraphedNetwork(run._launched) if graph else run._launched
            row: dict[str, Any] = {"views": count, "graph": graph}
            rows.append(row)
            try:
                row |= _measured_views(bench, run, batch, expected)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:500]
            bench.keep(rows)
            print("  ", row, flush=True)
    return rows


def _measured_views(bench: Bench, run: TorchRunner, tiles: Tensor, expected: Tensor) -> dict[str, Any]:
    for _ in range(3):  # searched, timed, recorded
        labels = run(tiles).seg_logits[:1].argmax(1)
    differing = float((labels != expected).float().mean())
    if isinstance(run._run, cuda_graph.GraphedNetwork) and run._run._recordings[tiles.shape] is cuda_graph._NO_GRAPH:
        raise RuntimeError("the network could not be recorded, see the log")
    peak = bench.peak_bytes(partial(run, tiles))
    reserved = torch.cuda.memory_reserved(bench.device) if bench.on_gpu else None
    seconds = bench.seconds(partial(run, tiles), 10)
    return {
        "seconds": seconds, "seconds_per_view": seconds / len(tiles), "peak_bytes": peak, "reserved_bytes": reserved,
        "voxels_differing": differing,
    }  # fmt: skip


def layers(bench: Bench) -> list[dict[str, Any]]:
    """Time each step of nnturbo's forward of the first network by the device's clock, and what convolutions reach.

    Note:
        Of the last block of a stage only the convolutions are steps: its norm writes to the decoder's place too.
    """
    _, model, tiles = next(_models(bench, bench.sizes.networks))
    precision = choose_precision("auto", bench.device)
    made = inference_network(model).to(bench.device)
    network = network_for_gpu(made, bench.device, precision) if bench.on_gpu else made
    rows: list[dict[str, Any]] = []

    def now() -> Any:
        if not bench.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(name: str, module: nn.Module) -> None:
        began: list[Any] = []

        def before(*_: Any) -> None:
            began.append(now())

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            rows.append({"step": name, "kind": type(module).__name__, "times": (began.pop(), now())})
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                rows[-1] |= {"shape": list(output.shape), "flops": 2 * output.numel() * module.weight[0].numel()}

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for name, module in network.named_modules():
        if name and not isinstance(module, nn.ModuleList | nn.Identity):
            watch(name, module)
    run = TorchRunner(network, bench.device, precision, graphs=False)
    for _ in range(3):  # the first two search and compile
        rows.clear()
        run(tiles.to(run.tiles_dtype))
        bench.wait()
    for row in rows:
        began, ended = row.pop("times")
        row["ms"] = began.elapsed_time(ended) if bench.on_gpu else 1e3 * (ended - began)
        if "flops" in row:
            row["of_matmul"] = row["flops"] / row["ms"] / 1e9 / bench.peak("matmul_fp16_tflop_per_s")
        print("  ", row, flush=True)
    return rows


def profile(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Find the kernels that take longest in one forward of the first network, nnU-Net's way and nnturbo's."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    _, model, tiles = next(_models(bench, bench.sizes.networks))
    found: dict[str, list[dict[str, Any]]] = {}
    chosen = ways(bench, model)
    activities = [ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU]
    for way in (OURS, AT_ONCE):
        run = chosen[way]()
        for _ in range(3):  # what is searched, timed and compiled first
            run(tiles)
        bench.wait()
        with profiled(activities=activities) as of_run:
            run(tiles)
            bench.wait()
        events = [
            {"kernel": event.key[:160], "calls": event.count, "ms": _of_event(event) / 1e3}
            for event in of_run.key_averages()
        ]
        found[way] = sorted(events, key=lambda event: -event["ms"])[:PROFILED]
        bench.keep(found)
        print(
            way, *(f"  {event['ms']:8.3f} ms {event['calls']:4} x {event['kernel']}" for event in found[way]), sep="\n"
        )
    return found


def _of_event(event: Any) -> float:
    """Microseconds on the device; where there is none, on the CPU."""
    return float(event.self_device_time_total or event.self_cpu_time_total)
