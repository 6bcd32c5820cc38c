"""The module that plans of multi-task models name for their network, also if nnU-Net itself builds it."""

from .model.network import MultiTaskUNet

__all__ = ["MultiTaskUNet"]
