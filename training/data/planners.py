"""Which of nnU-Net's planners plans, for which spacing and memory; and a plan small enough for a CPU."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...engine.errors import EngineError
from ...engine.files import write_json

Planner = Literal["resenc", "resenc_l", "resenc_xl", "plain", "compact"]
PLANNERS: tuple[Planner, ...] = ("resenc", "resenc_l", "resenc_xl", "plain", "compact")

RESIDUAL = {
    "resenc": "nnUNetPlannerResEncM",
    "resenc_l": "nnUNetPlannerResEncL",
    "resenc_xl": "nnUNetPlannerResEncXL",
}
"""nnU-Net's names of its planners of residual networks."""

COMPACT_FEATURES = (16, 32, 64, 128, 128)
COMPACT_PATCH = (32, 64, 96)
COMPACT_PIXELS = 1.5
COMPACT_STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
"""A network of 3.1 million parameters that trains on a CPU: two seconds a step of two patches on two cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """What is asked of nnU-Net's planner.

    Attributes:
        planner: "resenc", "resenc_l" or "resenc_xl" for `nnUNetPlannerResEncM`, `L` and `XL`, "plain" for
            `ExperimentPlanner`, "compact" for the latter with larger pixels and a small network, for CPUs.
        spacing: Target spacing of 3d_fullres in mm, (z, y, x), and of what follows from it; by default nnU-Net's
            choice.
        memory_gb: GPU memory to plan for; by default the planner's own: 8 GB, 24 for "resenc_l", 40 for "resenc_xl".
    """

    planner: Planner = "resenc"
    spacing: tuple[float, ...] | None = None
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        """Check all values, because people may have typed them."""
        if self.planner not in PLANNERS:
            raise ValueError(f"planner must be one of {', '.join(PLANNERS)}, got {self.planner!r}")
        if self.spacing is not None and (
            len(self.spacing) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in self.spacing)
        ):
            raise ValueError(f"spacing must be three positive numbers of mm, (z, y, x), got {list(self.spacing)}")
        if self.memory_gb is not None and not (math.isfinite(self.memory_gb) and self.memory_gb > 0):
            raise ValueError(f"memory must be a positive number of GB, got {self.memory_gb}")
        if self.planner == "compact" and self.memory_gb is not None:
            raise ValueError("planner compact has a fixed network, so memory must be left out; take another planner")

    @property
    def suffix(self) -> str:
        """Tells plans of an own spacing or memory from nnU-Net's, whose files they would otherwise replace."""
        memory = "" if self.memory_gb is None else f"_{self.memory_gb:g}GB"
        return memory + ("" if self.spacing is None else f"_{'x'.join(f'{mm:g}' for mm in self.spacing)}mm")


def plan_experiment(name: str, preprocessed: Path, planning: Planning, num_training: int) -> Path:
    """Run a planner on a data set whose fingerprint is there.

    Args:
        name: Such as Dataset801_PancreasPhantom.
        preprocessed: nnU-Net's `nnUNet_preprocessed`.
        planning: What is asked of the planner.
        num_training: Number of training cases; nnU-Net would count all labelled ones.

    Returns:
        The plans file. Plans with a spacing or memory of their own have a name of their own, and preprocessed data of
        their own where the spacing differs: nnU-Net's residual planners share those of `nnUNetPlans`.

    Raises:
        EngineError: If nnU-Net is not installed, or lacks the planner.
    """
    try:
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
        from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners
    except ImportError as error:
        raise EngineError(f"planning needs nnU-Net ({error}): pip install 'nnturbo[training]'") from error
    kind: Any = ExperimentPlanner
    if planning.planner in RESIDUAL:
        kind = getattr(residual_encoder_unet_planners, RESIDUAL[planning.planner], None)
    if kind is None:
        raise EngineError(
            f"planner {planning.planner} needs nnU-Net's {RESIDUAL[planning.planner]}, which this version lacks: pip "
            f"install 'nnturbo[training]', or take another planner"
        )
    arguments: dict[str, Any] = {}
    if planning.memory_gb is not None:
        arguments["gpu_memory_target_in_gb"] = planning.memory_gb
    if planning.spacing is not None:
        arguments["overwrite_target_spacing"] = [float(mm) for mm in planning.spacing]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "WARNING: You are running nnUNetPlanner")  # such plans get their own name
        planner = kind(name, **arguments)
    planner.dataset_json["numTraining"] = num_training
    if planning.planner == "compact":
        planner.plans_identifier = "nnUNetCompactPlans"
    planner.plans_identifier += planning.suffix
    planner.plan_experiment()
    plans_file = preprocessed / name / f"{planner.plans_identifier}.json"
    plans = json.loads(plans_file.read_bytes())
    fullres = plans["configurations"]["3d_fullres"]
    if planning.spacing is not None:
        fullres["data_identifier"] = f"{planner.plans_identifier}_3d_fullres"
    if planning.planner == "compact":
        _make_compact(fullres, 1.0 if planning.spacing is not None else COMPACT_PIXELS)
    write_json(plans_file, plans)
    return plans_file


def described_network(plans_file: Path, configurations: Sequence[str]) -> str:
    """Say patch, batch and spacing of configurations, a line for each."""
    planned = json.loads(plans_file.read_bytes())["configurations"]
    return "\n".join(
        f"{name}: patches of {' x '.join(map(str, planned[name]['patch_size']))} voxels, {planned[name]['batch_size']} "
        f"a batch, spacing {' x '.join(f'{mm:.3g}' for mm in planned[name]['spacing'])} mm"
        for name in configurations
        if "patch_size" in planned[name]
    )


def _make_compact(configuration: dict[str, Any], pixels: float) -> None:
    """Replace the network that was planned for a GPU, and enlarge pixels by a factor."""
    depth = len(COMPACT_FEATURES)
    # Larger pixels, so that a patch shows most of the region: a small network needs context most.
    slice_mm, *pixel_mm = configuration["spacing"]
    configuration["spacing"] = [slice_mm, *(pixels * mm for mm in pixel_mm)]
    slices, *counts = configuration["median_image_size_in_voxels"]
    configuration["median_image_size_in_voxels"] = [slices, *(round(count / pixels) for count in counts)]
    configuration["patch_size"] = list(COMPACT_PATCH)
    configuration["batch_size"] = 2
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": depth,
        "features_per_stage": list(COMPACT_FEATURES),
        # Slices are thicker than pixels, as in nnU-Net's own plans for such spacings.
        "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * (depth - 1)],
        "strides": [list(stride) for stride in COMPACT_STRIDES],
        "n_conv_per_stage": [2] * depth,
        "n_conv_per_stage_decoder": [1] * (depth - 1),
    }
