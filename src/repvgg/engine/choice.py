"""Which way a convolution is computed: directly or by Winograd, and with which tiles. A table of costs, in cycles.

The costs are those of one core that does two multiply-adds, two loads and a store a cycle; only their order matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from repvgg.engine.images import round_up
from repvgg.engine.isa import Isa
from repvgg.engine.kernels.conv import choose_tile, row_cycles
from repvgg.engine.kernels.tile import Tile
from repvgg.engine.kernels.winograd import Tiling
from repvgg.engine.layers import ConvGeometry, Pair
from repvgg.engine.winograd import Winograd, winograd

_SCRATCH = 2**18  # bytes of products that a piece keeps on the stack, a part of the second cache
_TRANSFORM = 3.0  # cycles for each place of a tile, going in or coming out
_TILES = 64  # of a block of several images
_BYTES = 12.0  # that come in a cycle from beyond the second cache
_WARM = 2**19  # bytes that stay in the second cache from one piece to the next


@final
@dataclass(frozen=True)
class Size:
    """What a convolution works on.

    Attributes:
        inputs: channels of all groups.
        outputs: channels of all groups.
        image: height and width of what comes out.
        batch: images at once.
    """

    inputs: int
    outputs: int
    image: Pair
    batch: int


@final
@dataclass(frozen=True)
class Choice:
    """Winograd, with these tiles.

    Attributes:
        form: F(m x m, 3x3).
        tiling: how the tiles of a batch are cut.
        tile: registers of the products.
        cycles: about how long all of it takes.
    """

    form: Winograd
    tiling: Tiling
    tile: Tile
    cycles: float


def choose(geometry: ConvGeometry, size: Size, isa: Isa) -> Choice | None:
    """The fastest way: Winograd with the tiles that come back, or None for the direct kernel.

    F(2x2) and F(4x4) are looked at: their errors are near that of a direct convolution.
    """
    whole = geometry.groups == 1 or size.outputs // geometry.groups % isa.width == 0
    if geometry.kernel != (3, 3) or geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return None
    if size.inputs < isa.width or not whole:
        return None
    every = (choice for outputs in (2, 4) for choice in _every(winograd(outputs), geometry.groups, size, isa))
    best = min(every, key=lambda choice: choice.cycles, default=None)
    return best if best and best.cycles < _direct(geometry, size, isa) else None


def _direct(geometry: ConvGeometry, size: Size, isa: Isa) -> float:
    vectors = -(-size.outputs // geometry.groups // isa.width)
    tile = choose_tile(isa, size.image[1], vectors)
    rows = size.batch * size.image[0] * geometry.groups
    steps = 9 * size.inputs // geometry.groups
    return rows * steps * row_cycles(tile, size.image[1], vectors) + 4 * steps * size.outputs / _BYTES


def _every(form: Winograd, groups: int, size: Size, isa: Isa) -> Iterator[Choice]:
    """All ways to cut the tiles."""
    grid = -(-size.image[0] // form.outputs), -(-size.image[1] // form.outputs)
    vectors = -(-size.outputs // groups // isa.width)
    for images in _blocks(grid, size.batch):
        for tile in _tiles(isa, vectors):
            tiling = _cut(form, grid, images, size.batch // images, tile, isa)
            if tiling:
                yield Choice(form, tiling, tile, _cycles(form, tiling, tile, groups, size, isa))


def _blocks(grid: Pair, batch: int) -> list[int]:
    """Images of a block: parts of the batch; more than one where an image has few tiles."""
    return [
        count for count in range(1, batch + 1) if batch % count == 0 and (count == 1 or count * grid[0] * grid[1] <= 64)
    ]


def _tiles(isa: Isa, vectors: int) -> Iterator[Tile]:
    """Register tiles that leave no register unused for nothing."""
    for count in range(1, min(vectors, 4) + 1):
        most = (isa.registers - count - 1) // count
        yield from (Tile(pixels, count) for pixels in range(max(1, most // 2), most + 1))


def _cut(form: Winograd, grid: Pair, images: int, blocks: int, tile: Tile, isa: Isa) -> Tiling | None:
    """Pieces that fit the scratch, as equal as can be."""
    tiles = images * grid[0] * grid[1]
    most = _SCRATCH // (4 * form.inputs**2 * tile.vectors * isa.width * tile.pixels)  # register tiles of a piece
    if not most:
        return None
    most = min(most, -(-tiles // tile.pixels))
    lengths = [steps * tile.pixels for steps in range(max(1, most // 2), most + 1)]
    piece = min(lengths, key=lambda length: (round_up(tiles, length), -length))
    return Tiling(grid, images, piece, blocks)


def _cycles(form: Winograd, tiling: Tiling, tile: Tile, groups: int, size: Size, isa: Isa) -> float:
    vectors, places = -(-size.outputs // groups // isa.width), form.inputs**2
    whole, rest = divmod(vectors, tile.vectors)
    step = whole * tile.cycles + (Tile(tile.pixels, rest).cycles if rest else 0)
    products = tiling.tiles // tile.pixels * places * size.inputs * step
    real = tiling.blocks * tiling.images * tiling.of_image
    transforms = _TRANSFORM * places * real * (size.inputs + size.outputs) / isa.width
    panel = 4 * places * (size.inputs // groups) * min(vectors, tile.vectors) * isa.width
    times = 1 if panel < _WARM else tiling.blocks * tiling.pieces
    weights = 4 * places * (size.inputs // groups) * size.outputs * times / _BYTES
    moved = 4 * places * tiling.tiles * size.inputs
    reads = moved * (1 if moved < _WARM else whole + bool(rest)) / _BYTES  # of transformed tiles
    return products + transforms + weights + reads
