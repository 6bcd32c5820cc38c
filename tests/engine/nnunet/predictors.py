"""nnU-Net's predictor and ours, and what they must agree on."""

import contextlib
import io
import warnings
from dataclasses import replace

import numpy as np
import SimpleITK as sitk
import torch

from tests.engine.factory import smooth_scan
from tests.parity.catalogue import PLAIN_CT
from tests.parity.model_folders import build_model_folder

SPACING = (3.0, 1.2, 1.2)
SHAPE = (11, 16, 26)
MOST_OTHER_LABELS = 0.003  # nnU-Net adds logits up in half precision
TWO_FOLDS = replace(PLAIN_CT, folds=("0", "1"), mirror_axes=(0, 2))


def write_model(parent, kind=PLAIN_CT, **changes):
    parent.mkdir(exist_ok=True)
    return build_model_folder(replace(kind, **changes), parent).path


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def load(kind, folder, folds=(0, 1), **settings):
    with quiet():
        predictor = kind(device=torch.device("cpu"), allow_tqdm=False, **settings)
        predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def write_scan(path, seed=0):
    image = sitk.GetImageFromArray(smooth_scan(SHAPE, seed))
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((5.0, -7.0, 11.0))
    sitk.WriteImage(image, str(path))


def check_labels(one, other):
    """Require the same labels, but for voxels that half precision decides."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    assert (one != other).mean() <= MOST_OTHER_LABELS
    assert len(np.unique(one)) > 1


def check_numbers(one, other, most=0.003):
    """Require the same probabilities or logits to half precision; weights near a scan's rim have few digits."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    difference = np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32))
    assert difference.mean() < most
    assert (difference > 10 * most).mean() < 0.02


def both(predictors, call):
    """Let both predictors do the same."""
    with quiet():
        return [call(predictor) for predictor in predictors]
