"""Files of a bundle for the kernels: the program as JSON, and the weights of all folds; see kernels/cpu/program.h."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ...kernels.program import Norm, Operation, Program, ProgramHead, Upsampling, Value
from ..errors import BundleError
from .safetensors import read_tensors, write_tensors

PROGRAM_FILE, WEIGHTS_FILE = "network.json", "weights.safetensors"
FORMAT = 1


def write_programs(folder: Path, program: Program, folds: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a network.

    Args:
        folder: Of the bundle.
        program: Of every fold.
        folds: Weights by name, by fold.
    """
    content = {"format": FORMAT, **asdict(program), "folds": list(folds)}
    (folder / PROGRAM_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    tensors = {f"{fold}/{name}": tensor for fold, weights in folds.items() for name, tensor in weights.items()}
    write_tensors(folder / WEIGHTS_FILE, tensors)


def read_programs(folder: Path) -> tuple[Program, dict[str, dict[str, Tensor]]]:
    """Read what `write_programs` wrote.

    Raises:
        BundleError: Where it is not there, damaged, or from another version.
    """
    path = folder / PROGRAM_FILE
    try:
        content: Any = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, this nnturbo reads {FORMAT}")
        program = _program(content)
        folds: dict[str, dict[str, Tensor]] = {str(fold): {} for fold in content["folds"]}
        for name, tensor in read_tensors(folder / WEIGHTS_FILE).items():
            fold, _, of_fold = name.partition("/")
            folds[fold][of_fold] = tensor
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path} must hold a network for the kernels: {error!s:.200}; build the bundle again"
        ) from error
    return program, folds


def _program(content: Any) -> Program:
    head = content["head"]
    return Program(
        values=tuple(Value(**{**value, "size": tuple(value["size"])}) for value in content["values"]),
        operations=tuple(_operation(operation) for operation in content["operations"]),
        logits=content["logits"],
        head=None if head is None else ProgramHead(**_with_tuples(head)),
        features=tuple(content["features"]),
    )


def _operation(given: Any) -> Operation:
    norm, upsampling = given["norm"], given["upsampling"]
    made = {
        "norm": None if norm is None else Norm(**norm),
        "upsampling": None if upsampling is None else Upsampling(**_with_tuples(upsampling)),
    }
    return Operation(**{**_with_tuples(given), **made})


def _with_tuples(given: Any) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
