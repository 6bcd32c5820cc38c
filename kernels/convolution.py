"""Convolutions, transposed convolutions and instance norms on CPUs: compiles kernels/cpu/convolution.cpp and calls it.

Tensors are (1, C, Z, Y, X) float32 with the channels last in memory (`torch.channels_last_3d`).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path(__file__).parent / "cpu" / "convolution.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")


def compiler() -> str | None:
    """Find a C++ compiler: what CXX names, or the system's."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def compile_library(folder: Path) -> ctypes.CDLL:
    """Compile for this machine's processor, or take what was compiled before.

    Args:
        folder: Where to keep it; made if it is not there.

    Raises:
        OSError: Where there is no compiler, or it fails, or the folder cannot be written.
    """
    command = compiler()
    if command is None:
        raise OSError("there is no C++ compiler")
    # What the compiler knows of itself and of this processor.
    about = _run([command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\n".join([about, *FLAGS, SOURCE.read_text(encoding="utf-8")]).encode()).hexdigest()[:16]
    path = folder / f"convolution-{key}.so"
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # it is not there, or was made against another C library
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as aside:
            made = Path(aside) / path.name
            _run([command, *FLAGS, "-o", str(made), str(SOURCE)])
            with made.open("r+b") as written:
                os.fsync(written.fileno())  # half a library would end the process that loads it
            made.replace(path)
        library = ctypes.CDLL(str(path))
    library.nnturbo_weights_size.restype = ctypes.c_int64
    for name in ("transform_weights", "convolve", "convolve_directly", "spread", "project", "normalise"):
        getattr(library, f"nnturbo_{name}").errcheck = _checked
    return library


def _checked(result: int, function: Any, arguments: Any) -> int:
    if result:
        raise MemoryError(f"{function.__name__} needs more memory than there is")
    return result


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise OSError(f"{command[0]} fails: {reason:.300}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class PendingUpsampling:
    """A transposed convolution whose kernel is as large as its stride, that is yet to be done.

    Args:
        values: (1, in, Z, Y, X).
        stride: Along z, y and x.
        weights: From `Kernels.pack_spread`.
        bias: (out,).
    """

    values: Tensor
    stride: Sequence[int]
    weights: Tensor
    bias: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, (1, out, ...)."""
        return (1, len(self.bias), *(n * s for n, s in zip(self.values.shape[2:], self.stride, strict=True)))


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled functions."""

    library: Any

    @property
    def lanes(self) -> int:
        """Channels come in multiples of this, but those of a direct convolution's input and of logits."""
        return self.library.nnturbo_lanes()

    @property
    def columns(self) -> int:
        """Outputs of weights come in multiples of this; the last may be empty."""
        return self.library.nnturbo_columns()

    def set_threads(self, count: int) -> None:
        """Compute with that many threads from now on."""
        self.library.nnturbo_threads(ctypes.c_int(count))

    def give_back(self) -> None:
        """Return memory that was freed to the system, where the C library holds on to it: up to a third of all."""
        self.library.nnturbo_give_back()

    def transform_weights(self, weight: Tensor) -> Tensor:
        """Make what `convolve` takes of (out, in, 3 or 1, 3, 3): four times as much."""
        weight = weight.contiguous()
        outputs, inputs, taps = weight.shape[:3]
        sizes = [ctypes.c_int64(n) for n in (taps, inputs, outputs)]
        transformed = torch.empty(self.library.nnturbo_weights_size(*sizes))
        self.library.nnturbo_transform_weights(*sizes, _at(weight), _at(transformed))
        return transformed

    def convolve(
        self,
        inputs: Sequence[Tensor | PendingUpsampling],
        taps: int,
        weights: Tensor,
        bias: Tensor,
        *,
        overwrite: bool = False,
    ) -> Tensor:
        """Convolve one tensor, or two as if they were concatenated, with 3 (or 1) x 3 x 3 taps and zeros around.

        Args:
            inputs: One or two; the first may be one that is made from a coarser one as it is needed.
            taps: Along z.
            weights: From `transform_weights`.
            bias: (out,).
            overwrite: Put the result into the memory of the last input, which must have as many channels.
        """
        one, *others = inputs
        last = inputs[-1]
        if overwrite and not (isinstance(last, Tensor) and last.shape[1] == len(bias)):
            raise ValueError(f"{len(bias)} channels cannot overwrite {last.shape[1]}, or what is yet to be done")
        out = last if overwrite and isinstance(last, Tensor) else _empty(len(bias), one.shape[2:])
        coarse = one if isinstance(one, PendingUpsampling) else None
        self.library.nnturbo_convolve(
            *(ctypes.c_int64(n) for n in (taps, *one.shape[2:])),
            *(argument for values in (one, *others) for argument in _input(values)),
            *(() if others else (None, ctypes.c_int64(0))),
            ctypes.c_int64(len(bias)),
            *(_at(tensor) for tensor in (weights, bias, out)),
            *(
                (None, ctypes.c_int64(0), None, None, None)
                if coarse is None
                else (
                    _at(coarse.values),
                    ctypes.c_int64(coarse.values.shape[1]),
                    _numbers(coarse.stride),
                    _at(coarse.weights),
                    _at(coarse.bias),
                )
            ),
        )
        return out

    def pack_weights(self, weight: Tensor) -> Tensor:
        """Make what `convolve_directly` takes of (out, in, z, y, x)."""
        return self._panels(weight.permute(2, 3, 4, 1, 0)).permute(4, 0, 1, 2, 3, 5).contiguous()

    def convolve_directly(
        self, values: Tensor, taps: Sequence[int], stride: Sequence[int], weights: Tensor, bias: Tensor
    ) -> Tensor:
        """Convolve with any odd number of taps and any strides, zeros around."""
        size = values.shape[2:]
        out = _empty(len(bias), [(n + 2 * (t // 2) - t) // s + 1 for n, t, s in zip(size, taps, stride, strict=True)])
        self.library.nnturbo_convolve_directly(
            *(_numbers(of) for of in (size, taps, stride)),
            ctypes.c_int64(values.shape[1]),
            ctypes.c_int64(len(bias)),
            *(_at(tensor) for tensor in (values, weights, bias, out)),
        )
        return out

    def pack_spread(self, weight: Tensor) -> Tensor:
        """Make what `spread` takes of (in, out, z, y, x)."""
        return self._panels(weight.flatten(2).permute(2, 0, 1)).permute(0, 2, 1, 3).contiguous()

    def _panels(self, weight: Tensor) -> Tensor:
        """Split the last axis, of outputs, into panels, the last one filled up with zeros."""
        return F.pad(weight, (0, -weight.shape[-1] % self.columns)).unflatten(-1, (-1, self.columns))

    def spread(self, finer: PendingUpsampling) -> Tensor:
        """Make it as a whole."""
        out = _empty(finer.shape[1], finer.shape[2:])
        self.library.nnturbo_spread(
            *(_numbers(of) for of in (finer.values.shape[2:], finer.stride)),
            *(ctypes.c_int64(n) for n in (finer.values.shape[1], finer.shape[1])),
            *(_at(tensor) for tensor in (finer.values, finer.weights, finer.bias, out)),
        )
        return out

    def project(self, values: Tensor, outputs: int, weights: Tensor, bias: Tensor) -> Tensor:
        """Mix the channels of each voxel; weights are from `pack_weights`, biases as many as columns.

        Returns:
            (1, outputs, Z, Y, X), the channels first in memory.
        """
        out = torch.empty((1, outputs, *values.shape[2:]))
        self.library.nnturbo_project(
            ctypes.c_int64(math.prod(values.shape[2:])),
            ctypes.c_int64(values.shape[1]),
            ctypes.c_int64(outputs),
            *(_at(tensor) for tensor in (values, weights, bias, out)),
        )
        return out

    def normalise(
        self,
        values: Tensor,
        scale: Tensor,
        shift: Tensor,
        epsilon: float,
        slope: float = 1.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalise each channel over its voxels, add a residual, damp what is negative by `slope`; in place."""
        self.library.nnturbo_normalise(
            ctypes.c_int64(math.prod(values.shape[2:])),
            ctypes.c_int64(values.shape[1]),
            _at(scale),
            _at(shift),
            ctypes.c_float(epsilon),
            None if residual is None else _at(residual),
            ctypes.c_float(slope),
            _at(values),
        )
        return values


def channels_last(values: Tensor) -> Tensor:
    """Lay a tensor out as the kernels take it."""
    return values.contiguous(memory_format=torch.channels_last_3d)


def _empty(channels: int, size: Sequence[int]) -> Tensor:
    return torch.empty((1, channels, *size), memory_format=torch.channels_last_3d)


def _input(values: Tensor | PendingUpsampling) -> tuple[Any, ctypes.c_int64]:
    return _at(values) if isinstance(values, Tensor) else None, ctypes.c_int64(values.shape[1])


def _numbers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    if tensor.dtype != torch.float32:
        raise TypeError(f"the kernels compute in float32, got {tensor.dtype}")
    return ctypes.c_void_p(tensor.data_ptr())
