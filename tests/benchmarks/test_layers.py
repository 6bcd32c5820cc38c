"""Work that the benchmark of layers counts."""

import pytest
from nnturbo.benchmarks.layers import work
from nnturbo.kernels.program import Operation, Program, Upsampling, Value

COARSE, FINE = (2, 4, 4), (4, 8, 8)


@pytest.mark.parametrize(
    ("options", "products", "weights"),
    [
        ({"taps": (3, 3, 3)}, 27, 27),
        ({"taps": (3, 3, 3), "transformed": True}, 27 / 6, 6 * 6 * 4),
        ({"taps": (3, 3, 3), "transformed": True, "in_int16": True}, 27 / 4, 6 * 6 * 3),
        ({"taps": (1, 3, 3), "transformed": True}, 9 / 4, 6 * 6),
        ({"taps": (3, 1, 5), "transformed": True}, 15 / 2, 6 * 5),
        ({}, 1, 1),
    ],
)
def test_a_convolution_counts_the_products_that_it_does_and_the_numbers_that_it_reads(options, products, weights):
    values = tuple(Value(buffer=place, channels=channels, size=FINE) for place, channels in enumerate((5, 7)))
    operation = Operation(kind="convolution", name="c", inputs=(0,), output=1, **options)
    program = Program(values=values, operations=(operation,), logits=1, head=None, features=())
    flops, moved = work(program, operation)
    assert flops == 2 * 4 * 8 * 8 * products * 5 * 7
    assert moved == 4 * (4 * 8 * 8 * (5 + 7) + weights * 5 * 7)


@pytest.mark.parametrize(
    ("kind", "stride", "to", "products"),
    [("transposed_convolution", (2, 2, 2), FINE, 1), ("average_pooling", (2, 2, 2), FINE, 0)],
)
def test_a_transposed_convolution_has_weights_for_each_place_and_a_pooling_none(kind, stride, to, products):
    values = (Value(buffer=0, channels=5, size=COARSE), Value(buffer=1, channels=7, size=to))
    operation = Operation(kind=kind, name="c", inputs=(0,), output=1, stride=stride)
    program = Program(values=values, operations=(operation,), logits=1, head=None, features=())
    flops, moved = work(program, operation)
    assert flops == 2 * 256 * products * 5 * 7
    assert moved == 4 * (32 * 5 + 256 * 7 + 8 * products * 5 * 7)


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
    assert flops == 2 * 256 * (27 / 6 * 12 * 6 + 3 * 6)
    assert moved == 4 * (32 * 3 + 256 * 6 + 256 * 6 + 144 * 12 * 6)
