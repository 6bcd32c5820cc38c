"""The whole path from a scan to its labels."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from .bundles.manifest import is_bundle
from .bundles.opening import Opened, check_given, open_bundle, open_model
from .model.choice import follow_single
from .model.folder import Model, read_chosen
from .model.given_network import GivenNetwork
from .model.provenance import Provenance
from .model.runner import Runner, tiles_dtype_of
from .options import EngineOptions, ModelChoice
from .pipeline.loaders import make_loader
from .pipeline.prediction import Prediction, answer
from .pipeline.segmenting import Segmenter
from .pipeline.steps import Prepared, Request, Segmented
from .pipeline.transfers import Transfers
from .pipeline.window import SlidingWindow, usual_views_per_call
from .predictor import Predictor, Progress


class Engine(Predictor[Prepared, Segmented]):
    """A trained model, loaded once and ready for any number of scans. Make one with `Engine.load`.

    Note:
        A scan becomes labels in stages, named as in `Prediction.timings`: read (`pipeline.loading`), preprocess
        (`pipeline.preprocessing`), network and stitch (`pipeline.sliding_window`) and labels (`pipeline.labels`);
        `pipeline.prediction` makes the answer. `Predictor.predict` runs one after the other, `Predictor.predict_many`
        those of several scans at once.
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        *,
        window: SlidingWindow,
        sums_device: torch.device,
        provenance: Provenance | None = None,
        aggregation: str = "foreground",
        loader: str = "exact",
    ) -> None:
        scheme = model.plan.classification
        self.model = model
        self.class_names = None if scheme is None else scheme.class_names
        self.provenance = () if provenance is None else (provenance,)
        transfers = Transfers(sums_device)
        self.loader = make_loader(loader, model.plan, sums_device, transfers)
        self.segmenter = Segmenter(model.plan, runner, window, transfers, sums_device, aggregation)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        folds: Sequence[int | str] | None = None,
        checkpoint: str | None = None,
        configuration: str | None = None,
        backend: str = "auto",
        precision: str = "auto",
        device: str = "auto",
        tile_step_size: float = 0.5,
        mirror: bool = True,
        network: nn.Module | Callable[..., nn.Module] | None = None,
        options: EngineOptions | None = None,
    ) -> Engine:
        """Load a trained model.

        Args:
            model: nnU-Net v2 model folder (`plans.json`, `dataset.json`, `fold_*`), export zip, or bundle; or the
                choice.json of `nnturbo choose` that names one, with its folds, checkpoint, classifier and aggregation.
            folds: Folds to average; by default all numbered ones, else "all".
            checkpoint: File name of the checkpoint in each fold; by default checkpoint_final.pth, or that of a bundle.
            configuration: The one wanted; needed for a zip that holds several.
            backend: How the network runs: "auto" or a name that `nnturbo inspect` lists.
            precision: "fp32", "bf16", "fp16", "int16", "int8" (bundles only), or "auto": fp32 on a CPU and fp16 on a
                GPU, as nnU-Net; that of a bundle.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps".
            tile_step_size: Distance of tiles as a fraction of the patch, in (0, 1].
            mirror: Average over mirrored views, along the axes the model was trained with.
            network: Runs in place of the plan's network: a module (N, C, *patch) -> (N, K, *patch), taken with its
                weights, or a function that makes one for the checkpoints' weights, such as a trainer's
                `build_network_architecture` (docs/networks.md).
            options: More of them, with defaults that suit most.

        Raises:
            ModelError: Where the model cannot be used, a `BundleError` where a bundle cannot.
            BackendUnavailable: Where device, precision or backend are not available here.
            ValueError: For arguments out of range.
        """
        choice = ModelChoice(
            folds=folds,
            checkpoint=checkpoint,
            configuration=configuration,
            backend=backend,
            precision=precision,
            tile_step_size=tile_step_size,
            mirror=mirror,
            options=options or EngineOptions(),
        )
        model, choice = follow_single(model, choice)
        given = None if network is None else GivenNetwork(given=network)
        if not is_bundle(model):
            opened = open_model(read_chosen(model, choice, given=given), choice, device)
        elif given is None:
            opened = open_bundle(Path(model), choice, device)
        else:
            raise ValueError(f"network needs a model folder; {model} is a bundle, whose network is compiled")
        check_given(opened)
        return cls.of_opened(opened, Path(model), choice)

    @classmethod
    def of_opened(cls, opened: Opened, path: Path, choice: ModelChoice) -> Engine:
        """Put what surrounds a network around a model that is ready to run.

        Args:
            opened: The model.
            path: Where it comes from.
            choice: Its step, mirroring and options count.
        """
        options = choice.options
        views = opened.model.views if choice.mirror else ((),)
        window = SlidingWindow.of_plan(
            opened.model.plan,
            tile_step_size=choice.tile_step_size,
            views=views,
            views_per_call=options.views_per_call or usual_views_per_call(opened.model.plan, opened.device),
            tiles_dtype=tiles_dtype_of(opened.runner),
            use_gaussian=options.use_gaussian,
        )
        sums_device = opened.device if options.sums_on_device else torch.device("cpu")
        return cls(
            opened.model,
            opened.runner,
            window=window,
            sums_device=sums_device,
            provenance=_provenance(path, opened, window, options, sums_device),
            aggregation=options.aggregation,
            loader=options.loader,
        )

    def _prepare(self, requests: Iterable[Request], *, readers: int) -> Generator[Prepared | Exception, None, None]:
        return self.loader(requests, readers=readers)

    def _segment(self, prepared: Prepared, save_probabilities: bool, progress: Progress | None) -> Segmented:
        return self.segmenter(prepared, save_probabilities, progress)

    def _answer(self, segmented: Segmented) -> Prediction:
        return answer(segmented, self.model.plan, self.provenance)


def _provenance(
    path: Path, opened: Opened, window: SlidingWindow, options: EngineOptions, sums_device: torch.device
) -> Provenance:
    plan = opened.model.plan
    return Provenance(
        model=str(path.resolve()),
        dataset=plan.dataset_name,
        trainer=opened.model.trainer,
        configuration=plan.configuration,
        folds=tuple(opened.model.folds),
        source=opened.source,
        checkpoint=opened.checkpoint,
        backend=opened.backend,
        precision=opened.precision,
        agreement=opened.agreement,
        classifier=opened.classifier,
        aggregation=None if plan.classification is None else options.aggregation,
        plan_remarks=opened.model.remarks,
        device=str(opened.device),
        loader=options.loader,
        tile_step_size=window.tile_step_size,
        mirror_views=len(window.views),
        use_gaussian=window.use_gaussian,
        views_per_call=window.views_per_call,
        sums_device=str(sums_device),
        network=None if opened.model.given is None else opened.model.given.name,
        torch=torch.__version__,
        python=platform.python_version(),
    )
