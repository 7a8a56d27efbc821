"""Convolution of any geometry as an implicit GEMM: rows of pixels times panels of output channels.

For each output row, and each panel of ``vectors`` vectors of output channels, tiles of ``pixels`` neighbouring pixels
are summed in registers over all taps and input channels: one load of a vector of weights serves all pixels of the
tile, one broadcast of an input serves all vectors. Nothing is gathered first; the border is zeros in memory. Each row
of taps, and each run of channels, is summed by itself: the sums of sums round less than one long sum.

Weights lie as (group, panel, tap, input channel, output channel of the panel), so that each panel is one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from repvgg.engine.codegen.ir_builder import Function, Index, Value
from repvgg.engine.codegen.jit import Isa
from repvgg.engine.graph import ConvGeometry
from repvgg.engine.kernels.base import POINTERS, UNITS, Tile, call_panel, multiply_add
from repvgg.engine.runtime.memory import Images
from repvgg.engine.winograd.tiling import LINE, equal_runs

_COLD = 2**15  # floats of a panel that is fetched ahead
_KEPT = 180_000  # floats of weights that stay in the second cache beside some rows of inputs
_NEAR = 48  # channels whose weights are fetched to the first cache ahead of their use
_ALONE = 96  # channels that are worth a sum of their own
_SUMMED = 144  # channels that are summed in one go, and a few more
_MOST_RUNS = 8  # that are written out


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
    def keeps_weights(self) -> bool:
        """Whether all weights stay in the second cache."""
        return self.taps * self.inputs * self.groups_and_panels * self.tile.vectors * self.width <= _KEPT

    @property
    def groups_and_panels(self) -> int:
        """Panels of all groups."""
        return self.geometry.groups * self.panels

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        return f"direct, tiles of {self.tile}"

    @property
    def units_of_image(self) -> int:
        """Pieces of work in one image: the output rows of each panel of each group."""
        return self.groups_and_panels * self.target.size[0]

    @property
    def muls(self) -> int:
        """Multiply-adds for one image, those with the zeros of the border among them."""
        return self.taps * self.inputs * self.target.channels * self.target.size[0] * self.target.size[1]

    def functions(self, name: str) -> list[Function]:
        """The function ``name``, and one each for a row of the last panel of a group, and of another.

        Neighbouring units read the same weights, unit ``(panel · batch + image) · rows + row``; but where all of them
        stay in the second cache, the same inputs, unit ``(image · rows + row) · panels + panel``.
        """
        rows = [_row(f"{name}_row{last:d}", self, last=last) for last in (False, True)]
        return [*rows, _units(name, self, rows)]


def _units(name: str, kernel: ConvKernel, rows: list[Function]) -> Function:
    write = Function(name, UNITS, kernel.width)
    geometry, source, target = kernel.geometry, kernel.source, kernel.target
    with write.loop("%begin", "%end") as units:
        if kernel.keeps_weights:
            place, panel = write.divide(units.index, kernel.groups_and_panels)
        else:
            panel, place = write.divide(units.index, write.mul("%batch", target.size[0]))
        image, row = write.divide(place, target.size[0])
        group, part = write.divide(panel, kernel.panels)
        channel = write.mul(part, kernel.tile.vectors * kernel.width)
        lanes = write.add(write.mul(group, kernel.group_vectors * kernel.width), channel)
        channels = write.mul(group, kernel.inputs * source.channel)
        read = write.add(_place(write, image, row, source, geometry.stride[0]), channels)
        corner = source.inside - geometry.padding[0] * source.row - geometry.padding[1] * source.pitch
        wrote = write.add(_place(write, image, row, target, 1), write.add(write.mul(group, kernel.outputs), channel))
        arguments = (
            ("ptr", write.at("%source", write.add(read, corner))),
            ("ptr", write.at("%target", write.add(wrote, target.inside))),
            ("ptr", write.at("%weights", write.mul(lanes, kernel.taps * kernel.inputs))),
            ("ptr", write.at("%bias", lanes)),
            ("i64", place),
        )
        call_panel(write, part, kernel.panels, rows, arguments)
    return write


def _place(write: Function, image: Index, row: Index, images: Images, stride: int) -> Index:
    """Floats to the first pixel of a row."""
    return write.add(write.mul(image, images.image), write.mul(row, stride * images.row))


def _row(name: str, kernel: ConvKernel, *, last: bool) -> Function:
    """One output row of one panel, the last of its group or another."""
    write = Function(name, (*POINTERS, ("i64", "place")), kernel.width, internal=True)
    vectors = kernel.tile.vectors
    if last:
        vectors = kernel.group_vectors - (kernel.panels - 1) * vectors
    counts = tuple(_counts(kernel, vectors)) if last else (kernel.width,) * vectors
    row = _Row(write, kernel, counts, _ahead(write, kernel, vectors))
    columns, pixels = kernel.target.size[1], min(kernel.tile.pixels, kernel.target.size[1])
    whole = columns // pixels * pixels
    if whole > pixels:
        with write.loop(0, whole, pixels) as tiles:
            row.tile(tiles.index, pixels)
    else:
        row.tile(0, pixels)
    if columns > whole:
        row.tile(whole, columns - whole)
    return write


def _counts(kernel: ConvKernel, vectors: int) -> Iterator[int]:
    """How many numbers of each vector of the last panel are stored: what lies behind them may be another group's."""
    spare = kernel.group_vectors * kernel.width - kernel.outputs
    free = kernel.geometry.groups == 1 and kernel.target.pitch >= kernel.group_vectors * kernel.width
    for vector in range(vectors):
        yield kernel.width - spare if vector == vectors - 1 and not free else kernel.width


def _ahead(write: Function, kernel: ConvKernel, vectors: int) -> Value | None:
    """Where a row fetches ahead: a share of the next panel, if panels are large. The first rows fetch all of it."""
    step, count = vectors * kernel.width, kernel.taps * kernel.inputs
    if kernel.keeps_weights or step * count < _COLD:
        return None
    rows = -(-step // LINE)
    late = write.value(f"icmp ugt i64 %place, {rows - 1}")
    share = write.value(f"select i1 {late}, i64 {rows - 1}, i64 %place")
    return write.at("%weights", write.add(write.mul(share, count * LINE), count * step))


@final
@dataclass(frozen=True)
class _Row:
    """A row that is being written.

    Attributes:
        write: the function.
        kernel: of which convolution.
        counts: how many numbers of each vector of the panel are stored.
        ahead: where weights are fetched ahead.
    """

    write: Function
    kernel: ConvKernel
    counts: tuple[int, ...]
    ahead: Value | None

    @property
    def step(self) -> int:
        """Floats of the weights of one channel of one tap."""
        return len(self.counts) * self.kernel.width

    def tile(self, column: Index, pixels: int) -> None:
        """One tile, from its biases to its stores; ``column`` is its first pixel in the row."""
        write, kernel, vectors = self.write, self.kernel, len(self.counts)
        biases = [write.load("%bias", vector * kernel.width) for vector in range(vectors)]
        source = write.at("%source", write.mul(column, kernel.geometry.stride[1] * kernel.source.pitch))
        first = [biases[vector] for _ in range(pixels) for vector in range(vectors)]
        sums = self._planes(source, first) if kernel.source.planar else self._sum(source, first)
        target = write.at("%target", write.mul(column, kernel.target.pitch))
        for place, value in enumerate(sums):
            pixel, vector = divmod(place, vectors)
            value = write.relu(value) if kernel.relu else value
            write.store(value, target, pixel * kernel.target.pitch + vector * kernel.width, self.counts[vector])

    def _planes(self, source: Value, sums: list[Value]) -> list[Value]:
        """Add all taps and channels, which are few: loops over rows of taps, channels and taps.

        Written out, neighbouring pixels would share their inputs, which then would not fit into the registers.
        """
        write, geometry, images = self.write, self.kernel.geometry, self.kernel.source
        pitch, inputs = geometry.stride[1] * images.pitch, self.kernel.inputs
        with write.loop(0, geometry.kernel[0], carried=sums) as rows:
            row = write.mul(rows.index, geometry.dilation[0] * images.row)
            with write.loop(0, inputs, carried=rows.carried) as channels:
                read = write.at(source, write.add(row, write.mul(channels.index, images.channel)))
                with write.loop(0, geometry.kernel[1], carried=channels.carried) as taps:
                    pixel = write.at(read, write.mul(taps.index, geometry.dilation[1] * images.pitch))
                    tap = write.add(write.mul(rows.index, geometry.kernel[1]), taps.index)
                    number = write.add(write.mul(tap, inputs), channels.index)
                    lanes = write.at("%weights", write.mul(number, self.step))
                    taps.next = multiply_add(write, pixel, pitch, lanes, taps.carried, len(self.counts))
                channels.next = taps.results
            rows.next = channels.results
        return rows.results

    def _sum(self, source: Value, sums: list[Value]) -> list[Value]:
        """Add all taps and channels to the sums of a tile: loops over rows of taps, taps and channels.

        Where the channels of neighbouring taps lie side by side, a row of taps is one loop.
        """
        write, geometry, images = self.write, self.kernel.geometry, self.kernel.source
        taps, length = geometry.kernel[1], self.kernel.inputs
        if geometry.dilation[1] == 1 and length == images.pitch:
            taps, length = 1, taps * length
        with write.loop(0, geometry.kernel[0], carried=sums) as tap_rows:
            read = write.mul(tap_rows.index, geometry.dilation[0] * images.row)
            with write.loop(0, taps, carried=tap_rows.carried) as row:
                tap = write.at(source, write.add(read, write.mul(row.index, geometry.dilation[1] * images.pitch)))
                first = write.mul(write.add(write.mul(tap_rows.index, taps), row.index), length)
                for begin, end in _runs(length):
                    row.next = self._run(tap, first, begin, end, row.next)
            tap_rows.next = row.results
        return tap_rows.results

    def _run(self, source: Value, first: Index, begin: int, end: int, sums: list[Value]) -> list[Value]:
        """Add some channels of a tap, or of a row of taps, whose weights are number ``first`` and those behind it."""
        write, kernel = self.write, self.kernel
        alone = end - begin >= _ALONE
        with write.loop(begin, end, carried=["zeroinitializer"] * len(sums) if alone else sums) as channels:
            number = write.add(first, channels.index)
            if self.ahead:
                write.prefetch(self.ahead, write.mul(number, LINE))
            lanes = write.at("%weights", write.mul(number, self.step))
            pitch = kernel.geometry.stride[1] * kernel.source.pitch
            for line in range(0, self.step, LINE):
                write.prefetch(lanes, _NEAR * self.step + line, near=True)
            inputs = write.at(source, channels.index)
            channels.next = multiply_add(write, inputs, pitch, lanes, channels.carried, len(self.counts))
        if not alone:
            return channels.results
        return [write.binary("fadd", total, value) for total, value in zip(sums, channels.results, strict=True)]


def _runs(channels: int) -> list[tuple[int, int]]:
    """(begin, end) of the channels that are summed in one go."""
    return equal_runs(channels, min(max(1, channels // _SUMMED), _MOST_RUNS))


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
