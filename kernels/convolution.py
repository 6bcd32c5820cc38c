"""Convolutions, transposed convolutions and instance norms on CPUs: finds or compiles the library, and calls it.

Tensors are (1, C, Z, Y, X) float32 with the channels last in memory (`torch.channels_last_3d`).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .compilation import FOLDER, compile_kernels, compiler, here, library_name

INSTALLED = Path(__file__).parent / library_name(here()[0])
"""The library that comes with nnturbo's wheels; a clone has none."""


def find_library(folder: Path) -> ctypes.CDLL | None:
    """Load the library that came with nnturbo, or one that was compiled before; None where there is neither.

    Args:
        folder: Where compiled ones are kept.

    Raises:
        OSError: Where the processor lacks the instructions.
    """
    for path in (INSTALLED, _kept(folder)):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # it is not there, or is for another system
            continue
        return _declared(library)
    return None


def load_library(folder: Path) -> ctypes.CDLL:
    """Give what `find_library` finds, or compile it.

    Args:
        folder: Where to keep it; made if it is not there.

    Raises:
        OSError: Where there is no compiler, or it fails, the folder cannot be written, or the processor lacks the
            instructions.
    """
    if (found := find_library(folder)) is not None:
        return found
    command = compiler()
    if command is None:
        raise OSError("there is no C++ compiler")
    system, processor = here()
    folder.mkdir(parents=True, exist_ok=True)
    path = _kept(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as aside:
        made = Path(aside) / path.name
        compile_kernels(command, made, system=system, processor=processor)
        with made.open("r+b") as written:
            os.fsync(written.fileno())  # half a library would end the process that loads it
        made.replace(path)
    return _declared(ctypes.CDLL(str(path)))


def lacking(folder: Path) -> str | None:
    """Say why there can be no library here, in words, or None; see `load_library`."""
    try:
        if find_library(folder) is None and compiler() is None:
            return "it needs one of nnturbo's wheels for this system, or a C++ compiler such as g++"
    except OSError as error:
        return str(error)
    return None


def _kept(folder: Path) -> Path:
    """Name what is compiled here, by all that it is made of."""
    sources = [path.read_bytes() for path in (*sorted(FOLDER.iterdir()), Path(__file__).with_name("compilation.py"))]
    key = hashlib.sha256(b"\n".join([*sources, " ".join(here()).encode()])).hexdigest()[:16]
    return folder / f"{key}-{library_name(here()[0])}"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.nnturbo_variant.restype = ctypes.c_char_p
    if library.nnturbo_variant() is None:
        raise OSError("this processor is too old for nnturbo's kernels, which need AVX2 and FMA")
    library.nnturbo_weights_size.restype = ctypes.c_int64
    for name in ("transform_weights", "convolve", "convolve_directly", "spread", "project", "normalise"):
        getattr(library, f"nnturbo_{name}").errcheck = _checked
    return library


def _checked(result: int, function: Any, arguments: Any) -> int:
    if result:
        raise MemoryError(f"{function.__name__} needs more memory than there is")
    return result


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
    def variant(self) -> str:
        """The instructions that are used, as `compilation.VARIANTS` names them: the widest that this processor has."""
        return self.library.nnturbo_variant().decode()

    def use(self, variant: str) -> None:
        """Use other instructions from now on; tensors that were laid out for others are of no use then.

        Raises:
            ValueError: Where this processor or library has none of that name.
        """
        if self.library.nnturbo_use(variant.encode()):
            raise ValueError(f"variant must be one that runs here, such as {self.variant}, got {variant}")

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
