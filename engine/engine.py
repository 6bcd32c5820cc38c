"""The whole path from a scan to its labels."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import platform
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .bundles.manifest import is_bundle
from .bundles.opening import open_bundle, open_model
from .errors import EngineError, PredictionError, VolumeError
from .model.folder import Model, read_model, with_classifier
from .model.plan_classes import remarks_on
from .model.runner import Runner
from .options import DEFAULT_CHECKPOINT, EngineOptions
from .overlap import overlapped
from .pipeline.labels import segment
from .pipeline.prediction import Prediction
from .pipeline.preprocessing import Case, preprocess
from .pipeline.properties import nnunet_properties
from .pipeline.sliding_window import SlidingWindow, predict_logits
from .pipeline.steps import Computed, Placement, Prepared, caught, engine_errors, paired
from .pipeline.timing import Timings
from .pipeline.transfers import Transfers
from .pipeline.voting import Votes
from .scans.volume import Volume, read_volume, restore_orientation

if TYPE_CHECKING:
    from .pipeline.dali import DaliLoader

logger = logging.getLogger(__name__)

Image = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Volume
"""A file, the files of all channels, a folder of DICOM slices, or a volume."""

Previous = str | os.PathLike[str] | np.ndarray | None
"""For a cascade: label file of the stage before, or its labels (Z, Y, X), on the scan's grid."""


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
        loader: DaliLoader | None = None,
    ) -> None:
        self.model = model
        self.provenance = provenance
        self._aggregation = aggregation
        self._loader = loader
        self._runner = runner
        self._window = window
        self._placement = Placement(views_per_call=window.views_per_call, sums_device=sums_device)
        self._transfers = Transfers(sums_device)

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
            opened = open_bundle(Path(model), asked, device)
        else:
            read = read_model(model, folds=folds, checkpoint=checkpoint, configuration=configuration)
            opened = open_model(with_classifier(read, options.classifier), checkpoint, backend, precision, device)
        views = opened.model.views if mirror else ((),)
        window = SlidingWindow.of_plan(
            opened.model.plan,
            tile_step_size=tile_step_size,
            views=views,
            views_per_call=options.views_per_call or (1 if opened.device.type == "cpu" else len(views)),
        )
        plan = opened.model.plan
        remarks = (*remarks_on(plan.architecture), *plan.labels.remarks)
        provenance = {
            "model": str(Path(model).resolve()),
            "dataset": opened.model.plan.dataset_name,
            "trainer": opened.model.trainer,
            "configuration": opened.model.plan.configuration,
            "folds": list(opened.model.folds),
            **opened.provenance,
            **({"plan_remarks": list(remarks)} if remarks else {}),
            **({"aggregation": options.aggregation} if opened.model.plan.classification is not None else {}),
            "device": str(opened.device),
            "loader": options.loader,
            "tile_step_size": tile_step_size,
            "mirror_views": len(views),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        sums_device = opened.device if options.sums_on_device else torch.device("cpu")
        loader = None
        if options.loader != "exact":
            from .pipeline.dali import DaliLoader

            interpolation = "linear" if options.loader == "dali-linear" else "cubic"
            loader = DaliLoader(opened.model.plan, sums_device, interpolation=interpolation)
        return cls(
            opened.model,
            opened.runner,
            window=window,
            provenance=provenance,
            sums_device=sums_device,
            aggregation=options.aggregation,
            loader=loader,
        )

    def predict(
        self,
        image: Image,
        *,
        previous_stage: Previous = None,
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
        with engine_errors():
            if self._loader is None:
                prepared = self._prepare(image, previous_stage)
                return self._finish(self._compute(prepared, save_probabilities, progress))
            with contextlib.closing(self._loader([image])) as loaded:  # the planes are there as long as it is open
                return self._finish(self._compute(next(loaded), save_probabilities, progress))

    def predict_many(
        self,
        images: Iterable[Image],
        *,
        previous_stages: Iterable[Previous] | None = None,
        save_probabilities: bool = False,
        readers: int = 1,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> Generator[Prediction | EngineError, None, None]:
        """Segment scans; the network goes on with the next one while those after it are read, and an answer is used.

        Args:
            images: As for `predict`; taken as there is room for them. Of those given as files, `readers` + 3 are in
                memory at once.
            previous_stages: For a cascade, as for `predict`, one for each image.
            save_probabilities: As for `predict`.
            readers: How many scans are read at once; with 0, everything is done when its turn comes, in this thread.
            progress: Called with (index of the image, tiles done, tiles in all).

        Yields:
            For each image in order its prediction, or the error that `predict` would have raised.
        """
        stopped = threading.Event()
        numbered = itertools.count()

        def tiles_done(index: int, done: int, total: int) -> None:
            if stopped.is_set():
                raise PredictionError("stopped, since no more answers are asked for")
            if progress is not None:
                progress(index, done, total)

        def compute(prepared: Prepared | EngineError) -> Computed | EngineError:
            share = functools.partial(tiles_done, next(numbered))
            return caught(functools.partial(self._compute, prepared, save_probabilities, share))

        prepared = self._prepared(images, previous_stages, readers)
        results = overlapped(compute, prepared, threads=min(readers, 1), name="nnturbo-compute", leave=stopped.set)
        with contextlib.closing(results):
            for computed in results:
                yield caught(functools.partial(self._finish, computed))

    def _prepared(
        self, images: Iterable[Image], stages: Iterable[Previous] | None, readers: int
    ) -> Iterator[Prepared | EngineError]:
        """Prepare scans in order, the next ones while the one before is computed."""
        if self._loader is not None:
            return self._loader(tuple(images))
        return overlapped(
            lambda pair: caught(lambda: self._prepare(*pair)),
            paired(images, stages),
            threads=readers,
            name="nnturbo-read",
        )

    def _prepare(self, image: Image, previous_stage: Previous = None) -> Prepared:
        """Read a scan, and start its way to the device."""
        plan, device = self.model.plan, self._placement.sums_device
        timings = Timings(device)
        with timings("read", on_gpu=False):
            scan = read_volume(image, channels=len(plan.channels), reader=plan.reader)
            volume = scan.reoriented() if plan.reorient else scan
            previous = self._read_previous(previous_stage, scan)
        with self._transfers.uploading() as wait, timings("preprocess"):
            try:
                case = preprocess(volume, plan, device, previous)
            except torch.OutOfMemoryError:  # `_compute` sees what does fit
                case = preprocess(volume, plan, torch.device("cpu"), previous)
        return Prepared(
            geometry=scan.geometry,
            properties=nnunet_properties(plan.reader, scan.geometry, volume, case),
            warnings=scan.warnings,
            case=case,
            wait=wait,
            timings=timings,
        )

    def _compute(
        self, prepared: Prepared | EngineError, save_probabilities: bool, progress: Callable[[int, int], None] | None
    ) -> Computed:
        """Run the network, from then on with less of a scan on the device at once where its memory is not enough."""
        if isinstance(prepared, EngineError):
            raise prepared
        prepared.wait()
        while True:
            placement, case = self._placement, prepared.case
            try:
                if case.device != placement.sums_device:
                    case = case.to(placement.sums_device)
                return self._attempt(prepared, case, placement, save_probabilities, progress)
            except torch.OutOfMemoryError as error:
                smaller = placement.smaller()
                if smaller is None:
                    raise PredictionError(
                        f"the device's memory is not enough for one tile of {self._window.patch_size} voxels; use a "
                        "GPU with more, or -device cpu",
                        transient=True,
                    ) from error
            logger.warning("the device's memory is not enough for %s; going on with %s", placement, smaller)
            self._placement = smaller
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(
        self,
        prepared: Prepared,
        case: Case,
        placement: Placement,
        save_probabilities: bool,
        progress: Callable[[int, int], None] | None,
    ) -> Computed:
        labels, timings, votes = self.model.plan.labels, prepared.timings, self._votes()
        logits = predict_logits(
            case,
            self._runner,
            replace(self._window, views_per_call=placement.views_per_call),
            labels.num_outputs,
            timings=timings,
            votes=votes,
            progress=progress,
        )
        segmentation, probabilities = segment(
            logits, case, labels, timings=timings, save_probabilities=save_probabilities
        )
        return Computed(
            prepared=prepared,
            segmentation=self._transfers.download(segmentation),
            probabilities=probabilities,
            votes=votes,
            placement=placement,
        )

    def _finish(self, computed: Computed | EngineError) -> Prediction:
        """Fetch the labels, and say how they came about."""
        if isinstance(computed, EngineError):
            raise computed
        prepared, plan = computed.prepared, self.model.plan
        with prepared.timings("labels", on_gpu=False):
            segmentation = computed.segmentation()
        probabilities, geometry = computed.probabilities, prepared.geometry
        if plan.reorient:
            segmentation = np.ascontiguousarray(restore_orientation(segmentation, geometry))
            if probabilities is not None:
                probabilities = np.ascontiguousarray(restore_orientation(probabilities, geometry))
        return Prediction(
            segmentation=segmentation,
            probabilities=probabilities,
            geometry=geometry,
            labels=plan.labels,
            timings=prepared.timings.as_dict(),
            warnings=prepared.warnings,
            provenance={
                **self.provenance,
                "views_per_call": computed.placement.views_per_call,
                "sums_device": str(computed.placement.sums_device),
            },
            properties=prepared.properties,
            reader=plan.reader,
            classification=None if computed.votes is None else computed.votes.count(),
        )

    def _votes(self) -> Votes | None:
        """Make what collects the answers for the tiles of one case; models without classification have none."""
        scheme = self.model.plan.classification
        if scheme is None:
            return None
        return Votes(scheme, views=len(self._window.views), aggregation=self._aggregation)

    def _read_previous(self, previous: Previous, scan: Volume) -> np.ndarray | None:
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
            labels = replace(Volume.from_array(previous, (1, 1, 1), name="previous stage"), geometry=scan.geometry)
        else:
            labels = read_volume(previous, channels=1, reader=self.model.plan.reader)
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
