"""Runs trained nnU-Net v2 models, and gives nnU-Net's labels many times faster."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .ensemble import Ensemble
    from .errors import (
        BackendUnavailable,
        BundleError,
        CheckpointError,
        EngineError,
        ModelError,
        OutputError,
        PredictionError,
        VolumeError,
    )
    from .export.build import build
    from .model.classification import Classification
    from .model.provenance import Provenance
    from .options import EngineOptions
    from .pipeline.prediction import Prediction
    from .pipeline.steps import Request
    from .scans.geometry import Geometry
    from .scans.volume import Volume, read_volume, write_segmentation

__all__ = [
    "BackendUnavailable",
    "BundleError",
    "CheckpointError",
    "Classification",
    "Engine",
    "EngineError",
    "EngineOptions",
    "Ensemble",
    "Geometry",
    "ModelError",
    "OutputError",
    "Prediction",
    "PredictionError",
    "Provenance",
    "Request",
    "Volume",
    "VolumeError",
    "build",
    "read_volume",
    "write_segmentation",
]

_MODULES = {
    "engine": ("Engine",),
    "ensemble": ("Ensemble",),
    "errors": (
        "BackendUnavailable",
        "BundleError",
        "CheckpointError",
        "EngineError",
        "ModelError",
        "OutputError",
        "PredictionError",
        "VolumeError",
    ),
    "export.build": ("build",),
    "model.classification": ("Classification",),
    "model.provenance": ("Provenance",),
    "options": ("EngineOptions",),
    "pipeline.prediction": ("Prediction",),
    "pipeline.steps": ("Request",),
    "scans.geometry": ("Geometry",),
    "scans.volume": ("Volume", "read_volume", "write_segmentation"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line and its --help start without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
