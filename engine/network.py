"""The name under which plans of multi-task models find their network, also where nnU-Net itself builds it."""

from .model.network import MultiTaskUNet

__all__ = ["MultiTaskUNet"]
