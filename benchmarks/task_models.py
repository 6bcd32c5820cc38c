"""Models of the pancreas task's size with random weights, PlainConvUNet and ResEnc M as nnU-Net plans them, and a scan.

    python -m nnturbo.benchmarks.task_models FOLDER

Speed does not depend on the weights; agreement is measured on trained models.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnturbo.engine.files import write_json
from nnturbo.engine.model.network import make_network
from nnturbo.engine.model.plans import parse_plan
from nnturbo.training.phantoms.phantom_settings import DEFAULT_SETTINGS

from .stages import dataset_json, smooth_field

PATCH = [64, 128, 192]
SPACING_MM = [2.0, 0.732, 0.732]
FLAT, FLAT_PATCH = "2d", [256, 256]
FEATURES = [32, 64, 128, 256, 320, 320]
CLASSES = 3
TASK_MEDIAN, TASK_LARGEST = (60, 118, 180), (128, 166, 244)
"""(z, y, x) of scans that one tile covers, and twelve."""
DATASET = "Dataset901_TaskSize"
DEMO_MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
# CT of 110 to 130 x 360 to 400 x 430 to 500 voxels.
ABDOMEN_SETTINGS = replace(
    DEFAULT_SETTINGS,
    slice_spacings_mm=((2.0, 1), (2.5, 1)),
    other_weight=0,
    in_plane_mm=(0.7, 0.75, 0.8),
    extent_mm=(220.0, 300.0, 340.0),
    largest_shape=(160, 512, 512),
)
RESAMPLING = {"is_seg": False, "order_z": 0, "force_separate_z": None}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "PlainConvUNet": {"n_conv_per_stage": [2] * 6},
    "ResidualEncoderUNet": {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6]},
}


def plans_json(network: str, patch: Sequence[int] = PATCH) -> dict[str, Any]:
    """nnU-Net's plan for the pancreas data set (patch, features and strides of its fingerprint)."""
    depth = {**ARCHITECTURES[network], "n_conv_per_stage_decoder": [1 if network == "ResidualEncoderUNet" else 2] * 5}
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": {
            "patch_size": list(patch), "spacing": SPACING_MM, "batch_size": 2,
            "data_identifier": "nnUNetPlans_3d_fullres",
            "preprocessor_name": "DefaultPreprocessor", "batch_dice": False,
            "median_image_size_in_voxels": [64.0, 119.0, 181.0],
            "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {**RESAMPLING, "order": 3},
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True, "order": 1},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": {**RESAMPLING, "order": 1},
            "architecture": {
                "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
                "arch_kwargs": {
                    "n_stages": 6, "features_per_stage": FEATURES, "conv_op": "torch.nn.modules.conv.Conv3d",
                    "kernel_sizes": [[1, 3, 3], *([[3, 3, 3]] * 5)],
                    "strides": [[1, 1, 1], [1, 2, 2], *([[2, 2, 2]] * 4)], **depth, "conv_bias": True,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }},
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 74.06, "std": 44.36, "percentile_00_5": -56.0, "percentile_99_5": 180.0,
                  "median": 78.0, "min": -400.0, "max": 1000.0}
        },
    }  # fmt: skip


def flat_plans_json(patch: Sequence[int] = FLAT_PATCH) -> dict[str, Any]:
    """nnU-Net's plan of a 2D network with 33 million parameters, for slices."""
    plans, stages = plans_json("PlainConvUNet"), 7
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": list(patch), "spacing": SPACING_MM[1:]}
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": [min(32 * 2**stage, 512) for stage in range(stages)],
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "kernel_sizes": [[3, 3]] * stages,
        "strides": [[1, 1], *[[2, 2]] * (stages - 1)],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    return plans


def write_task_model(folder: Path, network: str, patch: Sequence[int] | None = None) -> Path:
    """Write a model folder with random weights, seeded."""
    plans = flat_plans_json(patch or FLAT_PATCH) if network == FLAT else plans_json(network, patch or PATCH)
    dataset = dataset_json(CLASSES)
    plan = parse_plan(plans, dataset, "3d_fullres")
    made = make_network(plan.architecture, plan.input_channels, CLASSES).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        spread = (2 / fan_in) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data.normal_(0, spread, generator=generator)
    for name, parameter in made.named_parameters():
        if ".norm.weight" in name:
            parameter.data.add_(1)
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    checkpoint = {
        "network_weights": made.state_dict(),
        "init_args": {"configuration": "3d_fullres"},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": tuple(range(len(plan.patch_size))),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def ordinary_model(multi_task: Path, folder: Path, spacing_mm: Sequence[float] | None = None) -> Path:
    """Make an ordinary model of a multi-task one: the same U-Net, for nnU-Net itself, on another grid if asked."""
    shutil.copytree(multi_task, folder)
    plans = json.loads((folder / "plans.json").read_bytes())
    for configuration in plans["configurations"].values():
        architecture = configuration.get("architecture", {"arch_kwargs": {}})
        if architecture["arch_kwargs"].pop("head", None) is not None:
            configuration["spacing"] = list(spacing_mm or configuration["spacing"])
            architecture["network_class_name"] = architecture["arch_kwargs"].pop("backbone")
    write_json(folder / "plans.json", plans)
    for path in folder.glob("fold_*/checkpoint_final.pth"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: value for name, value in checkpoint["network_weights"].items() if not name.startswith("head.")}
        torch.save({
            "network_weights": weights, "trainer_name": "nnUNetTrainer", "init_args": checkpoint["init_args"],
            "inference_allowed_mirroring_axes": checkpoint["inference_allowed_mirroring_axes"],
        }, path)  # fmt: skip
    return folder


def write_task_scan(path: Path, shape: Sequence[int] = TASK_MEDIAN, spacing_mm: Sequence[float] = SPACING_MM) -> Path:
    """Write a smooth scan of that many voxels (z, y, x), by default of the task's median size on the network's grid."""
    import SimpleITK as sitk

    scan = (50 + 60 * smooth_field((1, *shape), 0)[0]).to(torch.int16).numpy()
    image = sitk.GetImageFromArray(scan)
    image.SetSpacing(tuple(spacing_mm)[::-1])
    sitk.WriteImage(image, str(path))
    return path


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description="models of the task's size")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for network in ARCHITECTURES:
        print(write_task_model(options.folder / network, network))
    print(write_task_scan(options.folder / "scan_0000.nii.gz"))


if __name__ == "__main__":
    main()
