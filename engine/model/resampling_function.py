"""Reads which of nnU-Net's resampling functions a plan names, and its arguments; `pipeline.resampling` runs it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ModelError

ANISOTROPY_THRESHOLD = 3.0
"""nnU-Net's ANISO_THRESHOLD: above this ratio of spacings the coarse axis is resampled separately."""


class Resampling(NamedTuple):
    """One of nnU-Net's resampling functions with the arguments a plan gives it.

    Attributes:
        function: "spline" (resample_data_or_seg_to_shape), "torch" (resample_torch_fornnunet),
            "torch_simple" (resample_torch_simple) or "none" (no_resampling_hack).
        order: Spline order in plane.
        order_coarse: Spline order along the coarse axis if it is resampled separately.
        separate: Whether to resample the coarse axis separately; None decides by the spacings.
        threshold: Ratio of spacings above which None means True.
        mode: torch's mode in plane.
        mode_coarse: torch's mode along the coarse axis.
        majority: Whether torch's functions give a voxel the label whose share is above one half, or 0 if there is none
            (memefficient_seg_resampling), instead of the label with the greatest share.

    Note:
        It is a NamedTuple, because torch.jit.script can hold that (`export.scripted`). Its annotations must be types,
        not text.
    """

    function: str
    order: int = 3
    order_coarse: int = 0
    separate: bool | None = False
    threshold: float = ANISOTROPY_THRESHOLD
    mode: str = "linear"
    mode_coarse: str = "nearest-exact"
    majority: bool = False


def coarse_axis(resampling: Resampling, old_spacing: list[float], new_spacing: list[float]) -> int:
    """Find the axis to resample separately (nnU-Net: determine_do_sep_z_and_axis); -1 for none."""
    separate = resampling.separate
    if resampling.function in ("torch_simple", "none") or (separate is not None and not separate):
        return -1
    for spacing in (old_spacing, new_spacing):
        if separate is not None or max(spacing) / min(spacing) > resampling.threshold:
            # If two or three axes have the coarse spacing, nnU-Net separates none.
            coarsest = -1
            for axis in range(3):
                if max(spacing) / spacing[axis] == 1:
                    coarsest = axis if coarsest < 0 else 3
            return coarsest if coarsest < 3 else -1
    return -1


FUNCTIONS = {
    "resample_data_or_seg_to_shape": (
        "spline",
        {
            "order": "order",
            "order_z": "order_coarse",
            "force_separate_z": "separate",
            "separate_z_anisotropy_threshold": "threshold",
            "is_seg": None,
        },
    ),
    "resample_torch_fornnunet": (
        "torch",
        {
            "mode": "mode",
            "aniso_axis_mode": "mode_coarse",
            "force_separate_z": "separate",
            "separate_z_anisotropy_threshold": "threshold",
            "is_seg": None,
            "num_threads": None,
            "device": None,
            "memefficient_seg_resampling": "majority",
        },
    ),
    "resample_torch_simple": (
        "torch_simple",
        {
            "mode": "mode",
            "is_seg": None,
            "num_threads": None,
            "device": None,
            "memefficient_seg_resampling": "majority",
        },
    ),
    "no_resampling_hack": ("none", {}),
}
"""By nnU-Net's name: our name, and our field for each argument (None for arguments that change nothing)."""

TORCH_MODES = ("linear", "nearest", "nearest-exact")


def parse_resampling(function: str, arguments: Mapping[str, Any]) -> Resampling:
    """Read a plan's `resampling_fn_*` and `resampling_fn_*_kwargs`.

    Raises:
        ModelError: For a function or an argument that nnU-Net 2.8 does not have.
    """
    if function not in FUNCTIONS:
        raise ModelError(f"resampling function must be one of {', '.join(FUNCTIONS)}, the plan names {function!r}")
    ours, fields = FUNCTIONS[function]
    if unknown := sorted(set(arguments) - set(fields)):
        raise ModelError(f"{function} takes {', '.join(fields) or 'no arguments'}, the plan also gives {unknown}")
    values = {fields[name]: value for name, value in arguments.items() if fields[name] is not None}
    # nnU-Net's defaults differ: the spline function separates only on request, the torch function by the spacings.
    values.setdefault("separate", None if ours == "torch" else False)
    for field in ("order", "order_coarse"):
        if type(values.get(field, 0)) is not int or not 0 <= values.get(field, 0) <= 5:
            raise ModelError(f"spline order must be an integer from 0 to 5, the plan asks for {values[field]!r}")
    for field in ("mode", "mode_coarse"):
        if values.get(field, "linear") not in TORCH_MODES:
            raise ModelError(f"interpolation mode must be one of {TORCH_MODES}, the plan asks for {values[field]!r}")
    if values["separate"] is not None and not isinstance(values["separate"], bool):
        raise ModelError(f"force_separate_z must be true, false or null, the plan says {values['separate']!r}")
    if not isinstance(values.get("majority", False), bool):
        raise ModelError(f"memefficient_seg_resampling must be true or false, the plan says {values['majority']!r}")
    threshold = values.get("threshold", ANISOTROPY_THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or threshold != threshold:
        raise ModelError(f"separate_z_anisotropy_threshold must be a number, the plan says {threshold!r}")
    return Resampling(function=ours, **values)
