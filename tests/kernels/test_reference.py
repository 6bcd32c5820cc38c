import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.kernels import AxisOperator, accumulate_views, argmax_labels, gather_tiles, region_labels, resample_axis

VIEWS = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def random_operator(n_in, n_out, taps, generator):
    first = torch.sort(torch.randint(0, n_in - taps + 1, (n_out,), generator=generator)).values
    return AxisOperator(n_in, first, torch.randn(n_out, taps, generator=generator))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 9),
    st.sampled_from([-3, -2, -1]),
    st.integers(0, 2**31),
    st.data(),
)
def test_resample_axis_is_the_sum_its_docstring_gives(n_in, n_out, taps, axis, seed, data):
    generator = torch.Generator().manual_seed(seed)
    operator = random_operator(n_in, n_out, min(taps, n_in), generator)
    start = data.draw(st.integers(0, n_out - 1))
    stop = data.draw(st.integers(start + 1, n_out))
    low, high = operator.inputs_of(start, stop)
    offset = data.draw(st.integers(0, low))
    shape = [2, 3, 4, 5]
    shape[axis] = n_in
    volume = torch.randn(shape, generator=generator)

    expected = torch.stack(
        [
            sum(
                operator.weights[row, tap] * volume.select(axis, int(operator.first[row]) + tap)
                for tap in range(operator.taps)
            )
            for row in range(start, stop)
        ],
        dim=axis,
    )
    part = volume.narrow(axis, offset, high - offset).contiguous()
    result = resample_axis(part, operator, axis, rows=(start, stop), offset=offset)
    assert result.shape == expected.shape
    assert torch.allclose(result, expected, atol=1e-5)


def test_resample_axis_refuses_data_that_lacks_inputs():
    operator = AxisOperator(6, torch.arange(5), torch.full((5, 2), 0.5))
    with pytest.raises(ValueError, match=r"read inputs \[2, 6\), data holds \[3, 6\)"):
        resample_axis(torch.zeros(1, 3, 2, 2), operator, -3, rows=(2, 5), offset=3)


def test_resample_axis_selects_and_keeps():
    volume = torch.arange(24.0).reshape(1, 4, 3, 2)
    assert torch.equal(resample_axis(volume, AxisOperator.identity(4), -3, rows=(1, 3)), volume[:, 1:3])
    nearest = AxisOperator(4, torch.tensor([0, 0, 2, 3]), torch.ones(4, 1))
    assert torch.equal(resample_axis(volume, nearest, -3), volume[:, [0, 0, 2, 3]])


def test_gather_tiles_cuts_and_flips():
    volume = torch.arange(2 * 6 * 7 * 8.0).reshape(2, 6, 7, 8)
    out = torch.empty(len(VIEWS), 2, 3, 4, 5, dtype=torch.bfloat16)
    gather_tiles(volume, (1, 2, 3), (3, 4, 5), VIEWS, out)
    tile = volume.numpy()[:, 1:4, 2:6, 3:8]
    for view, axes in zip(out, VIEWS, strict=True):
        expected = torch.from_numpy(np.flip(tile, [axis + 1 for axis in axes]).copy()).bfloat16()
        assert torch.equal(view, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulate_views_undoes_the_flips_of_gather_tiles(dtype):
    generator = torch.Generator().manual_seed(0)
    volume = torch.randint(-8, 8, (3, 4, 5, 6), generator=generator).float()
    logits = gather_tiles(volume, (0, 0, 0), (4, 5, 6), VIEWS, torch.empty(8, 3, 4, 5, 6, dtype=dtype))
    weights = tuple(torch.randint(1, 5, (n,), generator=generator).float() for n in (4, 5, 6))
    before = torch.randint(-8, 8, (3, 4, 5, 6), generator=generator).float()
    out = before.clone()
    accumulate_views(logits, VIEWS, weights, out)
    wz, wy, wx = weights
    # Small integers are exact in every type, so any order of additions gives the same sum.
    assert torch.equal(out, before + 8 * volume * wz[:, None, None] * wy[:, None] * wx)


@pytest.mark.parametrize("classes", [1, 2, 3, 20, 256, 300])
def test_argmax_labels_is_numpy_argmax_ties_included(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(0, max(2, classes // 4), (classes, 7, 9), generator=generator).float()
    labels = argmax_labels(logits)
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int32)
    assert np.array_equal(labels.numpy(), logits.numpy().argmax(0))


def test_region_labels_paint_in_order_where_the_probability_exceeds_a_half():
    logits = torch.tensor([[1.0, 1.0, 0.0, -1.0], [1.0, -1.0, 0.0, -1.0]])
    assert region_labels(logits, [2, 1]).tolist() == [1, 2, 0, 0]
