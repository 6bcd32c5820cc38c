"""Chooses the device, the precision and the backend of a model."""

from __future__ import annotations

import torch

from ..errors import BackendUnavailable
from ..options import PRECISIONS
from . import Backend

BACKENDS = ("native", "openvino", "torch", "inductor", "torchscript", "onnx", "tensorrt", "torch_tensorrt")
"""Names of all backends."""

AUTOMATIC = {"cpu": ("native", "openvino", "torch"), "cuda": ("torch",), "mps": ("torch",)}
"""Backends that "auto" tries on each kind of device, in this order; others run only if they are named."""


def backend_named(name: str) -> Backend:
    """Make the backend of a name in `BACKENDS`; only its module is imported, since most runs need one."""
    match name:
        case "native":
            from .native import NativeBackend as Named
        case "openvino":
            from .openvino import OpenVinoBackend as Named
        case "torch":
            from .torch import TorchBackend as Named
        case "inductor":
            from .inductor import InductorBackend as Named
        case "torchscript":
            from .torchscript import TorchScriptBackend as Named
        case "onnx":
            from .onnx import OnnxBackend as Named
        case "tensorrt":
            from .tensorrt import TensorRtBackend as Named
        case "torch_tensorrt":
            from .torch_tensorrt import TorchTensorRtBackend as Named
        case _:
            raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    return Named()


def backends() -> dict[str, Backend]:
    """Every backend by name."""
    return {name: backend_named(name) for name in BACKENDS}


def choose_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1" or "mps" into a device of this machine.

    Raises:
        ValueError: For another name.
        BackendUnavailable: Where this machine does not have it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {device!r}") from error
    if chosen.type == "cuda" and not (torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count()):
        raise BackendUnavailable(
            f"device {device} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; use -device cpu, or a CUDA build of torch"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise BackendUnavailable("device mps is not there: it needs a Mac with Apple's GPU; use -device cpu")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {device!r}")
    if chosen.type == "cuda" and chosen.index is None:
        # Another thread may have another current device.
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def choose_precision(precision: str, device: torch.device) -> str:
    """Turn "auto" into fp32 on a CPU and fp16 on a GPU, as nnU-Net does."""
    if precision == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be auto or one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def usable_backends(name: str, device: torch.device, precision: str) -> tuple[list[Backend], dict[str, str]]:
    """Find the named backend, or with "auto" all that run here, the best first.

    Returns:
        Those, and by name, in the same order, why others cannot run.

    Raises:
        ValueError: For an unknown name.
        BackendUnavailable: Where no backend can run on this device in this precision.
    """
    candidates = [backend_named(each) for each in (AUTOMATIC[device.type] if name == "auto" else (name,))]
    reasons = {candidate.name: candidate.unavailable(device, precision) for candidate in candidates}
    usable = [candidate for candidate in candidates if reasons[candidate.name] is None]
    missing = {other: why for other, why in reasons.items() if why is not None}
    if not usable:
        raise BackendUnavailable("; ".join(f"{other} cannot run here: {why}" for other, why in missing.items()))
    return usable, missing


def choose_backend(name: str, device: torch.device, precision: str) -> Backend:
    """Find the named backend, or with "auto" the best one that runs here; see `usable_backends`."""
    return usable_backends(name, device, precision)[0][0]
