"""Which way a convolution is computed: directly or by Winograd, and with which tiles.

Two ways lead through Winograd's domain:

* in two kernels, all tiles and then panel after panel: weights are fetched once (``kernels/winograd.py``);
* in one, tiles piece by piece: transformed tiles stay in the cache (``kernels/fused.py``).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, final

from repvgg.engine.codegen.jit import Isa
from repvgg.engine.costs import cycles, direct_cycles, least_cycles
from repvgg.engine.kernels.base import Tile
from repvgg.engine.layers import ConvGeometry, Pair
from repvgg.engine.part import Machine, Part, Rectangle, Run, Size, Way, form_of
from repvgg.engine.runtime.memory import round_up
from repvgg.engine.winograd.filters import Form
from repvgg.engine.winograd.tiling import Tiling

#: The m of F(m x n, 3x3), by the stride.
OUTPUTS: dict[int, tuple[int, ...]] = {1: (2, 3, 4, 5, 6, 7), 2: (1, 2, 3, 4)}
#: How much larger than a direct sum's the error of a layer may be, as :attr:`Form.loss` over the
#: square root of the channels that are summed. A loss of 1 is an error of 1.2e-7 here, and OpenVINO's direct sums of C
#: channels have 3.7e-8 √C: "high" stays below four times that from 17 channels on, "medium" below nine times.
LOSSES: dict[str, float] = {"highest": 0.0, "high": 1.15, "medium": 2.6}
_LEAST = 4.8  # loss that is allowed with few channels, too: F(4x4)

_STACK = 5 * 2**18 if sys.platform == "linux" else 3 * 2**17  # bytes that a unit keeps on the stack
_PRODUCTS = 2**19 if sys.platform == "linux" else 3 * 2**16  # bytes of products that a unit keeps on the stack


@final
@dataclass(frozen=True)
class Choice:
    """Winograd, in one part or several that cover the image."""

    parts: tuple[Part, ...]

    @property
    def cycles(self) -> float:
        """About how long all of it takes."""
        return sum(part.cycles for part in self.parts)

    @property
    def end(self) -> Pair:
        """One behind the last row and column that any tile covers."""
        return max(part.end[0] for part in self.parts), max(part.end[1] for part in self.parts)


#: Says how a convolution is computed: by the Winograd that comes back, or directly where None does.
Chooser: TypeAlias = Callable[[ConvGeometry, Size, Machine], Choice | None]


@lru_cache(maxsize=1024)  # equal layers come again, and each is asked about twice
def choose(geometry: ConvGeometry, size: Size, machine: Machine) -> Choice | None:
    """The fastest way by the table: Winograd with the tiles that come back, or None for the direct kernel."""
    if not may_use_winograd(geometry, size, machine):
        return None
    every = every_choice(size, geometry.stride[0], machine)
    best = min(every, key=lambda choice: choice.cycles, default=None)
    return best if best and best.cycles < direct_cycles(size, machine) else None


def may_use_winograd(geometry: ConvGeometry, size: Size, machine: Machine) -> bool:
    """Whether there is any other way than the direct one."""
    whole = geometry.groups == 1 or size.outputs // geometry.groups % machine.isa.width == 0
    if geometry.kernel != (3, 3) or geometry.stride not in ((1, 1), (2, 2)) or geometry.dilation != (1, 1):
        return False
    return size.inputs >= machine.isa.width and whole and machine.precision != "highest"


def every_choice(size: Size, stride: int, machine: Machine) -> Iterator[Choice]:
    """All covers of the image, each part in its fastest way, but for those that surely are slow.

    Smaller tiles one way and larger ones the other have fewer weights than large ones both ways.
    """
    covers = list(every_cover(size, stride, machine))
    bounds = {pieces: sum(least_cycles(piece, size, stride, machine) for piece in pieces) for pieces in covers}
    best = float("inf")
    for pieces in sorted(covers, key=lambda pieces: bounds[pieces]):
        if bounds[pieces] > best:
            break
        parts = [_part(piece, size, stride, machine) for piece in pieces]
        if all(parts):
            choice = Choice(tuple(part for part in parts if part))
            best = min(best, choice.cycles)
            yield choice


def every_cover(size: Size, stride: int, machine: Machine) -> Iterator[tuple[Rectangle, ...]]:
    """Rectangles of tiles that cover the image, for each two ways to cover rows and columns."""
    most = max(LOSSES[machine.precision] * math.sqrt(size.channels), _LEAST)
    down, across = (list(_covers(length, stride)) for length in size.image)
    for rows, columns in itertools.product(down, across):
        rectangles = tuple(itertools.product(rows, columns))
        if all(form_of(rectangle, stride).loss <= most for rectangle in rectangles):
            yield rectangles


def _covers(length: int, stride: int) -> Iterator[tuple[Run, ...]]:
    """Ways to cover rows or columns with tiles of one size.

    The last tile may stick out, be a tail, or be a smaller one with weights of its own.
    """
    for large in OUTPUTS[stride]:
        yield ((0, large, -(-length // large), 0),)
        whole, rest = divmod(length, large)
        if not (whole and rest):
            continue
        yield ((0, large, whole + 1, rest),)
        small = min((m for m in OUTPUTS[stride] if rest <= m < large), default=0)
        if small:
            yield ((0, large, whole, 0), (whole * large, small, 1, 0))


@lru_cache(maxsize=4096)  # covers share parts
def _part(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> Part | None:
    """The fastest way for some rows and columns of tiles; None if nothing fits."""
    return min(every_part(rectangle, size, stride, machine), key=lambda part: part.cycles, default=None)


def every_part(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> Iterator[Part]:
    """All ways to cut and to compute some tiles."""
    (top, _, high, _), (left, _, wide, _) = rectangle
    form, grid, corner = form_of(rectangle, stride), (high, wide), (top, left)
    for tile in _tiles(machine.isa, size.vectors(machine.isa.width), size.batch * high * wide):
        for way, pieces in _WAYS.items():
            for piece in pieces(form, (size.batch, high * wide), tile, size, machine):
                tiling = Tiling(grid, piece, size.batch, corner)
                for late, splits in itertools.product((False, True), _splits(way, tile, size, machine)):
                    how = way, form, tiling, tile, late, splits
                    yield Part(*how, cycles(Part(*how), size, machine))


def _splits(way: Way, tile: Tile, size: Size, machine: Machine) -> set[int]:
    """Into how many units a piece may be split: as many as threads, if there are as many panels."""
    panels = -(-size.vectors(machine.isa.width) // tile.vectors)
    return {1, machine.threads} if way == "fused" and machine.threads <= panels else {1}


def _tiles(isa: Isa, vectors: int, tiles: int) -> Iterator[Tile]:
    """Register tiles that leave no register unused for nothing; ``tiles`` is how many there are to be computed."""
    for count in range(1, min(vectors, 4) + 1):
        most = min(tiles, (isa.registers - count - 1) // count)
        yield from (Tile(pixels, count) for pixels in range(max(1, most // 2), most + 1))


def _of_products(form: Form, tiles: Pair, tile: Tile, size: Size, machine: Machine) -> Iterator[int]:
    """Tiles of a piece whose products fit the cache and the stack, as equal as can be."""
    of_tile = 4 * form.places * tile.vectors * machine.isa.width
    images, of_image = tiles
    if any(form.tails):
        if images * of_image * of_tile <= _PRODUCTS:
            yield images * of_image
        return
    every = -(-images * of_image // tile.pixels)
    most = _PRODUCTS // (of_tile * tile.pixels)  # register tiles of a piece
    if most:
        yield _piece(images * of_image, tile.pixels, min(most, every))


def _of_fused(form: Form, tiles: Pair, tile: Tile, size: Size, machine: Machine) -> Iterator[int]:
    """Tiles of a piece whose transformed tiles and products fit the cache and the stack."""
    pitch = round_up(size.inputs, machine.isa.width) + tile.vectors * machine.isa.width
    images, of_image = tiles
    each, every = (images * of_image, 1) if any(form.tails) else (tile.pixels, -(-images * of_image // tile.pixels))
    for most in range(1, min(8, every) + 1):
        if 4 * form.places * (most * each * pitch + 32) <= _STACK:
            yield most * each


_WAYS: dict[Way, Callable[..., Iterator[int]]] = {"product": _of_products, "fused": _of_fused}


def _piece(tiles: int, pixels: int, most: int) -> int:
    """The length of pieces of at most ``most`` register tiles that leaves the fewest tiles for nothing."""
    lengths = [steps * pixels for steps in range(max(1, most // 2), most + 1)]
    return min(lengths, key=lambda length: (round_up(tiles, length), -length))
