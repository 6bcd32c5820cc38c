"""Compiles a model into a bundle; the labels of lower precision are compared with fp32 before it gets its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..backends import Backend
from ..backends.choose import choose_device, choose_precision, usable_backends
from ..backends.openvino import OpenVinoBackend
from ..backends.quantization import INT8_FLOOR
from ..backends.tensorrt import TensorRtBackend
from ..backends.torchscript import save_script, trace
from ..bundles.manifest import (
    Manifest,
    compile_model,
    describe_gpus,
    describe_machine,
    is_bundle,
    plan_bundle,
    source_hashes,
)
from ..engine import Engine
from ..errors import BackendUnavailable, BundleError, ModelError, OutputError
from ..files import new_folder, written_atomically
from ..model.agreement import Agreement
from ..model.choice import follow_single
from ..model.folder import Model, read_chosen
from ..options import EngineOptions, ModelChoice
from ..pipeline.steps import Image
from .agreement import measure_agreement
from .calibration import calibration_tiles
from .native_path import write_native_path

logger = logging.getLogger(__name__)

FLOORS = {"fp32": 0.9995, "bf16": 0.99, "fp16": 0.99, "int16": 0.995, "int8": INT8_FLOOR}
"""Least Dice with fp32, of the label that agrees least; a bundle below it is not kept."""


FOR_CPP, PATH_FILE = ("torchscript", "inductor"), "path.ts"
"""Backends whose bundles C++ programs open, and the file for them beside the network."""


# Its parameters are the flags of `nnturbo build`; `build_whole_path` has those of --whole-path.
def build(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    folds: Sequence[int | str] | None = None,
    checkpoint: str | None = None,
    configuration: str | None = None,
    classifier: str = "auto",
    calibration: Sequence[Image] = (),
    calibration_name: str = "calibration scans",
    floor: float | None = None,
    compute_capabilities: Sequence[str] = (),
) -> Path:
    """Compile a trained model into a bundle that `Engine.load` opens.

    Args:
        model: nnU-Net v2 model folder or export zip; or the choice.json of `nnturbo choose` that names one.
        out: Folder of the bundle; must not exist.
        backend: As in `Engine.load`, like the next five.
        precision: "auto" is fp32 on a CPU and fp16 on a GPU.
        device: Device to build for.
        folds: Folds to average.
        checkpoint: File name of the checkpoint in each fold.
        configuration: Name of the configuration, for a zip that holds several.
        classifier: As in `EngineOptions`.
        calibration: Scans on which the agreement with fp32 is measured, and with which int8 is calibrated. Needed for
            every precision below fp32.
        calibration_name: Description of these scans, which the bundle stores.
        floor: Least Dice with fp32, of the label that agrees least, in 0 to 1; by default 0.9995 for fp32, 0.99
            for bf16 and fp16, 0.98 for int8.
        compute_capabilities: GPUs that are not in this machine, such as ("8.6", "12.0"), to build TensorRT engines for,
            by default in fp16. The agreement cannot be measured then.

    Returns:
        The bundle's folder.

    Raises:
        ValueError: For arguments out of range, and a precision below fp32 without scans.
        ModelError: Where the model cannot be used.
        BackendUnavailable: Where the backend cannot build here.
        BundleError: Where the agreement is below the floor; then there is no bundle.
        VolumeError: Where a calibration scan cannot be read, or does not fit the model.
        OutputError: Where the folder exists or cannot be written.
    """
    _check_arguments(model, floor, calibration, compute_capabilities)
    target = _choose(backend, precision, device, floor, compute_capabilities)
    if target.precision != "fp32" and not (calibration or compute_capabilities):
        raise ValueError(
            f"{target.precision} changes some labels, and a bundle says how many: scans are needed as calibration"
        )
    choice = ModelChoice(
        folds=folds, checkpoint=checkpoint, configuration=configuration, options=EngineOptions(classifier=classifier)
    )
    model, choice = follow_single(model, choice)
    loaded = read_chosen(model, choice)
    if loaded.plan.classification is not None and choice.options.aggregation != EngineOptions().aggregation:
        logger.warning(
            "a bundle takes its aggregation when it predicts: give %s there too, as --aggregation or in EngineOptions",
            choice.options.aggregation,
        )
    if calibration and loaded.plan.previous_stage is not None:
        raise ValueError(
            f"this model continues from the labels of {loaded.plan.previous_stage}, so scans alone cannot calibrate "
            "it: build it in fp32, without calibration"
        )
    int8 = target.precision == "int8"
    # Of two scans or more, half calibrate int8 and the agreement is measured on the others.
    measured = (calibration[1::2] or calibration) if int8 else calibration
    with new_folder(Path(out)) as folder:
        tiles = (
            calibration_tiles(loaded, calibration[::2], target.device) if int8 else loaded.example_tiles(target.device)
        )
        manifest = _compile_best(
            loaded, target, choice.checkpoint_file, tiles, folder,
            lambda: _measure(model, choice, folder, device, measured, calibration_name),
        )  # fmt: skip
        _judge(manifest, target.floor)
        manifest.write(folder)
    return Path(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """What a bundle is built for, and with.

    Args:
        device: Device.
        precision: Such as "fp16".
        attempts: Backends that may compile it, the best first; for int8 one list for each recipe, of which the next one
            is tried where the labels of one do not reach the floor.
        machine: Of `describe_machine`.
        floor: Least Dice with fp32, of the label that agrees least.
    """

    device: torch.device
    precision: str
    attempts: Sequence[Sequence[Backend]]
    machine: Mapping[str, str]
    floor: float


def _check_arguments(
    model: str | os.PathLike[str],
    floor: float | None,
    calibration: Sequence[Image],
    compute_capabilities: Sequence[str],
) -> None:
    if floor is not None and not 0 <= floor <= 1:
        raise ValueError(f"floor must be a Dice from 0 to 1, got {floor}")
    if floor is not None and not calibration:
        raise ValueError("a floor needs scans to measure the agreement on: give them as calibration")
    if compute_capabilities and calibration:
        raise ValueError(
            "agreement cannot be measured for GPUs that are not here: leave out calibration and floor, or build where "
            "the GPU is"
        )
    if is_bundle(model):
        raise ModelError(f"{model} is a bundle already; build from the model folder or zip that it was made of")


def _choose(
    backend: str, precision: str, device: str, floor: float | None, compute_capabilities: Sequence[str]
) -> _Target:
    """Choose the target of a bundle: a device of this machine, or with TensorRT, GPUs that are not here."""
    if not compute_capabilities:
        target = choose_device(device)
        precision = choose_precision(precision, target)
        floor = FLOORS[precision] if floor is None else floor
        usable = usable_backends(backend, target, precision)[0]
        return _Target(
            device=target,
            precision=precision,
            attempts=[[OpenVinoBackend(floor)], [OpenVinoBackend(1.0)]] if precision == "int8" else [usable],
            machine=describe_machine(target),
            floor=floor,
        )
    if backend not in ("auto", "tensorrt"):
        raise ValueError(f"for GPUs that are not here only tensorrt can build, not {backend}")
    chosen, precision = TensorRtBackend(compute_capabilities), "fp16" if precision == "auto" else precision
    if (reason := chosen.unavailable(torch.device("cpu"), precision)) is not None:
        raise BackendUnavailable(f"tensorrt cannot build here: {reason}")
    return _Target(
        device=torch.device("cpu"),
        precision=precision,
        attempts=[[chosen]],
        machine=describe_gpus(compute_capabilities),
        floor=FLOORS[precision],
    )


def _compile_best(
    model: Model,
    target: _Target,
    checkpoint: str,
    tiles: Tensor,
    folder: Path,
    measure: Callable[[], Agreement | None],
) -> Manifest:
    """Compile a model; where labels do not reach the floor, with the next attempt.

    Args:
        model: With weights.
        target: What for, and with.
        checkpoint: File name in each fold.
        tiles: As `Backend.build` takes them.
        folder: Of the bundle.
        measure: Gives the agreement of the bundle with fp32.

    Returns:
        The manifest, with the agreement.

    Raises:
        BackendUnavailable: Where no backend of an attempt can compile it.
    """
    source, manifest, agreement = source_hashes(model, checkpoint), None, None
    for backends in target.attempts:
        manifest = _compile_first(model, target, backends, source, tiles, folder)
        agreement = measure()
        if agreement is None or agreement.reaches(target.floor):
            break
    assert manifest is not None  # there is one attempt at least
    return replace(manifest, agreement=agreement)


def _compile_first(
    model: Model,
    target: _Target,
    backends: Sequence[Backend],
    source: Mapping[str, str],
    tiles: Tensor,
    folder: Path,
) -> Manifest:
    """Compile a model with the first backend that can."""

    def compile_with(backend: Backend) -> Manifest:
        def write_more(folder: Path) -> None:
            if backend.name in FOR_CPP:
                _write_scan_path(model, folder)
            elif backend.name == "native":
                write_native_path(model.plan, model.mirror_axes, folder)

        plan = plan_bundle(model, source, backend, target.precision, target.machine)
        return compile_model(model, plan, backend, tiles, folder, write_more=write_more)

    *others, last = backends
    for backend in others:
        try:
            return compile_with(backend)
        except BackendUnavailable as error:
            logger.info("%s; going on without it", error)
    return compile_with(last)


def _write_scan_path(model: Model, folder: Path) -> None:
    """Write path.ts, the path around the network for C++ programs, unless only Python can run the model."""
    from .scripted.path import scan_path

    try:
        save_script(scan_path(model.plan, model.mirror_axes), folder / PATH_FILE)
    except ModelError as error:
        logger.warning("no %s, so C++ programs cannot use this bundle: %s", PATH_FILE, error)


def build_whole_path(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    folds: Sequence[int | str] | None = None,
    checkpoint: str | None = None,
    configuration: str | None = None,
    classifier: str = "auto",
    aggregation: str = "foreground",
) -> Path:
    """Write the whole path from a scan to labels, with the network, as one TorchScript file in fp32.

    `torch.jit.load(out)(image, spacing, tile_step_size=0.5, mirror=True)`, in Python or C++, takes a scan (C, Z, Y, X)
    of any size with its spacing in mm (z, y, x), and gives labels (Z, Y, X) and class probabilities.

    Args:
        model: nnU-Net v2 model folder or export zip; or the choice.json of `nnturbo choose` that names one.
        out: The file; an existing one is replaced.
        device: Device to run on.
        folds: Folds to average.
        checkpoint: File name of the checkpoint in each fold.
        configuration: Name of the configuration, for a zip that holds several.
        classifier: As in `EngineOptions`.
        aggregation: As in `EngineOptions`.

    Returns:
        The file.

    Raises:
        ModelError: Where the model cannot be used, or needs more than a scan (cascades, readers that reorient).
        OutputError: Where the file cannot be written.
    """
    from .scripted.whole_path import whole_path

    options = EngineOptions(classifier=classifier, aggregation=aggregation)
    asked = ModelChoice(folds=folds, checkpoint=checkpoint, configuration=configuration, options=options)
    model, choice = follow_single(model, asked)
    read = read_chosen(model, choice)
    network = trace(read, read.example_tiles(choose_device(device)), "fp32")
    script = whole_path(network, read.plan, read.mirror_axes, choice.options.aggregation)
    if Path(out).is_dir():
        raise OutputError(f"{out} must be a file to write, it is a folder")
    with written_atomically(out, ending=".ts") as temporary:
        save_script(script, temporary)
    return Path(out)


def _measure(
    model: str | os.PathLike[str], choice: ModelChoice, bundle: Path, device: str, scans: Sequence[Image], name: str
) -> Agreement | None:
    """Compare the labels of a bundle with those of its model in fp32; None without scans."""
    if not scans:
        return None
    # Mirroring takes eight times as long, and would average differences out.
    exact = replace(choice, backend="torch", precision="fp32", mirror=False)
    reference = Engine.load(model, device=device, **exact.arguments())
    agreement = measure_agreement(reference, Engine.load(bundle, device=device, mirror=False), scans, name)
    logger.info("%s: %s", bundle, agreement)
    return agreement


def _judge(manifest: Manifest, floor: float) -> None:
    """Refuse a bundle whose labels agree too little with those in fp32, where that was measured."""
    agreement, precision = manifest.agreement, manifest.precision
    if agreement is None:
        return
    if agreement.lowest_dice is None:
        raise BundleError(
            f"the {agreement.what} must show what the model segments, neither fp32 nor {precision} finds any of it "
            "there: give other scans as calibration"
        )
    if not agreement.reaches(floor):
        raise BundleError(
            f"{precision} must agree with fp32 to a Dice of {floor:g} for every label, it does to "
            f"{agreement.lowest_dice:.4f}: {agreement}. Build in a higher precision, calibrate with other scans, or "
            "accept it with a lower floor"
        )
