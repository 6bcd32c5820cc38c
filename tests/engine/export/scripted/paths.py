"""Paths of TorchScript for tests: made, loaded, run tile by tile, and compared with the engine."""

import warnings

import numpy as np
import torch
from nnturbo.engine import Engine, EngineOptions, Volume
from nnturbo.engine.export.scripted.whole_path import whole_path
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network

from tests.engine.factory import dataset_json, multi_task, plans_json, smooth_scan

SPACING = (3.0, 1.2, 1.3)


def traced(model):
    """A model's network as TorchScript."""
    network = inference_network(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated, and that shapes become constants
        tiles = torch.randn(2, model.plan.input_channels, *model.plan.patch_size)
        return torch.jit.trace(network, (tiles,), check_trace=False)


def compiled(folder, aggregation="foreground"):
    """The whole path of a model folder."""
    model = read_model(folder)
    return whole_path(traced(model), model.plan, model.mirror_axes, aggregation)


def loaded(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
        return torch.jit.load(path)


def assert_same(folder, array, spacing, *, mirror=False, step=0.5, aggregation="foreground", path=None):
    """Compare labels and class probabilities of the whole path with the engine's, and return them."""
    engine = Engine.load(
        folder,
        device="cpu",
        backend="torch",
        mirror=mirror,
        tile_step_size=step,
        options=EngineOptions(aggregation=aggregation),
    )
    array = array if array.ndim == 4 else array[None]
    expected = engine.predict(Volume.from_array(array, spacing))
    path = path or compiled(folder, aggregation)
    labels, probabilities = path(torch.from_numpy(array), list(spacing), step, mirror)
    assert labels.shape == array.shape[1:]
    assert np.array_equal(labels.numpy(), expected.segmentation)
    if expected.classification is None:
        assert probabilities.shape == (0,)
    else:
        assert torch.allclose(probabilities, torch.tensor(expected.classification.probabilities), atol=1e-6, rtol=0)
    return labels, probabilities


def scan(shape=(9, 24, 26), seed=0):
    return smooth_scan(shape, seed)


def bordered(shape=(13, 24, 26)):
    """A body with a hole in it and a corner cut off, in a frame of zeros that is different on every side."""
    array = scan(shape)
    array[array == 0] = 1
    framed = np.zeros_like(array)
    framed[2:-1, 3:-4, 1:-5] = array[2:-1, 3:-4, 1:-5]
    framed[5:7, 8:11, 9:12] = 0
    framed[:5, :10, :9] = 0
    return framed


def normalized_by(scheme, mask):
    return plans_json(normalization_schemes=[scheme], use_mask_for_norm=[mask])


def transposed(plans, order):
    return {**plans, "transpose_forward": order, "transpose_backward": [order.index(axis) for axis in range(3)]}


def with_class(regions=False, **head):
    """A multi-task plan and its data set; for regions, the second lies within the first."""
    dataset = dataset_json()
    if regions:
        dataset = dataset_json(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    head = {"class_names": ["a", "b", "c"], "regions": regions, "focus_channels": [1], **head}
    return multi_task(plans_json(), **head), dataset


def stepwise(path, network, array, spacing):
    """What a C++ program does with a scan path and a network of its own."""
    state = path.start(torch.from_numpy(array)[None], list(spacing), 0.5, True)
    most_held = 0
    for tile in range(state.tiles.shape[0]):
        with torch.no_grad():
            seg_logits, class_logits = network(path.views(state, tile))
        state = path.add(state, tile, seg_logits, class_logits)
        most_held = max(most_held, state.labels.held.shape[1])
    return *path.finish(state), most_held
