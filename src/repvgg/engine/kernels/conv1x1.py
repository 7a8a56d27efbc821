"""1x1 convolution as a blocked GEMM: pixels of an image times panels of output channels.

Pixels are numbered through the image, so that register tiles do not end with a row, and divided into blocks of tiles. A
unit of work is a block by a panel; consecutive units reuse the inputs of a block, which stay in L2. Input channels are
divided into blocks as well: the weights of a panel for one of them stay in L1 while all tiles of the pixels use them,
and the sums wait in a scratch buffer. Weights are packed as (panel, input channel, output channel of the panel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import Epilogue, Pair
from repvgg.engine.kernels import pointwise
from repvgg.engine.kernels.base import (
    KERNEL_PARAMETERS,
    LINE_FLOATS,
    POINTER_PARAMETERS,
    Kernel,
    RegisterTile,
    call_for_panel,
)
from repvgg.engine.runtime.memory import FeatureMapLayout

_BLOCK_FLOATS = 2**16  # inputs of a block: 256 KiB, half of the smallest L2 of servers
_MAX_BLOCK_TILES = 24  # the scratch buffer of their sums shares L1 with the weights
_CHANNEL_BLOCK = 256  # 16 KiB of weights in panels of 16 channels; also the length of a partial sum
_PREFETCH_CHANNELS = 48  # distance of the prefetch of weights to L1: about the latency of L2
_EQUAL = 1.03  # a ratio of estimates


@final
@dataclass(frozen=True)
class Conv1x1Kernel(Kernel):
    """A 1x1 convolution of one group with bias and epilogue; source and target are NHWC.

    Attributes:
        stride: rows and columns of the input from one output to the next.
        source: layout of the input.
        target: layout of the output.
        tile: register tile; ``mr`` is at most the number of pixels.
        epilogue: functions of the outputs.
        width: floats in a vector.
    """

    stride: Pair
    source: FeatureMapLayout
    target: FeatureMapLayout
    tile: RegisterTile
    epilogue: Epilogue
    width: int

    def describe(self) -> str:
        return ", ".join(filter(None, (f"1x1, tiles of {self.tile}", pointwise.describe(self.epilogue))))

    @property
    def pixels(self) -> int:
        return self.target.size[0] * self.target.size[1]

    @property
    def vectors(self) -> int:
        """Vectors of output channels; the last one may be partly used."""
        return -(-self.target.channels // self.width)

    @property
    def num_panels(self) -> int:
        return -(-self.vectors // self.tile.nr)

    @property
    def num_tiles(self) -> int:
        """Register tiles of the pixels of an image."""
        return -(-self.pixels // self.tile.mr)

    @property
    def tiles_per_block(self) -> int:
        most = max(1, min(_MAX_BLOCK_TILES, _BLOCK_FLOATS // (self.tile.mr * self.source.channels)))
        return -(-self.num_tiles // -(-self.num_tiles // most))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tiles // self.tiles_per_block)

    @property
    def channel_blocks(self) -> int:
        return max(1, round(self.source.channels / _CHANNEL_BLOCK))

    @property
    def units_per_block(self) -> int:
        """Blocks of pixels of an image, by panels."""
        return self.num_blocks * self.num_panels

    @property
    def num_multiplies(self) -> int:
        return self.source.channels * self.target.channels * self.pixels

    def emit(self, name: str) -> list[IRBuilder]:
        """Build a function for a block and a full panel, one for a block and the last panel, and the driver."""
        last = self.vectors - (self.num_panels - 1) * self.tile.nr
        panels = [_PanelBuilder(self, f"{name}_panel{nr}", nr).emit() for nr in dict.fromkeys((self.tile.nr, last))]
        b = IRBuilder(name, KERNEL_PARAMETERS, self.width)
        with b.loop("%begin", "%end") as units:
            image, unit = b.divmod(units.index, self.units_per_block)
            block, panel = b.divmod(unit, self.num_panels)
            channel = b.mul(panel, self.tile.nr * self.width)
            read = b.add(b.mul(image, self.source.image_stride), self.source.interior_offset)
            written = b.add(b.mul(image, self.target.image_stride), self.target.interior_offset)
            first = b.mul(block, self.tiles_per_block)
            end = _minimum(b, b.add(first, self.tiles_per_block), self.num_tiles)
            arguments = (
                ("ptr", b.offset("%source", read)),
                ("ptr", b.offset("%target", b.add(written, channel))),
                ("ptr", b.offset("%weights", b.mul(channel, self.source.channels))),
                ("ptr", b.offset("%bias", channel)),
                ("i64", first),
                ("i64", end),
            )
            call_for_panel(b, panel, self.num_panels, [panels[0], panels[-1]], arguments)
        return [*panels, b]


class _PanelBuilder:
    """Builder of the function of a block of pixels and a panel of ``nr`` vectors."""

    def __init__(self, kernel: Conv1x1Kernel, name: str, nr: int) -> None:
        parameters = (*POINTER_PARAMETERS, ("i64", "first"), ("i64", "last"))
        self.b = IRBuilder(name, parameters, kernel.width, internal=True)
        self.kernel, self.nr, self.mr = kernel, nr, kernel.tile.mr
        self.step = nr * kernel.width  # floats of the weights of an input channel

    def emit(self) -> IRBuilder:
        b, kernel = self.b, self.kernel
        unused = b.scratch(self.step)
        biases = [b.load("%bias", vector * b.width) for vector in range(self.nr)]
        every = biases * self.mr
        if kernel.channel_blocks == 1:
            with b.loop("%first", "%last", runs=True) as tiles:
                self._finish(tiles.index, unused, self._sum(tiles.index, 0, kernel.source.channels, every))
            return b
        floats = self.mr * self.step
        sums = b.scratch(kernel.tiles_per_block * floats)

        def place(tile: Index) -> Value:
            return b.offset(sums, b.mul(b.assign(f"sub i64 {tile}, %first"), floats))

        with b.loop("%first", "%last", runs=True) as tiles:
            self._store(place(tiles.index), every)
        zeros = ["zeroinitializer"] * len(every)
        size = -(-kernel.source.channels // kernel.channel_blocks)
        with b.loop(0, kernel.channel_blocks - 1) as blocks:
            begin = b.mul(blocks.index, size)
            with b.loop("%first", "%last", runs=True) as tiles:
                found = self._sum(tiles.index, begin, b.add(begin, size), zeros)
                at = place(tiles.index)
                self._store(at, self._added(self._load(at), found))
        with b.loop("%first", "%last", runs=True) as tiles:
            found = self._sum(tiles.index, size * (kernel.channel_blocks - 1), kernel.source.channels, zeros)
            self._finish(tiles.index, unused, self._added(self._load(place(tiles.index)), found))
        return b

    def _added(self, values: Sequence[Value], others: Sequence[Value]) -> list[Value]:
        return [self.b.binary("fadd", value, other) for value, other in zip(values, others, strict=True)]

    def _load(self, pointer: Value) -> list[Value]:
        return [self.b.load(pointer, number * self.b.width) for number in range(self.mr * self.nr)]

    def _store(self, pointer: Value, values: Sequence[Value]) -> None:
        for number, value in enumerate(values):
            self.b.store(value, pointer, number * self.b.width)

    def _first_pixel(self, tile: Index) -> tuple[Index, Index]:
        """Return the number of the first pixel of a tile, and that of the first one that no other tile has."""
        begin = self.b.mul(tile, self.mr)
        if self.kernel.pixels % self.mr == 0:
            return begin, begin
        # The last tile ends with the last pixel: it computes some pixels of the tile before again.
        return _minimum(self.b, begin, self.kernel.pixels - self.mr), begin

    def _sum(self, tile: Index, begin: Index, end: Index, sums: Sequence[Value]) -> list[Value]:
        """Accumulate the input channels from ``begin`` to ``end`` for a register tile."""
        b, layout = self.b, self.kernel.source
        first, _ = self._first_pixel(tile)
        pixels = [self._address("%source", layout, b.add(first, at), self.kernel.stride) for at in range(self.mr)]
        if _is_contiguous(layout, self.kernel.target.size) and self.kernel.stride == (1, 1):
            pixels = [b.offset(pixels[0], at * layout.pixel_stride) for at in range(self.mr)]
        with b.loop(begin, end, carried=sums, runs=True) as channels:
            weights = b.offset("%weights", b.mul(channels.index, self.step))
            for line in range(0, self.step, LINE_FLOATS):
                # May reach beyond the weights: a prefetch of any address is harmless.
                b.prefetch(weights, _PREFETCH_CHANNELS * self.step + line, l1=True)
            loaded = [b.load(weights, vector * b.width) for vector in range(self.nr)]
            found: list[Value] = []
            for pixel, address in enumerate(pixels):
                value = b.broadcast(address, channels.index)
                found += [
                    b.fma(value, weight, channels.carried[pixel * self.nr + at]) for at, weight in enumerate(loaded)
                ]
            channels.next = found
        return channels.results

    def _address(self, pointer: Value, layout: FeatureMapLayout, pixel: Index, stride: Pair) -> Value:
        b, size = self.b, self.kernel.target.size
        if stride == (1, 1) and _is_contiguous(layout, size):
            return b.offset(pointer, b.mul(pixel, layout.pixel_stride))
        row, column = b.divmod(pixel, size[1])
        down, across = b.mul(row, stride[0] * layout.row_stride), b.mul(column, stride[1] * layout.pixel_stride)
        return b.offset(pointer, b.add(down, across))

    def _finish(self, tile: Index, unused: Value, sums: Sequence[Value]) -> None:
        """Apply the epilogue to a register tile, and store it."""
        b, kernel = self.b, self.kernel
        first, own = self._first_pixel(tile)
        for at in range(self.mr):
            pixel = b.add(first, at)
            address = self._address("%target", kernel.target, pixel, (1, 1))
            if first != own:  # not twice: the epilogue may add to what is there
                is_own = b.assign(f"icmp uge i64 {pixel}, {own}")
                address = b.select_pointer(is_own, address, unused)
            for vector in range(self.nr):
                offset = vector * b.width
                slopes = b.offset("%bias", kernel.vectors * b.width + offset)
                added = partial(b.load, address, offset)
                value = pointwise.apply(b, kernel.epilogue, sums[at * self.nr + vector], added, slopes)
                b.store(value, address, offset)


def _minimum(b: IRBuilder, value: Index, most: int) -> Index:
    if isinstance(value, int):
        return min(value, most)
    less = b.assign(f"icmp ult i64 {value}, {most}")
    return b.assign(f"select i1 {less}, i64 {value}, i64 {most}")


def _is_contiguous(layout: FeatureMapLayout, size: Pair) -> bool:
    """Whether the pixels of an image follow each other."""
    return layout.size == size and layout.row_stride == size[1] * layout.pixel_stride


def select_1x1_tile(isa: VectorIsa, pixels: int, vectors: int) -> RegisterTile:
    """Return the tile with the fewest estimated cycles that fits the register file.

    Args:
        isa: the instruction set.
        pixels: of an image.
        vectors: vectors of output channels.
    """
    every = (RegisterTile(mr, nr) for nr in range(1, min(vectors, 4) + 1) for mr in range(1, min(pixels, 16) + 1))

    def cycles(tile: RegisterTile) -> float:
        full, rest = divmod(vectors, tile.nr)
        of_panels = full * tile.cycles + (RegisterTile(tile.mr, rest).cycles if rest else 0)
        return -(-pixels // tile.mr) * of_panels

    fitting = [tile for tile in every if tile.registers <= isa.registers]
    least = min(map(cycles, fitting))
    # Of about equal estimates, the most accumulators: they tolerate more latency of loads.
    return max((tile for tile in fitting if cycles(tile) <= _EQUAL * least), key=lambda tile: tile.mr * tile.nr)
