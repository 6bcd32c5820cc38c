"""Kinds of models that differ in the path around the network, each with a scan and its spacing."""

import numpy as np

from tests.engine.export.scripted.paths import SPACING, bordered, normalized_by, scan, transposed
from tests.engine.factory import SPLINE, plans_2d, plans_json


def resampled_by(function, arguments, seg_arguments):
    changes = {}
    for kind, values in (("data", arguments), ("seg", seg_arguments), ("probabilities", seg_arguments)):
        changes[f"resampling_fn_{kind}"] = function
        changes[f"resampling_fn_{kind}_kwargs"] = values
    return plans_json(**changes)


def spline(**changes):
    return resampled_by("resample_data_or_seg_to_shape", {**SPLINE, **changes}, {**SPLINE, "order": 1, **changes})


MODELS = {
    "cubic splines": (plans_json(), scan(), SPACING),
    "smaller than the patch": (plans_json(), scan((3, 5, 7)), SPACING),
    "one voxel": (plans_json(), scan((1, 1, 1)), (2.0, 1.5, 1.5)),
    "the network's own grid": (plans_json(), scan((11, 13, 17)), (2.0, 1.5, 1.5)),
    "coarse z": (plans_json(), scan((7, 24, 27)), (5.0, 1.2, 1.2)),
    "coarse x": (plans_json(), scan((19, 24, 7)), (1.2, 1.3, 5.0)),
    "two coarse axes": (plans_json(), scan((9, 9, 21)), (5.0, 5.0, 1.2)),
    "coarse z of the model": (plans_json(spacing=[5.0, 1.0, 1.0]), scan((15, 15, 18)), (1.5, 1.5, 1.5)),
    "coarse z, never alone": (spline(force_separate_z=False), scan((7, 24, 27)), (5.0, 1.2, 1.2)),
    "z always alone": (spline(force_separate_z=True, order_z=1), scan(), SPACING),
    "cubic z alone": (spline(force_separate_z=True, order_z=3), scan(), SPACING),
    "logits by cubic splines": (spline(order=3), scan(), SPACING),
    "logits by cubic splines, coarse y": (spline(order=3), scan((19, 7, 24)), (1.2, 5.0, 1.3)),
    "splines of even order": (spline(order=2, order_z=4), scan(), SPACING),
    "splines of order 5 alone": (spline(force_separate_z=True, order=5, order_z=5), scan(), SPACING),
    "nearest": (spline(order=0), scan(), SPACING),
    "torch": (resampled_by("resample_torch_fornnunet", {"is_seg": False}, {"is_seg": False}), scan(), SPACING),
    "torch, linear whatever it says": (
        resampled_by("resample_torch_fornnunet", {"mode": "nearest"}, {"mode": "nearest"}),
        scan(),
        SPACING,
    ),
    "torch, coarse z": (
        resampled_by("resample_torch_fornnunet", {"mode": "linear"}, {"aniso_axis_mode": "nearest"}),
        scan((7, 24, 27)),
        (5.0, 1.2, 1.2),
    ),
    "torch_simple": (resampled_by("resample_torch_simple", {"mode": "linear"}, {"mode": "nearest"}), scan(), SPACING),
    "no resampling": (resampled_by("no_resampling_hack", {}, {}), scan(), SPACING),
    "transposed": (transposed(plans_json(), [2, 0, 1]), bordered(), (1.2, 3.0, 1.3)),
    "transposed the other way": (transposed(plans_json(), [1, 2, 0]), bordered(), (1.3, 1.2, 3.0)),
    "slices": (plans_2d(), scan(), (2.6, 1.2, 1.3)),
    "slices, transposed": (transposed(plans_2d(), [1, 0, 2]), bordered(), (1.3, 5.0, 1.2)),
    "zeros around": (plans_json(), bordered(), SPACING),
    "nothing but zeros": (plans_json(), np.zeros((9, 14, 15), np.int16), SPACING),
    "z-score": (normalized_by("ZScoreNormalization", False), bordered(), SPACING),
    "z-score within the body": (normalized_by("ZScoreNormalization", True), bordered(), SPACING),
    "z-score within the body, coarse z": (normalized_by("ZScoreNormalization", True), bordered(), (6.0, 1.2, 1.3)),
    "z-score of zeros": (normalized_by("ZScoreNormalization", True), np.zeros((9, 14, 15), np.int16), SPACING),
    "no normalization": (normalized_by("NoNormalization", False), scan() / 300, SPACING),
    "rescaled": (normalized_by("RescaleTo01Normalization", True), scan(), SPACING),
    "colours": (normalized_by("RGBTo01Normalization", False), (scan() % 256).astype(np.uint8), SPACING),
}
