"""Write the `plans.json` and `dataset.json` of a model kind, in the spellings that nnU-Net has used."""

from typing import Any

from tests.parity.kinds import ModelKind, NetworkKind, Resampler

INTENSITY_PROPERTIES = {
    "max": 411.0,
    "mean": 52.3,
    "median": 49.0,
    "min": -330.0,
    "percentile_00_5": -140.5,
    "percentile_99_5": 236.25,
    "std": 81.7,
}
"""Foreground intensities of the training scans, the same for each channel."""


def make_dataset_json(kind: ModelKind) -> dict[str, Any]:
    """Describe the data set as nnU-Net's `dataset.json` does."""
    channels_key = "modality" if kind.plans == "old" else "channel_names"
    dataset_json: dict[str, Any] = {
        channels_key: list(kind.channels) if kind.listed_channels else dict(zip("0123", kind.channels, strict=False)),
        "labels": kind.labels,
        "numTraining": 8,
        "file_ending": kind.file_ending,
    }
    if kind.regions_class_order is not None:
        dataset_json["regions_class_order"] = list(kind.regions_class_order)
    return dataset_json


def make_plans(kind: ModelKind) -> dict[str, Any]:
    """Describe the model as nnU-Net's `plans.json` does."""
    backward = [kind.transpose_forward.index(axis) for axis in range(3)]
    old = kind.plans == "old"
    properties_key = f"foreground_intensity_properties_{'by_modality' if old else 'per_channel'}"
    plans: dict[str, Any] = {
        "dataset_name": "Dataset998_Parity",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 1.5, 1.5],
        "original_median_shape_after_transp": [60, 80, 80],
        "image_reader_writer": kind.reader,
        "transpose_forward": list(kind.transpose_forward),
        "transpose_backward": backward,
        "configurations": _configurations(kind),
        "experiment_planner_used": "ExperimentPlanner",
        properties_key: {str(i): INTENSITY_PROPERTIES for i in range(len(kind.channels))},
    }
    if not old:
        plans["label_manager"] = "LabelManager"
    return plans


def _configurations(kind: ModelKind) -> dict[str, Any]:
    configuration = _configuration(kind)
    if kind.plans == "inherited":
        own = {"inherits_from": "parent", "spacing": configuration["spacing"], "batch_size": 4}
        parent = configuration | {"spacing": [9.0] * len(kind.spacing)}
        return {"grandparent": parent, "parent": {"inherits_from": "grandparent"}, kind.configuration: own}
    if kind.previous_stage is not None:
        configuration["previous_stage"] = kind.previous_stage
        previous = _configuration(kind) | {"next_stage": kind.configuration}
        return {kind.previous_stage: previous, kind.configuration: configuration}
    return {kind.configuration: configuration}


def _configuration(kind: ModelKind) -> dict[str, Any]:
    network = _old_network(kind.network) if kind.plans == "old" else {"architecture": _architecture(kind.network)}
    return {
        "data_identifier": f"nnUNetPlans_{kind.configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(kind.patch_size),
        "median_image_size_in_voxels": [80.0] * len(kind.patch_size),
        "spacing": list(kind.spacing),
        "normalization_schemes": [f"{each}Normalization" for each in kind.normalization + kind.more_normalizations],
        "use_mask_for_norm": [*kind.masked, *(True for _ in kind.more_normalizations)],
        **_resampling_entries("data", kind.resampling.data),
        **_resampling_entries("seg", kind.resampling.segmentation),
        **_resampling_entries("probabilities", kind.resampling.probabilities),
        **network,
        "batch_dice": False,
    }


def _resampling_entries(what: str, resampler: Resampler) -> dict[str, Any]:
    return {f"resampling_fn_{what}": resampler.function, f"resampling_fn_{what}_kwargs": resampler.kwargs}


def _architecture(network: NetworkKind) -> dict[str, Any]:
    dimensions = len(network.strides[0])
    norm = "batchnorm.BatchNorm" if network.batch_norm else "instancenorm.InstanceNorm"
    stages = len(network.features)
    return {
        "network_class_name": network.class_name,
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(network.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [list(size) for size in network.kernel_sizes],
            "strides": [list(stride) for stride in network.strides],
            "n_blocks_per_stage" if network.residual else "n_conv_per_stage": [network.blocks] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": network.norm or f"torch.nn.modules.{norm}{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": network.affine},
            "dropout_op": f"torch.nn.modules.dropout.Dropout{dimensions}d" if network.dropout else None,
            "dropout_op_kwargs": {"p": 0.3} if network.dropout else None,
            "nonlin": network.nonlin,
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": list(network.require_import or ("conv_op", "norm_op", "dropout_op", "nonlin")),
    }


def _old_network(network: NetworkKind) -> dict[str, Any]:
    stages = len(network.features)
    return {
        "UNet_class_name": network.class_name.rpartition(".")[2],
        "UNet_base_num_features": network.features[0],
        "unet_max_num_features": network.features[-1],
        "n_conv_per_stage_encoder": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "num_pool_per_axis": [stages - 1] * len(network.strides[0]),
        "pool_op_kernel_sizes": [list(stride) for stride in network.strides],
        "conv_kernel_sizes": [list(size) for size in network.kernel_sizes],
    }
