"""Winograd's minimal filtering as matrices: ``y = Aᵀ[(G g) ⊙ (Bᵀ d)]`` for m outputs of a kernel of 3.

Cook-Toom: the product of two polynomials is found from its values at m + 1 points and at infinity; turned around
(transposition), that gives m outputs of a filter from m + 2 inputs by m + 2 multiplications in the place of 3m. In two
dimensions it is applied to rows and columns (Lavin and Gray, CVPR 2016, §4.1), which need not have the same m.

The points decide the error. For m = 4 the common 0, ±1, ±2, ∞ costs as much as 0, ±3/4, ±3/2, ∞, which has numbers of
like size in all three matrices and several times less error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TypeAlias, final

import numpy as np

from repvgg.engine.layers import Floats, Pair

Matrix: TypeAlias = tuple[tuple[Fraction, ...], ...]
TAPS = 3

#: The finite points for each m.
POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
    5: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2), Fraction(1)),
}


@final
@dataclass(frozen=True)
class Filter:
    """F(m, 3), exactly.

    Attributes:
        outputs: m.
        input_matrix: Bᵀ, (m + 2, m + 2).
        kernel_matrix: G, (m + 2, 3).
        output_matrix: Aᵀ, (m, m + 2).
    """

    outputs: int
    input_matrix: Matrix
    kernel_matrix: Matrix
    output_matrix: Matrix

    @property
    def inputs(self) -> int:
        """Inputs of a tile, m + 2."""
        return self.outputs + TAPS - 1


@final
@dataclass(frozen=True)
class Form:
    """F(m x n, 3x3): a filter down and one across."""

    rows: Filter
    columns: Filter

    def __str__(self) -> str:
        return "F({}x{})".format(*self.outputs)

    @property
    def outputs(self) -> Pair:
        """Rows and columns of what comes out of a tile."""
        return self.rows.outputs, self.columns.outputs

    @property
    def inputs(self) -> Pair:
        """Rows and columns of an input tile."""
        return self.rows.inputs, self.columns.inputs

    @property
    def places(self) -> int:
        """Multiplications for each tile and channel."""
        return self.rows.inputs * self.columns.inputs

    def transformed(self, weight: Floats) -> Floats:
        """``G g Gᵀ`` of each kernel, computed in float64: (O, I, 3, 3) to (O, I, m + 2, n + 2)."""
        down, across = (np.array(part.kernel_matrix, np.float64) for part in (self.rows, self.columns))
        out: Floats = (down @ weight.astype(np.float64) @ across.T).astype(np.float32)
        return out


def winograd(rows: int, columns: int | None = None) -> Form:
    """F(rows x columns, 3x3) for the points of :data:`POINTS`; a square without ``columns``."""
    return Form(minimal_filter(rows), minimal_filter(rows if columns is None else columns))


@cache
def minimal_filter(outputs: int) -> Filter:
    """F(m, 3) for the points of :data:`POINTS`."""
    points = POINTS[outputs]
    output = [(*tuple(point**power for point in points), Fraction(power == outputs - 1)) for power in range(outputs)]
    kernel = [tuple(point**power / _others(points, point) for power in range(TAPS)) for point in points]
    rows = [(*_roots([other for other in points if other != point]), Fraction(0)) for point in points]
    infinity = (Fraction(0), Fraction(0), Fraction(1))
    return Filter(outputs, (*rows, _roots(points)), (*kernel, infinity), tuple(output))


def _others(points: Sequence[Fraction], point: Fraction) -> Fraction:
    """The product of the differences to all other points."""
    product = Fraction(1)
    for other in points:
        product *= point - other if other != point else 1
    return product


def _roots(points: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Coefficients of the polynomial with these roots, lowest power first."""
    out = [Fraction(1)]
    for point in points:
        shifted, scaled = [Fraction(0), *out], [*(-point * value for value in out), Fraction(0)]
        out = [above + below for above, below in zip(shifted, scaled, strict=True)]
    return tuple(out)
