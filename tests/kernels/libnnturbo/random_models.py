"""Models of random networks, for one or two channels."""

import numpy as np

from tests.engine.factory import dataset_json, multi_task, plans_json, write_model

NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
HEADS = ("gap_linear", "gap_mlp", "attention")
SCHEMES = ("CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization", "NoNormalization")
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def write_random_model(luck, folder):
    """Write a model folder; returns it and how many channels a scan must have."""
    axes, stages, channels = int(luck.choice([2, 3, 3])), int(luck.integers(2, 4)), int(luck.integers(1, 3))
    strides = [[1] * axes, *([int(n) for n in luck.integers(1, 3, axes)] for _ in range(stages - 1))]
    patch = np.prod(strides, axis=0) * luck.integers(2, 5, axes)
    plans = plans_json(
        patch_size=[int(n) for n in patch],
        spacing=[2.0, 1.5, 1.5][-axes:],
        normalization_schemes=[str(luck.choice(SCHEMES)) for _ in range(channels)],
        use_mask_for_norm=[bool(luck.integers(2)) for _ in range(channels)],
    )
    intensities = plans["foreground_intensity_properties_per_channel"]
    intensities["1"] = intensities["0"]
    architecture, network = plans["configurations"]["3d_fullres"]["architecture"], str(luck.choice(NETWORKS))
    architecture["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{network}"
    plain = network == "PlainConvUNet"
    arguments = architecture["arch_kwargs"]
    del arguments["n_conv_per_stage"]
    arguments |= {
        "n_stages": stages,
        "features_per_stage": [int(n) for n in luck.integers(1, 36, stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
        "kernel_sizes": [[int(n) for n in luck.choice([1, 3, 3], axes)] for _ in range(stages)],
        "strides": strides,
        "n_conv_per_stage" if plain else "n_blocks_per_stage": [int(n) for n in luck.integers(1, 3, stages)],
        "n_conv_per_stage_decoder": [int(n) for n in luck.integers(1, 3, stages - 1)],
        "conv_bias": bool(luck.integers(2)),
    }
    regions = bool(luck.random() < 0.3)
    if network != "ResidualUNet" and luck.random() < 0.5:  # which keeps no encoder that a head could read
        head = {"kind": str(luck.choice(HEADS)), "focus_channels": [1], "regions": regions}
        plans = multi_task(plans, **head)
    dataset = dataset_json(
        channel_names={str(channel): f"channel {channel}" for channel in range(channels)},
        **(REGIONS if regions else {}),
    )
    folds = tuple(str(fold) for fold in range(int(luck.integers(1, 3))))
    return write_model(folder, plans=plans, dataset=dataset, folds=folds), channels
