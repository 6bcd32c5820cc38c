"""Puts nnturbo's predictor in the place of nnU-Net's, when a program imports that. Starts without torch."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "nnunetv2.inference.predict_from_raw_data"


class Finder(importlib.abc.MetaPathFinder):
    """Finds nnU-Net's module where Python finds it, and changes it once it has run."""

    def __init__(self) -> None:
        self._is_searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != TARGET or self._is_searching:
            return None
        self._is_searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec


class Loader(importlib.abc.Loader):
    """Runs a module as its own loader does, and then replaces the predictor in it."""

    def __init__(self, original: importlib.abc.Loader) -> None:
        self._original = original

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """See `importlib.abc.Loader`."""
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        self._original.exec_module(module)
        replace_predictor(module)


def replace_predictor(module: ModuleType) -> None:
    """Put nnturbo's predictor into nnU-Net's module, which must have been run."""
    from .predictor import nnUNetPredictor

    module.nnUNetPredictor = nnUNetPredictor  # type: ignore[attr-defined]


def install() -> None:
    """Replace the predictor now, or when it is imported."""
    if (module := sys.modules.get(TARGET)) is not None:
        replace_predictor(module)
    elif not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def uninstall() -> None:
    """Undo `install`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    if (module := sys.modules.get(TARGET)) is not None:
        from .state import StockPredictor

        module.nnUNetPredictor = StockPredictor  # type: ignore[attr-defined]
