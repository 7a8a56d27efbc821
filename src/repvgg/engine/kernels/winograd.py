"""Winograd convolution in two kernels: input tiles into the transformed domain, then products and output tiles.

A unit of the second kernel multiplies some tiles by one panel of weights, a product for each of the (m + 2)² places of
a tile, into memory of its own that stays in the cache, and transforms what came out, with bias and ReLU.

Transformed inputs lie as (place, tile, channel), weights as (group, panel, place, input channel, output channel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.images import Images
from repvgg.engine.ir import Function, Index, Value
from repvgg.engine.kernels.kernel import POINTERS, UNITS
from repvgg.engine.kernels.tile import Tile, multiply_add
from repvgg.engine.kernels.transform import transform_square
from repvgg.engine.layers import Pair
from repvgg.engine.winograd import Winograd

_LINE = 16  # floats of a line of the cache


@final
@dataclass(frozen=True)
class Tiling:
    """How the tiles of a batch are cut into pieces of work.

    All pieces have the same length, so the last one of a block may have tiles that stand for nothing.

    Attributes:
        grid: tiles of an image, down and across.
        images: of a block.
        piece: tiles of a piece.
        blocks: of the largest batch.
    """

    grid: Pair
    images: int
    piece: int
    blocks: int

    @property
    def of_image(self) -> int:
        """Tiles of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def pieces(self) -> int:
        """Pieces of a block."""
        return -(-self.images * self.of_image // self.piece)

    @property
    def of_block(self) -> int:
        """Tiles of a block, those that stand for nothing among them."""
        return self.pieces * self.piece

    @property
    def tiles(self) -> int:
        """Tiles of the largest batch."""
        return self.blocks * self.of_block


def place_floats(tiling: Tiling, pitch: int) -> int:
    """Floats from one place of all transformed tiles to the next.

    A line more than they need: places that lie whole pages apart would all fall into one set of the cache.
    """
    return tiling.tiles * pitch + _LINE


@final
@dataclass(frozen=True)
class WinogradInput:
    """``Bᵀ d B`` of all input tiles.

    Attributes:
        form: F(m x m, 3x3).
        source: the images; ``border`` and ``more`` hold whatever tiles stick out.
        padding: of the convolution.
        tiling: the tiles.
        width: floats in a vector.
    """

    form: Winograd
    source: Images
    padding: Pair
    tiling: Tiling
    width: int

    @property
    def units_of_image(self) -> int:
        """Rows of tiles."""
        return self.tiling.grid[0]

    @property
    def muls(self) -> int:
        """None that count."""
        return 0

    def functions(self, name: str) -> list[Function]:
        """One function."""
        write, source, tiling = Function(name, UNITS, self.width), self.source, self.tiling
        with write.loop("%begin", "%end") as units:
            image, row = write.divide(units.index, tiling.grid[0])
            block, part = write.divide(image, tiling.images)
            tile = write.add(write.mul(block, tiling.of_block), write.mul(part, tiling.of_image))
            first = write.add(tile, write.mul(row, tiling.grid[1]))
            read = write.add(write.mul(image, source.image), write.mul(row, self.form.outputs * source.row))
            corner = source.inside - self.padding[0] * source.row - self.padding[1] * source.pitch
            begin = write.at("%source", write.add(read, corner))
            with write.loop(0, tiling.grid[1]) as across, write.loop(0, source.pitch, self.width) as channels:
                place = write.add(write.mul(across.index, self.form.outputs * source.pitch), channels.index)
                row_of_target = write.mul(write.add(first, across.index), source.pitch)
                target = write.at("%target", write.add(row_of_target, channels.index))
                self._tile(write, write.at(begin, place), target)
        return [write]

    def _tile(self, write: Function, source: Value, target: Value) -> None:
        size, images = self.form.inputs, self.source
        places = [(row, column) for row in range(size) for column in range(size)]
        values = [write.load(source, row * images.row + column * images.pitch) for row, column in places]
        for place, value in enumerate(transform_square(write, self.form.input_matrix, values)):
            write.store(value, target, place * place_floats(self.tiling, images.pitch))


@final
@dataclass(frozen=True)
class WinogradProduct:
    """Products in the transformed domain, and ``Aᵀ · A`` of them with bias and ReLU.

    Attributes:
        form: F(m x m, 3x3).
        groups: of the convolution; the output channels of each are whole vectors, or there is one.
        channels: of the input.
        pitch: floats from one transformed tile to the next.
        target: the images that it writes.
        tiling: the tiles.
        tile: the registers that it uses; its pixels, which are tiles here, divide a piece.
        relu: whether a ReLU follows.
        width: floats in a vector.
    """

    form: Winograd
    groups: int
    channels: int
    pitch: int
    target: Images
    tiling: Tiling
    tile: Tile
    relu: bool
    width: int

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.channels // self.groups

    @property
    def group_vectors(self) -> int:
        """Vectors of output channels of a group."""
        return -(-self.target.channels // self.groups // self.width)

    @property
    def panels(self) -> int:
        """Panels of a group; the last one may have fewer vectors than the others."""
        return -(-self.group_vectors // self.tile.vectors)

    @property
    def units_of_image(self) -> int:
        """Units of a block: its pieces, by each panel."""
        return self.groups * self.panels * self.tiling.pieces

    @property
    def muls(self) -> int:
        """Multiplications of a block, those of tiles that stand for nothing among them."""
        return self.tiling.of_block * self.form.inputs**2 * self.inputs * self.target.channels

    def functions(self, name: str) -> list[Function]:
        """The function ``name``, and one each for a piece by the last panel of a group, and by another.

        Unit ``(panel · blocks + block) · pieces + piece``: neighbouring units read the same weights.
        """
        last = self.group_vectors - (self.panels - 1) * self.tile.vectors
        parts = [_piece(f"{name}_piece{at}", self, count) for at, count in enumerate((self.tile.vectors, last))]
        return [*parts, _units(name, self, parts)]


def _product_floats(kernel: WinogradProduct, vectors: int) -> int:
    """Floats from one place of the products of a piece to the next, a line more than they need, too."""
    return kernel.tiling.piece * vectors * kernel.width + _LINE


_PIECE = (*POINTERS, ("i64", "block"), ("i64", "piece"))


def _units(name: str, kernel: WinogradProduct, parts: list[Function]) -> Function:
    write, tiling = Function(name, UNITS, kernel.width), kernel.tiling
    with write.loop("%begin", "%end") as units:
        panel, place = write.divide(units.index, write.mul("%batch", tiling.pieces))
        block, piece = write.divide(place, tiling.pieces)
        group, part = write.divide(panel, kernel.panels)
        vectors = write.add(write.mul(group, kernel.group_vectors), write.mul(part, kernel.tile.vectors))
        lanes = write.mul(vectors, kernel.width)
        tile = write.add(write.mul(block, tiling.of_block), write.mul(piece, tiling.piece))
        read = write.add(write.mul(tile, kernel.pitch), write.mul(group, kernel.inputs))
        arguments = (
            ("ptr", write.at("%source", read)),
            ("ptr", write.at("%target", lanes)),
            ("ptr", write.at("%weights", write.mul(lanes, kernel.form.inputs**2 * kernel.inputs))),
            ("ptr", write.at("%bias", lanes)),
            ("i64", block),
            ("i64", piece),
        )
        is_last = write.value(f"icmp eq i64 {part}, {kernel.panels - 1}")
        is_other = write.value(f"xor i1 {is_last}, true")
        for condition, function in ((is_other, parts[0]), (is_last, parts[1])):
            with write.when(condition):
                write.call(function.name, arguments)
    return write


def _piece(name: str, kernel: WinogradProduct, vectors: int) -> Function:
    """A piece of tiles by a panel of so many vectors."""
    write = Function(name, _PIECE, kernel.width, internal=True)
    floats = _product_floats(kernel, vectors)
    products = write.scratch(kernel.form.inputs**2 * floats)
    beyond = write.scratch(kernel.width)
    with write.loop(0, kernel.form.inputs**2) as places:
        inputs = write.at("%source", write.mul(places.index, place_floats(kernel.tiling, kernel.pitch)))
        weights = write.at("%weights", write.mul(places.index, kernel.inputs * vectors * kernel.width))
        _multiply(write, kernel, inputs, weights, write.at(products, write.mul(places.index, floats)), vectors)
    first = write.mul("%piece", kernel.tiling.piece)
    left = write.value(f"sub i64 {kernel.tiling.images * kernel.tiling.of_image}, {first}")
    few = write.value(f"icmp ult i64 {left}, {kernel.tiling.piece}")
    count = write.value(f"select i1 {few}, i64 {left}, i64 {kernel.tiling.piece}")
    with write.loop(0, count) as tiles:
        read = write.at(products, write.mul(tiles.index, vectors * kernel.width))
        _outputs(write, kernel, read, write.add(first, tiles.index), vectors, beyond)
    return write


def _multiply(
    write: Function, kernel: WinogradProduct, inputs: Value, weights: Value, products: Value, vectors: int
) -> None:
    """The product of one place: (tile, input channel) by (input channel, output channel)."""
    pixels, step = kernel.tile.pixels, vectors * kernel.width
    zeros = ["zeroinitializer"] * (pixels * vectors)
    with write.loop(0, kernel.tiling.piece, pixels) as tiles:
        read = write.at(inputs, write.mul(tiles.index, kernel.pitch))
        with write.loop(0, kernel.inputs, carried=zeros) as channels:
            lanes = write.at(weights, write.mul(channels.index, step))
            source = write.at(read, channels.index)
            for line in range(0, step, _LINE):  # of the next place: its weights may be cold
                write.prefetch(lanes, kernel.inputs * step + line)
            channels.next = multiply_add(write, source, kernel.pitch, lanes, channels.carried, vectors)
        wrote = write.at(products, write.mul(tiles.index, step))
        for place, value in enumerate(channels.results):
            write.store(value, wrote, place * kernel.width)


def _outputs(
    write: Function, kernel: WinogradProduct, products: Value, tile: Index, vectors: int, beyond: Value
) -> None:
    """The pixels of one tile of a block; those outside of the image go to memory that nobody reads."""
    tiling, target, size = kernel.tiling, kernel.target, kernel.form.outputs
    part, place = write.divide(tile, tiling.of_image)
    down, across = write.divide(place, tiling.grid[1])
    image = write.add(write.mul("%block", tiling.images), part)
    top, left = write.mul(down, size), write.mul(across, size)
    offset = write.add(write.mul(top, target.row), write.mul(left, target.pitch))
    corner = write.at("%target", write.add(write.mul(image, target.image), write.add(offset, target.inside)))
    rows = _inside(write, top, size, target.size[0])
    columns = _inside(write, left, size, target.size[1])
    floats = _product_floats(kernel, vectors)
    with write.loop(0, vectors * kernel.width, kernel.width) as lanes:
        read, pixel = write.at(products, lanes.index), write.at(corner, lanes.index)
        bias = write.load("%bias", lanes.index)
        values = [write.load(read, at * floats) for at in range(kernel.form.inputs**2)]
        for at, value in enumerate(transform_square(write, kernel.form.output_matrix, values)):
            row, column = divmod(at, size)
            value = write.binary("fadd", value, bias)
            address = write.at(pixel, row * target.row + column * target.pitch)
            for is_inside in filter(None, (rows[row], columns[column])):
                address = write.choose(is_inside, address, beyond)
            write.store(write.relu(value) if kernel.relu else value, address)


def _inside(write: Function, first: Index, size: int, length: int) -> list[Value | None]:
    """For each row or column of a tile whether it is inside the image; None where it always is."""
    if length % size == 0:
        return [None] * size
    places = [write.add(first, at) for at in range(size)]
    rest = length % size
    return [None if at < rest else write.value(f"icmp ult i64 {place}, {length}") for at, place in enumerate(places)]
