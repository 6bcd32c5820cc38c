"""Labels written slab by slab against those of the whole array."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.engine.model.resampling_function import Resampling
from nnturbo.engine.pipeline.labels import can_fuse, write_labels
from nnturbo.engine.pipeline.resampling import GridMap, grid_map, resample
from nnturbo.engine.pipeline.timing import Timings
from nnturbo.kernels import argmax_labels, region_labels

LINEAR = Resampling(function="spline", order=1)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(1, 40),
    st.sampled_from([(0.3, 0.3), (1.0, 1.0), (1.7, 0.8)]),
    st.sampled_from([None, (3, 1)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_labels_do_not_depend_on_where_slabs_end(depths, planes, factors, values, coarse, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 if values else 3, sum(depths), 7, 9, generator=generator)
    new = (planes, max(1, round(7 * factors[0])), max(1, round(9 * factors[1])))
    resampling = Resampling(function="spline", order=1, order_coarse=0, separate=coarse)
    grid = grid_map(resampling, logits.shape[1:], new, (5.0, 1.0, 1.0), (5.0, 1.0, 1.0))
    assert can_fuse(grid)
    expected = resample(logits, grid)
    expected = argmax_labels(expected) if values is None else region_labels(expected, values)
    target = torch.full((new[2], new[0], new[1]), 99, dtype=torch.uint16).permute(1, 2, 0)  # as a transposed scan
    timings = Timings()
    write_labels(torch.split(logits, depths, dim=1), grid, values, target, timings)
    # Matrix products add in another order for other shapes, which a voxel between two labels may show.
    assert (target.int() != expected.int()).sum() <= 1
    assert "labels" in timings.as_dict()


def test_what_clips_or_reads_far_is_not_fused():
    shape, new = (9, 10, 11), (12, 8, 14)
    grid = grid_map(LINEAR, shape, new, (1, 1, 1), (1, 1, 1))
    assert can_fuse(grid)
    assert can_fuse(GridMap.identity(shape))
    assert not can_fuse(grid_map(Resampling(function="spline", order=3), shape, new, (1, 1, 1), (1, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_every_voxel_is_written_once(dtype):
    logits = torch.zeros(3, 8, 4, 4)
    logits[2] = 1
    grid = grid_map(LINEAR, (8, 4, 4), (21, 5, 3), (1, 1, 1), (1, 1, 1))
    target = torch.full((21, 5, 3), 77, dtype=dtype)
    write_labels(logits.split(3, dim=1), grid, None, target, Timings())
    assert np.unique(target.numpy()).tolist() == [2]
