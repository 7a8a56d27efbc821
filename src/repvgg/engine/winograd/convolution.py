"""Winograd convolution in two kernels: input tiles into the transformed domain, then products and output tiles.

A unit of the second kernel multiplies some tiles by one panel of weights, a product for each place of a tile, into
memory of its own that stays in the cache, and transforms what came out, with bias and ReLU.

Transformed inputs lie as (place, tile, channel), weights as (group, panel, place, input channel, output channel).

Winograd convolution in one kernel, whose transformed tiles never leave the second cache of a processor.

A unit takes a piece of tiles all the way: into the transformed domain, through the products with all panels of weights
or with a part of them, and back. Where several units take the same piece, each transforms it for itself: on many
machines that is faster than to read what another processor wrote, and there are machines where a line that comes from
another processor costs as much as a thousand multiply-adds. Weights lie as those of :class:`WinogradProduct` do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from repvgg.engine.codegen.ir_builder import Function, Index, Value
from repvgg.engine.graph import Pair
from repvgg.engine.kernels.base import POINTERS, UNITS, Tile, call_panel
from repvgg.engine.runtime.memory import Images
from repvgg.engine.winograd.filters import Form
from repvgg.engine.winograd.gemm import Panel, Products
from repvgg.engine.winograd.tiling import Kind, Operand, Tiling, kinds, place_floats, place_tiles
from repvgg.engine.winograd.transforms import Outputs, PieceOfImages, input_corner, input_tile, tiles_of_piece


@final
@dataclass(frozen=True)
class WinogradInput:
    """``Bᵀ d B`` of all input tiles.

    Attributes:
        form: F(m x n, 3x3).
        source: the images; ``border`` and ``more`` hold whatever tiles stick out.
        padding: of the convolution.
        tiling: the tiles.
        width: floats in a vector.
    """

    form: Form
    source: Images
    padding: Pair
    tiling: Tiling
    width: int

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        return f"{self.form}, input tiles"

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
        write, tiling = Function(name, UNITS, self.width), self.tiling
        with write.loop("%begin", "%end") as units:
            image, row = write.divide(units.index, tiling.grid[0])
            every = kinds(self.form, tiling)
            for top, some in itertools.groupby(every, key=lambda kind: kind.top):
                of_row = list(some)
                if of_row[0].tiling.grid[0] == tiling.grid[0]:
                    self._row(write, of_row, image, row)
                    continue
                with write.when(write.value(f"icmp {'eq' if top else 'ult'} i64 {row}, {tiling.grid[0] - 1}")):
                    self._row(write, of_row, image, 0 if top else row)
        return [write]

    def _row(self, write: Function, of_row: Sequence[Kind], image: Value, row: Index) -> None:
        """The tiles of a row of an image."""
        source, tiling = self.source, self.tiling
        target = Operand.of("%target", tiling.tiles, source.pitch)
        for kind in of_row:
            form, alone = kind.form, kind.tiling
            within = write.add(write.mul(image, alone.of_image), write.mul(row, alone.grid[1]))
            first = write.add(within, kind.before)
            down, right = form.steps[0] * source.row, form.steps[1] * source.pitch
            read = write.add(write.mul(image, source.image), write.mul(row, down))
            begin = write.at("%source", write.add(read, input_corner(form, source, alone, self.padding)))
            with write.loop(0, alone.grid[1]) as across:
                pixel = write.at(begin, write.mul(across.index, right))
                wrote = write.mul(write.add(first, across.index), source.pitch)
                following = write.at(pixel, right)
                input_tile(write, kind, source, pixel, target, wrote, following)


@final
@dataclass(frozen=True)
class WinogradProduct:
    """Products in the transformed domain, and ``Aᵀ · A`` of them with bias and ReLU.

    Attributes:
        form: F(m x n, 3x3).
        groups: of the convolution; the output channels of each are whole vectors, or there is one.
        channels: of the input.
        pitch: floats from one transformed tile to the next.
        target: the images that it writes.
        tiling: the tiles.
        tile: the registers that it uses; its pixels are tiles here.
        late: whether kernels are transformed across while they are used.
        room: vectors that are free for the kernels that come next.
        relu: whether a ReLU follows.
        width: floats in a vector.
    """

    form: Form
    groups: int
    channels: int
    pitch: int
    target: Images
    tiling: Tiling
    tile: Tile
    late: bool
    room: int
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
    def words(self) -> str:
        """What it does, for a profile."""
        return f"{self.form}, products, tiles of {self.tile}"

    @property
    def units_of_image(self) -> int:
        """A piece of tiles by each panel."""
        return self.groups * self.panels

    @property
    def muls(self) -> int:
        """Multiplications of a piece."""
        return place_tiles(self.form, self.tiling) * self.inputs * self.target.channels

    def functions(self, name: str) -> list[Function]:
        """The function ``name``, and one each for a piece by the last panel of a group, and by another.

        Unit ``panel · pieces + piece``: neighbouring units read the same weights.
        """
        last = self.group_vectors - (self.panels - 1) * self.tile.vectors
        parts = [_piece(f"{name}_piece{at}", self, count) for at, count in enumerate((self.tile.vectors, last))]
        return [*parts, _units(name, self, parts)]


_NEAR = 2**18  # floats of transformed tiles that stay in the second cache
_PIECE = (*POINTERS, ("i64", "piece"))


def _units(name: str, kernel: WinogradProduct, parts: Sequence[Function]) -> Function:
    write, tiling = Function(name, UNITS, kernel.width), kernel.tiling
    with write.loop("%begin", "%end") as units:
        panel, piece = write.divide(units.index, "%batch")
        group, part = write.divide(panel, kernel.panels)
        vectors = write.add(write.mul(group, kernel.group_vectors), write.mul(part, kernel.tile.vectors))
        lanes = write.mul(vectors, kernel.width)
        read = write.add(write.mul(piece, tiling.piece * kernel.pitch), write.mul(group, kernel.inputs))
        arguments = (
            ("ptr", write.at("%source", read)),
            ("ptr", write.at("%target", lanes)),
            ("ptr", write.at("%weights", write.mul(lanes, kernel.form.sets(late=kernel.late) * kernel.inputs))),
            ("ptr", write.at("%bias", lanes)),
            ("i64", piece),
        )
        call_panel(write, part, kernel.panels, parts, arguments)
    return write


def _piece(name: str, kernel: WinogradProduct, vectors: int) -> Function:
    """A piece of tiles by a panel of so many vectors."""
    write, tiling = Function(name, _PIECE, kernel.width, internal=True), kernel.tiling
    step = vectors * kernel.width
    inputs = Operand.of("%source", tiling.tiles, kernel.pitch)
    products = Operand.of(write.scratch(kernel.form.places * place_floats(tiling.piece, step)), tiling.piece, step)
    beyond, images = write.scratch(kernel.width), PieceOfImages("%target", "%bias", "%piece")
    cold = kernel.form.places * inputs.place > _NEAR
    panel = Panel(kernel.form, kernel.tile, vectors, tiling, kernel.inputs, cold, kernel.room)
    product = Products(panel, kernel.late)
    product.write(write, inputs, "%weights", products, write.scratch(product.scratch(write.width)))
    for kind in kinds(kernel.form, tiling):
        Outputs(kind, kernel.target, kernel.relu, vectors).write(write, products, images, beyond)
    return write


@final
@dataclass(frozen=True)
class WinogradFused:
    """``Aᵀ[U ⊙ (Bᵀ d B)]A`` with bias and ReLU.

    Attributes:
        form: F(m x n, 3x3).
        groups: of the convolution; the output channels of each are whole vectors, or there is one.
        source: the images that it reads; ``border`` and ``more`` hold whatever tiles stick out.
        padding: of the convolution.
        target: the images that it writes.
        tiling: the tiles.
        tile: the registers that it uses; its pixels are tiles here.
        splits: parts of the panels of each group, each of which is a unit's.
        late: whether kernels are transformed across while they are used.
        room: vectors that are free for the kernels that come next.
        relu: whether a ReLU follows.
        width: floats in a vector.
    """

    form: Form
    groups: int
    source: Images
    padding: Pair
    target: Images
    tiling: Tiling
    tile: Tile
    splits: int
    late: bool
    room: int
    relu: bool
    width: int

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.source.channels // self.groups

    @property
    def group_vectors(self) -> int:
        """Vectors of output channels of a group."""
        return -(-self.target.channels // self.groups // self.width)

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        part = f" by 1/{self.splits} of the panels" if self.splits > 1 else ""
        return f"{self.form}, {self.tiling.piece} tiles at a time{part}, tiles of {self.tile}"

    @property
    def units_of_image(self) -> int:
        """A piece of tiles by each part of the panels."""
        return self.splits

    @property
    def muls(self) -> int:
        """Multiplications of a piece."""
        return place_tiles(self.form, self.tiling) * self.inputs * self.target.channels

    def functions(self, name: str) -> list[Function]:
        """The function ``name``, and one for a piece by a part of the panels.

        Unit ``split · pieces + piece``: neighbouring units read the same weights.
        """
        piece = _fused_piece(f"{name}_piece", self)
        write = Function(name, UNITS, self.width)
        with write.loop("%begin", "%end") as units:
            split, at = write.divide(units.index, "%batch")
            pointers = ((kind, f"%{pointer}") for kind, pointer in POINTERS)
            write.call(piece.name, [*pointers, ("i64", at), ("i64", split)])
        return [piece, write]


def _fused_piece(name: str, kernel: WinogradFused) -> Function:
    write = Function(name, (*POINTERS, ("i64", "piece"), ("i64", "split")), kernel.width, internal=True)
    tiling, pitch, most = kernel.tiling, kernel.source.pitch, min(kernel.tile.vectors, kernel.group_vectors)
    places = kernel.form.places
    moved = Operand.of(write.scratch(places * place_floats(tiling.piece, pitch)), tiling.piece, pitch)
    products = write.scratch(places * place_floats(tiling.piece, most * kernel.width))
    whole, rest = divmod(kernel.group_vectors, most)
    expanded = max(_products(kernel, vectors).scratch(write.width) for vectors in (most, rest or most))
    scratch = write.scratch(expanded), products, write.scratch(kernel.width)
    _inputs(write, kernel, moved)
    begin, end, last = _panels(write, kernel, whole, rest)
    with write.loop(0, kernel.groups) as groups:
        read = Operand(write.at(moved.at, write.mul(groups.index, kernel.inputs)), moved.place, moved.tile)
        first = write.mul(groups.index, kernel.group_vectors)
        with write.loop(begin, end) as panels:
            _panel(write, kernel, read, write.add(first, write.mul(panels.index, most)), most, scratch)
        if rest:
            with write.when(last):
                _panel(write, kernel, read, write.add(first, whole * most), rest, scratch)
    return write


def _panels(write: Function, kernel: WinogradFused, whole: int, rest: int) -> tuple[Index, Index, Value]:
    """The first whole panel of a split, one behind its last, and whether the rest behind all of those is its own."""
    count, splits = whole + bool(rest), kernel.splits
    if splits == 1:
        return 0, whole, "true"
    following = write.add("%split", 1)
    begin, end = (write.divide(write.mul(at, count), splits)[0] for at in ("%split", following))
    last = write.value(f"icmp eq i64 {following}, {splits}")
    return begin, write.value(f"select i1 {last}, i64 {whole}, i64 {end}"), last


def _inputs(write: Function, kernel: WinogradFused, moved: Operand) -> None:
    source = kernel.source
    for kind in kinds(kernel.form, kernel.tiling):
        first, count = tiles_of_piece(write, kind.tiling, "%piece")
        corner = write.at("%source", input_corner(kind.form, source, kind.tiling, kernel.padding))
        with write.loop(0, count) as tiles:
            tile = write.add(first, tiles.index)
            read, following = (_tile(write, source, kind, at) for at in (tile, write.add(tile, 1)))
            wrote = write.mul(write.add(tiles.index, kind.before), moved.tile)
            input_tile(write, kind, source, write.at(corner, read), moved, wrote, write.at(corner, following))


def _tile(write: Function, source: Images, kind: Kind, tile: Index) -> Index:
    """Floats from the first tile of a kind to another."""
    steps = kind.form.steps
    image, place = write.divide(tile, kind.tiling.of_image)
    down, across = write.divide(place, kind.tiling.grid[1])
    row, column = write.mul(down, steps[0] * source.row), write.mul(across, steps[1] * source.pitch)
    return write.add(write.mul(image, source.image), write.add(row, column))


def _products(kernel: WinogradFused, vectors: int) -> Products:
    """Those of a piece by a panel of so many vectors."""
    how = kernel.form, kernel.tile, vectors, kernel.tiling, kernel.inputs
    return Products(Panel(*how, cold=False, room=kernel.room), kernel.late)


def _panel(
    write: Function,
    kernel: WinogradFused,
    read: Operand,
    vector: Index,
    vectors: int,
    scratch: tuple[Value, Value, Value],
) -> None:
    """All products of the piece by a panel of so many vectors that begins at ``vector``, and what comes of them."""
    tiling, (kernels, sums, beyond) = kernel.tiling, scratch
    lanes = write.mul(vector, kernel.width)
    panel = write.at("%weights", write.mul(lanes, kernel.form.sets(late=kernel.late) * kernel.inputs))
    products = Operand.of(sums, tiling.piece, vectors * kernel.width)
    _products(kernel, vectors).write(write, read, panel, products, kernels)
    images = PieceOfImages(write.at("%target", lanes), write.at("%bias", lanes), "%piece")
    for kind in kinds(kernel.form, tiling):
        Outputs(kind, kernel.target, kernel.relu, vectors).write(write, products, images, beyond)
