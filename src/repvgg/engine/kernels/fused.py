"""Winograd convolution in one kernel, whose transformed tiles never leave the second cache of a processor.

A unit takes a piece of tiles all the way: into the transformed domain, through the products with all panels of weights
or with a part of them, and back. Where several units take the same piece, each transforms it for itself: on many
machines that is faster than to read what another processor wrote, and there are machines where a line that comes from
another processor costs as much as a thousand multiply-adds. Weights lie as those of :class:`WinogradProduct` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.images import Images
from repvgg.engine.ir import Function, Index, Value
from repvgg.engine.kernels.kernel import POINTERS, UNITS
from repvgg.engine.kernels.moving import Outputs, PieceOfImages, input_corner, input_tile, tiles_of_piece
from repvgg.engine.kernels.panel import Operand, Panel
from repvgg.engine.kernels.products import Products
from repvgg.engine.kernels.tile import Tile
from repvgg.engine.kernels.tiling import Kind, Tiling, kinds, place_floats, place_tiles
from repvgg.engine.layers import Pair
from repvgg.engine.winograd import Form


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
        piece = _piece(f"{name}_piece", self)
        write = Function(name, UNITS, self.width)
        with write.loop("%begin", "%end") as units:
            split, at = write.divide(units.index, "%batch")
            pointers = ((kind, f"%{pointer}") for kind, pointer in POINTERS)
            write.call(piece.name, [*pointers, ("i64", at), ("i64", split)])
        return [piece, write]


def _piece(name: str, kernel: WinogradFused) -> Function:
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
