"""What nnU-Net finds when the environment variable `nnUNet_extTrainer` names this folder."""

from nnturbo.training.trainer import nnUNetTrainerMultiTask  # type: ignore[import]

__all__ = ["nnUNetTrainerMultiTask"]
