"""Known-answer networks: what stitching gives is known exactly, whatever the tiles."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.engine.model.mirroring import mirror_views
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.pipeline.sliding_window import predict_logits
from nnturbo.engine.pipeline.tiling import gaussian
from nnturbo.engine.pipeline.timing import Timings
from nnturbo.engine.pipeline.window import SlidingWindow, tile_positions, usual_views_per_call

from tests.engine.factory import dataset_json, plans_json
from tests.engine.pipeline.cases import case_of, identity

CPU = torch.device("cpu")


def stitched(image: np.ndarray, runner, window: SlidingWindow, outputs: int) -> np.ndarray:
    slabs = [slab.clone() for slab in predict_logits(case_of(image), runner, window, outputs, timings=Timings())]
    return torch.cat(slabs, dim=1).numpy()


shapes = st.tuples(*[st.integers(1, 16)] * 3)
patches = st.tuples(*[st.integers(1, 12)] * 3)


@settings(deadline=None, max_examples=40)
@given(shapes, patches, st.floats(0.3, 1.0), st.sets(st.integers(0, 2)), st.integers(1, 8), st.integers(1, 2))
def test_the_identity_network_gives_the_scan_back(shape, patch, step, axes, per_call, channels):
    image = np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)
    window = SlidingWindow(
        patch_size=patch, tile_step_size=step, views=mirror_views(sorted(axes)), views_per_call=per_call
    )
    assert np.abs(stitched(image, identity, window, channels) - image).max() < 2e-5


@settings(deadline=None, max_examples=40)
@given(shapes, patches, st.floats(0.3, 1.0), st.booleans())
def test_tiles_are_weighted_over_the_sum_of_weights(shape, patch, step, use_gaussian):
    """A network that answers with its own coordinates shows how tiles are mixed; compared with a count map."""
    ramp = torch.arange(float(np.prod(patch))).reshape(1, 1, *patch) / np.prod(patch)
    window = SlidingWindow(
        patch_size=patch, tile_step_size=step, views=((),), views_per_call=1, use_gaussian=use_gaussian
    )
    result = stitched(np.zeros((1, *shape), np.float32), lambda tiles: NetworkOutput(ramp), window, 1)[0]

    padded = tuple(max(n, p) for n, p in zip(shape, patch, strict=True))
    weight = np.ones(())
    for n in patch:
        weight = weight[..., None] * (gaussian(n).numpy() if use_gaussian else np.ones(n))
    total, count = np.zeros(padded), np.zeros(padded)
    positions = [tile_positions(n, p, step) for n, p in zip(padded, patch, strict=True)]
    for z in positions[0]:
        for y in positions[1]:
            for x in positions[2]:
                place = (slice(z, z + patch[0]), slice(y, y + patch[1]), slice(x, x + patch[2]))
                total[place] += weight * ramp[0, 0].numpy()
                count[place] += weight
    crop = tuple(slice((p - n) // 2, (p - n) // 2 + n) for p, n in zip(padded, shape, strict=True))
    assert np.abs(result - (total / count)[crop]).max() < 1e-5


def test_mirror_views_are_flipped_back_before_they_are_averaged():
    """A network that adds a fixed ramp to every view: the mean over views holds the ramp's mirror images."""
    patch = (4, 6, 8)
    ramp = torch.arange(float(np.prod(patch))).reshape(1, 1, *patch)
    window = SlidingWindow(patch_size=patch, tile_step_size=0.5, views=mirror_views([0, 2]), views_per_call=3)
    result = stitched(np.zeros((1, *patch), np.float32), lambda t: NetworkOutput(t * 0 + ramp), window, 1)
    images = [ramp[0].flip([axis + 1 for axis in axes]) for axes in ((), (0,), (2,), (0, 2))]
    assert np.allclose(result, (sum(images) / 4).numpy(), atol=1e-4)


def test_a_slicewise_network_sees_every_plane_on_its_own():
    seen = []

    def runner(tiles):
        seen.append(tuple(tiles.shape))
        return NetworkOutput(tiles)

    image = np.random.default_rng(0).normal(size=(2, 5, 9, 11)).astype(np.float32)
    window = SlidingWindow(
        patch_size=(1, 6, 8), tile_step_size=0.5, views=mirror_views([1, 2]), views_per_call=4, slicewise=True
    )
    assert np.abs(stitched(image, runner, window, 2) - image).max() < 1e-5
    assert seen == [(4, 2, 6, 8)] * (5 * 2 * 2)


@pytest.mark.parametrize("axes", [(), (0, 1)])
def test_logits_are_gone_before_the_next_come(axes):
    """Those of many labels take more memory than all else."""
    given_out = []

    def runner(tiles):
        assert not [logits for logits in given_out if logits() is not None]
        logits = tiles + 0
        given_out.append(weakref.ref(logits.untyped_storage()))
        return NetworkOutput(logits)

    window = SlidingWindow(patch_size=(4, 4, 4), tile_step_size=0.5, views=mirror_views(axes), views_per_call=1)
    stitched(np.zeros((1, 7, 7, 7), np.float32), runner, window, 1)
    assert len(given_out) == 27 * len(window.views)


def test_logits_of_the_only_tile_are_the_sums():
    """No second array is made, which takes as much memory."""
    logits = torch.randn(1, 3, 6, 6, 6)
    window = SlidingWindow(patch_size=(6, 6, 6), tile_step_size=0.5, views=((),), views_per_call=1)
    case = case_of(np.zeros((1, 6, 4, 5), np.float32))
    (slab,) = predict_logits(case, lambda tiles: NetworkOutput(logits), window, 3, timings=Timings())
    assert slab.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    assert torch.equal(slab, logits[0, :, :, 1:5, 0:5])


def test_progress_counts_every_tile():
    seen = []
    window = SlidingWindow(patch_size=(4, 4, 4), tile_step_size=0.5, views=((),), views_per_call=1)
    case = case_of(np.zeros((1, 8, 6, 4), np.float32))
    slabs = predict_logits(
        case, identity, window, 1, timings=Timings(), progress=lambda done, total: seen.append((done, total))
    )
    assert sum(slab.shape[1] for slab in slabs) == 8
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("patch_size", "views"), [((512, 512), 8), ((64, 64, 64), 8), ((96, 96, 96), 2), ((64, 128, 192), 1),
                              ((192, 256, 256), 1)],
)  # fmt: skip
def test_fewer_views_of_large_patches_go_through_a_gpu_at_once(patch_size, views):
    made = replace(parse_plan(plans_json(), dataset_json(), "3d_fullres"), patch_size=patch_size)
    assert usual_views_per_call(made, torch.device("cuda", 0)) == views
    assert usual_views_per_call(made, torch.device("cpu")) == 1


@pytest.mark.parametrize("step", [0, -0.5, 1.01])
def test_a_step_out_of_range_is_refused(step):
    with pytest.raises(ValueError, match="tile_step_size"):
        SlidingWindow(patch_size=(4, 4, 4), tile_step_size=step, views=((),), views_per_call=1)
