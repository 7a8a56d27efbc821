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
from typing import Literal, TypeAlias, final

from repvgg.engine.codegen.jit import Isa
from repvgg.engine.graph import ConvGeometry, Pair
from repvgg.engine.kernels.base import Tile
from repvgg.engine.runtime.memory import round_up
from repvgg.engine.winograd.filters import Form, winograd
from repvgg.engine.winograd.tiling import Tiling

Run: TypeAlias = tuple[int, int, int, int]  # first row or column, m, tiles, and outputs of the last one, or 0 for m
Rectangle: TypeAlias = tuple[Run, Run]  # rows and columns of tiles of one form
Way: TypeAlias = Literal["product", "fused"]
Precision: TypeAlias = Literal["highest", "high", "medium"]


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

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return self.inputs // self.groups

    @property
    def kernels(self) -> int:
        """One for each output channel and each input channel of its group."""
        return self.channels * self.outputs

    def vectors(self, width: int) -> int:
        """Vectors of output channels of a group."""
        return -(-self.outputs // self.groups // width)


@final
@dataclass(frozen=True)
class Machine:
    """What computes.

    Attributes:
        isa: the vectors.
        threads: that share the work.
        precision: how far rounding errors may go; see :data:`repvgg.engine.planner.algorithms.LOSSES`.
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
        splits: units that take the same tiles, each by a part of the panels.
        cycles: about how long it takes, if that is known.
    """

    way: Way
    form: Form
    tiling: Tiling
    tile: Tile
    late: bool
    splits: int = 1
    cycles: float = 0.0

    @property
    def rectangle(self) -> Rectangle:
        """Which tiles it covers."""
        (top, left), (high, wide) = self.tiling.corner, self.tiling.grid
        (down, across), (low, narrow) = self.form.outputs, self.form.tails
        return (top, down, high, low), (left, across, wide, narrow)

    def room(self, registers: int) -> int:
        """Vectors of so many that products leave free for kernels that come next.

        None where a panel has an odd number of vectors, for two columns share them, or where a place takes more than
        one tile of registers, for only the first of those would do it.
        """
        whole = self.tiling.piece <= self.tile.pixels and self.tile.vectors % 2 == 0
        return registers - self.tile.registers if whole else 0

    @property
    def end(self) -> Pair:
        """One behind the last row and column that the tiles cover; it may lie outside of the image."""
        down, across = (run[0] + run[1] * run[2] - missing(run) for run in self.rectangle)
        return down, across


def missing(run: Run) -> int:
    """Outputs that the last tile has less than the others."""
    _, outputs, _, last = run
    return outputs - last if last else 0


def form_of(rectangle: Rectangle, stride: int) -> Form:
    """What computes some tiles."""
    (_, down, _, low), (_, across, _, narrow) = rectangle
    return winograd(down, across, stride, (low, narrow))


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


def may_use_winograd(geometry: ConvGeometry, size: Size, machine: Machine) -> bool:
    """Whether there is any other way than the direct one."""
    whole = geometry.groups == 1 or size.outputs // geometry.groups % machine.isa.width == 0
    if geometry.kernel != (3, 3) or geometry.stride not in ((1, 1), (2, 2)) or geometry.dilation != (1, 1):
        return False
    return size.inputs >= machine.isa.width and whole and machine.precision != "highest"


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
                    yield Part(*how)


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
