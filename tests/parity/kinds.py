"""What tells one nnU-Net model from another, as far as predicting is concerned."""

from dataclasses import dataclass, field
from typing import Any, Literal

Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampler:
    """A resampling function by nnU-Net's name for it, with its keyword arguments."""

    function: str = "resample_data_or_seg_to_shape"
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """How a plan resamples images, labels of the previous stage, and logits."""

    data: Resampler
    segmentation: Resampler
    probabilities: Resampler


def spline(
    *,
    data: int = 3,
    segmentation: int = 1,
    probabilities: int = 1,
    order_z: int = 0,
    force_separate_z: bool | None = None,
) -> Resampling:
    """Resample by nnU-Net's default function, with these spline orders; the arguments' defaults are nnU-Net's."""

    def resampler(is_seg: bool, order: int) -> Resampler:
        return Resampler(
            kwargs={"is_seg": is_seg, "order": order, "order_z": order_z, "force_separate_z": force_separate_z}
        )

    return Resampling(
        data=resampler(False, data),
        segmentation=resampler(True, segmentation),
        probabilities=resampler(False, probabilities),
    )


def torch_linear(force_separate_z: bool | None = None, majority: bool = False) -> Resampling:
    """Resample by torch's linear interpolation."""

    def resampler(is_seg: bool) -> Resampler:
        kwargs = {"is_seg": is_seg, "force_separate_z": force_separate_z, "memefficient_seg_resampling": majority}
        return Resampler(function="resample_torch_fornnunet", kwargs=kwargs)

    return Resampling(data=resampler(False), segmentation=resampler(True), probabilities=resampler(False))


NO_RESAMPLING = Resampling(
    data=Resampler(function="no_resampling_hack"),
    segmentation=Resampler(function="no_resampling_hack"),
    probabilities=Resampler(function="no_resampling_hack"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkKind:
    """A small U-Net; its number of stages is the length of `features`.

    Attributes:
        class_name: Path of the class as the plan spells it.
        features: Channels per stage.
        kernel_sizes: Kernel per stage.
        strides: Stride per stage.
        norm: Path of the norm's class, where it is not that of `batch_norm` or an instance norm.
        affine: Scale and shift in norms.
        blocks: Convolutions or residual blocks per stage of the encoder.
        batch_norm: BatchNorm with running statistics in place of InstanceNorm.
        dropout: Dropout in every block; inactive when predicting.
        nonlin: Path of the activation's class.
        require_import: Arguments that the plan marks as names to import; None for the usual four.
    """

    class_name: str = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    features: tuple[int, ...] = (6, 8, 12)
    kernel_sizes: tuple[Axes, ...] = ((3, 3, 3), (3, 3, 3), (3, 3, 3))
    strides: tuple[Axes, ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    norm: str | None = None
    affine: bool = True
    blocks: int = 1
    batch_norm: bool = False
    dropout: bool = False
    nonlin: str = "torch.nn.LeakyReLU"
    require_import: tuple[str, ...] | None = None

    @property
    def residual(self) -> bool:
        """Whether the encoder is made of residual blocks, and perhaps the decoder."""
        return "Residual" in self.class_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKind:
    """One kind of model folder and the scans it is compared on.

    Attributes:
        name: Name in test ids; also seeds the weights.
        scans: Names of scans, see `tests.parity.scans`.
        channels: Channel names, see `tests.parity.scans.intensities`.
        configuration: nnU-Net configuration.
        previous_stage: Configuration whose labels are further input channels, or None.
        network: The network.
        patch_size: Voxels per axis; two axes for a 2d configuration.
        spacing: Target spacing in mm, as long as `patch_size`, in transposed order.
        normalization: Scheme of each channel, without the ending `Normalization`.
        masked: Channels normalised inside the non-zero mask.
        more_normalizations: Schemes that the plan names beyond its channels.
        listed_channels: Whether dataset.json holds the names of channels as a list.
        labels: Entry `labels` of dataset.json.
        regions_class_order: Entry of dataset.json, or None.
        transpose_forward: Order of axes that the network sees.
        resampling: Resampling functions.
        folds: Folds in the folder.
        use_folds: Folds to predict with; None leaves the choice to the reader of the folder.
        checkpoint: File name of each fold's checkpoint.
        mirror_axes: Axes in the checkpoint, None, or `missing` for a checkpoint without the entry.
        use_mirroring: Whether the prediction is asked to mirror.
        tile_step_size: Step in units of the patch.
        reader: nnU-Net's class that reads scans.
        file_ending: Ending of scans and labels.
        plans: Spelling of plans.json; `old` is that of nnU-Net before `architecture` was an entry, `inherited`
            splits the configuration into a parent and what differs.
        weights: `fitted` heads give structured labels, as training does; `random` ones nearly tie everywhere.
        weights_prefix: Prefix of every key of the weights, left by wrappers of the network.
    """

    name: str
    scans: tuple[str, ...]
    channels: tuple[str, ...] = ("CT",)
    configuration: str = "3d_fullres"
    previous_stage: str | None = None
    network: NetworkKind = NetworkKind()
    patch_size: Axes = (16, 20, 24)
    spacing: tuple[float, ...] = (1.5, 1.0, 1.0)
    normalization: tuple[str, ...] = ("CT",)
    masked: tuple[bool, ...] = (False,)
    more_normalizations: tuple[str, ...] = ()
    listed_channels: bool = False
    labels: dict[str, Any] = field(default_factory=lambda: {"background": 0, "organ": 1, "lesion": 2})
    regions_class_order: tuple[Any, ...] | None = None
    transpose_forward: tuple[int, int, int] = (0, 1, 2)
    resampling: Resampling = field(default_factory=spline)
    folds: tuple[int | str, ...] = (0,)
    use_folds: tuple[int | str, ...] | None = None
    checkpoint: str = "checkpoint_final.pth"
    mirror_axes: Axes | Literal["missing"] | None = None
    use_mirroring: bool = True
    tile_step_size: float = 0.5
    reader: str = "SimpleITKIO"
    file_ending: str = ".nii.gz"
    plans: Literal["current", "old", "inherited"] = "current"
    weights: Literal["fitted", "random"] = "fitted"
    weights_prefix: str = ""

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.normalization) == len(self.masked):
            raise ValueError(f"{self.name}: channels, normalization and masked must be equally long")
        if len(self.patch_size) != len(self.spacing):
            raise ValueError(f"{self.name}: patch_size and spacing must be equally long")
