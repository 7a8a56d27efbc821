"""A small constant matrix times vectors in registers, with as few operations as its symmetries allow."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from repvgg.engine.ir import Function, Value, float_text
from repvgg.engine.winograd import Matrix


def transform(write: Function, matrix: Matrix, values: Sequence[Value]) -> list[Value]:
    """``matrix · values``, each value being a vector.

    The points a and -a of Winograd's matrices leave two symmetries. Two columns that differ in signs alone: the sum
    and the difference of their values are computed once. Two rows that differ in signs alone: so are the part that they
    share and the part that one of them negates.
    """
    matrix, values = _folded(write, matrix, list(values))
    out: list[Value] = []
    while len(out) < len(matrix):
        row, rest = matrix[len(out)], matrix[len(out) + 1 :]
        halves = _mirrored(row, rest[0]) if rest else None
        out += _both(write, *halves, values) if halves else [_sum(write, row, values)]
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


def _mirrored(row: Sequence[Fraction], other: Sequence[Fraction]) -> tuple[list[Fraction], list[Fraction]] | None:
    """What two rows share, and what one has negated; None if that is not all, or one of the two is nothing."""
    pairs = list(zip(row, other, strict=True))
    shared = [left if left == right else Fraction(0) for left, right in pairs]
    turned = [left if left == -right else Fraction(0) for left, right in pairs]
    whole = all(abs(left) == abs(right) for left, right in pairs)
    return (shared, turned) if whole and any(shared) and any(turned) else None


def _both(
    write: Function, shared: Sequence[Fraction], turned: Sequence[Fraction], values: Sequence[Value]
) -> list[Value]:
    """``s + f · t`` and ``s - f · t``, with a factor that leaves a 1 in ``t``."""
    factor = turned[max(place for place, value in enumerate(turned) if value)]
    first = _sum(write, shared, values)
    second = _sum(write, [value / factor for value in turned], values)
    if abs(factor) == 1:
        names = ("fadd", "fsub") if factor > 0 else ("fsub", "fadd")
        return [write.binary(name, first, second) for name in names]
    return [write.fma(second, _constant(write, by), first) for by in (factor, -factor)]


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
    return write.constant(float_text(float(number)))
