"""A small constant matrix times vectors in registers, with as few operations as its symmetry allows."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

from repvgg.engine.ir import Function, Value
from repvgg.engine.winograd import Matrix


def transform(write: Function, matrix: Matrix, values: Sequence[Value]) -> list[Value]:
    """``matrix · values``, each value being a vector.

    The rows of points a and -a differ in the signs of every other column alone: their sums over even and over odd
    columns are computed once.
    """
    out: list[Value] = []
    while len(out) < len(matrix):
        row, rest = matrix[len(out)], matrix[len(out) + 1 :]
        sign = _mirror(row, rest[0]) if rest else 0
        if sign:
            even, odd = (_sum(write, _every_other(row, parity), values) for parity in (0, 1))
            first, second = (even, odd) if sign > 0 else (odd, even)
            out += [write.binary("fadd", even, odd), write.binary("fsub", first, second)]
        else:
            out.append(_sum(write, row, values))
    return out


def transform_square(write: Function, matrix: Matrix, values: Sequence[Value]) -> list[Value]:
    """``matrix · values · matrixᵀ`` for a square of values, row by row; what comes out is one as well."""
    size = len(matrix[0])
    columns = [transform(write, matrix, values[column::size]) for column in range(size)]
    rows = zip(*columns, strict=True)
    return [value for row in rows for value in transform(write, matrix, row)]


def _mirror(row: Sequence[Fraction], other: Sequence[Fraction]) -> int:
    """1 if ``other`` has the odd columns of ``row`` negated, -1 if the even ones, 0 if neither or nothing to share."""
    for sign in (1, -1):
        turned = [value * sign * (-1) ** place for place, value in enumerate(row)]
        if turned == list(other) and any(_every_other(row, 0)) and any(_every_other(row, 1)):
            return sign
    return 0


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
