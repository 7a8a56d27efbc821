"""Tiling of feature maps for Winograd: blocks of tiles, edge tiles, and the layout of transformed tiles in memory.

Terms. A *tile element* is one of the n x n' positions of a transformed tile. A *block* is a number of tiles that a unit
of work processes together; blocks divide the tiles of a whole batch, so a block may start and end within an image.
The *phase images* of a map are what a convolution of dilation d reads together: for each pair (p, q) below d, the
pixels in rows p, p + d, … and columns q, q + d, …. Dilation 1 on each of them computes the same. They are views of
the map, with d times the strides: nothing is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.graph import Pair
from repvgg.engine.kernels.base import LINE_FLOATS
from repvgg.engine.runtime.memory import FeatureMapLayout
from repvgg.engine.winograd.filters import Winograd1d, Winograd2d, edge_filter


@final
@dataclass(frozen=True)
class Tiling:
    """The tiles of a region of each image of a batch, divided into blocks. Pairs are (down, across).

    All blocks have the same length: the last one may contain padding tiles, whose outputs are not stored. With edge
    tiles (:attr:`repvgg.engine.winograd.filters.Winograd2d.edge_tile`), all tiles form one block.

    Where ``dilation`` is not 1, an image is a phase image; all have the grid of the largest one, the first.
    """

    grid: Pair  # tiles of an image, including edge tiles
    tiles_per_block: int  # length of a block
    batch: int  # images of the largest batch
    corner: Pair = (0, 0)  # row and column of the first output of the first tile
    dilation: Pair = (1, 1)

    @property
    def tiles_per_image(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def phases(self) -> int:
        """Phase images of a map."""
        return self.dilation[0] * self.dilation[1]

    @property
    def num_tiles(self) -> int:
        """Tiles of the largest batch, without padding tiles."""
        return self.batch * self.tiles_per_image

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tiles // self.tiles_per_block)

    @property
    def num_padded_tiles(self) -> int:
        """Tiles of the largest batch, with padding tiles."""
        return self.num_blocks * self.tiles_per_block


@final
@dataclass(frozen=True)
class TileGroup:
    """The tiles of a block that have one size: full tiles, or those of the last row, the last column or the corner."""

    winograd: Winograd2d  # their transform, without edge tiles
    tiling: Tiling  # of these tiles alone
    elements: tuple[int, ...]  # their tile elements, as indices into those of the full transform
    first_row: int  # their first row of tiles
    first_tile: int  # of the block: the tiles of a group are contiguous


@final
@dataclass(frozen=True)
class TileSubset:
    """A rectangle of tile elements, and the ``count`` tiles of a block, from ``first`` on, that have them."""

    rows: range
    columns: range
    first: int
    count: int


@final
@dataclass(frozen=True)
class _AxisTiles:
    """Tiles of one size along an axis."""

    winograd: Winograd1d
    elements: tuple[int, ...]  # as indices into those of the full tile
    first: int  # tile
    count: int
    corner: int  # the first output


@lru_cache(maxsize=1024)  # the cost model uses each tiling for many candidates
def tile_groups(winograd: Winograd2d, tiling: Tiling) -> tuple[TileGroup, ...]:
    """Return the groups of tiles of a block, in memory order.

    As (down, across): (full, edge), (full, full), (edge, full), (edge, edge). The tiles that have a given tile element
    are then contiguous, so that each element is one GEMM.
    """
    down, across = _axis_tiles(winograd, tiling, 0), _axis_tiles(winograd, tiling, 1)
    # In this order, elements that edge rows lack belong to the first tiles, and those that edge columns lack to the
    # middle: each is a contiguous range.
    pairs = [
        *((down[0], tiles) for tiles in reversed(across)),
        *((tiles, other) for tiles in down[1:] for other in across),
    ]
    out: list[TileGroup] = []
    first = 0
    for rows, columns in pairs:
        # With edge tiles, the only block has the tiles of the whole batch, group by group; else there is one group.
        length = tiling.batch * rows.count * columns.count if any(winograd.edge_tile) else tiling.tiles_per_block
        own = replace(
            tiling,
            grid=(rows.count, columns.count),
            tiles_per_block=length,
            corner=(rows.corner, columns.corner),
        )
        elements = tuple(row * winograd.columns.inputs + column for row in rows.elements for column in columns.elements)
        out.append(TileGroup(Winograd2d(rows.winograd, columns.winograd), own, elements, rows.first, first))
        first += length
    return tuple(out)


@lru_cache(maxsize=1024)
def tile_subsets(winograd: Winograd2d, tiling: Tiling) -> tuple[tuple[TileSubset, ...], ...]:
    """Return all tile elements, by rows and then by columns, with the tiles of a block that have them."""
    groups = tile_groups(winograd, tiling)
    down, across = (_element_ranges(winograd, tiling, axis) for axis in (0, 1))
    return tuple(tuple(_tile_subset(winograd, groups, rows, columns) for columns in across) for rows in down)


def num_tile_elements(winograd: Winograd2d, tiling: Tiling) -> int:
    """Return the number of tile elements of all tiles of a block."""
    return sum(group.winograd.tile_elements * group.tiling.tiles_per_block for group in tile_groups(winograd, tiling))


def _tile_subset(winograd: Winograd2d, groups: Sequence[TileGroup], rows: range, columns: range) -> TileSubset:
    element = rows.start * winograd.columns.inputs + columns.start
    found = [group for group in groups if element in group.elements]
    return TileSubset(rows, columns, found[0].first_tile, sum(group.tiling.tiles_per_block for group in found))


def _element_ranges(winograd: Winograd2d, tiling: Tiling, axis: int) -> list[range]:
    """Divide the rows or columns of tile elements into ranges that the edge tile has or lacks."""
    every, edge = range(winograd.inputs[axis]), _axis_tiles(winograd, tiling, axis)[-1].elements
    groups = [list(group) for _, group in itertools.groupby(every, key=lambda element: element in edge)]
    return [range(group[0], group[-1] + 1) for group in groups]


def _axis_tiles(winograd: Winograd2d, tiling: Tiling, axis: int) -> list[_AxisTiles]:
    """Return the tiles along an axis: full ones, and then the edge tile if there is one."""
    full, edge = (winograd.rows, winograd.columns)[axis], winograd.edge_tile[axis]
    count, corner, elements = tiling.grid[axis], tiling.corner[axis], tuple(range(full.inputs))
    if not edge:
        return [_AxisTiles(full, elements, 0, count, corner)]
    last = _AxisTiles(*edge_filter(edge, full), count - 1, 1, corner + (count - 1) * full.outputs)
    return [_AxisTiles(full, elements, 0, count - 1, corner), last]


def pixel_steps(layout: FeatureMapLayout, tiling: Tiling) -> Pair:
    """Return the floats from one row and from one column of an image to the next."""
    return layout.row_stride * tiling.dilation[0], layout.pixel_stride * tiling.dilation[1]


def locate_image(b: IRBuilder, layout: FeatureMapLayout, tiling: Tiling, image: Value) -> tuple[Index, Index, Index]:
    """Return the offset of the first pixel of an image, and the row and column of that pixel in its map."""
    if tiling.phases == 1:
        return b.mul(image, layout.image_stride), 0, 0
    whole, phase = b.divmod(image, tiling.phases)
    row, column = b.divmod(phase, tiling.dilation[1])
    pixel = b.add(b.mul(row, layout.row_stride), b.mul(column, layout.pixel_stride))
    return b.add(b.mul(whole, layout.image_stride), pixel), row, column


def element_stride(tiles: int, channels: int) -> int:
    """Return the stride from one tile element to the next, for ``tiles`` tiles of ``channels`` floats."""
    # One cache line of padding: at a stride of whole pages, all elements would map to the same sets of L1 and L2.
    return tiles * channels + LINE_FLOATS


@final
@dataclass(frozen=True)
class TransformedTiles:
    """Transformed inputs or products, (tile element, tile, channel): a matrix for each tile element."""

    address: Value  # of the first float
    element_stride: int  # floats from one tile element to the next
    tile_stride: int  # floats from one tile to the next

    @classmethod
    def allocate(cls, address: Value, tiles: int, channels: int) -> TransformedTiles:
        return cls(address, element_stride(tiles, channels), channels)

    def at_element(self, b: IRBuilder, element: Index) -> TransformedTiles:
        return replace(self, address=b.offset(self.address, b.mul(element, self.element_stride)))
