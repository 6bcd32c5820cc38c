"""Runs trained nnU-Net v2 models: the labels nnU-Net gives, many times sooner."""

from pathlib import Path

__version__ = "0.2.0"

_HERE = Path(__file__).parent
if not (_HERE / "engine").exists():
    # A clone: engine, kernels, training and benchmarks lie beside this folder. Installed, they are in it.
    __path__.append(str(_HERE.parent))
