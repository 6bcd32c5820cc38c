"""Times preprocessing and labelling of a CT, nnU-Net's functions against nnturbo's, in one process.

    python -m nnturbo.benchmarks.stages [--shape 140 512 512] [--rounds 3] [--json FILE]

Both get the same array and the same logits on the network's grid; the results are compared before times are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.pipeline.labels import segment
from nnturbo.engine.pipeline.preprocessing import preprocess
from nnturbo.engine.pipeline.timing import Timings
from nnturbo.engine.pipeline.transfers import Transfers
from nnturbo.engine.scans.volume import Volume

from .report import write_report

SPLINE = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
PLANS = {
    "dataset_name": "Dataset900_Benchmark",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 74.06, "std": 44.36, "percentile_00_5": -56.0, "percentile_99_5": 180.0}
    },
    "configurations": {
        "3d_fullres": {
            "patch_size": [64, 128, 192],
            "spacing": [2.0, 0.732, 0.732],
            "preprocessor_name": "DefaultPreprocessor",
            "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": SPLINE,
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {**SPLINE, "is_seg": True, "order": 1},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": {**SPLINE, "order": 1},
            "architecture": {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []},
        }
    },
}


def dataset_json(classes: int) -> dict[str, Any]:
    """A data set with that many labels, background included."""
    labels = {"background": 0, **{f"label {i}": i for i in range(1, classes)}}
    return {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}


def smooth_field(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """(C, Z, Y, X) float32: noise with a correlation length of about ten voxels, standard deviation about one."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, shape[0], *(max(2, n // 10) for n in shape[1:]), generator=generator)
    field = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="trilinear", align_corners=True)[0]
    return field * 2


def stock_functions(classes: int, plans: dict[str, Any] | None = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """nnU-Net's functions from an array to the network's input, and from logits to a segmentation."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans or PLANS)
    configuration = manager.get_configuration("3d_fullres")
    dataset = dataset_json(classes)

    def prepare(array: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, dict[str, Any]]:
        properties: dict[str, Any] = {"spacing": list(spacing)}
        preprocessor = DefaultPreprocessor(verbose=False)
        data, _, properties = preprocessor.run_case_npy(array, None, properties, manager, configuration, dataset)
        return data, properties

    def finish(logits: torch.Tensor, properties: dict[str, Any]) -> np.ndarray:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, manager, configuration, manager.get_label_manager(dataset), properties
        )

    return prepare, finish


def timed(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    start = clock()
    result = function()
    return clock() - start, result


def measure(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    classes: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Run both on the same input and return times (stock's least, nnturbo's median), ratio and agreement."""
    plan = parse_plan(PLANS, dataset_json(classes), "3d_fullres")
    scan = (50 + 100 * smooth_field((1, *shape), 0)).round().to(torch.int16).numpy()
    volume = Volume.from_array(scan, spacing)
    case = preprocess(volume, plan, torch.device("cpu"))
    logits = smooth_field((classes, *case.shape), 1)
    step = plan.patch_size[0] // 2
    depth = case.shape[0]
    ranges = [(start, min(start + step, depth)) for start in range(0, depth, step)]

    def prepare() -> list[torch.Tensor]:
        return list(preprocess(volume, plan, torch.device("cpu")).planes(ranges))

    def finish() -> np.ndarray:
        slabs = (logits[:, start:stop] for start, stop in ranges)
        return segment(slabs, case, plan.labels, timings=Timings(), transfers=Transfers(torch.device("cpu")))[0].numpy()

    stock_prepare, stock_finish = stock_functions(classes)
    ours = torch.cat(prepare(), dim=1).numpy()
    labels = finish()
    stock_samples, samples = [], []
    for _ in range(2):  # stock before and after, so that a busy moment affects both
        stock_seconds, (stock_data, properties) = timed(lambda: stock_prepare(scan, spacing), clock)
        halves = logits.half()
        stock_finish_seconds, stock_labels = timed(lambda kept=halves, of=properties: stock_finish(kept, of), clock)
        stock_samples.append((stock_seconds, stock_finish_seconds))
        samples.extend((timed(prepare, clock)[0], timed(finish, clock)[0]) for _ in range(rounds))
    stock_least = [min(column) for column in zip(*stock_samples, strict=True)]
    seconds = [statistics.median(column) for column in zip(*samples, strict=True)]
    return {
        "shape": shape,
        "spacing_mm": spacing,
        "classes": classes,
        "network_grid": case.shape,
        "stock_s": {"preprocess": stock_least[0], "labels": stock_least[1]},
        "stock_samples_s": stock_samples,
        "nnturbo_s": {"preprocess": seconds[0], "labels": seconds[1]},
        "nnturbo_samples_s": samples,
        "ratio": sum(stock_least) / sum(seconds),
        "agreement": {
            "preprocessed_max_difference": float(np.abs(ours - stock_data).max()),
            "preprocessed_range": float(np.ptp(stock_data)),
            # Both get the logits rounded to fp16 differently: stock keeps fp16, nnturbo fp32.
            "labels_differing": int((labels != stock_labels).sum()),
            "voxels": int(labels.size),
        },
    }


def main() -> None:
    """Measure, print the ratio with the agreement beside it, and keep the samples."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", type=int, nargs=3, default=(140, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--spacing", type=float, nargs=3, default=(2.5, 0.78, 0.78), metavar=("Z", "Y", "X"))
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(tuple(options.shape), tuple(options.spacing), options.classes, options.rounds)
    print(
        f"stock {sum(result['stock_s'].values()):.2f} s, nnturbo {sum(result['nnturbo_s'].values()):.2f} s: "
        f"{result['ratio']:.1f} times faster; {result['agreement']}"
    )
    write_report(options.json, {"benchmark": "stages", **result})


if __name__ == "__main__":
    main()
