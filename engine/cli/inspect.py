"""`nnturbo inspect`: describes a model or bundle, and how it can run here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import PRECISIONS
from .output import say_rows

if TYPE_CHECKING:
    from ..bundles.manifest import Manifest
    from ..model.folder import Model


def add_inspect(commands: Any) -> None:
    """Declare `nnturbo inspect`."""
    inspect = commands.add_parser("inspect", help="say what is in a model or bundle and how it can run here")
    inspect.add_argument("model", help="model folder, nnU-Net export zip, or bundle")
    inspect.add_argument("-c", dest="configuration", help="configuration to take from a zip that holds several")
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    return say_rows(describe(options.model, options.configuration))


def describe(path: str | os.PathLike[str], configuration: str | None) -> list[tuple[str, str]]:
    """Describe a model folder, export zip or bundle.

    Args:
        path: The folder or zip.
        configuration: Name of the configuration, for a zip that holds several.

    Returns:
        Rows of (what, finding).

    Raises:
        ModelError: Where it cannot be used.
    """
    from ..bundles.manifest import bundle_model, is_bundle, read_manifest
    from ..model.folder import read_model
    from ..model.folds import inference_network

    if is_bundle(path):
        manifest = read_manifest(Path(path))
        model_rows = _model_rows(bundle_model(manifest, Path(path)))
        return [*model_rows, *_bundle_rows(manifest), ("here", _runs_here(manifest, Path(path)))]
    model = read_model(path, configuration=configuration)
    inference_network(model)  # raises the errors that would stop a prediction
    return [*_model_rows(model), *_fitted_rows(model), *_backend_rows()]


def _model_rows(model: Model) -> list[tuple[str, str]]:
    plan = model.plan
    size = f", {model.num_parameters / 1e6:.2f} M parameters" if model.weights else ""  # a bundle holds none
    regions = "" if plan.labels.regions_class_order is None else " (regions)"
    rows = [
        ("model", str(model.source)),
        ("dataset", plan.dataset_name),
        ("configuration", f"{plan.configuration}, trained by {model.trainer}"),
        ("folds", ", ".join(model.folds)),
        ("network", _network_name(model) + size),
        (
            "input",
            ", ".join(f"{n} ({c.scheme})" for n, c in zip(plan.channel_names, plan.channels, strict=True))
            + (f", and the labels of {plan.previous_stage}" if plan.previous_stage else ""),
        ),
        ("labels", ", ".join(f"{value} {name}" for name, value in plan.labels.labels.items()) + regions),
        ("patch", f"{' x '.join(map(str, plan.patch_size))} voxels of {' x '.join(f'{s:g}' for s in plan.spacing)} mm"),
        ("mirroring", "along axes " + ", ".join(map(str, model.mirror_axes)) if model.mirror_axes else "none"),
    ]
    if (scheme := plan.classification) is not None:
        rows += [
            ("classes", ", ".join(f"{label} {name}" for label, name in enumerate(scheme.class_names))),
            ("head", f"{scheme.kind} on stages {', '.join(map(str, scheme.stages))}"),
        ]
    return rows


def _bundle_rows(manifest: Manifest) -> list[tuple[str, str]]:
    unmeasured = "not measured: no scans to compare on, or built for a GPU that was not there"
    rows = [
        ("built for", f"{manifest.backend} in {manifest.precision}"),
        ("machine", ", ".join(f"{key} {value}" for key, value in manifest.machine.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in manifest.versions.items())),
        ("agreement", unmeasured if manifest.agreement is None else str(manifest.agreement)),
        *((f"source {name}", digest) for name, digest in manifest.source.items()),
        *((f"file {name}", digest) for name, digest in manifest.files.items()),
    ]
    return rows if manifest.classifier is None else [*rows, ("classifier", manifest.classifier)]


def _runs_here(manifest: Manifest, folder: Path) -> str:
    """Whether a bundle runs on this machine, and if not, why."""
    from ..backends.choose import choose_backend, choose_device
    from ..bundles.manifest import check_machine
    from ..errors import BackendUnavailable, BundleError

    try:
        device = choose_device(manifest.machine.get("device", "cpu"))
        backend = choose_backend(manifest.backend, device, manifest.precision)
        check_machine(manifest, backend, device, folder)
    except (BackendUnavailable, BundleError, ValueError) as error:
        return f"does not run: {error}"
    return "runs"


def _backend_rows() -> list[tuple[str, str]]:
    """Whether each backend runs here in each precision, and why not."""
    import torch

    from ..backends.choose import backends

    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    reasons = {
        f"{backend.name} {device} {precision}": backend.unavailable(device, precision) or backend.cannot_build()
        for device in devices
        for backend in backends().values()
        for precision in PRECISIONS
    }
    return [(way, "runs here" if reason is None else f"no: {reason}") for way, reason in reasons.items()]


def _fitted_rows(model: Model) -> list[tuple[str, str]]:
    """The fitted classifiers, which can replace the head; empty for a model without classification."""
    if model.plan.classification is None:
        return []
    fitted = [
        f"fold {fold}: {classifier.kind} on stages {', '.join(map(str, classifier.stages))}"
        f"{_divided(classifier.temperature)}{'' if classifier.preferred else ', only if asked for'}"
        for fold, classifier in zip(model.folds, model.pooled_classifiers, strict=True)
        if classifier is not None
    ]
    of_head = [f"fold {fold}{_divided(value)}" for fold, value in zip(model.folds, model.temperatures, strict=True)
               if value != 1]  # fmt: skip
    calibrated = [("probabilities of the head", "; ".join(of_head))] if of_head else []
    return [("fitted classifier", "; ".join(fitted) or "none"), *calibrated]


def _divided(temperature: float) -> str:
    return "" if temperature == 1 else f", calibrated by temperature {temperature:.3g}"


def _network_name(model: Model) -> str:
    """Name the network that was trained, and if the plan does not describe it the trainer that tells so."""
    from ..model.named_networks import named_network

    architecture = model.plan.architecture
    if (named := named_network(architecture, model.trainer)) is not None:
        return f"{named.name}, recognised by trainer and class"
    name = architecture.class_name.rpartition(".")[2]
    backbone = str(architecture.arguments.get("backbone", "")).rpartition(".")[2]
    return f"{name} around {backbone}" if backbone else name
