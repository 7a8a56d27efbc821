import math

import numpy as np
import pytest

from repvgg.engine.graph import ConvGeometry
from repvgg.engine.winograd.filters import POINTS, edge_filter, winograd1d, winograd2d
from tests.engine.covering import covering
from tests.engine.helpers import expected, isas, random_conv
from tests.engine.winograd.helpers import ALL_TRANSFORMS, compute


def assert_exact(winograd):
    """In fractions: m outputs of a filter of 3 taps, for unit vectors as inputs and filters."""
    assert winograd.inputs == len(winograd.input_matrix) == len(winograd.filter_matrix)
    for tap in range(3):
        for place in range(winograd.inputs):
            filters = [row[tap] for row in winograd.filter_matrix]
            inputs = [row[place] for row in winograd.input_matrix]
            products = [a * b for a, b in zip(filters, inputs, strict=True)]
            for at, row in enumerate(winograd.output_matrix):
                total = sum(a * b for a, b in zip(row, products, strict=True))
                assert total == (at * winograd.stride + tap == place)


@pytest.mark.parametrize("pair", POINTS, ids=str)
def test_matrices_are_exact(pair):
    stride, outputs = pair
    full = winograd1d(outputs, stride)
    assert_exact(full)
    for fewer in range(1, outputs):
        edge, elements = edge_filter(fewer, full)
        assert_exact(edge)
        assert edge.filter_matrix == tuple(full.filter_matrix[element] for element in elements)
        assert stride == 2 or edge.error_growth <= full.error_growth + 1e-9


def test_error_growth():
    """1 for direct sums; F(4x4) has half of what the points 0, ±1, ±2 have, which is 10.8."""
    assert winograd2d(1, stride=2).error_growth == 1
    found = [winograd2d(outputs).error_growth for outputs in (2, 3, 4, 5, 6, 7)]
    assert found == pytest.approx([1.67, 2.62, 4.78, 9.69, 20.6, 49.2], rel=0.01)
    growth = math.sqrt(winograd2d(2).error_growth * winograd2d(7).error_growth)
    assert winograd2d(2, 7).error_growth == pytest.approx(growth)


SELECTED = [one for one in ALL_TRANSFORMS if one.rows == one.columns or one.outputs in ((2, 7), (5, 4), (4, 1))]


@pytest.mark.parametrize(
    ("winograd", "on_the_fly"),
    covering(
        SELECTED,
        [False, True],
        views=[
            lambda winograd, on_the_fly: (winograd,),
            lambda winograd, on_the_fly: (winograd.rows.stride, winograd.rows == winograd.columns, on_the_fly),
        ],
    ),
)
def test_error_growth_predicts_the_error(winograd, on_the_fly):
    """With 192 channels: 0.9e-7 to 2.1e-7 for a growth of 1, as root mean square relative to the outputs."""
    isa, stride = isas()[-1], winograd.rows.stride
    conv = random_conv(192, 32, ConvGeometry((3, 3), (stride, stride), (1, 1)), relu=False)
    out, x = compute(conv, (14, 14), winograd, isa, batch=1, on_the_fly=on_the_fly)
    reference = expected(conv, x)
    error = ((out - reference).square().mean() / reference.square().mean()).sqrt()
    assert 0.6e-7 * winograd.error_growth < error < 2.4e-7 * winograd.error_growth


def test_filters_are_transformed_in_float64():
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    winograd = winograd2d(4, 5)
    down, across = (np.array(part.filter_matrix, np.float64) for part in (winograd.rows, winograd.columns))
    exact = np.einsum("ij,oujk,lk->ouil", down, weight.astype(np.float64), across)
    np.testing.assert_allclose(winograd.transform_filters(weight, on_the_fly=False), exact, rtol=1e-7, atol=1e-7)
    assert winograd.transform_filters(weight, on_the_fly=True).shape == (4, 3, 6, 3)
