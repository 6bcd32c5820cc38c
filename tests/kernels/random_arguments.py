"""Random arguments for operations of kernels."""

import random

import torch
from nnturbo.kernels import AxisOperator

ALL_VIEWS = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps


def random_operator(n_in, n_out, taps, *, positive=False):
    first = torch.sort(torch.randint(0, n_in - taps + 1, (n_out,))).values
    weights = torch.rand(n_out, taps) if positive else torch.randn(n_out, taps)
    if taps == 1:
        weights = torch.ones(n_out, 1)
    return AxisOperator(n_in, first, weights)


def shape(low, high, count=3):
    return tuple(random.randint(low, high) for _ in range(count))


def embedded(values, target):
    """The same values on a device, as part of a larger array whose other elements are not numbers."""
    margins = shape(0, 3, values.ndim - 1)
    whole = torch.full([n + 2 * m for n, m in zip(values.shape, (*margins, 2), strict=True)], torch.nan, device=target)
    part = whole[tuple(slice(m, m + n) for n, m in zip(values.shape, (*margins, 2), strict=True))]
    return part.copy_(values)


def length(least, greatest, *others):
    """A random length, in a third of all calls one of the others: of many threads, or that packs divide."""
    return random.choice(others) if random.random() < 0.33 else random.randint(least, greatest)


def shifted(tensor):
    """The same numbers, contiguous, not always at a multiple of more than one number's size."""
    whole = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    begin = random.choice([0, 0, 1, 2, 3])
    return whole[begin : begin + tensor.numel()].view(tensor.shape).copy_(tensor)
