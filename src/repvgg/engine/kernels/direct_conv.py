"""Direct convolution of any geometry as an implicit GEMM: rows of pixels times panels of output channels.

A unit of work is one output row by one panel. The row is divided into register tiles of ``mr`` neighbouring pixels,
each of which is accumulated over all taps and input channels. There is no im2col: inputs are read in place, NHWC or
NCHW, and the border is zeros in memory (:class:`repvgg.engine.runtime.memory.FeatureMapLayout`). Weights are packed as
(group, panel, tap, input channel, output channel of the panel), so that a kernel reads each panel sequentially.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import ConvGeometry, Epilogue
from repvgg.engine.kernels import pointwise
from repvgg.engine.kernels.base import (
    KERNEL_PARAMETERS,
    LINE_FLOATS,
    POINTER_PARAMETERS,
    Kernel,
    RegisterTile,
    call_for_panel,
    rank_1_update,
)
from repvgg.engine.runtime.memory import FeatureMapLayout

_PREFETCH_PANEL_FLOATS = 2**15  # 128 KiB: the hardware prefetcher fetches smaller panels to L2 in time
_L2_WEIGHT_FLOATS = 180_000  # 720 KB: weights that stay in an L2 of 1 MiB together with some rows of inputs
_L1_PREFETCH_CHANNELS = 48  # distance of the prefetch to L1: about the latency of L2
# Each block of channels is summed separately, and then the sums: a value passes through fewer roundings.
_BLOCK_CHANNELS = 144  # minimum length of a block
_MAX_BLOCKS = 8  # each block is a separate loop in the code
_SEPARATE_SUM_CHANNELS = 96  # shorter blocks add to the running sums: one addition for each accumulator less


@final
@dataclass(frozen=True)
class DirectConvKernel(Kernel):
    """A convolution with bias and epilogue.

    Attributes:
        geometry: kernel size, stride, padding, dilation, groups. The padding is at most the border of ``source``.
        source: layout of the input.
        target: layout of the output.
        tile: register tile.
        epilogue: functions of the outputs.
        width: floats in a vector.
    """

    geometry: ConvGeometry
    source: FeatureMapLayout
    target: FeatureMapLayout
    tile: RegisterTile
    epilogue: Epilogue
    width: int

    @property
    def in_channels(self) -> int:
        """Input channels of a group."""
        return self.source.channels // self.geometry.groups

    @property
    def out_channels(self) -> int:
        """Output channels of a group."""
        return self.target.channels // self.geometry.groups

    @property
    def taps(self) -> int:
        return self.geometry.kernel[0] * self.geometry.kernel[1]

    @property
    def group_vectors(self) -> int:
        """Vectors of output channels of a group; the last one may be partly used."""
        return -(-self.out_channels // self.width)

    @property
    def num_panels(self) -> int:
        """Panels of a group; the last one may have fewer vectors."""
        return -(-self.group_vectors // self.tile.nr)

    @property
    def all_panels(self) -> int:
        return self.geometry.groups * self.num_panels

    @property
    def weights_fit_l2(self) -> bool:
        return self.taps * self.in_channels * self.all_panels * self.tile.nr * self.width <= _L2_WEIGHT_FLOATS

    def describe(self) -> str:
        return ", ".join(filter(None, (f"direct, tiles of {self.tile}", pointwise.describe(self.epilogue))))

    @property
    def padded_channels(self) -> int:
        """Output channels of all groups, each padded to whole vectors: the length of the biases."""
        return self.geometry.groups * self.group_vectors * self.width

    @property
    def units_per_block(self) -> int:
        """Output rows of an image, by each panel of each group."""
        return self.all_panels * self.target.size[0]

    @property
    def num_multiplies(self) -> int:
        """Multiplications of an image, including those by the zeros of the border."""
        return self.taps * self.in_channels * self.target.channels * self.target.size[0] * self.target.size[1]

    def emit(self, name: str) -> list[IRBuilder]:
        """Build a function for a row of a full panel, one for a row of a group's last panel, and the driver.

        Consecutive units reuse what is expensive to load: the weights, with unit ``(panel · batch + image) · rows +
        row``; or, if all weights stay in L2, the inputs, with unit ``(image · rows + row) · panels + panel``.
        """
        shapes = [(self.width,) * self.tile.nr, tuple(self._stored_lanes())]
        rows = [_emit_row(f"{name}_row{at}", self, lanes) for at, lanes in enumerate(dict.fromkeys(shapes))]
        return [*rows, _emit_driver(name, self, [rows[0], rows[-1]])]

    def _stored_lanes(self) -> Iterator[int]:
        """Yield how many lanes of each vector of a group's last panel are stored."""
        unused = self.group_vectors * self.width - self.out_channels
        # Unused lanes go to the padding of the pixel; with several groups, they would overwrite the next one's.
        padded = self.geometry.groups == 1 and self.target.pixel_stride >= self.group_vectors * self.width
        vectors = self.group_vectors - (self.num_panels - 1) * self.tile.nr
        for vector in range(vectors):
            yield self.width - unused if vector == vectors - 1 and not padded else self.width


def _emit_driver(name: str, kernel: DirectConvKernel, rows: list[IRBuilder]) -> IRBuilder:
    b = IRBuilder(name, KERNEL_PARAMETERS, kernel.width)
    geometry, source, target = kernel.geometry, kernel.source, kernel.target
    with b.loop("%begin", "%end") as units:
        # Two divisions cost little compared to a row; incrementing the indices instead would need branches.
        if kernel.weights_fit_l2:
            place, panel = b.divmod(units.index, kernel.all_panels)
        else:
            panel, place = b.divmod(units.index, b.mul("%batch", target.size[0]))
        image, row = b.divmod(place, target.size[0])
        group, panel_of_group = b.divmod(panel, kernel.num_panels)
        channel = b.mul(panel_of_group, kernel.tile.nr * kernel.width)
        padded_channel = b.add(b.mul(group, kernel.group_vectors * kernel.width), channel)
        in_channel = b.mul(group, kernel.in_channels * source.channel_stride)
        read = b.add(_row_offset(b, image, row, source, geometry.stride[0]), in_channel)
        padding = geometry.padding[0] * source.row_stride + geometry.padding[1] * source.pixel_stride
        to_row = _row_offset(b, image, row, target, 1)
        written = b.add(to_row, b.add(b.mul(group, kernel.out_channels), channel))
        arguments = (
            ("ptr", b.offset("%source", b.add(read, source.interior_offset - padding))),
            ("ptr", b.offset("%target", b.add(written, target.interior_offset))),
            ("ptr", b.offset("%weights", b.mul(padded_channel, kernel.taps * kernel.in_channels))),
            ("ptr", b.offset("%bias", padded_channel)),
            ("i64", place),
        )
        call_for_panel(b, panel_of_group, kernel.num_panels, rows, arguments)
    return b


def _row_offset(b: IRBuilder, image: Index, row: Index, layout: FeatureMapLayout, stride: int) -> Index:
    return b.add(b.mul(image, layout.image_stride), b.mul(row, stride * layout.row_stride))


def _emit_row(name: str, kernel: DirectConvKernel, stored_lanes: tuple[int, ...]) -> IRBuilder:
    """Build one output row of a panel, of which some lanes of each vector are stored."""
    b = IRBuilder(name, (*POINTER_PARAMETERS, ("i64", "place")), kernel.width, internal=True)
    row = _RowBuilder(b, kernel, stored_lanes, _next_panel(b, kernel, len(stored_lanes)))
    # The rest of a row gets a narrower tile, which takes less time than a full one with masked stores.
    columns, mr = kernel.target.size[1], min(kernel.tile.mr, kernel.target.size[1])
    whole = columns // mr * mr
    if whole > mr:
        with b.loop(0, whole, mr) as tiles:
            row.emit_tile(tiles.index, mr)
    else:
        row.emit_tile(0, mr)
    if columns > whole:
        row.emit_tile(whole, columns - whole)
    return b


def _next_panel(b: IRBuilder, kernel: DirectConvKernel, nr: int) -> Value | None:
    """Return the address in the next panel that a row prefetches from, or None if panels are small.

    A row prefetches a line for each channel of each tap, so the first rows of an image prefetch the whole panel.
    """
    step, count = nr * kernel.width, kernel.taps * kernel.in_channels
    if kernel.weights_fit_l2 or step * count < _PREFETCH_PANEL_FLOATS:
        return None
    rows = -(-step // LINE_FLOATS)
    done = b.assign(f"icmp ugt i64 %place, {rows - 1}")
    part = b.assign(f"select i1 {done}, i64 {rows - 1}, i64 %place")
    return b.offset("%weights", b.add(b.mul(part, count * LINE_FLOATS), count * step))


@final
@dataclass(frozen=True)
class _RowBuilder:
    """Builder of an output row of a panel."""

    b: IRBuilder
    kernel: DirectConvKernel
    stored_lanes: tuple[int, ...]  # lanes to store, for each vector of the panel
    prefetched: Value | None  # address in the next panel, or None

    @property
    def nr(self) -> int:
        """Vectors of the panel."""
        return len(self.stored_lanes)

    @property
    def step(self) -> int:
        """Floats of the weights of one channel of one tap."""
        return self.nr * self.kernel.width

    def emit_tile(self, column: Index, mr: int) -> None:
        """Build one register tile, from biases to stores, that begins at ``column`` of the row."""
        b, kernel, nr = self.b, self.kernel, self.nr
        # Accumulators start as the bias, which saves an addition for each of them at the end.
        biases = [b.load("%bias", vector * kernel.width) for vector in range(nr)]
        source = b.offset("%source", b.mul(column, kernel.geometry.stride[1] * kernel.source.pixel_stride))
        first = [biases[vector] for _ in range(mr) for vector in range(nr)]
        sums = self._sum_planar(source, first) if kernel.source.planar else self._sum(source, first)
        target = b.offset("%target", b.mul(column, kernel.target.pixel_stride))
        for place, value in enumerate(sums):
            pixel, vector = divmod(place, nr)
            offset, lanes = pixel * kernel.target.pixel_stride + vector * kernel.width, self.stored_lanes[vector]
            value = self._finish(value, vector, target, offset)
            b.store(value, target, offset, lanes)

    def _finish(self, value: Value, vector: int, target: Value, offset: int) -> Value:
        """Apply the epilogue to the sums of a vector of channels of a pixel."""
        b, kernel = self.b, self.kernel
        slopes = (
            b.offset("%bias", kernel.padded_channels + vector * kernel.width)
            if any(one.kind == "prelu" for one in kernel.epilogue)
            else None
        )
        added = partial(b.load, target, offset, self.stored_lanes[vector])
        return pointwise.apply(b, kernel.epilogue, value, added, slopes)

    def _sum_planar(self, source: Value, sums: list[Value]) -> list[Value]:
        """Accumulate NCHW inputs, which have few channels: loops over rows of taps, channels and taps."""
        # The taps are a loop, not unrolled: LLVM would share the inputs of neighbouring pixels, and run out of
        # registers.
        b, geometry, layout = self.b, self.kernel.geometry, self.kernel.source
        stride, in_channels = geometry.stride[1] * layout.pixel_stride, self.kernel.in_channels
        with b.loop(0, geometry.kernel[0], carried=sums) as rows:
            row = b.mul(rows.index, geometry.dilation[0] * layout.row_stride)
            with b.loop(0, in_channels, carried=rows.carried) as channels:
                read = b.offset(source, b.add(row, b.mul(channels.index, layout.channel_stride)))
                with b.loop(0, geometry.kernel[1], carried=channels.carried) as taps:
                    pixel = b.offset(read, b.mul(taps.index, geometry.dilation[1] * layout.pixel_stride))
                    tap = b.add(b.mul(rows.index, geometry.kernel[1]), taps.index)
                    number = b.add(b.mul(tap, in_channels), channels.index)
                    weights = b.offset("%weights", b.mul(number, self.step))
                    taps.next = rank_1_update(b, pixel, stride, weights, taps.carried, self.nr)
                channels.next = taps.results
            rows.next = channels.results
        return rows.results

    def _sum(self, source: Value, sums: list[Value]) -> list[Value]:
        """Accumulate NHWC inputs: loops over rows of taps, taps and channels."""
        b, geometry, layout = self.b, self.kernel.geometry, self.kernel.source
        taps, length = geometry.kernel[1], self.kernel.in_channels
        if geometry.dilation[1] == 1 and length == layout.pixel_stride:
            # The channels of the taps of a row are contiguous in inputs and weights: one longer loop.
            taps, length = 1, taps * length
        with b.loop(0, geometry.kernel[0], carried=sums) as tap_rows:
            read = b.mul(tap_rows.index, geometry.dilation[0] * layout.row_stride)
            with b.loop(0, taps, carried=tap_rows.carried) as row:
                offset = b.add(read, b.mul(row.index, geometry.dilation[1] * layout.pixel_stride))
                tap = b.offset(source, offset)
                first = b.mul(b.add(b.mul(tap_rows.index, taps), row.index), length)
                row.next = self._sum_blocks(tap, first, length, row.next)
            tap_rows.next = row.results
        return tap_rows.results

    def _sum_blocks(self, source: Value, first: Index, length: int, sums: list[Value]) -> list[Value]:
        """Accumulate the channels of a tap, or of a row of taps; ``first`` is the number of channel 0."""
        b, blocks = self.b, _channel_blocks(length)
        size = blocks[0][1]
        if size * len(blocks) < length:
            for begin, end in blocks:
                sums = self._sum_block(source, first, begin, end - begin, sums)
            return sums
        if len(blocks) == 1:
            return self._sum_block(source, first, 0, length, sums)
        with b.loop(0, len(blocks), carried=sums) as loop:  # equal blocks share their code
            loop.next = self._sum_block(source, first, b.mul(loop.index, size), size, loop.carried)
        return loop.results

    def _sum_block(self, source: Value, first: Index, begin: Index, length: int, sums: list[Value]) -> list[Value]:
        """Accumulate ``length`` channels from ``begin`` on."""
        b, kernel = self.b, self.kernel
        separate = length >= _SEPARATE_SUM_CHANNELS
        source, first = b.offset(source, begin), b.add(first, begin)
        with b.loop(0, length, carried=["zeroinitializer"] * len(sums) if separate else sums) as channels:
            number = b.add(first, channels.index)
            if self.prefetched:
                b.prefetch(self.prefetched, b.mul(number, LINE_FLOATS))
            weights = b.offset("%weights", b.mul(number, self.step))
            stride = kernel.geometry.stride[1] * kernel.source.pixel_stride
            for line in range(0, self.step, LINE_FLOATS):
                # May reach beyond the weights: a prefetch of any address is harmless.
                b.prefetch(weights, _L1_PREFETCH_CHANNELS * self.step + line, l1=True)
            inputs = b.offset(source, channels.index)
            channels.next = rank_1_update(b, inputs, stride, weights, channels.carried, self.nr)
        if not separate:
            return channels.results
        return [b.binary("fadd", total, value) for total, value in zip(sums, channels.results, strict=True)]


def _channel_blocks(channels: int) -> list[tuple[int, int]]:
    """Divide the channels into blocks (begin, end): of equal length if few more channels in each allow it."""
    most = min(max(1, channels // _BLOCK_CHANNELS), _MAX_BLOCKS)
    count = next((count for count in range(most, most // 2, -1) if channels % count == 0), most)
    return list(itertools.pairwise(channels * block // count for block in range(count + 1)))


def select_register_tile(isa: VectorIsa, columns: int, vectors: int) -> RegisterTile:
    """Return the tile with the fewest estimated cycles that fits the register file.

    Args:
        isa: the instruction set.
        columns: pixels of an output row.
        vectors: vectors of output channels of a group.
    """
    every = (RegisterTile(mr, nr) for nr in range(1, min(vectors, 8) + 1) for mr in range(1, min(columns, 16) + 1))
    fitting = (tile for tile in every if tile.registers <= isa.registers)
    # Among equal estimates, more accumulators: they tolerate more latency of loads.
    return min(fitting, key=lambda tile: (estimate_row_cycles(tile, columns, vectors), -tile.mr * tile.nr))


def estimate_row_cycles(tile: RegisterTile, columns: int, vectors: int) -> float:
    """Return the estimated cycles of one channel of one tap, for a row of ``columns`` pixels and all panels."""
    rows, panels = _full_and_rest(columns, tile.mr), _full_and_rest(vectors, tile.nr)
    return sum(RegisterTile(mr, nr).cycles * many * times for mr, many in rows for nr, times in panels)


def _full_and_rest(length: int, size: int) -> list[tuple[int, int]]:
    """Divide a length into parts of ``size`` and a rest: (size, how many) of both."""
    return [(part, many) for part, many in ((size, length // size), (length % size, 1)) if part and many]
