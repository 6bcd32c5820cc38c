"""Programs of networks for CPUs: what they are made of, and their run by the library of kernels; see cpu/program.h."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = ("convolution", "transposed_convolution", "concatenation", "average_pooling", "projection")
"""Of operations, in the order of their numbers."""

HEADS = ("none", "pooled", "attention", "focus_pooling")
"""Kinds of heads, in the order of their numbers."""

_ERROR_BYTES = 400
_Size3 = ctypes.c_int64 * 3
_ONES, _ZEROS = (1, 1, 1), (0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A map, or the logits.

    Args:
        buffer: Where it lies; -1 for logits.
        channels: How many.
        size: (z, y, x) in voxels.
    """

    buffer: int
    channels: int
    size: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An instance norm after a convolution, with what is added and the activation.

    Args:
        scale, shift: Names of weights, one number for each channel.
        epsilon: Added to the variance.
        slope: What negative values are multiplied by; 1 without an activation.
        residual: Value that is added before the activation.
    """

    scale: str
    shift: str
    epsilon: float
    slope: float
    residual: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upsampling:
    """A transposed convolution before a convolution, whose first input it makes; that is never there as a whole.

    Args:
        stride: And kernel size.
        weight, bias: Names of weights, (in, out, *stride) and (out,).
    """

    stride: tuple[int, int, int]
    weight: str
    bias: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation.

    Args:
        kind: One of `KINDS`.
        name: Of the network's module.
        inputs: One or two values.
        output: A value.
        taps: Of a convolution.
        stride: Of a convolution, transposed convolution or pooling.
        transformed: Whether a convolution, not of the tile, goes by fewer products: with 1 or 3 x 3 x 3 taps, stride 1;
            or in float32 along z alone, with 3 taps and stride 1 there.
        in_int16: Whether it multiplies in int16; a convolution, transposed or not, but not of the tile.
        weight, bias: Names of weights.
        norm: After a convolution.
        upsampling: Before a convolution.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    taps: tuple[int, int, int] = _ONES
    stride: tuple[int, int, int] = _ONES
    transformed: bool = False
    in_int16: bool = False
    weight: str | None = None
    bias: str | None = None
    norm: Norm | None = None
    upsampling: Upsampling | None = None

    @property
    def along_z(self) -> bool:
        """Whether it goes by fewer products along z alone, which it does with one input that stays as it is."""
        return self.transformed and (self.taps[1:] != (3, 3) or self.stride != _ONES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramHead:
    """A classification head.

    Args:
        kind: One of `HEADS`.
        features: Values that it reads.
        focus_channels: Of the logits.
        regions: Whether these are regions.
        tensors: Names of weights, as cpu/program.h lists them.
        classes: S.
    """

    kind: str
    features: tuple[int, ...]
    focus_channels: tuple[int, ...]
    regions: bool
    tensors: tuple[str, ...]
    classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A network as a list of operations over values.

    Args:
        values: The first is a tile.
        operations: In the order in which they run.
        logits: The value of the logits.
        head: What classifies a tile.
        features: Values that are given out.
    """

    values: tuple[Value, ...]
    operations: tuple[Operation, ...]
    logits: int
    head: ProgramHead | None
    features: tuple[int, ...]


class Outputs(NamedTuple):
    """What a program gives for (N, C, Z, Y, X).

    Args:
        logits: (N, K, Z, Y, X).
        class_logits: (N, S); None without a head.
        features: (N, C, *grid) each, with the channels last in memory.
    """

    logits: Tensor
    class_logits: Tensor | None
    features: tuple[Tensor, ...]


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Value(ctypes.Structure):
    _fields_ = (("buffer", ctypes.c_int64), ("channels", ctypes.c_int64), ("size", _Size3))


class _Operation(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("inputs", ctypes.c_int64 * 2),
        ("output", ctypes.c_int64),
        ("taps", _Size3),
        ("stride", _Size3),
        ("transformed", ctypes.c_int64),
        ("in_int16", ctypes.c_int64),
        ("upsampling", _Size3),
        ("residual", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("slope", ctypes.c_float),
        ("weight", _Tensor),
        ("bias", _Tensor),
        ("scale", _Tensor),
        ("shift", _Tensor),
        ("upsampling_weight", _Tensor),
        ("upsampling_bias", _Tensor),
    )


class _Head(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("features", ctypes.POINTER(ctypes.c_int64)),
        ("feature_count", ctypes.c_int64),
        ("focus_channels", ctypes.POINTER(ctypes.c_int64)),
        ("focus_count", ctypes.c_int64),
        ("regions", ctypes.c_int64),
        ("tensors", ctypes.POINTER(_Tensor)),
        ("tensor_count", ctypes.c_int64),
        ("classes", ctypes.c_int64),
    )


class _Description(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.POINTER(_Value)),
        ("value_count", ctypes.c_int64),
        ("operations", ctypes.POINTER(_Operation)),
        ("operation_count", ctypes.c_int64),
        ("logits", ctypes.c_int64),
        ("head", _Head),
        ("features", ctypes.POINTER(ctypes.c_int64)),
        ("feature_count", ctypes.c_int64),
    )


class Executor:
    """A program with its weights, packed for this processor.

    Args:
        library: From `library.load_library`.
        program: What to run.
        weights: float32 tensors by name, in the layouts of torch; they may go afterwards.
        threads: With which the weights are packed.

    Raises:
        ValueError: Where the program or its weights do not fit together, or memory is short.
        KeyError: Where a weight is missing.
    """

    def __init__(self, library: ctypes.CDLL, program: Program, weights: Mapping[str, Tensor], threads: int) -> None:
        self.program, self._library = program, library
        description, kept = _described(program, weights)
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        library.nnturbo_program_create.restype = ctypes.c_void_p
        made = library.nnturbo_program_create(
            ctypes.byref(description), ctypes.c_int(threads), error, ctypes.c_size_t(_ERROR_BYTES)
        )
        del kept
        if made is None:
            raise ValueError(error.value.decode(errors="replace"))
        self._made = ctypes.c_void_p(made)
        weakref.finalize(self, library.nnturbo_program_destroy, self._made)

    def __call__(self, tiles: Tensor, threads: int) -> Outputs:
        """Run tiles, (N, C, Z, Y, X) float32, with so many threads.

        Raises:
            ValueError: For tiles of another shape.
            MemoryError: Where memory is short.
        """
        program, count = self.program, len(tiles)
        tile, last = program.values[0], program.values[program.logits]
        if tuple(tiles.shape[1:]) != (tile.channels, *tile.size) or tiles.dtype != torch.float32:
            raise ValueError(
                f"tiles must be (N, {tile.channels}, {', '.join(map(str, tile.size))}) float32, got "
                f"{tuple(tiles.shape)} {tiles.dtype}"
            )
        tiles = tiles.contiguous()
        logits = torch.empty(count, last.channels, *last.size)
        class_logits = None if program.head is None else torch.empty(count, program.head.classes)
        maps = [program.values[feature] for feature in program.features]
        features = [torch.empty(count, *each.size, each.channels) for each in maps]
        failed = self._library.nnturbo_program_run(
            self._made,
            ctypes.c_int64(count),
            _at(tiles),
            _at(logits),
            None if class_logits is None else _at(class_logits),
            (ctypes.c_void_p * max(1, len(features)))(*(each.data_ptr() for each in features)),
            ctypes.c_int(threads),
        )
        if failed:
            raise MemoryError("the network needs more memory than there is")
        return Outputs(logits, class_logits, tuple(each.movedim(-1, 1) for each in features))

    def measure(self, tile: Tensor, threads: int) -> list[tuple[float, float]]:
        """Run a tile, (1, C, Z, Y, X); gives the seconds of each operation and of the norm after it."""
        last, count = self.program.values[self.program.logits], len(self.program.operations)
        logits, seconds = torch.empty(last.channels, *last.size), (ctypes.c_double * (2 * count))()
        given = _at(tile.contiguous()), _at(logits)
        if self._library.nnturbo_program_measure(self._made, *given, seconds, ctypes.c_int(threads)):
            raise MemoryError("the network needs more memory than there is")
        return list(zip(seconds[::2], seconds[1::2], strict=True))


def variant(library: ctypes.CDLL) -> str:
    """Name the instructions that are used, as `compilation.VARIANTS` does: the widest that this processor has."""
    return library.nnturbo_variant().decode()


def multiplies_int16(library: ctypes.CDLL) -> bool:
    """Whether these instructions, and this processor, multiply in int16."""
    return bool(library.nnturbo_multiplies_int16())


def use(library: ctypes.CDLL, name: str) -> None:
    """Use other instructions for programs that are made from now on.

    Raises:
        ValueError: Where this processor or library has none of that name.
    """
    if library.nnturbo_use(name.encode()):
        raise ValueError(f"variant must be one that runs here, such as {variant(library)}, got {name}")


def _described(program: Program, weights: Mapping[str, Tensor]) -> tuple[_Description, list[Any]]:
    """Give what the library reads, and what must live as long as it reads."""
    kept: list[Any] = []

    def tensor(name: str | None) -> _Tensor:
        if name is None:
            return _Tensor(None, 0)
        weight = weights[name].contiguous()
        if weight.dtype != torch.float32:
            raise ValueError(f"weights must be float32, {name} is {weight.dtype}")
        kept.append(weight)
        return _Tensor(weight.data_ptr(), weight.numel())

    values = (_Value * len(program.values))(*(_Value(v.buffer, v.channels, _Size3(*v.size)) for v in program.values))
    operations = (_Operation * len(program.operations))(*(_operation(each, tensor) for each in program.operations))
    kept += [values, operations]
    head = _Head()
    if (given := program.head) is not None:
        tensors = (_Tensor * len(given.tensors))(*map(tensor, given.tensors))
        kept.append(tensors)
        features, focus = _numbers(given.features), _numbers(given.focus_channels)
        head = _Head(
            *(HEADS.index(given.kind), features, len(given.features), focus, len(given.focus_channels)),
            *(int(given.regions), tensors, len(given.tensors), given.classes),
        )
    description = _Description(
        *(values, len(values), operations, len(operations), program.logits, head),
        *(_numbers(program.features), len(program.features)),
    )
    return description, kept


def _operation(operation: Operation, tensor: Any) -> _Operation:
    norm, upsampling = operation.norm, operation.upsampling
    first, *others = operation.inputs
    return _Operation(
        kind=KINDS.index(operation.kind),
        inputs=(ctypes.c_int64 * 2)(first, others[0] if others else -1),
        output=operation.output,
        taps=_Size3(*operation.taps),
        stride=_Size3(*operation.stride),
        transformed=int(operation.transformed),
        in_int16=int(operation.in_int16),
        upsampling=_Size3(*(_ZEROS if upsampling is None else upsampling.stride)),
        residual=-1 if norm is None or norm.residual is None else norm.residual,
        epsilon=0.0 if norm is None else norm.epsilon,
        slope=1.0 if norm is None else norm.slope,
        weight=tensor(operation.weight),
        bias=tensor(operation.bias),
        scale=tensor(None if norm is None else norm.scale),
        shift=tensor(None if norm is None else norm.shift),
        upsampling_weight=tensor(None if upsampling is None else upsampling.weight),
        upsampling_bias=tensor(None if upsampling is None else upsampling.bias),
    )


def _numbers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
