"""Products of matrices of two feature maps, as in attention: register tiles of rows times vectors of columns.

The left operand is read by broadcasts, so rows and columns may have any stride; rows of the right operand are vectors,
in place of the packed weights of a convolution. A unit of work is a register tile of rows, by all columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.graph import C, Epilogue, H, Rearrangement, W
from repvgg.engine.kernels import pointwise
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel, RegisterTile, rank_1_update, row_address
from repvgg.engine.runtime.memory import FeatureMapLayout

_MAX_BLOCKS = 8  # of the depth; each is a separate loop in the code
_SUMMED_DEPTH = 128  # products in a partial sum: with several, each value passes through fewer roundings


class Stride(NamedTuple):
    """A loop over memory: its number of steps, and the floats of each."""

    extent: int
    floats: int


@final
@dataclass(frozen=True)
class MatrixOperand:
    """Where the matrices of an operand are, in floats: loops over matrices (the outermost first), rows and columns."""

    matrices: tuple[Stride, ...]
    row: int
    column: int
    image: int
    offset: int


@final
@dataclass(frozen=True)
class MatMulKernel(Kernel):
    """``target[h, m] = epilogue(Σ_k left[h, m, k] · right[h, k])`` for each image and matrix h.

    Attributes:
        left: the operand in ``source``.
        right: the operand in ``weights``, whose columns are contiguous.
        depth: k.
        target: layout of the output: h is the row, m the pixel.
        tile: register tile.
        epilogue: functions of the outputs.
        width: floats in a vector.
    """

    left: MatrixOperand
    right: MatrixOperand
    depth: int
    target: FeatureMapLayout
    tile: RegisterTile
    epilogue: Epilogue
    width: int

    @property
    def row_tiles(self) -> int:
        """Register tiles of the rows of a matrix; the last one may have fewer rows."""
        return -(-self.target.size[1] // self.tile.mr)

    def describe(self) -> str:
        text = f"matrix product, depth {self.depth}, tiles of {self.tile}"
        return ", ".join(filter(None, (text, pointwise.describe(self.epilogue))))

    @property
    def units_per_block(self) -> int:
        return self.target.size[0] * self.row_tiles

    @property
    def num_multiplies(self) -> int:
        return self.depth * self.target.channels * self.target.size[0] * self.target.size[1]

    def emit(self, name: str) -> list[IRBuilder]:
        b, target = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.target
        rest = target.size[1] - (self.row_tiles - 1) * self.tile.mr
        with b.loop("%begin", "%end") as units:
            matrices, tile = b.divmod(units.index, self.row_tiles)
            image, matrix = b.divmod(matrices, target.size[0])
            first = b.mul(tile, self.tile.mr)
            left, right = (self._matrix(b, one, image, matrix) for one in (self.left, self.right))
            pointers = (
                b.offset("%source", b.add(left, b.mul(first, self.left.row))),
                b.offset("%weights", right),
                b.offset(row_address(b, "%target", target, image, matrix), b.mul(first, target.pixel_stride)),
            )
            if rest == self.tile.mr:
                self._emit_rows(b, pointers, rest)
            else:
                last = b.assign(f"icmp eq i64 {tile}, {self.row_tiles - 1}")
                for condition, rows in ((b.assign(f"xor i1 {last}, true"), self.tile.mr), (last, rest)):
                    with b.when(condition):
                        self._emit_rows(b, pointers, rows)
        return [b]

    @staticmethod
    def _matrix(b: IRBuilder, operand: MatrixOperand, image: Index, matrix: Index) -> Index:
        """Return the offset of a matrix."""
        offset = b.add(b.mul(image, operand.image), operand.offset)
        inner = math.prod(loop.extent for loop in operand.matrices)
        for loop in operand.matrices:
            inner //= loop.extent
            index, matrix = b.divmod(matrix, inner)
            offset = b.add(offset, b.mul(index, loop.floats))
        return offset

    def _emit_rows(self, b: IRBuilder, pointers: Sequence[Value], rows: int) -> None:
        """Build a register tile of rows by all columns."""
        left, right, target = pointers
        vectors, nr = -(-self.target.channels // self.width), self.tile.nr
        whole = vectors // nr * nr
        if whole:
            with b.loop(0, whole * self.width, nr * self.width) as panels:
                self._emit_tile(b, left, b.offset(right, panels.index), b.offset(target, panels.index), rows, nr)
        if whole < vectors:
            at = whole * self.width
            self._emit_tile(b, left, b.offset(right, at), b.offset(target, at), rows, vectors - whole)

    def _emit_tile(self, b: IRBuilder, left: Value, right: Value, target: Value, rows: int, nr: int) -> None:
        zeros = ["zeroinitializer"] * (rows * nr)
        blocks = min(max(1, round(self.depth / _SUMMED_DEPTH)), _MAX_BLOCKS)
        cuts = [self.depth * block // blocks for block in range(blocks + 1)]
        sums = zeros
        for begin, end in itertools.pairwise(cuts):
            with b.loop(begin, end, carried=zeros) as depth:
                inputs = b.offset(left, b.mul(depth.index, self.left.column))
                weights = b.offset(right, b.mul(depth.index, self.right.row))
                depth.next = rank_1_update(b, inputs, self.left.row, weights, depth.carried, nr)
            pairs = zip(sums, depth.results, strict=True)
            sums = depth.results if begin == 0 else [b.binary("fadd", total, value) for total, value in pairs]
        for at, value in enumerate(sums):
            row, vector = divmod(at, nr)
            place = row * self.target.pixel_stride + vector * self.width
            value = pointwise.apply(b, self.epilogue, value, partial(b.load, target, place))
            b.store(value, target, place)


def operand_of(what: Rearrangement, layout: FeatureMapLayout, *, is_left: bool, width: int) -> MatrixOperand | None:
    """Return where the matrices of an operand are in a feature map, or None if it has to be copied first.

    Rows and columns must have one stride each, and vectors of columns of the right operand must stay in their pixel.
    """
    sizes = layout.channels, *layout.size
    strides = layout.channel_stride, layout.row_stride, layout.pixel_stride
    columns, matrices, rows = (
        _merged([Stride(factor.extent or sizes[factor.axis], factor.stride * strides[factor.axis]) for factor in axis])
        for axis in (what.axes[C], what.axes[H], what.axes[W])
    )
    if len(columns) > 1 or len(rows) > 1:
        return None
    offset = layout.interior_offset + sum(at * stride for at, stride in zip(what.offset, strides, strict=True))
    row, column = (one[0].floats if one else 0 for one in (rows, columns))
    if not is_left:
        count = columns[0].extent if columns else 1
        # From the last column of a matrix on, vectors have channels of others, or the padding of the pixel.
        last = what.offset[C] + sum(
            (stride.extent - 1) * stride.floats for stride in (*matrices, *rows) if stride.floats < layout.pixel_stride
        )
        if (columns and column != 1) or last + -(-count // width) * width > layout.pixel_stride:
            return None
    return MatrixOperand(tuple(matrices), row, column, layout.image_stride, offset)


def _merged(loops: Sequence[Stride]) -> list[Stride]:
    """Join nested loops that run through memory with one stride."""
    merged: list[Stride] = []
    for loop in loops:
        last = merged[-1] if merged else None
        if last is not None and last.floats == loop.floats * loop.extent:
            merged[-1] = Stride(last.extent * loop.extent, loop.floats)
        elif loop.extent > 1:
            merged.append(loop)
    return merged
