"""Compares the peak memory of nnU-Net and nnturbo for long scans with many classes.

    python -m nnturbo.benchmarks.memory [--json FILE] [--no-stock]

Scans of 512 x 512 x 200 and x 400 voxels, a small network with 20 outputs, resampling on both ways. Each prediction
runs in a separate process: nnU-Net through `predict_from_files_sequential`, which keeps everything in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnturbo.engine.model.network import make_network
from nnturbo.engine.model.plans import parse_plan

from .report import python, run_measured, write_report
from .stages import PLANS, dataset_json, smooth_field

CLASSES = 20
PATCH = [32, 128, 128]
SPACING_MM = (1.0, 0.8, 0.8)
PLAN_SPACING_MM = [1.25, 0.9, 0.9]

NNTURBO = """
import sys
from nnturbo.engine import Engine
model, scan, out = sys.argv[1:]
Engine.load(model, device="cpu", tile_step_size=1.0, mirror=False).predict(scan).save(out)
"""
STOCK = """
import sys, torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
model, scan, out = sys.argv[1:]
predictor = nnUNetPredictor(tile_step_size=1.0, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, (0,))
predictor.predict_from_files_sequential([[scan]], [out.removesuffix(".nii.gz")])
"""


def write_model(folder: Path, classes: int = CLASSES, mirror_axes: tuple[int, ...] = ()) -> Path:
    """Write a model folder with a network of two stages."""
    plans, dataset = copy.deepcopy(PLANS), dataset_json(classes)
    configuration: dict[str, Any] = plans["configurations"]["3d_fullres"]  # type: ignore[index,assignment]
    configuration.update(patch_size=PATCH, spacing=PLAN_SPACING_MM)
    configuration["architecture"] = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]],
            "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
            "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None, "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip
    plan = parse_plan(plans, dataset, "3d_fullres")
    network = make_network(plan.architecture, 1, classes).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    torch.save(
        {"network_weights": network.state_dict(), "init_args": {"configuration": "3d_fullres"},
         "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": mirror_axes or None},
        folder / "fold_0" / "checkpoint_final.pth",
    )  # fmt: skip
    return folder


def write_scan(path: Path, shape: tuple[int, int, int], seed: int = 0) -> int:
    """Write a smooth int16 scan (z, y, x); returns the bytes of its array."""
    scan = (50 + 100 * smooth_field((1, *shape), seed)[0]).to(torch.int16).numpy()
    image = sitk.GetImageFromArray(scan)
    image.SetSpacing(SPACING_MM[::-1])
    sitk.WriteImage(image, str(path))
    return scan.nbytes


def main() -> None:
    """Measure, print, and keep the numbers."""
    parser = argparse.ArgumentParser(description="peak memory")
    parser.add_argument("--depths", type=int, nargs="+", default=[200, 400])
    parser.add_argument("--no-stock", action="store_true", help="nnU-Net needs some 20 GB and half an hour")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model")
        for depth in options.depths:
            scan = Path(folder) / f"scan{depth}_0000.nii.gz"
            arrays = write_scan(scan, (depth, 512, 512))
            arrays += arrays // 2  # the input is int16, the output uint8
            labels = []
            for side, code in (("nnturbo", NNTURBO), ("stock", STOCK)):
                if side == "stock" and (options.no_stock or depth != max(options.depths)):
                    continue
                out = Path(folder) / f"{side}{depth}.nii.gz"
                try:
                    run = run_measured(python("-c", code, str(model), str(scan), str(out)))
                except RuntimeError as error:
                    rows.append({"side": side, "depth": depth, "failed": str(error)[-300:]})
                    print(rows[-1])
                    continue
                labels.append(sitk.GetArrayFromImage(sitk.ReadImage(str(out))))
                rows.append({"side": side, "depth": depth, "peak_bytes": run.peak_bytes, "seconds": run.seconds,
                             "beyond_arrays_bytes": run.peak_bytes - arrays})  # fmt: skip
                if len(labels) == 2:
                    rows[-1]["voxels_differing"] = int(np.count_nonzero(labels[0] != labels[1]))
                print(rows[-1], flush=True)
    write_report(options.json, {"benchmark": "memory", "classes": CLASSES, "patch": PATCH, "rows": rows})


if __name__ == "__main__":
    main()
