"""Winograd's minimal filtering as matrices: ``y = Aᵀ[(G g) ⊙ (Bᵀ d)]`` for m outputs of a kernel of 3.

Cook-Toom: the product of two polynomials is found from its values at some points and at infinity; turned around
(transposition), that gives m outputs of a filter of r taps from m + r - 1 inputs by as many multiplications, in the
place of r·m. In two dimensions it is applied to rows and columns (Lavin and Gray, CVPR 2016, §4.1), which need not
have the same m.

Where m does not divide a row of outputs, the last tile of it is a tail of fewer outputs. It needs fewer values, and may
take them from the points of the others: then its products have the same transformed kernels, and stand beside those of
the other tiles. 14 = 3·4 + 2 rows take 3·6 + 4 multiplications that way, where four tiles of F(4, 3) would take 24.

With stride 2, a filter of three taps is one of two taps, the outer ones, over the inputs 0, 2, 4, … and one tap over
the inputs 1, 3, 5, …: F(m, 2) and m single products, 2m + 1 multiplications in the place of 3m.

The points decide the error, and pairs ±a decide the cost. For inputs and kernels of independent numbers the error of
the products, which is most of it, grows by a factor that the matrices alone give (:attr:`Filter.loss`). With stride 1,
the points here have the least of it among pairs of eighths, and 0 where m is even: for F(5x5) 9.7, where 0, ±3/4, ±3/2,
1 have 66; for F(4x4) 4.8, where the common 0, ±1, ±2 have 10.8. What divides by differences of points is in Aᵀ: so each
pair of points costs a kernel three operations.
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

Matrix: TypeAlias = tuple[tuple[Fraction, ...], ...]
TAPS = 3


def _pairs(*points: Fraction | int) -> tuple[Fraction, ...]:
    """Each point and its negative."""
    return tuple(Fraction(sign * point) for point in points for sign in (1, -1))


#: The finite points for each stride and m; none for m = 1, which goes without a transform. The first r + 1 of them, or
#: r with stride 2, are the points of a tail of r outputs; see :func:`tail`.
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


@final
@dataclass(frozen=True, eq=False)
class Filter:
    """m outputs of a filter of 3, exactly; n is the number of inputs of a tile and of multiplications.

    There is one of each kind, which :func:`minimal_filter` and :func:`tail` return: others are not equal to it.

    Attributes:
        stride: of the filter.
        outputs: m.
        input_matrix: Bᵀ, (n, n).
        kernel_matrix: G, (n, 3).
        output_matrix: Aᵀ, (m, n).
    """

    stride: int
    outputs: int
    input_matrix: Matrix
    kernel_matrix: Matrix
    output_matrix: Matrix

    @cached_property
    def loss(self) -> float:
        """How much rounding errors of the products grow in the outputs, relative to those of direct sums.

        ``√(mean over k of Σᵢ (A_ki ‖B_i‖ ‖G_i‖)² / 3)`` for inputs and kernels of independent numbers.
        """
        down, kernel, output = (
            np.array(matrix, np.float64) for matrix in (self.input_matrix, self.kernel_matrix, self.output_matrix)
        )
        sizes = np.linalg.norm(down, axis=1) * np.linalg.norm(kernel, axis=1)
        return float(np.sqrt(((output * sizes) ** 2).sum(axis=1).mean() / TAPS))

    @cached_property
    def moved(self) -> range:
        """Multiplications whose factor from the kernel is not just one of its three numbers."""
        places = [place for place, row in enumerate(self.kernel_matrix) if sorted(row) != [0, 0, 1]]
        return range(places[0], places[-1] + 1) if places else range(0)

    @cached_property
    def inputs(self) -> int:
        """Inputs of a tile: m + 2 with stride 1, 2m + 1 with stride 2."""
        return (self.outputs - 1) * self.stride + TAPS


@final
@dataclass(frozen=True)
class Form:
    """F(m x n, 3x3): a filter down and one across.

    Attributes:
        rows: the one down.
        columns: the one across.
        tails: outputs of the last tile down and across where they are fewer; else 0.
    """

    rows: Filter
    columns: Filter
    tails: Pair = (0, 0)

    def __str__(self) -> str:
        stride = "" if self.rows.stride == 1 else f" of stride {self.rows.stride}"
        down, across = (f"{m}+{tail}" if tail else str(m) for m, tail in zip(self.outputs, self.tails, strict=True))
        return f"F({down}x{across}){stride}"

    @cached_property
    def loss(self) -> float:
        """How much larger rounding errors are than those of direct sums, in the tiles that lose most.

        See :attr:`Filter.loss`.
        """
        pairs = zip((self.rows, self.columns), self.tails, strict=True)
        return math.prod(max(part.loss, tail(short, part)[0].loss if short else 0.0) for part, short in pairs)

    @property
    def outputs(self) -> Pair:
        """Rows and columns of what comes out of a tile."""
        return self.rows.outputs, self.columns.outputs

    @property
    def inputs(self) -> Pair:
        """Rows and columns of an input tile."""
        return self.rows.inputs, self.columns.inputs

    @property
    def strides(self) -> Pair:
        """Inputs from one output to the next."""
        return self.rows.stride, self.columns.stride

    @property
    def steps(self) -> Pair:
        """Rows and columns of inputs from one tile to the next."""
        return self.rows.outputs * self.rows.stride, self.columns.outputs * self.columns.stride

    @property
    def places(self) -> int:
        """Multiplications for each tile and channel."""
        return self.rows.inputs * self.columns.inputs

    def transformed(self, weight: Floats, *, late: bool) -> Floats:
        """``G g Gᵀ`` of each kernel, computed in float64: (O, I, 3, 3) to (O, I, rows, columns) of a tile.

        ``late``: ``G g`` alone, (O, I, rows, 3).
        """
        down, across = (np.array(part.kernel_matrix, np.float64) for part in (self.rows, self.columns))
        moved = down @ weight.astype(np.float64)
        out: Floats = (moved if late else moved @ across.T).astype(np.float32)
        return out

    def sets(self, *, late: bool) -> int:
        """Numbers that are kept for each kernel; see :meth:`transformed`."""
        return self.rows.inputs * (TAPS if late else self.columns.inputs)


@cache
def winograd(rows: int, columns: int | None = None, stride: int = 1, tails: Pair = (0, 0)) -> Form:
    """F(rows x columns, 3x3) for the points of :data:`POINTS`; a square without ``columns``."""
    return Form(minimal_filter(rows, stride), minimal_filter(rows if columns is None else columns, stride), tails)


@cache
def minimal_filter(outputs: int, stride: int = 1) -> Filter:
    """The filter of m outputs for the points of :data:`POINTS`."""
    if (stride, outputs) == (2, 1):
        return Filter(stride, outputs, _identity(TAPS), _identity(TAPS), ((Fraction(1),) * TAPS,))
    return _of_points(POINTS[stride, outputs], outputs, stride)


@cache
def tail(outputs: int, whole: Filter) -> tuple[Filter, tuple[int, ...]]:
    """The filter of fewer outputs whose multiplications are some of those of another, and which ones.

    What they take from the kernel is the same; what they take from the inputs is not.
    """
    stride, points = whole.stride, POINTS[whole.stride, whole.outputs]
    found = _of_points(points[: outputs + (TAPS - 2) * (stride == 1)], outputs, stride)
    if stride == 1:
        return found, tuple(range(found.inputs))
    outer, inner = outputs + 1, whole.outputs + 1
    return found, (*range(outer), *range(inner, inner + outputs))


def _of_points(points: Sequence[Fraction], outputs: int, stride: int) -> Filter:
    """The filter of so many outputs for infinity and these points."""
    if stride == 1:
        return Filter(stride, outputs, *_cook_toom(points, outputs, TAPS))
    outer = _cook_toom(points, outputs, 2)
    inner = _identity(outputs), ((Fraction(1),),) * outputs, _identity(outputs)
    output = tuple((*first, *second) for first, second in zip(outer[2], inner[2], strict=True))
    return Filter(stride, outputs, _in_turns(outer[0], inner[0]), _in_turns(outer[1], inner[1]), output)


def _cook_toom(points: Sequence[Fraction], outputs: int, taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """Bᵀ, G and Aᵀ of F(outputs, taps) for infinity and these points."""
    kernel = [tuple(point**power for power in range(taps)) for point in points]
    columns = [[point**power / _others(points, point) for power in range(outputs)] for point in points]
    largest = [Fraction(power == outputs - 1) for power in range(outputs)]
    rows = [(*_roots([other for other in points if other != point]), Fraction(0)) for point in points]
    infinity = (*(Fraction(0),) * (taps - 1), Fraction(1))
    return (_roots(points), *rows), (infinity, *kernel), tuple(zip(largest, *columns, strict=True))


def _in_turns(outer: Matrix, inner: Matrix) -> Matrix:
    """The rows of two matrices; columns 0, 2, 4, … are those of the first, and 1, 3, 5, … those of the second."""
    first = [(*itertools.chain(*((number, Fraction(0)) for number in row[:-1])), row[-1]) for row in outer]
    second = [(*itertools.chain(*((Fraction(0), number) for number in row)), Fraction(0)) for row in inner]
    return (*first, *second)


def _identity(size: int) -> Matrix:
    return tuple(tuple(Fraction(row == column) for column in range(size)) for row in range(size))


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
