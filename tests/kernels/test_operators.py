import pytest
import torch
from nnturbo.kernels import AxisOperator
from nnturbo.kernels.operators import BLOCK_ROWS, band_of_entries, matrix_blocks


def test_a_band_adds_up_repeats_and_clamps_to_the_axis():
    columns = torch.tensor([[-2, 0, 1], [3, 3, 9]])
    weights = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]]).double()
    operator = AxisOperator(4, *band_of_entries(4, columns, weights))
    dense = torch.zeros(2, 4)
    for row, (first, weights) in enumerate(zip(operator.first, operator.weights, strict=True)):
        dense[row, first : first + operator.taps] = weights
    assert dense.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 1]]


def test_blocks_cover_the_rows_and_hold_the_band():
    n_out = 2 * BLOCK_ROWS + 5
    first = torch.arange(n_out) // 2
    operator = AxisOperator(n_out, first, torch.rand(n_out, 3))
    dense = torch.zeros(n_out, n_out)
    for start, stop, low, high, matrix in matrix_blocks(operator, 3, n_out, torch.device("cpu")):
        assert matrix.shape == (stop - start, high - low)
        dense[start:stop, low:high] = matrix
    for row in range(3, n_out):
        expected = torch.zeros(n_out)
        expected[first[row] : first[row] + 3] = operator.weights[row]
        assert torch.equal(dense[row], expected)


@pytest.mark.parametrize(
    ("first", "weights", "message"),
    [
        ([0, 3], [[1.0, 1.0]] * 2, "must lie in"),
        ([-1, 0], [[1.0]] * 2, "must lie in"),
        ([2, 1], [[1.0]] * 2, "must ascend"),
        ([0], [[1.0]] * 2, "first must be"),
        ([], torch.zeros(0, 1).tolist(), "weights|lie in"),
    ],
)
def test_an_operator_that_leaves_the_axis_is_refused(first, weights, message):
    with pytest.raises(ValueError, match=message):
        AxisOperator(4, torch.tensor(first, dtype=torch.int64), torch.tensor(weights))


def test_identity_is_a_selection_and_a_shift_is_not_the_identity():
    assert AxisOperator.identity(5).is_identity
    shift = AxisOperator(5, torch.tensor([0, 0, 1, 2, 3]), torch.ones(5, 1))
    assert shift.is_selection
    assert not shift.is_identity
    assert not AxisOperator(5, torch.arange(4), torch.full((4, 2), 0.5)).is_selection
