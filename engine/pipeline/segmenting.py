"""Runs the network over a prepared scan and turns its logits into labels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from ...kernels.device_memory import give_back
from ..errors import PredictionError
from ..model.plans import Plan
from ..model.runner import Runner
from .labels import segment
from .preprocessing import Case
from .sliding_window import predict_logits
from .steps import Placement, Prepared, Segmented
from .transfers import Transfers
from .voting import Votes
from .window import SlidingWindow

logger = logging.getLogger(__name__)


class Segmenter:
    """Runs a network over scans; keeps less of them on a device at once from when its memory was not enough.

    Args:
        plan: The model's.
        runner: The network.
        window: How tiles cover a scan.
        transfers: Copies from the device.
        sums_device: Where planes and sums are.
        aggregation: How answers for tiles become one (`EngineOptions.aggregation`).
    """

    def __init__(
        self,
        plan: Plan,
        runner: Runner,
        window: SlidingWindow,
        transfers: Transfers,
        sums_device: torch.device,
        aggregation: str,
    ) -> None:
        self.runner = runner
        self.placement = Placement(views_per_call=window.views_per_call, sums_device=sums_device)
        self.window = window
        self._plan, self._transfers, self._aggregation = plan, transfers, aggregation

    def __call__(
        self, prepared: Prepared, save_probabilities: bool, progress: Callable[[int, int], None] | None
    ) -> Segmented:
        """Predict and label one scan.

        Args:
            prepared: The scan.
            save_probabilities: Keep probabilities too.
            progress: Called with (tiles done, tiles in all).

        Raises:
            PredictionError: Where the network fails, gives NaN or infinity, or not one tile fits.
        """
        prepared.wait()
        while True:
            placement, case = self.placement, prepared.case
            try:
                if case.device != placement.sums_device:
                    case = case.to(placement.sums_device)
                return self._attempt(prepared, case, placement, save_probabilities, progress)
            except torch.OutOfMemoryError as error:
                smaller = placement.smaller()
                if smaller is None:
                    raise PredictionError(
                        f"the device's memory is not enough for one tile of {self.window.patch_size} voxels; use a "
                        "GPU with more, or -device cpu",
                        transient=True,
                    ) from error
            logger.warning("the device's memory is not enough for %s; going on with %s", placement, smaller)
            self.placement = smaller
            if torch.cuda.is_available():
                give_back()

    def _attempt(
        self,
        prepared: Prepared,
        case: Case,
        placement: Placement,
        save_probabilities: bool,
        progress: Callable[[int, int], None] | None,
    ) -> Segmented:
        labels, timings, scheme = self._plan.labels, prepared.timings, self._plan.classification
        window = replace(self.window, views_per_call=placement.views_per_call)
        votes = scheme and Votes(scheme, views=len(window.views), aggregation=self._aggregation)
        logits = predict_logits(
            case, self.runner, window, labels.num_outputs, timings=timings, votes=votes, progress=progress
        )
        segmentation, probabilities = segment(
            logits, case, labels, timings=timings, transfers=self._transfers, save_probabilities=save_probabilities
        )
        return Segmented(
            prepared=prepared,
            segmentation=self._transfers.download(segmentation),
            probabilities=probabilities,
            votes=votes,
            placement=placement,
        )
