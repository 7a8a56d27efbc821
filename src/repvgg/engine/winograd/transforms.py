"""A small constant matrix times vectors in registers, with as few operations as its symmetries allow.

Input tiles into Winograd's domain, and output tiles out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

from repvgg.engine.codegen.ir_builder import Function, Index, Value, float_text
from repvgg.engine.graph import Pair
from repvgg.engine.runtime.memory import Images
from repvgg.engine.winograd.filters import Form, Matrix
from repvgg.engine.winograd.tiling import Kind, Operand, Tiling


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


def input_corner(form: Form, source: Images, tiling: Tiling, padding: Pair) -> int:
    """Floats from the beginning of an image to the first input of its first tile."""
    axes = zip(tiling.corner, form.strides, padding, strict=True)
    row, column = (first * stride - pad for first, stride, pad in axes)
    return source.inside + row * source.row + column * source.pitch


def input_tile(
    write: Function, kind: Kind, source: Images, read: Value, target: Operand, wrote: Index, following: Value
) -> None:
    """``Bᵀ d B`` of one input tile whose first pixel is at ``read``, for all channels, to ``wrote`` in each place.

    What the tile at ``following`` reads is fetched meanwhile.
    """
    form, (down, across) = kind.form, kind.form.inputs
    with write.loop(0, source.pitch, write.width) as channels:
        pixel, ahead = write.at(read, channels.index), write.at(following, channels.index)
        for row in range(down):
            for column in range(across - form.steps[1], across):
                write.prefetch(ahead, row * source.row + column * source.pitch, near=True)
        values = [
            write.load(pixel, row * source.row + column * source.pitch)
            for row in range(down)
            for column in range(across)
        ]
        out = write.at(target.at, write.add(wrote, channels.index))
        moved = transform_rectangle(write, form.rows.input_matrix, form.columns.input_matrix, values)
        for place, value in zip(kind.places, moved, strict=True):
            write.store(value, out, place * target.place)


@final
@dataclass(frozen=True)
class PieceOfImages:
    """Where outputs go.

    Attributes:
        at: address of the first image, at the first channel.
        bias: address of that of the first channel.
        piece: which one.
    """

    at: Value
    bias: Value
    piece: Index


def tiles_of_piece(write: Function, tiling: Tiling, piece: Index) -> tuple[Index, Index]:
    """The first tile of a piece, and how many there are that stand for something."""
    first = write.mul(piece, tiling.piece)
    if tiling.tiles == tiling.real:
        return first, tiling.piece
    left = write.value(f"sub i64 {tiling.real}, {first}")
    few = write.value(f"icmp ult i64 {left}, {tiling.piece}")
    return first, write.value(f"select i1 {few}, i64 {left}, i64 {tiling.piece}")


@final
@dataclass(frozen=True)
class Outputs:
    """``Aᵀ · A`` of the products of a piece of tiles, with bias and ReLU, into images.

    Attributes:
        kind: which of the tiles.
        target: the images.
        relu: whether a ReLU follows.
        vectors: of output channels.
    """

    kind: Kind
    target: Images
    relu: bool
    vectors: int

    def write(self, write: Function, products: Operand, images: PieceOfImages, beyond: Value) -> None:
        """Write it for a piece; ``beyond`` is a vector of memory that nobody reads.

        The lines of the next tile are fetched meanwhile.
        """
        target, bias, form = images.at, images.bias, self.kind.form
        first, count = tiles_of_piece(write, self.kind.tiling, images.piece)
        begin = write.at(products.at, self.kind.before * products.tile)
        with write.loop(0, count) as tiles:
            read = write.at(begin, write.mul(tiles.index, products.tile))
            corner, inside = self._corner(write, target, write.add(first, tiles.index))
            following = self._corner(write, target, write.add(first, write.add(tiles.index, 1)))[0]
            with write.loop(0, self.vectors * write.width, write.width) as lanes:
                ahead = write.at(following, lanes.index)
                for row in range(form.outputs[0]):
                    for column in range(form.outputs[1]):
                        write.prefetch(ahead, row * self.target.row + column * self.target.pitch, write=True)
                values = [write.load(read, write.add(lanes.index, at * products.place)) for at in self.kind.places]
                pixel, offset = write.at(corner, lanes.index), write.load(bias, lanes.index)
                self._pixels(write, values, pixel, offset, inside, beyond)

    def _corner(self, write: Function, target: Value, tile: Index) -> tuple[Value, list[list[Value | None]]]:
        """Where the first pixel of a tile lies, and which of its rows and columns are inside the image."""
        tiling, images, outputs = self.kind.tiling, self.target, self.kind.form.outputs
        part, place = write.divide(tile, tiling.of_image)
        places = write.divide(place, tiling.grid[1])
        down, across = (
            write.add(write.mul(at, size), corner)
            for at, size, corner in zip(places, outputs, tiling.corner, strict=True)
        )
        offset = write.add(write.mul(down, images.row), write.mul(across, images.pitch))
        address = write.add(write.mul(part, images.image), write.add(offset, images.inside))
        ends = (first + size * count for first, size, count in zip(tiling.corner, outputs, tiling.grid, strict=True))
        inside = [
            _inside(write, at, size, length, end)
            for at, size, length, end in zip((down, across), outputs, images.size, ends, strict=True)
        ]
        return write.at(target, address), inside

    def _pixels(
        self,
        write: Function,
        values: list[Value],
        pixel: Value,
        bias: Value,
        inside: list[list[Value | None]],
        beyond: Value,
    ) -> None:
        """Store one vector of channels of a tile; what is outside of the image goes to memory that nobody reads."""
        form = self.kind.form
        matrices = form.rows.output_matrix, form.columns.output_matrix
        for at, value in enumerate(transform_rectangle(write, *matrices, values)):
            row, column = divmod(at, form.outputs[1])
            value = write.binary("fadd", value, bias)
            address = write.at(pixel, row * self.target.row + column * self.target.pitch)
            for is_inside in filter(None, (inside[0][row], inside[1][column])):
                address = write.choose(is_inside, address, beyond)
            write.store(write.relu(value) if self.relu else value, address)


def _inside(write: Function, first: Index, size: int, length: int, end: int) -> list[Value | None]:
    """For each row or column of a tile whether it is inside the image; None where it always is."""
    out = end - length
    return [
        None if at < size - out else write.value(f"icmp ult i64 {write.add(first, at)}, {length}") for at in range(size)
    ]
