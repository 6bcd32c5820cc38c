"""A bundle, a compiled model on disk: a manifest and a backend's files, which are verified when they are loaded."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from ..backends import Backend
from ..backends.choose import BACKENDS
from ..errors import BackendUnavailable, BundleError, EngineError
from ..files import sha256, write_json
from ..model.agreement import Agreement
from ..model.folder import Model
from ..model.json_values import check_object
from ..model.plans import parse_plan
from ..options import PRECISIONS

SCHEMA = 1
MANIFEST = "engine.json"
LARGEST_MANIFEST_BYTES = 256 * 2**20
PACKAGES = ("nnturbo", "torch", "openvino", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13", "torch-tensorrt")
"""Packages whose versions a manifest keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of `engine.json`.

    Args:
        schema: Version of this format.
        plans, dataset: Content of the model's `plans.json` and `dataset.json`.
        configuration, folds, mirror_axes, trainer: As in `Model`.
        classifier: What classifies the case, "head" or "lda"; None without classification.
        source: SHA-256 of each file that the weights come from, by its name within the model.
        backend, precision: How the network runs.
        machine: Machine that it was built for, see `describe_machine`.
        versions: Versions of the packages that built it.
        files: SHA-256 of every file of the backend, by name.
        agreement: Comparison of its labels with those of fp32 torch, see `Agreement`; None if it was not measured.
    """

    schema: int
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    configuration: str
    folds: tuple[str, ...]
    mirror_axes: tuple[int, ...]
    trainer: str
    classifier: str | None
    source: Mapping[str, str]
    backend: str
    precision: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    agreement: Agreement | None

    def to_json(self) -> dict[str, Any]:
        """Give all of it, by name; tuples as lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Any) -> Manifest:
        """Read what `to_json` gave.

        Raises:
            ValueError: For anything else.
        """
        schema = content.get("schema") if isinstance(content, dict) else None
        if type(schema) is not int:
            raise ValueError("it must hold an object with a schema number; build the bundle again")
        if schema < 1:
            raise ValueError(f"it must have a schema of 1 or more, it has {schema}; build the bundle again")
        if schema > SCHEMA:
            raise ValueError(
                f"it has schema {schema}, this nnturbo knows up to {SCHEMA}: update nnturbo, or build the bundle again"
            )
        check_object(content, _KINDS, "a bundle's manifest")
        agreement = content["agreement"]
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        return cls(**{**values, "agreement": None if agreement is None else Agreement.from_json(agreement)})

    def write(self, folder: Path) -> None:
        """Write it into a bundle."""
        write_json(folder / MANIFEST, self.to_json())


_KINDS: dict[str, type | tuple[type, ...]] = {
    "schema": int, "plans": dict, "dataset": dict, "configuration": str, "folds": list, "mirror_axes": list,
    "trainer": str, "classifier": (str, NoneType), "source": dict, "backend": str, "precision": str,
    "machine": dict, "versions": dict, "files": dict, "agreement": (dict, NoneType),
}  # fmt: skip
"""Kinds of its values in JSON."""


def describe_machine(device: torch.device) -> dict[str, str]:
    """Properties that compiled code depends on: kind of device, CPU instructions, or the GPU's compute capability."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return describe_gpus([f"{major}.{minor}"])
    return {**_host(device.type), "cpu": torch.backends.cpu.get_cpu_capability()}


def describe_gpus(compute_capabilities: Sequence[str]) -> dict[str, str]:
    """The same for one of several GPUs, which need not be in this machine."""
    return {**_host("cuda"), "compute_capability": ", ".join(compute_capabilities)}


def _host(device: str) -> dict[str, str]:
    return {"device": device, "architecture": platform.machine(), "system": platform.system()}


def source_hashes(model: Model, checkpoint: str) -> dict[str, str]:
    """Hash the files that a model's weights were read from: a checkpoint for each fold, or the zip."""
    if model.given is not None and model.given.has_weights:
        return {"network": model.given.weights_sha256()}
    if model.source.is_file():
        return {model.source.name: sha256(model.source)}
    names = [f"fold_{fold}/{checkpoint}" for fold in model.folds]
    return {name: sha256(model.source / name) for name in names}


def plan_bundle(
    model: Model, source: Mapping[str, str], backend: Backend, precision: str, machine: Mapping[str, str]
) -> Manifest:
    """Make the manifest of a bundle before it is built, for this machine (`describe_machine`) or another one."""
    return Manifest(
        schema=SCHEMA,
        plans=model.plans,
        dataset=model.dataset,
        configuration=model.plan.configuration,
        folds=model.folds,
        mirror_axes=model.mirror_axes,
        trainer=model.trainer,
        classifier=model.classifier,
        source=source,
        backend=backend.name,
        precision=precision,
        machine=machine,
        versions=_versions(),
        files={},
        agreement=None,
    )


def compile_model(
    model: Model,
    manifest: Manifest,
    backend: Backend,
    tiles: torch.Tensor,
    folder: Path,
    *,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> Manifest:
    """Write a backend's files and the manifest.

    Args:
        model: Model with weights.
        manifest: From `plan_bundle`.
        backend: Backend that compiles.
        tiles: As `Backend.build` takes them.
        folder: Folder of the bundle.
        write_more: Called with the folder; writes further files before they are hashed.

    Returns:
        The manifest with the hashes of the files.

    Raises:
        BackendUnavailable: Where the backend fails, also if memory runs out.
    """
    try:
        backend.build(model, tiles, manifest.precision, folder)
    except (EngineError, OSError):
        raise
    except Exception as error:  # compilers raise many types for networks that they do not support
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise BackendUnavailable(
            f"{backend.name} could not compile this model in {manifest.precision}: {reason:.300}. Choose another "
            "backend, or a machine with more memory if that ran out"
        ) from error
    write_more(folder)
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = replace(manifest, files=files)
    manifest.write(folder)
    return manifest


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a bundle: a folder with a manifest."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and verify the hash of every file.

    Raises:
        BundleError: Where something is missing, changed, or of a newer version.
    """
    manifest = _parse_manifest(folder / MANIFEST)
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}
    if missing := set(manifest.files) - present:
        raise BundleError(f"{folder} must hold {min(missing)!r:.120}, which its manifest names; build the bundle again")
    if unknown := present - set(manifest.files):
        raise BundleError(
            f"{folder} must hold what its manifest names and nothing else, it holds {min(unknown)!r:.120}, which "
            "cannot be verified. Remove it, or build the bundle again"
        )
    for name, digest in manifest.files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise BundleError(f"{folder / name} is not what was built: its SHA-256 differs. Build the bundle again")
    return manifest


def _parse_manifest(path: Path) -> Manifest:
    try:
        if path.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise BundleError(f"{path} must be at most {LARGEST_MANIFEST_BYTES} bytes, it has {path.stat().st_size}")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} must be a bundle's manifest; it cannot be read: {error}") from error
    try:
        return Manifest.from_json(content)
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error


def check_machine(manifest: Manifest, backend: Backend, device: torch.device, folder: Path) -> None:
    """Refuse a bundle that runs only on other machines.

    Raises:
        BundleError: It names the differences.
    """
    built = {**manifest.versions, **manifest.machine}
    here = {**_versions(), **describe_machine(device)}
    differing = [
        f"{key} {built.get(key, 'unknown')} there, {here.get(key, 'none')} here"
        for key in backend.bound_to
        if here.get(key) not in (built[key].split(", ") if key in built else [None])
    ]
    if differing:
        raise BundleError(
            f"{folder} was built by {manifest.backend} for another machine or version: {'; '.join(differing)}. Build "
            "it again on this machine"
        )


def bundle_model(manifest: Manifest, folder: Path) -> Model:
    """Make the model of a bundle, without weights: those are in the backend's files.

    Raises:
        ModelError: Where its plan is damaged.
    """
    if manifest.backend not in BACKENDS or manifest.precision not in PRECISIONS:
        raise BundleError(
            f"{folder} was built for {manifest.backend} in {manifest.precision}, which this nnturbo lacks"
        )
    if not all(isinstance(value, str) for value in manifest.machine.values()):
        raise BundleError(f"{folder}: machine must be described in words; build the bundle again")
    axes, folds = manifest.mirror_axes, manifest.folds
    if not all(type(axis) is int and 0 <= axis <= 2 for axis in axes) or len(set(axes)) != len(axes):
        raise BundleError(f"{folder}: mirror_axes must be among 0, 1, 2 and differ; build the bundle again")
    if not folds or not all(isinstance(fold, str) and Path(fold).name == fold for fold in folds):
        raise BundleError(f"{folder}: folds must be one or more names; build the bundle again")
    return Model(
        plan=parse_plan(manifest.plans, manifest.dataset, manifest.configuration),
        weights=(),
        folds=manifest.folds,
        mirror_axes=manifest.mirror_axes,
        trainer=manifest.trainer,
        source=folder,
        plans=manifest.plans,
        dataset=manifest.dataset,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
