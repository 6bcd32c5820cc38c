"""The module that plans of multi-task models name for their network, also if nnU-Net itself builds it."""

from .model.multi_task_unet import MultiTaskUNet

__all__ = ["MultiTaskUNet"]
