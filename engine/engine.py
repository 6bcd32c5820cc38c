"""The whole path from a scan to its labels."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .backends import Runner
from .backends.choose import choose_backend, choose_device, choose_precision
from .bundle import bundle_model, check_machine, describe_machine, is_bundle, plan_bundle, read_manifest, source_hashes
from .errors import BundleError, EngineError, VolumeError
from .labels import segment
from .model import Model, read_model, with_classifier
from .prediction import Prediction
from .preprocessing import Case, preprocess
from .sliding_window import SlidingWindow, mirror_views, predict_logits
from .timing import Timings
from .volume import Geometry, Volume, read_volume, restore_orientation
from .voting import AGGREGATIONS, Votes

logger = logging.getLogger(__name__)

Image = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Volume
"""A file, the files of all channels, a folder of DICOM slices, or a volume."""

CLASSIFIERS = ("auto", "head", "lda")
DEFAULT_CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What rarely needs changing.

    Args:
        views_per_call: Mirror views that go through the network at once; by default one on a CPU, where more take
            memory and no less time, and all on a GPU.
        sums_on_device: Keep planes and sums on the network's device (nnU-Net: perform_everything_on_device).
        classifier: What answers for the case in a multi-task model: the network's "head", the classifier "lda" that was
            fitted afterwards, or "auto": the fitted one where every fold has one. Means nothing to other models.
        aggregation: How its answers for tiles become one: weighted by what the class is about ("foreground"), or all
            alike ("mean"). Means nothing to other models.
    """

    views_per_call: int | None = None
    sums_on_device: bool = True
    classifier: str = "auto"
    aggregation: str = "foreground"

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, known in (("classifier", CLASSIFIERS), ("aggregation", AGGREGATIONS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.views_per_call is not None and self.views_per_call < 1:
            raise ValueError(f"views_per_call must be at least 1, got {self.views_per_call}")


class Engine:
    """A trained model, loaded once and ready for any number of scans. Make one with `Engine.load`."""

    def __init__(
        self,
        model: Model,
        runner: Runner,
        *,
        window: SlidingWindow,
        sums_device: torch.device,
        provenance: dict[str, Any],
        aggregation: str = "foreground",
    ) -> None:
        self.model = model
        self.provenance = provenance
        self._aggregation = aggregation
        self._runner = runner
        self._window = window
        self._sums_device = sums_device

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Classes of a case, or None for a model without a classification head."""
        scheme = self.model.plan.classification
        return None if scheme is None else scheme.class_names

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        folds: Sequence[int | str] | None = None,
        checkpoint: str = DEFAULT_CHECKPOINT,
        configuration: str | None = None,
        backend: str = "auto",
        precision: str = "auto",
        device: str = "auto",
        tile_step_size: float = 0.5,
        mirror: bool = True,
        options: EngineOptions | None = None,
    ) -> Engine:
        """Load a trained model.

        Args:
            model: nnU-Net v2 model folder (`plans.json`, `dataset.json`, `fold_*`), export zip, or bundle.
            folds: Folds to average; by default all numbered ones, else "all".
            checkpoint: File name of the checkpoint in each fold.
            configuration: The one wanted; needed for a zip that holds several.
            backend: How the network runs: "auto" or a name that `nnturbo inspect` lists.
            precision: "fp32", "bf16", "fp16", "int8" (bundles only), or "auto": fp32 on a CPU and fp16 on a GPU, as
                nnU-Net; that of a bundle.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps".
            tile_step_size: Distance of tiles as a fraction of the patch, in (0, 1].
            mirror: Average over mirrored views, along the axes the model was trained with.
            options: What rarely needs changing.

        Raises:
            ModelError: Where the model cannot be used, a `BundleError` where a bundle cannot.
            BackendUnavailable: Where device, precision or backend are not to be had here.
            ValueError: For arguments out of range.
        """
        options = options or EngineOptions()
        if is_bundle(model):
            asked = {
                "folds": None if folds is None else sorted(map(str, folds)),
                "checkpoint": None if checkpoint == DEFAULT_CHECKPOINT else checkpoint,
                "configuration": configuration,
                "backend": None if backend == "auto" else backend,
                "precision": None if precision == "auto" else precision,
                "classifier": None if options.classifier == "auto" else options.classifier,
            }
            opened = _open_bundle(Path(model), asked, device)
        else:
            read = read_model(model, folds=folds, checkpoint=checkpoint, configuration=configuration)
            opened = _open_model(with_classifier(read, options.classifier), checkpoint, backend, precision, device)
        views = _views(opened.model) if mirror else ((),)
        window = SlidingWindow.of_plan(
            opened.model.plan,
            tile_step_size=tile_step_size,
            views=views,
            views_per_call=options.views_per_call or (1 if opened.device.type == "cpu" else len(views)),
        )
        provenance = {
            "model": str(Path(model).resolve()),
            "dataset": opened.model.plan.dataset_name,
            "trainer": opened.model.trainer,
            "configuration": opened.model.plan.configuration,
            "folds": list(opened.model.folds),
            **opened.provenance,
            **({"aggregation": options.aggregation} if opened.model.plan.classification is not None else {}),
            "device": str(opened.device),
            "tile_step_size": tile_step_size,
            "mirror_views": len(views),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        return cls(
            opened.model,
            opened.runner,
            window=window,
            provenance=provenance,
            sums_device=opened.device if options.sums_on_device else torch.device("cpu"),
            aggregation=options.aggregation,
        )

    def predict(
        self,
        image: Image,
        *,
        previous_stage: str | os.PathLike[str] | np.ndarray | None = None,
        save_probabilities: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Prediction:
        """Segment one scan.

        Args:
            image: A file, the files of all channels in order, a folder of DICOM slices, or a `Volume`.
            previous_stage: For a cascade: label file of the stage before, or its labels (Z, Y, X), on the scan's grid.
            save_probabilities: Keep class probabilities too; takes 4 bytes per class and voxel of the scan.
            progress: Called with (tiles done, tiles in all).

        Raises:
            VolumeError: Where the scan cannot be read or does not suit the model.
            PredictionError: Where the network fails or gives numbers that mean nothing.
        """
        timings = Timings()
        plan = self.model.plan
        with timings("read"):
            scan = read_volume(image, channels=len(plan.channels))
            volume = scan.reoriented() if plan.reorient else scan
            previous = self._read_previous(previous_stage, scan)
        with timings("preprocess"):
            case = preprocess(volume, plan, self._sums_device, previous)
        votes = self._votes()
        logits = predict_logits(
            case, self._runner, self._window, plan.labels.num_outputs, timings=timings, votes=votes, progress=progress
        )
        segmentation, probabilities = segment(
            logits, case, plan.labels, timings=timings, save_probabilities=save_probabilities
        )
        if plan.reorient:
            segmentation = np.ascontiguousarray(restore_orientation(segmentation, scan.geometry))
            if probabilities is not None:
                probabilities = np.ascontiguousarray(restore_orientation(probabilities, scan.geometry))
        return Prediction(
            segmentation=segmentation,
            probabilities=probabilities,
            geometry=scan.geometry,
            labels=plan.labels,
            timings=timings.as_dict(),
            warnings=scan.warnings,
            provenance=self.provenance,
            properties=_properties(case, volume.geometry),
            classification=None if votes is None else votes.count(),
        )

    def _votes(self) -> Votes | None:
        """Make what collects the answers for the tiles of one case; models without classification have none."""
        scheme = self.model.plan.classification
        if scheme is None:
            return None
        return Votes(scheme, views=len(self._window.views), aggregation=self._aggregation)

    def _read_previous(self, previous: str | os.PathLike[str] | np.ndarray | None, scan: Volume) -> np.ndarray | None:
        """Read the labels of a cascade's previous stage, with the network's orientation."""
        wanted = self.model.plan.previous_stage
        if wanted is None:
            if previous is not None:
                raise ValueError("previous_stage is for cascades; this model's configuration has no previous stage")
            return None
        if previous is None:
            raise VolumeError(
                f"{scan.name}: this model continues from the labels of {wanted}; give them as previous_stage "
                f"(on the command line -prev_stage_predictions)"
            )
        if isinstance(previous, np.ndarray):
            labels = Volume.from_array(
                previous,
                scan.geometry.spacing,
                origin=scan.geometry.origin,
                direction=scan.geometry.direction,
                name="previous stage",
            )
        else:
            labels = read_volume(previous, channels=1)
        if labels.array.shape[1:] != scan.array.shape[1:]:
            raise VolumeError(
                f"{labels.name}: labels of the previous stage must lie on the scan's grid, "
                f"{scan.array.shape[1:]}; got {labels.array.shape[1:]}"
            )
        if not labels.geometry.matches(scan.geometry):
            raise VolumeError(
                f"{labels.name}: labels of the previous stage must lie where the scan lies, {scan.geometry}; "
                f"got {labels.geometry}"
            )
        labels = labels.reoriented() if self.model.plan.reorient else labels
        return np.rint(labels.array[0]).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A model that is ready to run, and what predictions say about how."""

    model: Model
    runner: Runner
    device: torch.device
    provenance: dict[str, Any]


def _open_model(model: Model, checkpoint: str, backend: str, precision: str, device: str) -> _Opened:
    """Choose how a model runs here, and compile it if need be, or take what was compiled before."""
    target = choose_device(device)
    precision = choose_precision(precision, target)
    chosen = choose_backend(backend, target, precision)
    provenance = {"checkpoint": checkpoint, "backend": chosen.name, "precision": precision}
    if model.plan.classification is not None:
        provenance["classifier"] = "lda" if model.pooled_classifiers else "head"
    if not chosen.compiles:
        runner = chosen.load(model, None, target, precision)
        return _Opened(model=model, runner=runner, device=target, provenance=provenance)
    if precision == "int8":
        raise ValueError("int8 needs scans to calibrate with: build a bundle with nnturbo build --calibration")
    from .cache import cached_bundle

    manifest = plan_bundle(model, source_hashes(model, checkpoint), chosen, precision, describe_machine(target))
    with cached_bundle(model, manifest, chosen, target) as folder:
        runner = chosen.load(model, folder, target, precision)
    return _Opened(model=replace(model, weights=()), runner=runner, device=target, provenance=provenance)


def _open_bundle(folder: Path, asked: Mapping[str, Any], device: str) -> _Opened:
    """Verify a bundle and load what was compiled.

    Args:
        folder: The bundle.
        asked: Arguments of `Engine.load`, None where they were left out; they may only repeat what it was built for.
        device: Where to run.
    """
    manifest = read_manifest(folder)
    model = bundle_model(manifest, folder)
    built = {
        "folds": sorted(manifest.folds),
        "checkpoint": Path(next(iter(manifest.source), DEFAULT_CHECKPOINT)).name,
        "configuration": manifest.configuration,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "classifier": manifest.classifier or asked["classifier"],
    }
    for name, wanted in asked.items():
        if wanted is not None and wanted != built[name]:
            raise BundleError(
                f"{folder} was built with {name} {_in_words(built[name])}, not {_in_words(wanted)}: build another "
                "bundle for that"
            )
    target = choose_device(manifest.machine.get("device", "cpu") if device == "auto" else device)
    chosen = choose_backend(manifest.backend, target, manifest.precision)
    check_machine(manifest, chosen, target, folder)
    provenance = {
        "source": dict(manifest.source),
        "backend": manifest.backend,
        "precision": manifest.precision,
        "agreement": manifest.agreement,
    }
    if manifest.classifier is not None:
        provenance["classifier"] = manifest.classifier
    try:
        runner = chosen.load(model, folder, target, manifest.precision)
    except EngineError:
        raise
    except Exception as error:  # whatever a runtime raises for files it cannot read
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"{chosen.name} cannot load {folder}: {reason:.200}. Build it anew, with the versions installed here"
        ) from error
    return _Opened(model=model, runner=runner, device=target, provenance=provenance)


def _in_words(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def _views(model: Model) -> tuple[tuple[int, ...], ...]:
    """Mirror views of a model, in the axes (z, y, x) of a 3D tile."""
    dimensions = len(model.plan.patch_size)
    return mirror_views([axis + 3 - dimensions for axis in model.mirror_axes if axis < dimensions])


def _properties(case: Case, geometry: Geometry) -> dict[str, Any]:
    """What nnU-Net's ensembling reads from the `.pkl` beside probabilities."""
    return {
        "sitk_stuff": {"spacing": geometry.spacing[::-1], "origin": geometry.origin, "direction": geometry.direction},
        "spacing": list(geometry.spacing),
        "shape_before_cropping": case.full_shape,
        "bbox_used_for_cropping": [list(bounds) for bounds in case.box],
        "shape_after_cropping_and_before_resampling": case.logits_grid.shape,
    }
