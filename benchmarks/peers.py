"""Times the way from a preprocessed scan to logits: nnU-Net, MONAI, OpenVINO as in its guide, and nnturbo.

    python -m nnturbo.benchmarks.peers [-m MODEL -i SCAN] [--no_mirroring] [--rounds 3] [--json FILE]

All run in one process on the same weights and array; each round is one run of each. By default it is the U-Net of the
demo model on a phantom of the pancreas task. MONAI's tiles have other positions, so its labels cannot be nnU-Net's.
Needs monai (`pip install 'nnturbo[dev]'`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from nnturbo.engine.bundles.opening import open_model
from nnturbo.engine.errors import BackendUnavailable
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import InferenceNetwork, inference_network
from nnturbo.engine.model.mirroring import View, mirror_views
from nnturbo.engine.model.runner import Runner
from nnturbo.engine.options import ModelChoice
from nnturbo.engine.pipeline.preprocessing import Case, preprocess
from nnturbo.engine.pipeline.sliding_window import predict_logits
from nnturbo.engine.pipeline.tiling import gaussian
from nnturbo.engine.pipeline.timing import Timings
from nnturbo.engine.pipeline.window import SlidingWindow, tile_positions
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.phantoms.phantom import DEFAULT_SETTINGS, write_dataset
from torch import Tensor

from .report import write_report
from .task_models import DEMO_MODEL, ordinary_model

SEED = 20261123
Logits = Callable[[Tensor], Tensor]
"""From (C, Z, Y, X) on the network's grid to (K, Z, Y, X)."""


def stock(model: Path, mirror: bool) -> Logits:
    """nnU-Net itself."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    return lambda scan: predictor.predict_logits_from_preprocessed_data(scan).float()


def monai(network: InferenceNetwork, patch: tuple[int, ...], views: tuple[View, ...], batched: bool) -> Logits:
    """MONAI's sliding window, with all views of a tile in one batch, or one after the other."""
    from monai.inferers.utils import sliding_window_inference

    def averaged(tiles: Tensor) -> Tensor:
        axes = [[axis + 2 for axis in view] for view in views]
        flipped = [tiles.flip(flips) for flips in axes]
        logits = network(torch.cat(flipped))[0].split(len(tiles)) if batched else [network(of)[0] for of in flipped]
        return torch.stack([of.flip(flips) for of, flips in zip(logits, axes, strict=True)]).mean(0)

    def run(scan: Tensor) -> Tensor:
        found = sliding_window_inference(scan[None], patch, 1, averaged, overlap=0.5, mode="gaussian")
        assert isinstance(found, Tensor)
        return found[0]

    return torch.inference_mode()(run)


def openvino_naive(network: InferenceNetwork, patch: tuple[int, ...], channels: int, views: tuple[View, ...]) -> Logits:
    """OpenVINO's conversion and compilation with default settings, so in bf16 if the processor has it; numpy sums."""
    import openvino

    converted = openvino.convert_model(network, example_input=torch.zeros(1, channels, *patch))
    compiled = openvino.Core().compile_model(converted, "CPU")
    weight = functools.reduce(np.multiply, np.ix_(*(gaussian(length).float().numpy() for length in patch)))

    def run(scan: Tensor) -> Tensor:
        padding = [max(p - n, 0) for n, p in zip(scan.shape[1:], patch, strict=True)]
        array = np.pad(scan.numpy(), [(0, 0), *((more // 2, more - more // 2) for more in padding)])
        sums, count = None, np.zeros(array.shape[1:], np.float32)
        for corner in itertools.product(
            *(tile_positions(n, p, 0.5) for n, p in zip(array.shape[1:], patch, strict=True))
        ):
            place = (slice(None), *(slice(start, start + length) for start, length in zip(corner, patch, strict=True)))
            for view in views:
                axes = tuple(axis + 1 for axis in view)
                logits = np.flip(compiled(np.flip(array[place], axes)[None])[0][0], axes)
                if sums is None:
                    sums = np.zeros((len(logits), *array.shape[1:]), np.float32)
                sums[place] += logits * weight
                count[place[1:]] += weight
        assert sums is not None
        kept = (slice(more // 2, more // 2 + n) for more, n in zip(padding, scan.shape[1:], strict=True))
        return torch.from_numpy((sums / count)[(slice(None), *kept)])

    return run


def nnturbo(case: Case, runner: Runner, window: SlidingWindow, num_outputs: int) -> Logits:
    """The sliding window of nnturbo; its time includes resampling the scan, which the others' times do not."""

    def run(scan: Tensor) -> Tensor:
        del scan  # it comes from the case, row by row
        slabs = predict_logits(case, runner, window, num_outputs, timings=Timings())
        return torch.cat([slab.clone() for slab in slabs], 1)

    return run


def main() -> None:
    """Measure, print ratios with the agreement beside them, and keep the samples."""
    parser = argparse.ArgumentParser(description="peers")
    parser.add_argument("-m", type=Path, metavar="MODEL", help="model folder with a fold 0, that nnU-Net can run")
    parser.add_argument("-i", type=Path, metavar="SCAN")
    parser.add_argument("--no_mirroring", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if bool(options.m) != bool(options.i):
        parser.error("give a model and a scan, -m and -i, or neither")
    with tempfile.TemporaryDirectory(prefix="nnturbo-") as name:
        folder = Path(name)
        model = options.m or ordinary_model(DEMO_MODEL, folder / "model")
        (phantom,) = write_dataset(folder / "phantom", counts={"test": 1}, seed=SEED, settings=DEFAULT_SETTINGS)
        scan = options.i or phantom.image
        found = read_model(model, folds=["0"])
        plan, network = found.plan, inference_network(found)
        if len(plan.patch_size) != 3:
            parser.error("the peers are compared on 3D models")
        views = mirror_views(found.mirror_axes) if not options.no_mirroring else ((),)
        case = preprocess(read_volume(scan, channels=plan.input_channels), plan, torch.device("cpu"))
        array = next(case.planes([(0, case.shape[0])]))
        window, outputs = SlidingWindow.of_plan(plan, views=views), plan.labels.num_outputs
        ways: dict[str, Logits] = {
            "nnU-Net": stock(model, not options.no_mirroring),
            "MONAI": monai(network, plan.patch_size, views, batched=False),
            "MONAI, batched": monai(network, plan.patch_size, views, batched=True),
            "OpenVINO, naive": openvino_naive(network, plan.patch_size, plan.input_channels, views),
        }
        used = {}
        for precision in ("fp32", "bf16"):
            with contextlib.suppress(BackendUnavailable):
                opened = open_model(found, ModelChoice(precision=precision), "cpu")
                ways[f"nnturbo {precision}"] = nnturbo(case, opened.runner, window, outputs)
                used[precision] = opened.backend
        labels = {way: run(array).argmax(0) for way, run in ways.items()}
        samples: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, run in ways.items():
                start = time.perf_counter()
                run(array)
                samples[way].append(time.perf_counter() - start)
    rows = []
    for way, taken in samples.items():
        seconds = statistics.median(taken)
        differing = int((labels[way] != labels["nnU-Net"]).sum())
        ratio = statistics.median(samples["nnU-Net"]) / seconds
        rows.append(
            {"way": way, "median_s": seconds, "ratio": ratio, "voxels_differing": differing, "samples_s": taken}
        )
        print(f"{way:16} {seconds:7.2f} s {ratio:5.2f} x  {differing} of {labels[way].numel()} voxels differ")
    write_report(options.json, {
        "benchmark": "peers", "dataset": plan.dataset_name, "grid": list(case.shape), "mirroring": len(views) > 1,
        "backends": used,
        "voxels": labels["nnU-Net"].numel(), "rows": rows,
        "peers": {package: metadata.version(package) for package in ("monai", "openvino", "nnunetv2")},
    })  # fmt: skip


if __name__ == "__main__":
    main()
