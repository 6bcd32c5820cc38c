"""What nnU-Net finds when the environment variable `nnUNet_extTrainer` names this folder.

Its command names a trainer and no preset, so each preset has a trainer.
"""

from nnturbo.training.trainer import nnUNetTrainerMultiTask  # type: ignore[import]

__all__ = [
    "nnUNetTrainerMultiTask",
    "nnUNetTrainerMultiTask_aggressive",
    "nnUNetTrainerMultiTask_conservative",
    "nnUNetTrainerMultiTask_segmentation_focused",
]


class nnUNetTrainerMultiTask_conservative(nnUNetTrainerMultiTask):  # noqa: N801 - nnU-Net's form
    """Trains by the preset "conservative" where the plans have no recipe."""

    preset = "conservative"


class nnUNetTrainerMultiTask_aggressive(nnUNetTrainerMultiTask):  # noqa: N801
    """Trains by the preset "aggressive" where the plans have no recipe."""

    preset = "aggressive"


class nnUNetTrainerMultiTask_segmentation_focused(nnUNetTrainerMultiTask):  # noqa: N801
    """Trains by the preset "segmentation_focused" where the plans have no recipe."""

    preset = "segmentation_focused"
