"""Code of the input and output transforms of Winograd tiles: multiplications by small constant matrices.

Vectors hold channels of one pixel or tile element, so that transforms never mix lanes. Strides are in floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value, float_text
from repvgg.engine.graph import Epilogue, Pair
from repvgg.engine.kernels import pointwise
from repvgg.engine.runtime.memory import FeatureMapLayout
from repvgg.engine.winograd.filters import Matrix, Winograd2d
from repvgg.engine.winograd.tiling import TileGroup, Tiling, TransformedTiles, locate_image, pixel_steps

# Multiplication by constant matrices


def multiply(b: IRBuilder, matrix: Matrix, values: Sequence[Value]) -> list[Value]:
    """Build ``matrix · values`` for vectors ``values``, with few operations.

    The points ±p cause two symmetries in Winograd's matrices. Of columns that differ in signs only, the sum and the
    difference of the values are computed once. Of rows that differ in signs only, the shared and the negated terms are
    summed once.
    """
    matrix, values = _fold_columns(b, matrix, list(values))
    out: list[Value] = []
    while len(out) < len(matrix):
        row, rest = matrix[len(out)], matrix[len(out) + 1 :]
        halves = _mirrored_rows(row, rest[0]) if rest else None
        out += _sum_and_difference(b, *halves, values) if halves else [_dot(b, row, values)]
    return out


def multiply_both_sides(b: IRBuilder, rows: Matrix, columns: Matrix, values: Sequence[Value]) -> list[Value]:
    """Build ``rows · values · columnsᵀ`` for a matrix of vectors, row-major, as is the result."""
    width = len(columns[0])
    done = [multiply(b, rows, values[column::width]) for column in range(width)]
    return [value for row in zip(*done, strict=True) for value in multiply(b, columns, row)]


def _fold_columns(b: IRBuilder, matrix: Matrix, values: list[Value]) -> tuple[Matrix, list[Value]]:
    """Replace the values of neighbouring columns that differ in signs only by their sum and difference."""
    rows = [list(row) for row in matrix]
    for left in range(len(values) - 1):
        right = left + 1
        signs = {row[left] == row[right] for row in rows if row[left] or row[right]}
        if all(abs(row[left]) == abs(row[right]) for row in rows) and signs == {True, False}:
            first, second = values[left], values[right]
            values[left : right + 1] = [b.binary(name, first, second) for name in ("fadd", "fsub")]
            # Each row uses either the sum or the difference, with the factor of the left column.
            for row in rows:
                row[left : right + 1] = (
                    [row[left], Fraction(0)] if row[left] == row[right] else [Fraction(0), row[left]]
                )
    return tuple(map(tuple, rows)), values


def _mirrored_rows(row: Sequence[Fraction], other: Sequence[Fraction]) -> tuple[list[Fraction], list[Fraction]] | None:
    """Split a row into the terms that another one shares and those that it negates; None if there are other terms."""
    pairs = list(zip(row, other, strict=True))
    shared = [left if left == right else Fraction(0) for left, right in pairs]
    negated = [left if left == -right else Fraction(0) for left, right in pairs]
    complete = all(abs(left) == abs(right) for left, right in pairs)
    return (shared, negated) if complete and any(shared) and any(negated) else None


def _sum_and_difference(
    b: IRBuilder, shared: Sequence[Fraction], negated: Sequence[Fraction], values: Sequence[Value]
) -> list[Value]:
    """Build ``s + f · t`` and ``s - f · t``, with a factor f that leaves one coefficient of t at 1."""
    # The last coefficient becomes 1: its term costs at most an addition.
    factor = negated[max(place for place, value in enumerate(negated) if value)]
    first = _dot(b, shared, values)
    second = _dot(b, [value / factor for value in negated], values)
    if abs(factor) == 1:
        names = ("fadd", "fsub") if factor > 0 else ("fsub", "fadd")
        return [b.binary(name, first, second) for name in names]
    return [b.fma(second, _constant(b, by), first) for by in (factor, -factor)]


def _dot(b: IRBuilder, row: Sequence[Fraction], values: Sequence[Value]) -> Value:
    """Build the dot product of a row. Terms with a factor of ±1 come first: they cost at most an addition."""
    terms = sorted(((factor, value) for factor, value in zip(row, values, strict=True) if factor), key=_term_cost)
    (factor, total), *others = terms
    if factor != 1:
        total = b.binary("fmul", total, _constant(b, factor))
    for factor, value in others:
        if abs(factor) == 1:
            total = b.binary("fadd" if factor > 0 else "fsub", total, value)
        else:
            total = b.fma(value, _constant(b, factor), total)
    return total


def _term_cost(term: tuple[Fraction, Value]) -> int:
    return 0 if term[0] == 1 else 1 if term[0] == -1 else 2


def _constant(b: IRBuilder, number: Fraction) -> Value:
    return b.constant(float_text(float(number)))


# Input transform


def first_input_offset(winograd: Winograd2d, source: FeatureMapLayout, tiling: Tiling, padding: Pair) -> int:
    """Return the offset of the first input of the first tile in an image; see :class:`FeatureMapLayout`."""
    axes = zip(tiling.corner, winograd.strides, tiling.dilation, padding, strict=True)
    row, column = (first * stride * dilation - pad for first, stride, dilation, pad in axes)
    return source.interior_offset + row * source.row_stride + column * source.pixel_stride


def emit_input_transform(
    b: IRBuilder,
    group: TileGroup,
    source: FeatureMapLayout,
    read: Value,
    target: TransformedTiles,
    written: Index,
    next_tile: Value,
) -> None:
    """Build ``Bᵀ d B`` of one input tile, for all channels.

    Args:
        b: the function.
        group: of the tile.
        source: layout of the input.
        read: address of the first pixel of the tile.
        target: transformed tiles.
        written: offset of the tile in each tile element of ``target``.
        next_tile: address of the next tile, which is prefetched.
    """
    winograd, (height, width) = group.winograd, group.winograd.inputs
    down, right = pixel_steps(source, group.tiling)
    # Padding channels are transformed too, though the GEMM does not read them: a masked store would cost more.
    with b.loop(0, source.pixel_stride, b.width) as channels:
        pixel, ahead = b.offset(read, channels.index), b.offset(next_tile, channels.index)
        for row in range(height):
            # Only the columns that the two tiles do not share: the others are in L1.
            for column in range(width - winograd.tile_strides[1], width):
                b.prefetch(ahead, row * down + column * right, l1=True)
        values = [b.load(pixel, row * down + column * right) for row in range(height) for column in range(width)]
        out = b.offset(target.address, b.add(written, channels.index))
        transformed = multiply_both_sides(b, winograd.rows.input_matrix, winograd.columns.input_matrix, values)
        for element, value in zip(group.elements, transformed, strict=True):
            b.store(value, out, element * target.element_stride)


# Output transform


@final
@dataclass(frozen=True)
class OutputBlock:
    """Where the outputs of a block are stored."""

    address: Value  # of the first image, at the first channel
    bias: Value  # address, of the first channel
    block: Index


def tiles_of_block(b: IRBuilder, tiling: Tiling, block: Index) -> tuple[Index, Index]:
    """Return the first tile of a block, and the number of its tiles that are not padding."""
    first = b.mul(block, tiling.tiles_per_block)
    if tiling.num_padded_tiles == tiling.num_tiles:
        return first, tiling.tiles_per_block  # known: the loop over tiles then needs no guard
    left = b.assign(f"sub i64 {tiling.num_tiles}, {first}")
    fewer = b.assign(f"icmp ult i64 {left}, {tiling.tiles_per_block}")
    return first, b.assign(f"select i1 {fewer}, i64 {left}, i64 {tiling.tiles_per_block}")


@final
@dataclass(frozen=True)
class OutputTransform:
    """``Aᵀ M A`` of the products M of a block's tiles, with bias and epilogue."""

    group: TileGroup
    target: FeatureMapLayout
    epilogue: Epilogue
    vectors: int  # of output channels
    padded_channels: int  # of all groups: the length of the biases, which the slopes of "prelu" follow

    def emit(self, b: IRBuilder, products: TransformedTiles, output: OutputBlock, discarded: Value) -> None:
        """Build the transform of a block. Outputs beyond the image are stored to ``discarded``, a vector of scratch."""
        winograd = self.group.winograd
        first, count = tiles_of_block(b, self.group.tiling, output.block)
        begin = b.offset(products.address, self.group.first_tile * products.tile_stride)
        down, right = pixel_steps(self.target, self.group.tiling)
        with b.loop(0, count) as tiles:
            read = b.offset(begin, b.mul(tiles.index, products.tile_stride))
            corner, inside = self._locate(b, output.address, b.add(first, tiles.index))
            next_corner = self._locate(b, output.address, b.add(first, b.add(tiles.index, 1)))[0]
            with b.loop(0, self.vectors * b.width, b.width) as lanes:
                ahead = b.offset(next_corner, lanes.index)
                # The lines of the next tile's outputs: a store that misses would first read the line from memory.
                for row in range(winograd.outputs[0]):
                    for column in range(winograd.outputs[1]):
                        b.prefetch(ahead, row * down + column * right, write=True)
                values = [
                    b.load(read, b.add(lanes.index, element * products.element_stride))
                    for element in self.group.elements
                ]
                place = OutputBlock(b.offset(corner, lanes.index), b.offset(output.bias, lanes.index), output.block)
                self._store(b, values, place, inside, discarded)

    def _locate(self, b: IRBuilder, target: Value, tile: Index) -> tuple[Value, list[list[Value | None]]]:
        """Return the address of the first pixel of a tile, and which of its rows and columns are inside the image."""
        tiling, layout, outputs = self.group.tiling, self.target, self.group.winograd.outputs
        image, place = b.divmod(tile, tiling.tiles_per_image)
        places = b.divmod(place, tiling.grid[1])
        down, across = (
            b.add(b.mul(at, size), corner) for at, size, corner in zip(places, outputs, tiling.corner, strict=True)
        )
        steps, (begin, *phase) = pixel_steps(layout, tiling), locate_image(b, layout, tiling, image)
        offset = b.add(b.mul(down, steps[0]), b.mul(across, steps[1]))
        address = b.add(begin, b.add(offset, layout.interior_offset))
        ends = (first + size * count for first, size, count in zip(tiling.corner, outputs, tiling.grid, strict=True))
        axes = zip((down, across), outputs, layout.size, ends, tiling.dilation, phase, strict=True)
        inside = [_inside(b, *axis) for axis in axes]
        return b.offset(target, address), inside

    def _store(
        self,
        b: IRBuilder,
        values: list[Value],
        place: OutputBlock,
        inside: list[list[Value | None]],
        discarded: Value,
    ) -> None:
        winograd, bias = self.group.winograd, b.load(place.bias)
        has_slopes = any(one.kind == "prelu" for one in self.epilogue)
        slopes = b.offset(place.bias, self.padded_channels) if has_slopes else None
        matrices = winograd.rows.output_matrix, winograd.columns.output_matrix
        down, right = pixel_steps(self.target, self.group.tiling)
        for at, value in enumerate(multiply_both_sides(b, *matrices, values)):
            row, column = divmod(at, winograd.outputs[1])
            value = b.binary("fadd", value, bias)
            address = b.offset(place.address, row * down + column * right)
            # Selecting an address costs less than a branch around each store.
            for is_inside in filter(None, (inside[0][row], inside[1][column])):
                address = b.select_pointer(is_inside, address, discarded)
            b.store(pointwise.apply(b, self.epilogue, value, partial(b.load, address), slopes), address)


def _inside(
    b: IRBuilder, first: Index, size: int, length: int, end: int, dilation: int, phase: Index
) -> list[Value | None]:
    """Return for each row or column of a tile whether it is inside the image; None if it always is.

    The tile begins at ``first`` and has ``size`` outputs along the axis; the map has ``length``, all tiles ``end``.
    """
    # Only the last `overhang` rows or columns of a tile can be outside of the image: no compare for the others.
    overhang = end - length // dilation
    places = [b.add(b.mul(b.add(first, at), dilation), phase) if at >= size - overhang else None for at in range(size)]
    return [None if place is None else b.assign(f"icmp ult i64 {place}, {length}") for place in places]
