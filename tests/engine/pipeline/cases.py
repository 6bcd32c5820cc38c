"""Cases without preprocessing."""

import numpy as np
import torch
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.pipeline.normalization import Normalization
from nnturbo.engine.pipeline.preprocessing import Case
from nnturbo.engine.pipeline.resampling import GridMap


def case_of(image: np.ndarray) -> Case:
    """A case whose grid is the scan's own."""
    shape = image.shape[1:]
    return Case(
        image=torch.from_numpy(image),
        normalizations=(Normalization(),) * len(image),
        mask=None,
        grid=GridMap.identity(shape),
        limits=(None, None),
        previous=None,
        previous_labels=(),
        logits_grid=GridMap.identity(shape),
        box=tuple((0, n) for n in shape),
        full_shape=shape,
        transpose_forward=(0, 1, 2),
        device=torch.device("cpu"),
    )


def identity(tiles):
    """A network that answers with its input."""
    return NetworkOutput(tiles)
