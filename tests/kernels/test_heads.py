"""The kernels' classification heads on random features of a program, by numpy's formula and by the engine's heads."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnturbo.engine.backends.buffers import plan_buffers
from nnturbo.engine.backends.native_head import program_head
from nnturbo.engine.model.classification import ClassificationScheme
from nnturbo.engine.model.heads import LinearClassifier, focus_map, make_head
from nnturbo.kernels.library import load_library
from nnturbo.kernels.program import Executor, Program
from scipy.ndimage import maximum_filter

from tests.kernels.test_program import layer, selected, started, values

CLASSES, SIZE, CHANNELS = 3, (8, 12, 16), (7, 21)
SMALLEST_SHARE = 1e-6


@pytest.fixture(scope="module")
def kernels(compiled_kernels):
    return load_library(compiled_kernels.parent)


def run(kernels, head, regions, seed):
    """Run a program with two features and a head; gives its outputs and the scheme."""
    scheme = ClassificationScheme(
        kind="gap_linear", stages=(0, 1), class_names=("a", "b", "c"), focus_channels=(1, 3), regions=regions
    )
    tile = values(2, CHANNELS[0], *SIZE, seed=seed)
    builder = started(tile)
    wide = builder.convolution("wide", layer(values(CHANNELS[1], CHANNELS[0], 3, 3, 3, seed=1) / 9), [0], None)
    given = selected(builder, "given", 0, CHANNELS[0])
    features = [builder.pooling("a", given, (1, 2, 2)), builder.pooling("b", wide, (2, 2, 4))]
    logits = builder.projection("logits", wide, values(4, CHANNELS[1], 1, 1, 1, seed=2), None)
    described = program_head(builder, SimpleNamespace(head=head, scheme=scheme), features)
    program = Program(
        values=plan_buffers(builder.shapes, builder.operations, logits, features),
        operations=tuple(builder.operations),
        logits=logits,
        head=described,
        features=tuple(features),
    )
    return Executor(kernels, program, builder.weights, 2)(tile, 2), scheme


def focus_by_numpy(logits, channels, regions):
    """Probability of each voxel of (K, Z, Y, X) to belong to the focus."""
    if regions:
        return (1 / (1 + np.exp(-logits[channels]))).max(0)
    probabilities = np.exp(logits - logits.max(0))
    return (probabilities / probabilities.sum(0))[channels].sum(0)


def discriminant_by_numpy(features, logits, channels, regions, weight, bias):
    """Class logits of one tile: averages of features over the patch, the focus and its rim, by a linear map."""
    focus, pooled = focus_by_numpy(logits, channels, regions), []
    for feature in features:
        grid = feature.shape[1:]
        blocks = [part for fine, coarse in zip(focus.shape, grid, strict=True) for part in (coarse, fine // coarse)]
        inside = focus.reshape(blocks).mean((1, 3, 5))
        rim = maximum_filter(inside, 5, mode="constant", cval=0) - inside
        for shares in (np.ones(grid), inside + SMALLEST_SHARE, rim + SMALLEST_SHARE):
            pooled.append((feature * shares).sum((1, 2, 3)) / shares.sum())
    return weight @ np.concatenate(pooled) + bias


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_discriminant_analysis_is_that_of_numpy(kernels, regions, seed):
    weight, bias = values(CLASSES, 3 * sum(CHANNELS), seed=seed + 1), values(CLASSES, seed=seed + 2)
    outputs, scheme = run(kernels, LinearClassifier((0, 1), weight, bias), regions, seed)
    for index, got in enumerate(outputs.class_logits):
        features = [feature[index].double().numpy() for feature in outputs.features]
        logits = outputs.logits[index].double().numpy()
        numbers = (weight.double().numpy(), bias.double().numpy())
        expected = discriminant_by_numpy(features, logits, list(scheme.focus_channels), regions, *numbers)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kind", ["gap_linear", "gap_mlp", "attention"])
def test_trained_heads_are_the_engines_in_double_precision(kernels, kind, regions):
    scheme = ClassificationScheme(
        kind=kind, stages=(0, 1), class_names=("a", "b", "c"), focus_channels=(1, 3), regions=regions
    )
    head = make_head(scheme, CHANNELS).eval()
    for seed, parameter in enumerate(head.parameters()):
        parameter.data = values(*parameter.shape, seed=seed)
    outputs, _ = run(kernels, head, regions, seed=0)
    features = [feature.double() for feature in outputs.features]
    head.double()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # heads convert features to float32
        expected = head(features, focus_map(outputs.logits.double(), scheme))
    torch.testing.assert_close(outputs.class_logits.double(), expected, rtol=1e-4, atol=1e-4)
