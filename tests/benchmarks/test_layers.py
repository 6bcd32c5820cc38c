"""Work that the benchmark of layers counts."""

import math

import pytest
from nnturbo.benchmarks.layers import work
from nnturbo.kernels.program import Operation, Program, Upsampling, Value

COARSE, FINE = (2, 4, 4), (4, 8, 8)


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({"taps": (3, 3, 3)}, 4 * 8 * 8 * 27 * 5 * 7),
        ({"taps": (3, 3, 3), "transformed": True}, 4 * 8 * 8 * 27 * 5 * 7 / 4),
        ({"taps": (1, 3, 3), "transformed": True}, 4 * 8 * 8 * 9 * 5 * 7 / 4),
        ({}, 4 * 8 * 8 * 5 * 7),
    ],
)
def test_a_convolution_counts_the_products_that_it_does_and_the_numbers_that_it_reads(options, products):
    values = tuple(Value(buffer=place, channels=channels, size=FINE) for place, channels in enumerate((5, 7)))
    operation = Operation(kind="convolution", name="c", inputs=(0,), output=1, **options)
    program = Program(values=values, operations=(operation,), logits=1, head=None, features=())
    flops, moved = work(program, operation)
    assert flops == 2 * products
    taps = math.prod(options.get("taps", (1,))) * (4 if "transformed" in options else 1)
    assert moved == 4 * (4 * 8 * 8 * (5 + 7) + taps * 5 * 7)


def test_what_is_upsampled_counts_too_but_is_not_moved():
    sizes = ((0, 3, COARSE), (1, 6, FINE), (2, 6, FINE))
    values = tuple(Value(buffer=buffer, channels=channels, size=size) for buffer, channels, size in sizes)
    operation = Operation(
        kind="convolution",
        name="c",
        inputs=(0, 1),
        output=2,
        taps=(3, 3, 3),
        transformed=True,
        upsampling=Upsampling(stride=(2, 2, 2), weight="w", bias=None),
    )
    program = Program(values=values, operations=(operation,), logits=2, head=None, features=())
    flops, moved = work(program, operation)
    assert flops == 2 * 256 * (27 / 4 * 12 * 6 + 3 * 6)
    assert moved == 4 * (32 * 3 + 256 * 6 + 256 * 6 + 4 * 27 * 12 * 6)
