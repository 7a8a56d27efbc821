"""Winograd's minimal filtering as exact matrices: ``y = Aᵀ[(G g) ⊙ (Bᵀ d)]`` for m outputs of a filter of 3 taps.

F(m, r) computes m outputs of a filter of r taps from m + r - 1 inputs with as many multiplications, in place of r·m. It
is the transpose of the Cook-Toom algorithm, which finds the product of two polynomials from its values at m + r - 2
points and at infinity. F(m x n, 3x3) applies it to columns and rows, ``Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A`` (Lavin and Gray,
CVPR 2016, section 4.1); m and n need not be equal. The element-wise product is the *transformed domain*, its elements
the *tile elements*: one batched GEMM over channels for each of them.

Edge tiles. Where m does not divide the outputs, the last tile has fewer of them. It needs fewer tile elements, and can
use a subset of the interpolation points of the full tiles: then their transformed filters are the same, and its GEMMs
join those of the full tiles. 14 = 3·4 + 2 rows take 3·6 + 4 multiplications that way; four tiles of F(4, 3) take 24.

Stride 2. A filter of three taps splits into its outer two taps on inputs 0, 2, 4, … and its inner tap on inputs 1, 3,
5, …: F(m, 2) and m plain products, 2m + 1 multiplications in place of 3m.

Choice of points. They decide the rounding error, and pairs ±p decide the cost. For inputs and filters of independent
numbers the error of the element-wise products, which dominates, grows by a factor that follows from the matrices
(:attr:`Winograd1d.error_growth`). For stride 1, the points below have the least growth among pairs of multiples of 1/8,
and 0 where m is even: 9.7 for F(5x5), against 66 for 0, ±3/4, ±3/2, 1; 4.8 for F(4x4), against 10.8 for the usual 0,
±1, ±2. The denominators, products of differences of points, are in Aᵀ, so that a pair of points costs the filter
transform three operations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import TypeAlias, final

import numpy as np

from repvgg.engine.graph import Floats, Pair

# Exact: the code generator compares entries to find signs and ones, and rounds each to float32 once.
Matrix: TypeAlias = tuple[tuple[Fraction, ...], ...]
TAPS = 3


def _pairs(*points: Fraction | int) -> tuple[Fraction, ...]:
    """Return each point and its negative."""
    return tuple(Fraction(sign * point) for point in points for sign in (1, -1))


#: Finite points for (stride, m); none for (2, 1), which needs no transform. The order matters: an edge tile of k
#: outputs uses the first k + 1 of them (stride 1) or k (stride 2); see :func:`edge_filter`.
POINTS: dict[tuple[int, int], tuple[Fraction, ...]] = {
    (1, 2): (*_pairs(1), Fraction(0)),
    (1, 3): _pairs(Fraction(5, 4), Fraction(3, 8)),
    (1, 4): (Fraction(0), *_pairs(Fraction(3, 2), Fraction(5, 8))),
    (1, 5): _pairs(Fraction(7, 8), Fraction(1, 4), Fraction(7, 4)),
    (1, 6): (Fraction(0), *_pairs(1, Fraction(1, 2), 2)),
    (1, 7): _pairs(Fraction(9, 8), Fraction(1, 4), Fraction(9, 4), Fraction(5, 8)),
    (2, 1): (),
    (2, 2): _pairs(1),
    (2, 3): (Fraction(0), *_pairs(1)),
    (2, 4): _pairs(Fraction(1, 2), Fraction(5, 4)),
}


# eq=False: kernels contain instances, and hashing the matrices for each lookup of a kernel would take long.
@final
@dataclass(frozen=True, eq=False)
class Winograd1d:
    """F(m, 3) of one stride, in exact fractions; n tile elements.

    Instances come from :func:`winograd1d` and :func:`edge_filter`, which are cached, and compare by identity.

    Attributes:
        stride: of the convolution.
        outputs: m.
        input_matrix: Bᵀ, (n, n).
        filter_matrix: G, (n, 3).
        output_matrix: Aᵀ, (m, n).
    """

    stride: int
    outputs: int
    input_matrix: Matrix
    filter_matrix: Matrix
    output_matrix: Matrix

    @cached_property
    def error_growth(self) -> float:
        """RMS rounding error of the products in the outputs, relative to that of direct sums.

        ``√(mean over k of Σᵢ (A_ki ‖B_i‖ ‖G_i‖)² / 3)``, for inputs and filters of independent numbers.
        """
        inputs, filters, outputs = (
            np.array(matrix, np.float64) for matrix in (self.input_matrix, self.filter_matrix, self.output_matrix)
        )
        norms = np.linalg.norm(inputs, axis=1) * np.linalg.norm(filters, axis=1)
        return float(np.sqrt(((outputs * norms) ** 2).sum(axis=1).mean() / TAPS))

    @cached_property
    def transformed(self) -> range:
        """Tile elements whose filter value has to be computed, because it is not simply one of the three taps."""
        elements = [element for element, row in enumerate(self.filter_matrix) if sorted(row) != [0, 0, 1]]
        # Infinity is the first element, and 0 the first or last finite point, so these are contiguous.
        return range(elements[0], elements[-1] + 1) if elements else range(0)

    @cached_property
    def inputs(self) -> int:
        """The inputs of a tile, and its tile elements: n = m + 2 for stride 1, 2m + 1 for stride 2."""
        return (self.outputs - 1) * self.stride + TAPS


@final
@dataclass(frozen=True)
class Winograd2d:
    """F(m x n, 3x3). Pairs are (down, across).

    Attributes:
        rows: F(m, 3), applied to columns of a tile.
        columns: F(n, 3), applied to its rows.
        edge_tile: outputs of the last tile down and across if they are fewer, else 0.
    """

    rows: Winograd1d
    columns: Winograd1d
    edge_tile: Pair = (0, 0)

    def __str__(self) -> str:
        stride = "" if self.rows.stride == 1 else f" of stride {self.rows.stride}"
        down, across = (f"{m}+{edge}" if edge else str(m) for m, edge in zip(self.outputs, self.edge_tile, strict=True))
        return f"F({down}x{across}){stride}"

    @cached_property
    def error_growth(self) -> float:
        """Error relative to direct sums in the tiles where it is largest; see :attr:`Winograd1d.error_growth`."""
        pairs = zip((self.rows, self.columns), self.edge_tile, strict=True)
        return math.prod(
            max(full.error_growth, edge_filter(m, full)[0].error_growth if m else 0.0) for full, m in pairs
        )

    @property
    def outputs(self) -> Pair:
        """Size of an output tile, (m, n)."""
        return self.rows.outputs, self.columns.outputs

    @property
    def inputs(self) -> Pair:
        """Size of an input tile, and of its transform."""
        return self.rows.inputs, self.columns.inputs

    @property
    def strides(self) -> Pair:
        """Strides of the convolution."""
        return self.rows.stride, self.columns.stride

    @property
    def tile_strides(self) -> Pair:
        """Inputs from the start of one tile to that of the next."""
        return self.rows.outputs * self.rows.stride, self.columns.outputs * self.columns.stride

    @property
    def tile_elements(self) -> int:
        """Elements of a transformed tile: multiplications for each tile and pair of channels."""
        return self.rows.inputs * self.columns.inputs

    def transform_filters(self, weight: Floats, *, on_the_fly: bool) -> Floats:
        """Transform filters (O, I, 3, 3) in float64: ``G g Gᵀ``, (O, I, rows, columns) of a tile.

        ``on_the_fly``: only ``G g``, (O, I, rows, 3); the kernel multiplies by Gᵀ.
        """
        down, across = (np.array(part.filter_matrix, np.float64) for part in (self.rows, self.columns))
        half = down @ weight.astype(np.float64)  # one rounding of each filter, to float32 at the end
        out: Floats = (half if on_the_fly else half @ across.T).astype(np.float32)
        return out

    def filter_elements(self, *, on_the_fly: bool) -> int:
        """Floats that :meth:`transform_filters` returns for each 3x3 filter."""
        return self.rows.inputs * (TAPS if on_the_fly else self.columns.inputs)


@cache
def winograd2d(rows: int, columns: int | None = None, stride: int = 1, edge_tile: Pair = (0, 0)) -> Winograd2d:
    """Return F(rows x columns, 3x3) for the points of :data:`POINTS`; ``columns`` defaults to ``rows``."""
    return Winograd2d(winograd1d(rows, stride), winograd1d(rows if columns is None else columns, stride), edge_tile)


@cache
def winograd1d(outputs: int, stride: int = 1) -> Winograd1d:
    """Return F(outputs, 3) for the points of :data:`POINTS`."""
    if (stride, outputs) == (2, 1):
        # Three products for one output: no gain along this axis, but the other axis may have a larger tile.
        return Winograd1d(stride, outputs, _identity(TAPS), _identity(TAPS), ((Fraction(1),) * TAPS,))
    return _from_points(POINTS[stride, outputs], outputs, stride)


@cache
def edge_filter(outputs: int, full: Winograd1d) -> tuple[Winograd1d, tuple[int, ...]]:
    """Return F(outputs, 3) on a subset of the points of ``full``, and which of its tile elements it has.

    Rows of G are the same for these elements, so both use the same transformed filters; rows of Bᵀ differ.
    """
    stride, points = full.stride, POINTS[full.stride, full.outputs]
    found = _from_points(points[: outputs + (TAPS - 2) * (stride == 1)], outputs, stride)
    if stride == 1:
        return found, tuple(range(found.inputs))
    outer, inner = outputs + 1, full.outputs + 1  # elements of F(m, 2) come first, then those of the inner tap
    return found, (*range(outer), *range(inner, inner + outputs))


def _from_points(points: Sequence[Fraction], outputs: int, stride: int) -> Winograd1d:
    """Return F(outputs, 3) for infinity and these points."""
    if stride == 1:
        return Winograd1d(stride, outputs, *_cook_toom(points, outputs, TAPS))
    outer = _cook_toom(points, outputs, 2)
    inner = _identity(outputs), ((Fraction(1),),) * outputs, _identity(outputs)
    output = tuple((*first, *second) for first, second in zip(outer[2], inner[2], strict=True))
    return Winograd1d(stride, outputs, _interleave(outer[0], inner[0]), _interleave(outer[1], inner[1]), output)


def _cook_toom(points: Sequence[Fraction], outputs: int, taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return Bᵀ, G and Aᵀ of F(outputs, taps) for infinity and these points."""
    filters = [tuple(point**power for power in range(taps)) for point in points]
    # The denominators could be in any of the three matrices: in Aᵀ, they leave G simple, which is applied on the fly.
    columns = [[point**power / _denominator(points, point) for power in range(outputs)] for point in points]
    largest = [Fraction(power == outputs - 1) for power in range(outputs)]
    rows = [(*_from_roots([other for other in points if other != point]), Fraction(0)) for point in points]
    infinity = (*(Fraction(0),) * (taps - 1), Fraction(1))
    return (_from_roots(points), *rows), (infinity, *filters), tuple(zip(largest, *columns, strict=True))


def _interleave(outer: Matrix, inner: Matrix) -> Matrix:
    """Return the rows of two matrices, with the columns of the first at 0, 2, 4 … and of the second at 1, 3, 5 …."""
    first = [(*itertools.chain(*((number, Fraction(0)) for number in row[:-1])), row[-1]) for row in outer]
    second = [(*itertools.chain(*((Fraction(0), number) for number in row)), Fraction(0)) for row in inner]
    return (*first, *second)


def _identity(size: int) -> Matrix:
    return tuple(tuple(Fraction(row == column) for column in range(size)) for row in range(size))


def _denominator(points: Sequence[Fraction], point: Fraction) -> Fraction:
    """Return the product of the differences to all other points."""
    return math.prod((point - other for other in points if other != point), start=Fraction(1))


def _from_roots(points: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Return the coefficients of the monic polynomial with these roots, lowest power first."""
    out = [Fraction(1)]
    for point in points:
        shifted, scaled = [Fraction(0), *out], [*(-point * value for value in out), Fraction(0)]
        out = [above + below for above, below in zip(shifted, scaled, strict=True)]
    return tuple(out)
