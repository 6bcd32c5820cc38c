"""All kinds of nnU-Net model that the suite covers, and the scans that each is run on."""

from dataclasses import replace

from tests.parity.kinds import NO_RESAMPLING, ModelKind, NetworkKind, spline, torch_linear

RESIDUAL_CLASS = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
PLAIN = NetworkKind()
RESIDUAL = NetworkKind(class_name=RESIDUAL_CLASS)
RESIDUAL_BOTH_WAYS = NetworkKind(class_name="dynamic_network_architectures.architectures.unet.ResidualUNet")
FLAT_KERNELS = NetworkKind(kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)))
TWO_DIMENSIONAL = NetworkKind(kernel_sizes=((3, 3), (3, 3), (3, 3)), strides=((1, 1), (2, 2), (2, 2)))
ONE_STRIDE = NetworkKind(features=(6, 8), kernel_sizes=((3, 3, 3), (3, 1, 3)), strides=((1, 1, 1), (1, 1, 1)))

DEEP = NetworkKind(
    class_name=RESIDUAL_CLASS,
    features=(6, 8, 12, 12, 12, 12, 12, 12),
    kernel_sizes=((3, 3),) * 8,
    strides=((1, 1), *((2, 2),) * 7),
    blocks=2,
)
"""Eight stages, as nnU-Net plans them for slices of 512 x 512: the coarsest grid has 4 x 4 voxels."""

REGIONS: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
COARSE = {"spacing": (4.0, 1.0, 1.0), "patch_size": (8, 24, 28), "network": FLAT_KERNELS}
MR = {"channels": ("T1",), "normalization": ("ZScore",)}
MR_PAIR = {"channels": ("T1", "T2"), "normalization": ("ZScore", "ZScore")}

PLAIN_CT = ModelKind(
    name="plain_ct",
    scans=(
        *("isotropic", "plan_spacing", "half_voxels", "coarse_first", "coarse_middle", "coarse_last", "two_coarse"),
        *("ratio_three", "tiny", "flat", "single_slice", "bordered", "blank", "scaled_integers"),
    ),
)
PLAIN_2D = ModelKind(
    name="2d",
    scans=("isotropic", "coarse_first", "coarse_last", "single_slice", "tiny", "bordered"),
    configuration="2d",
    network=TWO_DIMENSIONAL,
    patch_size=(20, 28),
    spacing=(1.0, 1.2),
)
CASCADE = ModelKind(
    name="cascade",
    scans=("isotropic", "coarse_first", "bordered"),
    configuration="3d_cascade_fullres",
    previous_stage="3d_lowres",
)
REGION_KIND = ModelKind(
    name="regions", scans=("isotropic", "bordered"), labels=REGIONS, regions_class_order=(1, 2, 3), **MR
)

NETWORKS = (
    PLAIN_CT,
    ModelKind(name="random_weights", scans=("isotropic", "coarse_first", "tiny"), weights="random"),
    ModelKind(name="residual", scans=("isotropic", "coarse_first"), network=RESIDUAL),
    ModelKind(name="residual_both_ways", scans=("small", "coarse_first"), network=RESIDUAL_BOTH_WAYS),
    ModelKind(name="odd_channels", scans=("small",), network=replace(PLAIN, features=(5, 7, 13))),
    ModelKind(name="odd_channels_residual", scans=("small",), network=replace(RESIDUAL, features=(5, 7, 13))),
    ModelKind(name="coarse_plan", scans=("isotropic", "coarse_first", "coarse_as_planned", "coarse_last"), **COARSE),
    ModelKind(
        name="coarse_plan_residual",
        scans=("coarse_first",),
        **COARSE | {"network": replace(FLAT_KERNELS, class_name=RESIDUAL_CLASS)},
    ),
    ModelKind(name="odd_patch", scans=("isotropic", "tiny"), network=ONE_STRIDE, patch_size=(9, 13, 15)),
    ModelKind(name="batch_norm", scans=("small",), network=replace(PLAIN, batch_norm=True)),
    ModelKind(
        name="dropout_relu",
        scans=("small",),
        network=replace(PLAIN, dropout=True, nonlin="torch.nn.modules.activation.ReLU"),
    ),
    ModelKind(name="norm_without_affine", scans=("small",), weights="random", network=replace(PLAIN, affine=False)),
    ModelKind(name="another_activation", scans=("small",), network=replace(PLAIN, nonlin="torch.nn.SiLU")),
    ModelKind(
        name="nonlin_not_there",
        scans=("small",),
        network=replace(PLAIN, nonlin="torch.nn.modules.activations.LeakyReLU"),
    ),
    ModelKind(
        name="nonlin_not_there_residual", scans=("small",), network=replace(RESIDUAL, nonlin="torch.nn.LeakyRelu")
    ),
    ModelKind(
        name="norm_not_there",
        scans=("small",),
        network=replace(PLAIN, norm="torch.nn.modules.batchnorm.InstanceNorm3d", affine=False),
    ),
    ModelKind(name="lowres", scans=("isotropic", "coarse_first"), configuration="3d_lowres", spacing=(3.0, 2.6, 2.6)),
    PLAIN_2D,
    replace(
        PLAIN_2D, name="2d_residual", scans=("small",), network=replace(TWO_DIMENSIONAL, class_name=RESIDUAL_CLASS)
    ),
    replace(
        PLAIN_2D,
        name="2d_residual_both_ways",
        scans=("small",),
        network=replace(TWO_DIMENSIONAL, class_name=RESIDUAL_BOTH_WAYS.class_name),
    ),
    replace(PLAIN_2D, name="2d_odd_channels", scans=("small",), network=replace(TWO_DIMENSIONAL, features=(3, 9, 11))),
    replace(PLAIN_2D, name="2d_mirrored", scans=("coarse_first",), mirror_axes=(0, 1)),
    replace(
        PLAIN_2D,
        name="2d_deep",
        scans=("flat", "bordered_coarse"),
        network=DEEP,
        patch_size=(512, 512),
        spacing=(1.0, 1.0),
        weights="random",
    ),
    replace(PLAIN_2D, name="2d_transposed", scans=("isotropic", "coarse_last"), transpose_forward=(2, 0, 1)),
)
INTENSITIES = (
    ModelKind(name="zscore", scans=("isotropic", "bordered", "blank"), **MR),
    ModelKind(name="zscore_masked", scans=("isotropic", "bordered", "bordered_coarse"), masked=(True, True), **MR_PAIR),
    ModelKind(name="zscore_half_masked", scans=("bordered",), masked=(True, False), **MR_PAIR),
    ModelKind(
        name="rescale_and_none",
        scans=("isotropic", "bordered"),
        channels=("T1", "CT"),
        normalization=("RescaleTo01", "No"),
        masked=(False, False),
    ),
    ModelKind(
        name="rgb",
        scans=("isotropic", "bordered"),
        channels=("R", "G", "B"),
        normalization=("RGBTo01",) * 3,
        masked=(False,) * 3,
    ),
    ModelKind(
        name="ct_and_mr",
        scans=("isotropic", "coarse_first"),
        channels=("CT", "T1", "T2"),
        normalization=("CT", "ZScore", "ZScore"),
        masked=(False, False, True),
    ),
    ModelKind(name="more_normalizations", scans=("small",), more_normalizations=("ZScore", "CT")),
    ModelKind(name="listed_channels", scans=("small",), listed_channels=True),
)
LABELS = (
    REGION_KIND,
    replace(REGION_KIND, name="regions_reordered", scans=("small",), regions_class_order=(2, 3, 1)),
    replace(REGION_KIND, name="regions_ignore", scans=("small",), labels=REGIONS | {"ignore": 4}),
    ModelKind(name="labels_as_strings", scans=("small",), labels={"background": "0", "organ": "1", "lesion": "2"}),
    ModelKind(name="labels_as_floats", scans=("small",), labels={"background": 0.0, "organ": 1.0, "lesion": 2.0}),
    replace(
        REGION_KIND,
        name="regions_as_floats",
        scans=("small",),
        labels={"background": 0.0, "whole": [1.0, 2.0, 3.0], "core": [2.0, 3.0], "enhancing": 3.0},
        regions_class_order=(1.0, 2.0, 3.0),
    ),
    ModelKind(name="ignore", scans=("small",), labels={"background": 0, "organ": 1, "ignore": 2}),
    ModelKind(
        name="254_labels",
        scans=("tiny",),
        weights="random",
        labels={"background": 0} | {f"label_{i}": i for i in range(1, 255)},
    ),
    ModelKind(
        name="255_labels",
        scans=("tiny",),
        weights="random",
        labels={"background": 0} | {f"label_{i}": i for i in range(1, 256)},
    ),
)
CASCADES = (
    CASCADE,
    replace(CASCADE, name="cascade_transposed", scans=("coarse_last",), transpose_forward=(2, 0, 1)),
    replace(CASCADE, name="cascade_torch", scans=("isotropic", "coarse_first"), resampling=torch_linear()),
    replace(CASCADE, name="cascade_linear_z", scans=("coarse_first", "coarse_last"), resampling=spline(order_z=1)),
    replace(CASCADE, name="cascade_cubic", scans=("isotropic", "coarse_first"), resampling=spline(segmentation=3)),
    replace(
        CASCADE, name="cascade_majority", scans=("isotropic", "coarse_first"), resampling=torch_linear(majority=True)
    ),
    replace(
        CASCADE,
        name="cascade_deep",
        scans=("isotropic", "coarse_first"),
        weights="random",
        network=NetworkKind(
            features=(6, 8, 12, 12, 12),
            kernel_sizes=((3, 3, 3),) * 5,
            strides=((1, 1, 1), *((2, 2, 2),) * 4),
            blocks=2,
        ),
        patch_size=(32, 32, 32),
    ),
    replace(CASCADE, name="cascade_regions", scans=("small",), labels=REGIONS, regions_class_order=(1, 2, 3)),
    replace(CASCADE, name="cascade_masked", scans=("bordered",), masked=(True,), **MR),
)
TRANSPOSED = (
    ModelKind(
        name="transposed_201",
        scans=("isotropic", "coarse_last", "bordered", "oblique"),
        transpose_forward=(2, 0, 1),
        **COARSE,
    ),
    ModelKind(name="transposed_102", scans=("isotropic", "coarse_middle"), transpose_forward=(1, 0, 2), **COARSE),
    ModelKind(name="transposed_120_mirrored", scans=("small",), transpose_forward=(1, 2, 0), mirror_axes=(0,)),
)
RESAMPLINGS = (
    ModelKind(
        name="separate_z", scans=("isotropic", "coarse_first", "two_coarse"), resampling=spline(force_separate_z=True)
    ),
    ModelKind(name="never_separate_z", scans=("isotropic", "coarse_first"), resampling=spline(force_separate_z=False)),
    ModelKind(name="linear_data", scans=("isotropic", "coarse_first"), resampling=spline(data=1)),
    ModelKind(name="linear_z", scans=("coarse_first", "coarse_last"), resampling=spline(order_z=1)),
    ModelKind(name="nearest", scans=("isotropic", "coarse_first"), resampling=spline(data=0, probabilities=0)),
    ModelKind(name="cubic_logits", scans=("isotropic", "coarse_first"), resampling=spline(probabilities=3, order_z=3)),
    ModelKind(name="square", scans=("isotropic", "coarse_first"), resampling=spline(data=2)),
    ModelKind(name="quartic", scans=("isotropic", "coarse_first"), resampling=spline(data=4, order_z=2)),
    ModelKind(name="quintic", scans=("isotropic", "coarse_last"), resampling=spline(data=5, order_z=5)),
    ModelKind(name="cubic_logits_of_order_5", scans=("coarse_first",), resampling=spline(probabilities=5, order_z=4)),
    ModelKind(name="torch", scans=("isotropic", "coarse_first", "plan_spacing"), resampling=torch_linear()),
    ModelKind(name="torch_separate_z", scans=("isotropic", "coarse_last"), resampling=torch_linear(True)),
    ModelKind(name="torch_never_separate_z", scans=("coarse_first",), resampling=torch_linear(False)),
    ModelKind(name="no_resampling", scans=("isotropic", "bordered"), resampling=NO_RESAMPLING),
    ModelKind(
        name="mixed_resampling",
        scans=("coarse_first",),
        resampling=replace(spline(), probabilities=torch_linear().probabilities),
    ),
)
PREDICTION = (
    ModelKind(name="mirror_all", scans=("small", "tiny"), mirror_axes=(0, 1, 2)),
    ModelKind(name="mirror_first", scans=("small",), mirror_axes=(0,)),
    ModelKind(name="mirror_plane", scans=("small",), mirror_axes=(1, 2), network=RESIDUAL),
    ModelKind(name="mirror_declined", scans=("small",), mirror_axes=(0, 1, 2), use_mirroring=False),
    ModelKind(name="mirror_missing", scans=("small",), mirror_axes="missing"),
    ModelKind(name="two_folds", scans=("coarse_first",), folds=(0, 3)),
    ModelKind(name="two_folds_mirrored", scans=("small",), folds=(0, 1), mirror_axes=(2,)),
    ModelKind(name="one_of_two_folds", scans=("small",), folds=(0, 1), use_folds=(1,)),
    ModelKind(name="fold_all", scans=("small",), folds=("all",), use_folds=("all",)),
    ModelKind(name="fold_all_beside_others", scans=("small",), folds=("all", 2)),
    ModelKind(name="checkpoint_best", scans=("small",), checkpoint="checkpoint_best.pth"),
    ModelKind(name="step_0.3", scans=("small",), tile_step_size=0.3),
    ModelKind(name="step_0.75", scans=("isotropic",), tile_step_size=0.75),
    ModelKind(name="step_1", scans=("isotropic",), tile_step_size=1.0),
    ModelKind(name="module_prefix", scans=("small",), weights_prefix="module."),
    ModelKind(name="orig_mod_prefix", scans=("small",), weights_prefix="_orig_mod."),
)
FORMATS = (
    ModelKind(name="simpleitk", scans=("two_flips", "one_flip", "sagittal", "oblique")),
    ModelKind(name="nibabel", scans=("two_flips", "sagittal", "oblique", "scaled_integers"), reader="NibabelIO"),
    ModelKind(
        name="nibabel_reorient", scans=("two_flips", "one_flip", "sagittal", "oblique"), reader="NibabelIOWithReorient"
    ),
    ModelKind(name="simpleitk_reorient", scans=("two_flips", "sagittal", "oblique"), reader="SimpleITKIOWithReorient"),
    ModelKind(name="nrrd", scans=("oblique",), file_ending=".nrrd"),
    ModelKind(name="mha", scans=("sagittal",), file_ending=".mha"),
    ModelKind(name="old_plans", scans=("small",), plans="old"),
    ModelKind(
        name="old_plans_residual", scans=("small",), plans="old", network=replace(RESIDUAL, features=(6, 12, 12))
    ),
    ModelKind(
        name="moved_class",
        scans=("small",),
        network=replace(
            RESIDUAL, class_name="dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet"
        ),
    ),
    ModelKind(
        name="class_of_a_fork",
        scans=("small",),
        network=replace(RESIDUAL, class_name="nnunetv2.training.nnUNetTrainer.variants.ResidualEncoderUNet"),
    ),
    ModelKind(name="inherited_plans", scans=("small",), plans="inherited"),
    ModelKind(
        name="few_imports", scans=("small",), network=replace(PLAIN, require_import=("conv_op", "norm_op", "nonlin"))
    ),
)

ALL_KINDS = (
    *NETWORKS,
    *INTENSITIES,
    *LABELS,
    *CASCADES,
    *TRANSPOSED,
    *RESAMPLINGS,
    *PREDICTION,
    *FORMATS,
)
PAIRS = tuple((kind, scan) for kind in ALL_KINDS for scan in kind.scans)
