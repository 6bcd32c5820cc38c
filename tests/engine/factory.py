"""Small models and scans for the engine's own tests; nothing here needs nnU-Net."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnturbo.engine.model.network import make_network
from nnturbo.engine.model.plans import MULTI_TASK_NETWORK, parse_plan
from nnturbo.engine.model.provenance import Provenance


def provenance(**changes: Any) -> Provenance:
    """What a prediction by one fp32 model says about its making."""
    values: dict[str, Any] = {
        "source": {"plans.json": "hash"}, "configuration": "3d_fullres", "precision": "fp32", "classifier": None,
        "aggregation": None, "loader": "exact", "tile_step_size": 0.5, "mirror_views": 8, "model": "model",
        "dataset": "Dataset900_Test", "trainer": "nnUNetTrainer", "folds": ("0",),
        "checkpoint": "checkpoint_final.pth", "backend": "torch", "agreement": None, "plan_remarks": (),
        "device": "cpu", "torch": "2", "python": "3", "views_per_call": 1, "sums_device": "cpu",
    }  # fmt: skip
    return Provenance(**{**values, **changes})


SPLINE = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


def plans_json(**changes: Any) -> dict[str, Any]:
    """A plan for one CT channel and a tiny network; `changes` replace entries of its configuration."""
    configuration = {
        "patch_size": [8, 12, 16],
        "spacing": [2.0, 1.5, 1.5],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": dict(SPLINE),
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**SPLINE, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**SPLINE, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
                "strides": [[1, 1, 1], [2, 2, 2]],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **changes,
    }
    return {
        "dataset_name": "Dataset900_Test",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 50.0, "std": 60.0, "percentile_00_5": -150.0, "percentile_99_5": 250.0}
        },
    }


def multi_task(plans: Mapping[str, Any], **head: Any) -> dict[str, Any]:
    """The same plan with a classification head on its network, for three classes; `head` replaces what describes it."""
    plans = copy.deepcopy(dict(plans))
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["arch_kwargs"] |= {
        "backbone": architecture["network_class_name"],
        "head": {
            "kind": "gap_linear",
            "stages": [0, 1],
            "class_names": ["0", "1", "2"],
            "focus_channels": [2],
            **head,
        },
    }
    architecture["network_class_name"] = MULTI_TASK_NETWORK
    return plans


def plans_2d(*patch_size: int) -> dict[str, Any]:
    """A plan for slices; the configuration is still called 3d_fullres, as everywhere here."""
    plans = plans_json(patch_size=list(patch_size or (12, 16)), spacing=[1.5, 1.5])
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "kernel_sizes": [[3, 3], [3, 3]],
        "strides": [[1, 1], [2, 2]],
    }
    return plans


def pooled_classifier(stages: Sequence[int] = (0, 1), classes: int = 3, seed: int = 0) -> dict[str, Any]:
    """What a checkpoint carries for a fitted classifier, on the tiny network's stages of 4 and 8 channels."""
    generator = torch.Generator().manual_seed(seed)
    features = 3 * sum((4, 8)[stage] for stage in stages)
    return {
        "kind": "lda",
        "stages": list(stages),
        "weight": torch.randn(classes, features, generator=generator).tolist(),
        "bias": torch.randn(classes, generator=generator).tolist(),
    }


def dataset_json(**changes: Any) -> dict[str, Any]:
    """A data set with two foreground labels."""
    return {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "pancreas": 1, "lesion": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
        **changes,
    }


def random_weights(plans: Mapping[str, Any], dataset: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded weights that fit a plan, under every name the network has for them."""
    plan = parse_plan(plans, dataset, "3d_fullres")
    network = make_network(plan.architecture, plan.input_channels, plan.labels.num_outputs)
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, torch.Tensor] = {}
    weights = {}
    for name, parameter in network.state_dict(keep_vars=True).items():
        if id(parameter) not in made:
            made[id(parameter)] = 0.3 * torch.randn(parameter.shape, generator=generator)
        weights[name] = made[id(parameter)]
        if name.endswith("seg_layers.0.weight"):
            made[id(parameter)].mul_(10)  # so that every label wins somewhere
        elif name.endswith("seg_layers.0.bias"):
            made[id(parameter)].zero_()
    return weights


def write_model(
    folder: Path,
    *,
    plans: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
    folds: tuple[str, ...] = ("0",),
    checkpoint: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder; `checkpoint` replaces entries of every fold's checkpoint."""
    plans, dataset = plans or plans_json(), dataset or dataset_json()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for seed, fold in enumerate(folds):
        content = {
            "init_args": {"configuration": "3d_fullres"},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
            "_best_ema": np.float64(0.5),
            **(checkpoint or {}),
        }
        if "network_weights" not in content:
            content["network_weights"] = random_weights(plans, dataset, seed)
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def smooth_scan(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A smooth int16 field between about -200 and 300, like CT numbers of soft tissue."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, *(max(2, n // 6) for n in shape), generator=generator)
    field = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0, 0]
    return (50 + 120 * field).round().to(torch.int16).numpy()


def write_scan(path: Path, seed: int = 0, shape: tuple[int, int, int] = (8, 14, 16)) -> Path:
    """Write a smooth scan on a grid of 2 x 1.5 x 1.5 mm."""
    image = sitk.GetImageFromArray(smooth_scan(shape, seed))
    image.SetSpacing((1.5, 1.5, 2.0))
    sitk.WriteImage(image, str(path))
    return path


def zipped(folder, target, prefix="Dataset900_Test/nnUNetTrainer__nnUNetPlans__3d_fullres"):
    with zipfile.ZipFile(target, "a") as archive:
        for path in folder.rglob("*"):
            if path.is_file():
                archive.write(path, f"{prefix}/{path.relative_to(folder)}")
    return target


def write_scans(folder: Path, names: Iterable[str]) -> Path:
    """Write a scan of one channel for each case into a new folder."""
    folder.mkdir()
    for seed, name in enumerate(names):
        write_scan(folder / f"{name}_0000.nii.gz", seed)
    return folder
