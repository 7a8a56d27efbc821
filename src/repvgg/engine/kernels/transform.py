"""A small constant matrix times vectors in registers, with as few operations as its symmetries allow."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

from repvgg.engine.ir import Function, Value
from repvgg.engine.winograd import Matrix


def transform(write: Function, matrix: Matrix, values: Sequence[Value]) -> list[Value]:
    """``matrix · values``, each value being a vector.

    The points a and -a of Winograd's matrices leave two symmetries. Two columns that differ in signs alone: the sum
    and the difference of their values are computed once. Two rows that differ in the signs of every other column: so
    are their even and their odd part.
    """
    matrix, values = _folded(write, matrix, list(values))
    out: list[Value] = []
    while len(out) < len(matrix):
        row, rest = matrix[len(out)], matrix[len(out) + 1 :]
        sign = _mirror(row, rest[0]) if rest else 0
        out += _both(write, row, sign, values) if sign else [_sum(write, row, values)]
    return out


def transform_rectangle(write: Function, rows: Matrix, columns: Matrix, values: Sequence[Value]) -> list[Value]:
    """``rows · values · columnsᵀ`` for a rectangle of values, row by row; what comes out is one as well."""
    width = len(columns[0])
    done = [transform(write, rows, values[column::width]) for column in range(width)]
    return [value for row in zip(*done, strict=True) for value in transform(write, columns, row)]


def _folded(write: Function, matrix: Matrix, values: list[Value]) -> tuple[Matrix, list[Value]]:
    """The same product, with sums and differences in the place of values whose columns differ in signs alone."""
    rows = [list(row) for row in matrix]
    for left in range(len(values) - 1):
        right = left + 1
        signs = {row[left] == row[right] for row in rows if row[left] or row[right]}
        if all(abs(row[left]) == abs(row[right]) for row in rows) and signs == {True, False}:
            first, second = values[left], values[right]
            values[left : right + 1] = [write.binary(name, first, second) for name in ("fadd", "fsub")]
            for row in rows:
                row[left : right + 1] = (
                    [row[left], Fraction(0)] if row[left] == row[right] else [Fraction(0), row[left]]
                )
    return tuple(map(tuple, rows)), values


def _mirror(row: Sequence[Fraction], other: Sequence[Fraction]) -> int:
    """1 if ``other`` has the odd columns of ``row`` negated, -1 if the even ones, 0 if neither or nothing to share."""
    for sign in (1, -1):
        turned = [value * sign * (-1) ** place for place, value in enumerate(row)]
        if turned == list(other) and any(_every_other(row, 0)) and any(_every_other(row, 1)):
            return sign
    return 0


def _both(write: Function, row: Sequence[Fraction], sign: int, values: Sequence[Value]) -> list[Value]:
    """A row and its mirror: ``even + f · odd`` and ``±(even - f · odd)``, with a factor that leaves a 1 in ``odd``."""
    even, odd = _every_other(row, 0), _every_other(row, 1)
    if sign < 0:
        even, odd = odd, even
    factor = odd[max(place for place, value in enumerate(odd) if value)]
    first = _sum(write, even, values)
    second = _sum(write, [value / factor for value in odd], values)
    if abs(factor) == 1:
        names = ("fadd", "fsub") if factor > 0 else ("fsub", "fadd")
        return [write.binary(name, first, second) for name in names]
    return [write.fma(second, _constant(write, by), first) for by in (factor, -factor)]


def _every_other(row: Sequence[Fraction], parity: int) -> list[Fraction]:
    return [value if place % 2 == parity else Fraction(0) for place, value in enumerate(row)]


def _sum(write: Function, row: Sequence[Fraction], values: Sequence[Value]) -> Value:
    """The products of a row, ones first, so that they cost an addition at most."""
    terms = sorted(((factor, value) for factor, value in zip(row, values, strict=True) if factor), key=_cost)
    (factor, total), *others = terms
    if factor != 1:
        total = write.binary("fmul", total, _constant(write, factor))
    for factor, value in others:
        if abs(factor) == 1:
            total = write.binary("fadd" if factor > 0 else "fsub", total, value)
        else:
            total = write.fma(value, _constant(write, factor), total)
    return total


def _cost(term: tuple[Fraction, Value]) -> int:
    return 0 if term[0] == 1 else 1 if term[0] == -1 else 2


def _constant(write: Function, number: Fraction) -> Value:
    """A vector of one known number, rounded to a float."""
    bits = struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<f", float(number)))[0]))[0]
    return write.constant(f"0x{bits:016X}")
