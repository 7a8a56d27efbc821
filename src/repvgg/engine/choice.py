"""Which way a convolution is computed: directly or by Winograd, and with which tiles. A table of costs, in cycles.

The costs are those of one core that does two multiply-adds, two loads and a store a cycle, with a second cache of a
megabyte; only their order matters. Two ways lead through Winograd's domain:

* in two kernels, all tiles and then panel after panel: weights are fetched once (``kernels/winograd.py``);
* in one, tiles piece by piece: transformed tiles stay in the cache (``kernels/fused.py``).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, final

from repvgg.engine.images import round_up
from repvgg.engine.isa import Isa
from repvgg.engine.kernels.conv import choose_tile, row_cycles
from repvgg.engine.kernels.products import late_run_length, run_length
from repvgg.engine.kernels.tile import Tile
from repvgg.engine.kernels.tiling import Tiling
from repvgg.engine.layers import ConvGeometry, Pair
from repvgg.engine.winograd import Form, winograd

_Run: TypeAlias = tuple[int, int, int]  # first row or column, m, tiles
Rectangle: TypeAlias = tuple[_Run, _Run]  # rows and columns of tiles of one form
Way: TypeAlias = Literal["product", "fused"]
Precision: TypeAlias = Literal["highest", "high", "medium"]

#: The m of F(m x n, 3x3), by the stride.
OUTPUTS: dict[int, tuple[int, ...]] = {1: (2, 3, 4, 5, 6, 7), 2: (1, 2, 3, 4)}
#: How much larger than a direct sum's the error of a layer may be, as :attr:`repvgg.engine.winograd.Form.loss` over the
#: square root of the channels that are summed. A loss of 1 is an error of 1.2e-7 here, and OpenVINO's direct sums of C
#: channels have 3.7e-8 √C: "high" stays below three times that, "medium" below nine times.
LOSSES: dict[str, float] = {"highest": 0.0, "high": 0.8, "medium": 2.6}
_LEAST = 4.8  # loss that is allowed with few channels, too: F(4x4)

_STACK = 3 * 2**18 if sys.platform == "linux" else 3 * 2**17  # bytes that a unit keeps on the stack
_PRODUCTS = 2**19 if sys.platform == "linux" else 3 * 2**16  # bytes of products that a unit keeps on the stack
_CACHE = 7 * 2**17  # bytes of the second cache that a unit may fill
_IN, _OUT = 11.0, 7.0  # cycles for each vector of a place of a tile, going in and coming out
_SPILLED = 1.25  # times that, where tiles and weights do not fit the second cache together
_STORED = 0.45  # cycles for each vector of a product that is stored, and loaded and stored
_EXPANDED = 2.7  # cycles for each vector of a kernel that is transformed late
_STARTED = 4.0  # cycles for each run of channels
_DIRECT = 1.15  # steps of the direct kernel, which has more rests, to those of others
_PIXEL = 40.0  # cycles for each pixel and panel of the direct kernel, beside its steps
_FETCHED = 22.0  # bytes of weights that come in a cycle to all threads, ahead of their use
_AGAIN = 48.0  # that come from the third cache, where they were before
_NEAR = 100.0  # that come from the second cache of each thread
_STAY = 2**23  # bytes of weights that stay in the third cache beside all else
_FULL = 2**24  # bytes of feature maps that do
_MOVED = 6.5  # bytes of transformed tiles that are written there in a cycle
_READ, _READ_FAR = 34.0, 9.7  # bytes that are read from there in a cycle, and from memory
_UNIT = 300.0  # cycles to claim a unit and to begin with it


@final
@dataclass(frozen=True)
class Size:
    """What a convolution works on.

    Attributes:
        inputs: channels of all groups.
        outputs: channels of all groups.
        image: height and width of what comes out.
        batch: images at once.
        groups: of the convolution.
    """

    inputs: int
    outputs: int
    image: Pair
    batch: int
    groups: int = 1


@final
@dataclass(frozen=True)
class Machine:
    """What computes.

    Attributes:
        isa: the vectors.
        threads: that share the work.
        precision: which m are allowed.
    """

    isa: Isa
    threads: int = 1
    precision: Precision = "high"


@final
@dataclass(frozen=True)
class Part:
    """Winograd for a part of each image.

    Attributes:
        way: which kernels.
        form: F(m x n, 3x3).
        tiling: how the tiles of a batch are cut.
        tile: registers of the products.
        late: whether kernels are transformed across while they are used.
        cycles: about how long it takes.
    """

    way: Way
    form: Form
    tiling: Tiling
    tile: Tile
    late: bool
    cycles: float

    @property
    def rectangle(self) -> Rectangle:
        """Which tiles it covers."""
        (top, left), (high, wide), (down, across) = self.tiling.corner, self.tiling.grid, self.form.outputs
        return (top, down, high), (left, across, wide)

    @property
    def end(self) -> Pair:
        """One behind the last row and column that the tiles cover; it may lie outside of the image."""
        pairs = zip(self.tiling.corner, self.tiling.grid, self.form.outputs, strict=True)
        down, across = (corner + count * size for corner, count, size in pairs)
        return down, across


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


def direct_cycles(size: Size, machine: Machine) -> float:
    """About how long the direct kernel takes for 3x3."""
    vectors = -(-size.outputs // size.groups // machine.isa.width)
    tile = choose_tile(machine.isa, size.image[1], vectors)
    panels = -(-vectors // tile.vectors)
    steps = 9 * size.inputs // size.groups
    rows = size.batch * size.image[0] * size.groups
    of_row = _DIRECT * steps * row_cycles(tile, size.image[1], vectors) + panels * (_UNIT + _PIXEL * size.image[1])
    return rows * of_row / machine.threads + 4 * steps * size.outputs / _FETCHED


def every_choice(size: Size, stride: int, machine: Machine) -> Iterator[Choice]:
    """All covers of the image, each part in its fastest way, but for those that surely are slow.

    Smaller tiles one way and larger ones the other have fewer weights than large ones both ways.
    """
    covers = list(every_cover(size, stride, machine))
    bounds = {pieces: sum(_least_cycles(piece, size, stride, machine) for piece in pieces) for pieces in covers}
    best = float("inf")
    for pieces in sorted(covers, key=lambda pieces: bounds[pieces]):
        if bounds[pieces] > best:
            break
        parts = [_part(piece, size, stride, machine) for piece in pieces]
        if all(parts):
            choice = Choice(tuple(part for part in parts if part))
            best = min(best, choice.cycles)
            yield choice


def _least_cycles(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> float:
    """What the multiplications of some tiles take at least, and to fetch their weights once."""
    (_, down, high), (_, across, wide) = rectangle
    form = winograd(down, across, stride)
    muls = size.batch * high * wide * form.places * size.inputs * size.outputs // size.groups
    weights = 4 * form.sets(late=True) * size.inputs * size.outputs // size.groups
    return muls / (2 * machine.isa.width * machine.threads) + weights / _FETCHED


def every_cover(size: Size, stride: int, machine: Machine) -> Iterator[tuple[Rectangle, ...]]:
    """Rectangles of tiles that cover the image, for each two ways to cover rows and columns."""
    allowed = LOSSES[machine.precision] * math.sqrt(size.inputs // size.groups)
    most = max(allowed, _LEAST) if allowed else 0.0
    down, across = (list(_covers(length, OUTPUTS[stride])) for length in size.image)
    for rows, columns in itertools.product(down, across):
        if all(winograd(run[1], other[1], stride).loss <= most for run in rows for other in columns):
            yield tuple(itertools.product(rows, columns))


def _covers(length: int, outputs: Sequence[int]) -> Iterator[tuple[_Run, ...]]:
    """Ways to cover rows or columns: with tiles of one size that may stick out, or with a smaller one for the rest."""
    for large in outputs:
        yield ((0, large, -(-length // large)),)
        whole, rest = divmod(length, large)
        small = min((m for m in outputs if rest <= m < large), default=0)
        if whole and rest and small:
            yield ((0, large, whole), (whole * large, small, 1))


@lru_cache(maxsize=4096)  # covers share parts
def _part(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> Part | None:
    """The fastest way for some rows and columns of tiles; None if nothing fits."""
    return min(every_part(rectangle, size, stride, machine), key=lambda part: part.cycles, default=None)


def every_part(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> Iterator[Part]:
    """All ways to cut and to compute some tiles."""
    (top, down, high), (left, across, wide) = rectangle
    form, grid, corner = winograd(down, across, stride), (high, wide), (top, left)
    vectors = -(-size.outputs // size.groups // machine.isa.width)
    for tile in _tiles(machine.isa, vectors):
        for way, pieces in _WAYS.items():
            for piece in pieces(form, size.batch * high * wide, tile, size, machine):
                tiling = Tiling(grid, piece, size.batch, corner)
                for late in (False, True):
                    yield Part(way, form, tiling, tile, late, _cycles(way, form, tiling, tile, late, size, machine))


def _tiles(isa: Isa, vectors: int) -> Iterator[Tile]:
    """Register tiles that leave no register unused for nothing."""
    for count in range(1, min(vectors, 4) + 1):
        most = (isa.registers - count - 1) // count
        yield from (Tile(pixels, count) for pixels in range(max(1, most // 2), most + 1))


def _of_products(form: Form, tiles: int, tile: Tile, size: Size, machine: Machine) -> Iterator[int]:
    """Tiles of a piece whose products fit the cache and the stack, as equal as can be."""
    most = _PRODUCTS // (4 * form.places * tile.vectors * machine.isa.width * tile.pixels)  # register tiles of a piece
    if most:
        yield _piece(tiles, tile.pixels, min(most, -(-tiles // tile.pixels)))


def _of_fused(form: Form, tiles: int, tile: Tile, size: Size, machine: Machine) -> Iterator[int]:
    """Tiles of a piece whose transformed tiles and products fit the cache and the stack."""
    pitch = round_up(size.inputs, machine.isa.width) + tile.vectors * machine.isa.width
    for most in range(1, min(8, -(-tiles // tile.pixels)) + 1):
        if 4 * form.places * (most * tile.pixels * pitch + 32) <= _STACK:
            yield most * tile.pixels


_WAYS: dict[Way, Callable[..., Iterator[int]]] = {"product": _of_products, "fused": _of_fused}


def _piece(tiles: int, pixels: int, most: int) -> int:
    """The length of pieces of at most ``most`` register tiles that leaves the fewest tiles for nothing."""
    lengths = [steps * pixels for steps in range(max(1, most // 2), most + 1)]
    return min(lengths, key=lambda length: (round_up(tiles, length), -length))


def _cycles(way: Way, form: Form, tiling: Tiling, tile: Tile, late: bool, size: Size, machine: Machine) -> float:
    """About how long one of the threads is busy."""
    width, places = machine.isa.width, form.places
    channels, vectors = size.inputs // size.groups, -(-size.outputs // size.groups // width)
    panels = -(-vectors // tile.vectors)
    work = size.groups * _multiplied(way, form, tiling.tiles, size, tile, late, width)
    if late:
        expanded = form.rows.inputs * len(form.columns.moved)
        work += _EXPANDED * tiling.pieces * size.groups * channels * vectors * expanded
    spilled = _SPILLED if way == "fused" and not _fits(form, tiling, tile, size, machine) else 1.0
    work += spilled * _OUT * places * tiling.real * size.groups * vectors
    into = spilled * _IN * places * tiling.real * -(-size.inputs // width)
    units = tiling.pieces
    if way == "product":
        moved = 4 * places * tiling.tiles * size.inputs
        units *= size.groups * panels
        if moved > _CACHE:
            work += moved * panels / (_READ if moved < _FULL else _READ_FAR)
        into += _UNIT * tiling.batch * tiling.grid[0] + (moved / _MOVED if moved > _CACHE / 2 else 0)
    of_unit = work / units + _UNIT
    rounds = -(-units // machine.threads)
    return rounds * of_unit + into / machine.threads + _fetched(way, form, tiling, tile, late, size, machine)


def _multiplied(way: Way, form: Form, tiles: int, size: Size, tile: Tile, late: bool, width: int) -> float:
    """Products of all panels of a group."""
    channels, vectors = size.inputs // size.groups, -(-size.outputs // size.groups // width)
    whole, rest = divmod(vectors, tile.vectors)
    lanes = [tile.vectors] * whole + [rest] * bool(rest)
    step = tile.vectors * width
    run = late_run_length(channels, form, step) if late else run_length(channels, cold=way == "product")
    sums = -(-channels // run)
    each = [
        channels * Tile(tile.pixels, count).cycles + sums * (_STARTED + _STORED * tile.pixels * count)
        for count in lanes
    ]
    return tiles // tile.pixels * form.places * sum(each)


def _fetched(way: Way, form: Form, tiling: Tiling, tile: Tile, late: bool, size: Size, machine: Machine) -> float:
    """To fetch all weights once, and again for each piece that finds other things where they were."""
    channels, vectors = size.inputs // size.groups, tile.vectors * machine.isa.width
    weights = 4 * form.sets(late=late) * channels * size.outputs
    if way == "product":
        near, passes = 4 * form.sets(late=late) * channels * vectors <= _CACHE // 2, tiling.pieces
    else:  # all threads pass through them at the same time
        near = _fits(form, tiling, tile, size, machine)
        passes = -(-tiling.pieces // machine.threads)
    rate = _NEAR if near else _AGAIN if weights < _STAY else _FETCHED
    return weights / _FETCHED + (passes - 1) * weights / rate


def _fits(form: Form, tiling: Tiling, tile: Tile, size: Size, machine: Machine) -> bool:
    """Whether all weights, a piece of transformed tiles and their products fit the second cache together."""
    weights = size.inputs // size.groups * size.outputs
    return 4 * form.places * (weights + tiling.piece * (size.inputs + tile.vectors * machine.isa.width)) <= _CACHE
