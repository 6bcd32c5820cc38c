"""Stands in for nnU-Net's predictor, in Python and under programs that know nothing of nnturbo."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import accelerated
    from .predictor import nnUNetPredictor

__all__ = ["accelerated", "nnUNetPredictor"]

_HOME = {"accelerated": "acceleration", "nnUNetPredictor": "predictor"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: nnU-Net takes seconds to import."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
