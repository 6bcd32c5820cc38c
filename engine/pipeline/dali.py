"""NVIDIA DALI as a loader: scans read in parallel, normalised and resampled where the network runs.

DALI has no cubic spline. Its cubic kernel (Keys, 1981) is another interpolation than nnU-Net's, so labels differ more
than with the exact loader, whose own resampling is nnU-Net's to rounding: docs/gpu.md has how much.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import BackendUnavailable
from ..model.plans import Plan
from ..scans.geometry import Geometry
from .loading import check_previous_stage, read
from .normalization import Normalization
from .preprocessing import Case, preprocess
from .properties import nnunet_properties
from .resampling import GridMap
from .steps import Prepared, Request, caught
from .timing import Timings

logger = logging.getLogger(__name__)

INTERPOLATIONS = ("cubic", "linear")
AHEAD = 2
"""Scans that are read and resampled beforehand."""

LEAST_READERS, MOST_READERS = 2, 4


def _dali() -> Any:
    try:
        import nvidia.dali
    except ImportError as error:
        raise BackendUnavailable(
            f"DALI is not installed ({error}): pip install 'nnturbo[dali]', or use the exact loader"
        ) from error
    return nvidia.dali


@dataclass(frozen=True, slots=True)
class ScanSource:
    """Reads one scan after another in DALI's processes; all that goes there is pickled."""

    requests: tuple[Request, ...]
    plan: Plan

    def __call__(self, sample: Any) -> tuple[np.ndarray, ...]:
        """Read one scan.

        Returns:
            Planes (C, z, y, x) cropped to non-zero, normalisation (4, C, 1, 1, 1), size (z, y, x) after resampling with
            the kernel and after all of it, and pickled: what else there is to know, or an error.
        """
        if sample.idx_in_epoch >= len(self.requests):
            raise StopIteration
        read = caught(lambda: self._read(self.requests[sample.idx_in_epoch]))
        if not isinstance(read, Exception):
            return read
        nothing = np.zeros((len(self.plan.channels), 1, 1, 1), np.float32)
        numbers = np.ones((4, len(nothing), 1, 1, 1), np.float32)
        one = np.ones(3, np.float32)
        return nothing, numbers, one, one, _packed(read)

    def _read(self, request: Request) -> tuple[np.ndarray, ...]:
        scan = read(request, self.plan)
        case = preprocess(scan.volume, self.plan, torch.device("cpu"))
        shape = case.shape
        if case.grid.clip == "slice":
            # As nnU-Net: in plane first, the coarse axis then on its own, by its nearest slice.
            of_coarse = case.grid.last_axis
            in_plane = [case.image.shape[1 + axis] if axis == of_coarse else n for axis, n in enumerate(shape)]
        else:
            in_plane = shape
        numbers = np.array([channel.numbers for channel in case.normalizations], np.float32)
        facts = ScanFacts(
            geometry=scan.stored.geometry, warnings=scan.stored.warnings,
            properties=nnunet_properties(self.plan.reader, scan.stored.geometry, scan.volume, case),
            case=replace(case, image=torch.empty(0), limits=(None, None)),
        )  # fmt: skip
        return (
            np.ascontiguousarray(case.image.numpy(), np.float32),  # DALI takes one type of number for all scans
            np.ascontiguousarray(numbers.T.reshape(4, -1, 1, 1, 1)),
            np.array(in_plane, np.float32),
            np.array(shape, np.float32),
            _packed(facts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanFacts:
    """What `Prepared` has beside the planes."""

    geometry: Geometry
    warnings: tuple[str, ...]
    properties: Mapping[str, Any]
    case: Case


def _packed(content: Any) -> np.ndarray:
    return np.frombuffer(pickle.dumps(content), np.uint8).copy()


class DaliLoader:
    """Prepares scans with a DALI pipeline, on a CUDA device or on the CPU.

    Args:
        plan: The model's.
        device: Where the planes will be.
        interpolation: "cubic" or "linear", both without antialiasing.

    Raises:
        BackendUnavailable: Where DALI is not installed.
        ValueError: For models that it cannot load for.
    """

    def __init__(self, plan: Plan, device: torch.device, *, interpolation: str = "cubic") -> None:
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        if plan.previous_stage is not None or any(channel.use_mask for channel in plan.channels):
            raise ValueError(
                "DALI cannot load for cascades, nor for models that are normalised within a mask: use the exact loader"
            )
        if plan.resampling_data.function == "none":
            raise ValueError("this model's scans are not resampled: use the exact loader")
        self._dali = _dali()
        self._plan, self._device, self._interpolation = plan, device, interpolation

    def __call__(self, requests: Iterable[Request], *, readers: int = 0) -> Generator[Prepared | Exception, None, None]:
        """See `Loader`; takes all requests before it begins, and reads in 2 to 4 processes, not more than scans."""
        requests = tuple(requests)
        if not requests:
            return
        for request in requests:
            check_previous_stage(request, self._plan)
        processes = min(max(readers, LEAST_READERS), MOST_READERS, len(requests))
        pipeline = self._pipeline(ScanSource(requests, self._plan), processes)
        for _ in requests:
            timings = Timings(self._device)
            with timings("read"):  # waits for what other processes have begun long before
                ready = caught(pipeline.run)
                facts = ready if isinstance(ready, Exception) else pickle.loads(ready[1].at(0).tobytes())
            if isinstance(ready, Exception) or isinstance(facts, Exception):
                yield facts
                continue
            planes = ready[0]
            image = torch.from_dlpack(planes.as_tensor())[0]
            yield Prepared(
                geometry=facts.geometry,
                properties=facts.properties,
                warnings=facts.warnings,
                case=replace(
                    facts.case,
                    image=image,
                    normalizations=(Normalization(),) * len(image),
                    grid=GridMap.identity(image.shape[1:]),
                    device=self._device,
                ),
                wait=lambda: None,
                timings=timings,
            )
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # the next run writes where these planes are

    def _pipeline(self, source: ScanSource, readers: int) -> Any:
        fn, types, math = self._dali.fn, self._dali.types, self._dali.math
        on_gpu = self._device.type == "cuda"
        pipeline = self._dali.Pipeline(
            batch_size=1,
            num_threads=torch.get_num_threads(),
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=AHEAD,
            py_num_workers=readers,
            py_start_method="spawn",
        )
        kernel = types.INTERP_CUBIC if self._interpolation == "cubic" else types.INTERP_LINEAR
        with pipeline:
            planes, numbers, in_plane, size, packed = fn.external_source(
                source=source, num_outputs=5, batch=False, parallel=True, layout=["CDHW", "", "", "", ""]
            )
            low, high, shift, scale = (numbers[index] for index in range(4))
            if on_gpu:
                planes, low, high, shift, scale = (each.gpu() for each in (planes, low, high, shift, scale))
            planes = (math.clamp(planes, low, high) - shift) / scale
            planes = fn.reshape(planes, layout="CDHW")
            planes = fn.resize(planes, size=in_plane, interp_type=kernel, antialias=False)
            planes = fn.resize(planes, size=size, interp_type=types.INTERP_NN, antialias=False)
            pipeline.set_outputs(planes, packed)
        pipeline.build()
        return pipeline
