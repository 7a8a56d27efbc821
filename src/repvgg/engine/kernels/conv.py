"""Convolution of any geometry as an implicit GEMM: rows of pixels times panels of output channels.

For each output row, and each panel of ``vectors`` vectors of output channels, tiles of ``pixels`` neighbouring pixels
are summed in registers over all taps and input channels: one load of a vector of weights serves all pixels of the
tile, one broadcast of an input serves all vectors. Nothing is gathered first; the border is zeros in memory.

Weights lie as (group, panel, tap, input channel, output channel of the panel), so that each panel is one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from repvgg.engine.images import Images, round_up
from repvgg.engine.ir import Function, Index, Value
from repvgg.engine.isa import Isa
from repvgg.engine.kernels.kernel import POINTERS, UNITS
from repvgg.engine.kernels.tile import Tile, multiply_add
from repvgg.engine.layers import Conv, ConvGeometry, Floats


@final
@dataclass(frozen=True)
class ConvKernel:
    """One convolution on images of one size: everything that its code depends on.

    Attributes:
        geometry: where it reads; its padding is not beyond the border of ``source``.
        source: the images that it reads.
        target: the images that it writes.
        tile: the registers that it uses.
        relu: whether a ReLU follows.
        width: floats in a vector.
    """

    geometry: ConvGeometry
    source: Images
    target: Images
    tile: Tile
    relu: bool
    width: int

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.source.channels // self.geometry.groups

    @property
    def outputs(self) -> int:
        """Output channels of a group."""
        return self.target.channels // self.geometry.groups

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return self.geometry.kernel[0] * self.geometry.kernel[1]

    @property
    def group_vectors(self) -> int:
        """Vectors of output channels of a group, the last one perhaps not full."""
        return -(-self.outputs // self.width)

    @property
    def panels(self) -> int:
        """Panels of a group; the last one may have fewer vectors than the others."""
        return -(-self.group_vectors // self.tile.vectors)

    @property
    def units_of_image(self) -> int:
        """Pieces of work in one image: the output rows of each panel of each group."""
        return self.geometry.groups * self.panels * self.target.size[0]

    @property
    def muls(self) -> int:
        """Multiply-adds for one image, those with the zeros of the border among them."""
        return self.taps * self.inputs * self.target.channels * self.target.size[0] * self.target.size[1]

    def functions(self, name: str) -> list[Function]:
        """The function ``name``, and one each for a row of the last panel of a group, and of another.

        Unit ``(panel · batch + image) · rows + row``: neighbouring units read the same weights.
        """
        rows = [_row(f"{name}_row{last:d}", self, last=last) for last in (False, True)]
        return [*rows, _units(name, self, rows)]


def pack(conv: Conv, width: int, vectors: int) -> tuple[Floats, Floats]:
    """Weights and biases in the order that the kernel reads them, with zeros for channels beyond the last.

    Returns:
        Two arrays of one axis; both have whole vectors for each group.
    """
    groups = conv.geometry.groups
    outputs = conv.weight.shape[0] // groups
    wide = round_up(outputs, width)
    kernel = conv.weight.reshape(groups, outputs, conv.weight.shape[1], -1).transpose(0, 3, 2, 1)
    kernel = np.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, wide - outputs)))  # group, tap, input, output
    step = vectors * width
    panels = [kernel[group, :, :, at : at + step].ravel() for group in range(groups) for at in range(0, wide, step)]
    bias = np.pad(conv.bias.reshape(groups, outputs), ((0, 0), (0, wide - outputs)))
    return np.concatenate(panels), bias.ravel()


def _units(name: str, kernel: ConvKernel, rows: list[Function]) -> Function:
    write = Function(name, UNITS, kernel.width)
    geometry, source, target = kernel.geometry, kernel.source, kernel.target
    per_panel = write.mul("%batch", target.size[0])
    with write.loop("%begin", "%end") as units:
        panel, place = write.divide(units.index, per_panel)
        image, row = write.divide(place, target.size[0])
        group, part = write.divide(panel, kernel.panels)
        channel = write.mul(part, kernel.tile.vectors * kernel.width)
        lanes = write.add(write.mul(group, kernel.group_vectors * kernel.width), channel)
        read = write.add(_place(write, image, row, source, geometry.stride[0]), write.mul(group, kernel.inputs))
        corner = source.inside - geometry.padding[0] * source.row - geometry.padding[1] * source.pitch
        wrote = write.add(_place(write, image, row, target, 1), write.add(write.mul(group, kernel.outputs), channel))
        arguments = (
            ("ptr", write.at("%source", write.add(read, corner))),
            ("ptr", write.at("%target", write.add(wrote, target.inside))),
            ("ptr", write.at("%weights", write.mul(lanes, kernel.taps * kernel.inputs))),
            ("ptr", write.at("%bias", lanes)),
        )
        is_last = write.value(f"icmp eq i64 {part}, {kernel.panels - 1}")
        is_other = write.value(f"xor i1 {is_last}, true")
        for condition, function in ((is_other, rows[0]), (is_last, rows[1])):
            with write.when(condition):
                write.call(function.name, arguments)
    return write


def _place(write: Function, image: Index, row: Index, images: Images, stride: int) -> Index:
    """Floats to the first pixel of a row."""
    return write.add(write.mul(image, images.image), write.mul(row, stride * images.row))


def _row(name: str, kernel: ConvKernel, *, last: bool) -> Function:
    """One output row of one panel, the last of its group or another."""
    write = Function(name, POINTERS, kernel.width, internal=True)
    vectors = kernel.tile.vectors
    if last:
        vectors = kernel.group_vectors - (kernel.panels - 1) * vectors
    counts = list(_counts(kernel, vectors)) if last else [kernel.width] * vectors
    columns, pixels = kernel.target.size[1], min(kernel.tile.pixels, kernel.target.size[1])
    whole = columns // pixels * pixels
    if whole > pixels:
        with write.loop(0, whole, pixels) as tiles:
            _tile(write, kernel, tiles.index, pixels, counts)
    else:
        _tile(write, kernel, 0, pixels, counts)
    if columns > whole:
        _tile(write, kernel, whole, columns - whole, counts)
    return write


def _counts(kernel: ConvKernel, vectors: int) -> Iterator[int]:
    """How many numbers of each vector of the last panel are stored: what lies behind them may be another group's."""
    spare = kernel.group_vectors * kernel.width - kernel.outputs
    free = kernel.geometry.groups == 1 and kernel.target.pitch >= kernel.group_vectors * kernel.width
    for vector in range(vectors):
        yield kernel.width - spare if vector == vectors - 1 and not free else kernel.width


def _tile(write: Function, kernel: ConvKernel, column: Index, pixels: int, counts: list[int]) -> None:
    """One tile, from its biases to its stores; ``column`` is its first pixel in the row."""
    vectors, width = len(counts), kernel.width
    biases = [write.load("%bias", vector * width) for vector in range(vectors)]
    source = write.at("%source", write.mul(column, kernel.geometry.stride[1] * kernel.source.pitch))
    sums = _sum(write, kernel, source, [biases[vector] for _ in range(pixels) for vector in range(vectors)], vectors)
    target = write.at("%target", write.mul(column, kernel.target.pitch))
    for place, value in enumerate(sums):
        pixel, vector = divmod(place, vectors)
        value = write.relu(value) if kernel.relu else value
        write.store(value, target, pixel * kernel.target.pitch + vector * width, counts[vector])


def _sum(write: Function, kernel: ConvKernel, source: Value, sums: list[Value], vectors: int) -> list[Value]:
    """Add all taps and channels to the sums of a tile: loops over rows of taps, taps and channels.

    Where the channels of neighbouring taps lie side by side, a row of taps is one loop.
    """
    geometry, images = kernel.geometry, kernel.source
    taps, length = geometry.kernel[1], kernel.inputs
    if geometry.dilation[1] == 1 and length == images.pitch:
        taps, length = 1, taps * length
    step, pitch = vectors * kernel.width, geometry.stride[1] * images.pitch
    with write.loop(0, geometry.kernel[0], carried=sums) as tap_rows:
        read = write.mul(tap_rows.index, geometry.dilation[0] * images.row)
        stream = write.mul(tap_rows.index, taps * length * step)
        with write.loop(0, taps, carried=tap_rows.carried) as row:
            source_tap = write.at(source, write.add(read, write.mul(row.index, geometry.dilation[1] * images.pitch)))
            weights = write.at("%weights", write.add(stream, write.mul(row.index, length * step)))
            with write.loop(0, length, carried=row.carried) as channels:
                inputs = write.at(source_tap, channels.index)
                lanes = write.at(weights, write.mul(channels.index, step))
                channels.next = multiply_add(write, inputs, pitch, lanes, channels.carried, vectors)
            row.next = channels.results
        tap_rows.next = row.results
    return tap_rows.results


def choose_tile(isa: Isa, columns: int, vectors: int) -> Tile:
    """The tile that keeps the multipliers busiest, for rows of ``columns`` pixels and ``vectors`` vectors of channels.

    By :attr:`Tile.cycles` in the place of a search.
    """
    counts, widths = range(1, min(vectors, 8) + 1), range(1, min(columns, 16) + 1)
    every = (Tile(pixels, count) for count in counts for pixels in widths)
    fitting = (tile for tile in every if tile.registers <= isa.registers)
    return min(fitting, key=lambda tile: (row_cycles(tile, columns, vectors), -tile.pixels * tile.vectors))


def row_cycles(tile: Tile, columns: int, vectors: int) -> float:
    """About how long one channel of one tap takes for a whole row and all panels."""
    widths = _pieces(columns, tile.pixels)
    heights = _pieces(vectors, tile.vectors)
    return sum(Tile(p, v).cycles * many * times for p, many in widths for v, times in heights)


def _pieces(length: int, piece: int) -> list[tuple[int, int]]:
    """A length cut into equal pieces and a rest: (length, how many)."""
    return [(size, many) for size, many in ((piece, length // piece), (length % piece, 1)) if size and many]
