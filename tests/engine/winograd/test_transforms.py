import struct

import numpy as np
import pytest

from repvgg.engine.winograd.filters import winograd2d
from repvgg.engine.winograd.transforms import multiply, multiply_both_sides
from tests.engine.winograd.helpers import ALL_TRANSFORMS


class Interpreter:
    """An IR builder that computes values at once."""

    def binary(self, operation, left, right):
        return {"fadd": left + right, "fsub": left - right, "fmul": left * right}[operation]

    def fma(self, left, right, addend):
        return left * right + addend

    def constant(self, number):
        return struct.unpack("<d", struct.pack("<Q", int(number, 16)))[0]


class Counter(Interpreter):
    """An IR builder that counts operations."""

    def __init__(self):
        self.count = 0

    def binary(self, operation, left, right):
        self.count += 1
        return 0

    def fma(self, left, right, addend):
        return self.binary("", 0, 0)


def count_operations(winograd, name):
    """Count the additions, multiplications and FMAs of a transform."""
    counter = Counter()
    rows, columns = getattr(winograd.rows, name), getattr(winograd.columns, name)
    multiply_both_sides(counter, rows, columns, [0] * len(rows[0]) * len(columns[0]))
    return counter.count


@pytest.mark.parametrize("winograd", ALL_TRANSFORMS, ids=str)
def test_transforms_are_products_with_their_matrices(winograd):
    """On small integers, for which float64 is nearly exact; matrices of the code are rounded to float32."""
    for name in ("input_matrix", "filter_matrix", "output_matrix"):
        rows, columns = getattr(winograd.rows, name), getattr(winograd.columns, name)
        values = np.random.default_rng(0).integers(-9, 9, (len(rows[0]), len(columns[0]))).astype(np.float64)
        found = multiply_both_sides(Interpreter(), rows, columns, list(values.ravel()))
        exact = np.array(rows, np.float64) @ values @ np.array(columns, np.float64).T
        np.testing.assert_allclose(found, exact.ravel(), rtol=1e-5, atol=1e-4)


def test_pairs_of_points_save_operations():
    """F(4x4): 12 operations for each of 12 columns and rows of an input, and 13 for each of 10 of an output."""
    for name, most in (("input_matrix", 144), ("output_matrix", 130)):
        assert count_operations(winograd2d(4), name) <= most


def test_a_pair_of_points_costs_a_filter_three_operations():
    counter = Counter()
    multiply(counter, winograd2d(7).columns.filter_matrix, [0] * 3)
    assert counter.count == 4 * 3


def test_only_the_outer_taps_cost_operations_with_stride_2():
    """F(4x4): 4 for each pair of points and 2 for infinity, for each of 9 columns and rows of 9 inputs."""
    assert count_operations(winograd2d(4, stride=2), "input_matrix") <= 9 * 10 + 9 * 10
    assert count_operations(winograd2d(3, stride=2), "input_matrix") <= 7 * 4 + 7 * 4
    assert count_operations(winograd2d(1, stride=2), "input_matrix") == 0
