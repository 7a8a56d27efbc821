"""Input tiles into Winograd's domain, and output tiles out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.images import Images
from repvgg.engine.ir import Function, Index, Value
from repvgg.engine.kernels.panel import Operand
from repvgg.engine.kernels.tiling import Kind, Tiling
from repvgg.engine.kernels.transform import transform_rectangle
from repvgg.engine.layers import Pair
from repvgg.engine.winograd import Form


def input_corner(form: Form, source: Images, tiling: Tiling, padding: Pair) -> int:
    """Floats from the beginning of an image to the first input of its first tile."""
    axes = zip(tiling.corner, form.strides, padding, strict=True)
    row, column = (first * stride - pad for first, stride, pad in axes)
    return source.inside + row * source.row + column * source.pitch


def input_tile(
    write: Function, kind: Kind, source: Images, read: Value, target: Operand, wrote: Index, following: Value
) -> None:
    """``Bᵀ d B`` of one input tile whose first pixel is at ``read``, for all channels, to ``wrote`` in each place.

    What the tile at ``following`` reads is fetched meanwhile.
    """
    form, (down, across) = kind.form, kind.form.inputs
    with write.loop(0, source.pitch, write.width) as channels:
        pixel, ahead = write.at(read, channels.index), write.at(following, channels.index)
        for row in range(down):
            for column in range(across - form.steps[1], across):
                write.prefetch(ahead, row * source.row + column * source.pitch, near=True)
        values = [
            write.load(pixel, row * source.row + column * source.pitch)
            for row in range(down)
            for column in range(across)
        ]
        out = write.at(target.at, write.add(wrote, channels.index))
        moved = transform_rectangle(write, form.rows.input_matrix, form.columns.input_matrix, values)
        for place, value in zip(kind.places, moved, strict=True):
            write.store(value, out, place * target.place)


@final
@dataclass(frozen=True)
class PieceOfImages:
    """Where outputs go.

    Attributes:
        at: address of the first image, at the first channel.
        bias: address of that of the first channel.
        piece: which one.
    """

    at: Value
    bias: Value
    piece: Index


def tiles_of_piece(write: Function, tiling: Tiling, piece: Index) -> tuple[Index, Index]:
    """The first tile of a piece, and how many there are that stand for something."""
    first = write.mul(piece, tiling.piece)
    if tiling.tiles == tiling.real:
        return first, tiling.piece
    left = write.value(f"sub i64 {tiling.real}, {first}")
    few = write.value(f"icmp ult i64 {left}, {tiling.piece}")
    return first, write.value(f"select i1 {few}, i64 {left}, i64 {tiling.piece}")


@final
@dataclass(frozen=True)
class Outputs:
    """``Aᵀ · A`` of the products of a piece of tiles, with bias and ReLU, into images.

    Attributes:
        kind: which of the tiles.
        target: the images.
        relu: whether a ReLU follows.
        vectors: of output channels.
    """

    kind: Kind
    target: Images
    relu: bool
    vectors: int

    def write(self, write: Function, products: Operand, images: PieceOfImages, beyond: Value) -> None:
        """Write it for a piece; ``beyond`` is a vector of memory that nobody reads.

        The lines of the next tile are fetched meanwhile.
        """
        target, bias, form = images.at, images.bias, self.kind.form
        first, count = tiles_of_piece(write, self.kind.tiling, images.piece)
        begin = write.at(products.at, self.kind.before * products.tile)
        with write.loop(0, count) as tiles:
            read = write.at(begin, write.mul(tiles.index, products.tile))
            corner, inside = self._corner(write, target, write.add(first, tiles.index))
            following = self._corner(write, target, write.add(first, write.add(tiles.index, 1)))[0]
            with write.loop(0, self.vectors * write.width, write.width) as lanes:
                ahead = write.at(following, lanes.index)
                for row in range(form.outputs[0]):
                    for column in range(form.outputs[1]):
                        write.prefetch(ahead, row * self.target.row + column * self.target.pitch, write=True)
                values = [write.load(read, write.add(lanes.index, at * products.place)) for at in self.kind.places]
                pixel, offset = write.at(corner, lanes.index), write.load(bias, lanes.index)
                self._pixels(write, values, pixel, offset, inside, beyond)

    def _corner(self, write: Function, target: Value, tile: Index) -> tuple[Value, list[list[Value | None]]]:
        """Where the first pixel of a tile lies, and which of its rows and columns are inside the image."""
        tiling, images, outputs = self.kind.tiling, self.target, self.kind.form.outputs
        part, place = write.divide(tile, tiling.of_image)
        places = write.divide(place, tiling.grid[1])
        down, across = (
            write.add(write.mul(at, size), corner)
            for at, size, corner in zip(places, outputs, tiling.corner, strict=True)
        )
        offset = write.add(write.mul(down, images.row), write.mul(across, images.pitch))
        address = write.add(write.mul(part, images.image), write.add(offset, images.inside))
        ends = (first + size * count for first, size, count in zip(tiling.corner, outputs, tiling.grid, strict=True))
        inside = [
            _inside(write, at, size, length, end)
            for at, size, length, end in zip((down, across), outputs, images.size, ends, strict=True)
        ]
        return write.at(target, address), inside

    def _pixels(
        self,
        write: Function,
        values: list[Value],
        pixel: Value,
        bias: Value,
        inside: list[list[Value | None]],
        beyond: Value,
    ) -> None:
        """Store one vector of channels of a tile; what is outside of the image goes to memory that nobody reads."""
        form = self.kind.form
        matrices = form.rows.output_matrix, form.columns.output_matrix
        for at, value in enumerate(transform_rectangle(write, *matrices, values)):
            row, column = divmod(at, form.outputs[1])
            value = write.binary("fadd", value, bias)
            address = write.at(pixel, row * self.target.row + column * self.target.pitch)
            for is_inside in filter(None, (inside[0][row], inside[1][column])):
                address = write.choose(is_inside, address, beyond)
            write.store(write.relu(value) if self.relu else value, address)


def _inside(write: Function, first: Index, size: int, length: int, end: int) -> list[Value | None]:
    """For each row or column of a tile whether it is inside the image; None where it always is."""
    out = end - length
    return [
        None if at < size - out else write.value(f"icmp ult i64 {write.add(first, at)}, {length}") for at in range(size)
    ]
