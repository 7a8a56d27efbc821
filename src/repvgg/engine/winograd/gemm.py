"""Batched GEMMs in the transformed domain: for each tile element, (tile, input channel) by (input, output channel).

Blocking, from the inside out:

* a register tile of ``mr`` tiles by ``nr`` vectors of output channels: ``mr · nr`` accumulators, ``nr`` weights and a
  broadcast input fill the register file;
* a block of ``kc`` input channels, whose weights for one panel (``kc · nr`` vectors) stay in L1 while all tiles of the
  block pass. Products of several blocks are added in memory: a value of this two-level sum passes through fewer
  roundings;
* one panel of ``nr`` vectors, one tile element after the other.

Filters are stored either fully transformed, ``G g Gᵀ`` as (tile element, input channel, output channel), or as ``G g``,
(row of elements, input channel, 3 columns, output channel): half to two thirds of the bytes, at the cost of the
transform ``· Gᵀ`` for each block of channels into an L1 scratch buffer (:class:`OnTheFlyGemm`). That pays where weights
come from memory and few tiles use them. Strides and offsets are in floats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import TypeAlias, final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.kernels.base import LINE_FLOATS, RegisterTile, balanced_tiles, rank_1_update
from repvgg.engine.winograd.filters import TAPS, Winograd2d
from repvgg.engine.winograd.tiling import TileSubset, Tiling, TransformedTiles, tile_subsets
from repvgg.engine.winograd.transforms import multiply

# Channel blocks (kc). Long blocks save stores of partial sums; short ones round less and leave L1 to the tiles.
MAX_CHANNEL_BLOCK = 64
_KC_PREFETCHED_TILES = 48  # where tiles are prefetched: their lines share L1 with the weights
_SCRATCH_FLOATS = 2**13  # 32 KiB, a small L1: filters of a block, transformed on the fly
_INTERLEAVED_FLOATS = 5 * 2**11  # 40 KiB: filters of an interleaved block, stored and transformed ones together
_INTERLEAVED_REGISTERS = 5  # of the interleaved filter transform: p², p, and three columns
_RING_COLUMNS = 4  # transformed columns in scratch if interleaved: the pair in use, and the next one


def channel_block(channels: int, *, prefetch_tiles: bool) -> int:
    """Return kc, the length of a channel block; the last block may be shorter."""
    return _divide_evenly(channels, _KC_PREFETCHED_TILES if prefetch_tiles else MAX_CHANNEL_BLOCK)


def on_the_fly_channel_block(
    channels: int, winograd: Winograd2d, panel_floats: int, free_vector_registers: int
) -> tuple[int, bool]:
    """Return kc for filters that are transformed on the fly, and whether the transform is interleaved with the GEMM.

    It is interleaved if enough vector registers are free, and all blocks have the same length.

    Args:
        channels: input channels of a group.
        winograd: the transform.
        panel_floats: output channels of a panel.
        free_vector_registers: left by the register tile.
    """
    if winograd.columns.transformed and free_vector_registers >= _INTERLEAVED_REGISTERS:
        # Of each channel: G g of this block and of the next one, and the ring of transformed columns.
        kc = _divide_evenly(
            channels, min(MAX_CHANNEL_BLOCK, max(1, _INTERLEAVED_FLOATS // ((2 * TAPS + _RING_COLUMNS) * panel_floats)))
        )
        if channels % kc == 0:
            return kc, True
    most = max(1, _SCRATCH_FLOATS // (winograd.columns.inputs * panel_floats))
    return _divide_evenly(channels, min(MAX_CHANNEL_BLOCK, most)), False


def _divide_evenly(length: int, most: int) -> int:
    """Return a part of at most ``most`` that divides ``length``, if up to a quarter more parts allow it."""
    fewest = -(-length // most)
    counts = range(fewest, fewest + fewest // 4 + 1)
    return -(-length // next((count for count in counts if length % count == 0), fewest))


# A panel by all tiles of a block


@final
@dataclass(frozen=True)
class ChannelBlock:
    """Input channels [begin, end) that are summed in registers; the ``first`` block has no partial sums to add."""

    begin: Index
    end: Index
    length: int
    first: bool


@final
@dataclass(frozen=True)
class WeightStream:
    """Weights of a channel block, and the weights to prefetch to L1 at the same time."""

    address: Value  # of the first vector
    stride: int  # from one channel to the next
    prefetched: Value  # address of the first float to prefetch
    prefetched_floats: int  # floats to prefetch for each channel; 0 for none


@final
@dataclass(frozen=True)
class _Rows:
    """``count`` register tiles, one after the other, each of ``mr`` Winograd tiles."""

    mr: int
    count: Index
    source: Value  # address of the first channel of the block in the first transformed tile
    target: Value  # address of its products
    ahead: Value  # address of the inputs to prefetch, those of a later block of the first tile


#: Builds work that is interleaved with a rank-1 update, given the index of the channel in its block.
InterleavedWork: TypeAlias = Callable[[Value], None]


@final
@dataclass(frozen=True)
class PanelGemm:
    """GEMM of one panel of output channels and the tiles of a block."""

    winograd: Winograd2d  # F(m x n, 3x3)
    tile: RegisterTile  # ``mr`` counts Winograd tiles
    nr: int  # vectors of this panel; the last panel of a group may have fewer than ``tile.nr``
    tiling: Tiling
    channels: int  # input channels of a group
    prefetch_tiles: bool  # whether transformed tiles come from L3, so that the next ones are prefetched to L2
    free_vector_registers: int  # left by the register tile, for interleaved work

    @property
    def subsets(self) -> tuple[tuple[TileSubset, ...], ...]:
        """The tile elements by rows and columns, with the tiles that have them."""
        return tile_subsets(self.winograd, self.tiling)

    def channel_blocks(self, b: IRBuilder, kc: int) -> Iterator[ChannelBlock]:
        """Yield the blocks of ``kc`` channels; those between the first and a shorter last one share a loop."""
        whole, rest = divmod(self.channels, kc)
        yield ChannelBlock(0, kc, kc, first=True)  # stores sums without loading: products need not be zeroed
        if whole > 1:
            with b.loop(1, whole) as blocks:
                begin = b.mul(blocks.index, kc)
                yield ChannelBlock(begin, b.add(begin, kc), kc, first=False)
        if rest:
            yield ChannelBlock(whole * kc, self.channels, rest, first=False)

    def accumulate(
        self,
        b: IRBuilder,
        block: ChannelBlock,
        subset: TileSubset,
        inputs: TransformedTiles,
        products: TransformedTiles,
        weights: WeightStream,
        prefetched_channel: Index,
        interleaved: InterleavedWork | None = None,
    ) -> None:
        """Add a channel block to the products of one tile element.

        Args:
            b: the function.
            block: the channels.
            subset: the tiles.
            inputs: transformed inputs of the tile element.
            products: products of the tile element.
            weights: of the block.
            prefetched_channel: offset of the inputs to prefetch, if :attr:`prefetch_tiles`.
            interleaved: other work, for each channel of each register tile.
        """
        begin = subset.first
        for count, tile in balanced_tiles(subset.count, self.tile):
            source = b.offset(inputs.address, begin * inputs.tile_stride)
            read, ahead = b.offset(source, block.begin), b.offset(source, prefetched_channel)
            rows = _Rows(tile.mr, count, read, b.offset(products.address, begin * self.nr * b.width), ahead)
            if interleaved:
                self._emit_rows(b, block, rows, inputs.tile_stride, weights, interleaved)
            else:
                self._call_rows(b, block, rows, inputs.tile_stride, weights)
            begin += count * tile.mr

    def _call_rows(
        self, b: IRBuilder, block: ChannelBlock, rows: _Rows, tile_stride: int, weights: WeightStream
    ) -> None:
        """Call the function for register tiles: the parts of the tile elements and blocks share a few of them."""
        facts = (rows.mr, self.nr, block.length, tile_stride, weights.stride, weights.prefetched_floats)
        kind = f"{'first' if block.first else 'add'}{'_prefetching' * self.prefetch_tiles}"

        def build(inner: IRBuilder) -> None:
            own = replace(rows, count="%count", source="%source", target="%target", ahead="%ahead")
            stream = replace(weights, address="%weights", prefetched="%prefetched")
            self._emit_rows(inner, block, own, tile_stride, stream)

        arguments: list[tuple[str, str, Index]] = [
            ("ptr", "source", rows.source),
            ("ptr", "target", rows.target),
            ("ptr", "weights", weights.address),
            ("ptr", "prefetched", weights.prefetched),
            ("ptr", "ahead", rows.ahead),
            ("i64", "count", rows.count),
        ]
        b.call_shared(f"gemm_{kind}_{'_'.join(map(str, facts))}", arguments, build)

    def _emit_rows(
        self,
        b: IRBuilder,
        block: ChannelBlock,
        rows: _Rows,
        tile_stride: int,
        weights: WeightStream,
        interleaved: InterleavedWork | None = None,
    ) -> None:
        # The panel's weights of this block stay in L1; tiles stream past them, and their sums to L2.
        with b.loop(0, rows.count, runs=True) as at:
            first = b.mul(at.index, rows.mr * tile_stride)
            source = b.offset(rows.source, first)
            target = b.offset(rows.target, b.mul(at.index, rows.mr * self.nr * b.width))
            if self.prefetch_tiles:
                ahead = b.offset(rows.ahead, first)
                for row in range(rows.mr):
                    for line in range(0, block.length, LINE_FLOATS):
                        b.prefetch(ahead, row * tile_stride + line)
            # mr · nr accumulators live in registers for all kc channels: the only stores are those below.
            sums = self._sum_block(b, rows.mr, source, tile_stride, block.length, weights, interleaved)
            for place, value in enumerate(sums):
                lane = place * b.width
                total = value if block.first else b.binary("fadd", value, b.load(target, lane))
                b.store(total, target, lane)

    def _sum_block(
        self,
        b: IRBuilder,
        mr: int,
        read: Value,
        tile_stride: int,
        length: int,
        weights: WeightStream,
        interleaved: InterleavedWork | None,
    ) -> list[Value]:
        with b.loop(0, length, carried=["zeroinitializer"] * (mr * self.nr)) as channels:
            address = b.offset(weights.address, b.mul(channels.index, weights.stride))
            # A few lines for each channel: all at once would fill the line fill buffers and stall the loads.
            for line in range(0, weights.prefetched_floats, LINE_FLOATS):
                ahead = b.add(b.mul(channels.index, weights.prefetched_floats), line)
                b.prefetch(b.offset(weights.prefetched, ahead), l1=True)
            source = b.offset(read, channels.index)
            channels.next = rank_1_update(b, source, tile_stride, address, channels.carried, self.nr)
            if interleaved:
                interleaved(channels.index)
        return channels.results


# All tile elements


@final
@dataclass(frozen=True)
class BatchedGemm:
    """The GEMMs of all tile elements, for one panel and the tiles of a block."""

    panel: PanelGemm
    on_the_fly: bool  # whether filters are stored as ``G g``

    def scratch_floats(self, width: int) -> int:
        """Return the floats of scratch memory that :meth:`emit` needs, at least 1."""
        return OnTheFlyGemm(self.panel, width).scratch_floats if self.on_the_fly else 1

    def emit(
        self, b: IRBuilder, inputs: TransformedTiles, weights: Value, products: TransformedTiles, scratch: Value
    ) -> None:
        """Build the GEMMs. Weights are prefetched to L1 during the preceding channel block."""
        if self.on_the_fly:
            OnTheFlyGemm(self.panel, b.width).emit(b, inputs, weights, products, scratch)
            return
        panel, across = self.panel, self.panel.winograd.inputs[1]
        element_floats = panel.channels * panel.nr * b.width
        for row_subsets in panel.subsets:
            with b.loop(row_subsets[0].rows.start, row_subsets[0].rows.stop) as rows:
                first = b.mul(rows.index, across)
                for subset in row_subsets:
                    with b.loop(subset.columns.start, subset.columns.stop) as columns:
                        element = b.add(first, columns.index)
                        read, written = inputs.at_element(b, element), products.at_element(b, element)
                        self._emit_element(b, subset, read, written, b.offset(weights, b.mul(element, element_floats)))

    def _emit_element(
        self, b: IRBuilder, subset: TileSubset, inputs: TransformedTiles, products: TransformedTiles, weights: Value
    ) -> None:
        panel, step = self.panel, self.panel.nr * b.width
        for block in panel.channel_blocks(b, channel_block(panel.channels, prefetch_tiles=panel.prefetch_tiles)):
            address = b.offset(weights, b.mul(block.begin, step))
            # Panels are contiguous, so the next block's weights follow these, across tile elements as well.
            stream = WeightStream(address, step, b.offset(address, block.length * step), step)
            ahead = self._next_channel(b, block.end, inputs.element_stride)
            panel.accumulate(b, block, subset, inputs, products, stream, ahead)

    def _next_channel(self, b: IRBuilder, channel: Index, element_stride: int) -> Index:
        """Return the offset of a channel; after the last one, that of the first channel of the next tile element."""
        if isinstance(channel, int):
            return element_stride if channel == self.panel.channels else channel
        last = b.assign(f"icmp eq i64 {channel}, {self.panel.channels}")
        return b.assign(f"select i1 {last}, i64 {element_stride}, i64 {channel}")


# Filters transformed on the fly


@final
@dataclass(frozen=True)
class _ColumnGroup:
    """Columns of tile elements that share a loop."""

    columns: range  # of the tile elements
    subset: TileSubset  # the tiles that have them
    tap: int | None  # the tap that the filters of this column are equal to, or None if they are transformed
    before: int  # number of columns that are computed before these
    prefetches: bool  # whether the loop prefetches weights
    interleaves: bool  # whether the loop transforms filters of the next columns


@final
@dataclass(frozen=True)
class _BlockFilters:
    """Addresses of the filters of a channel block."""

    stored: Value  # ``G g``, (input channel, 3, output channel)
    transformed: Value  # ``G g Gᵀ``, (column, input channel, output channel)
    next_stored: Value  # of the next block to transform (after the last one, of any)
    points: Value  # p² and p of each pair of columns ±p


@final
class OnTheFlyGemm:
    """GEMMs with filters stored as ``G g``: each channel block is multiplied by Gᵀ into L1 scratch just before its use.

    Tile elements whose column of ``G g Gᵀ`` is one of the three stored columns (points 0 and ∞) use it in place.

    Where the register tile leaves registers free, the transform is interleaved with the GEMMs, whose inner loop has
    unused store slots: the GEMMs of a pair of columns ±p compute the next pair, and those of the first column in place
    compute the first pair of the next block. Four columns of scratch are then enough.
    """

    def __init__(self, panel: PanelGemm, width: int) -> None:
        self._panel, self._step = panel, panel.nr * width
        self._kc, self._interleaves = on_the_fly_channel_block(
            panel.channels, panel.winograd, self._step, panel.free_vector_registers
        )
        self._columns, self._transformed = panel.winograd.columns, panel.winograd.columns.transformed

    @property
    def scratch_floats(self) -> int:
        return self._filter_floats + LINE_FLOATS  # transformed filters, then the points

    @property
    def _filter_floats(self) -> int:
        count = len(self._transformed)
        return (min(count, _RING_COLUMNS) if self._interleaves else count) * self._kc * self._step

    def emit(
        self, b: IRBuilder, inputs: TransformedTiles, weights: Value, products: TransformedTiles, scratch: Value
    ) -> None:
        """Build the GEMMs of all tile elements. Weights are prefetched to L1 during the preceding channel block."""
        # The lines of an input channel of the next block are spread over the first columns of this one.
        lines = -(-TAPS * self._step // LINE_FLOATS)
        lines_per_column = -(-lines // self._columns.inputs)
        points = b.offset(scratch, self._filter_floats)
        # No GEMM precedes the first pair of the first block, so it cannot be interleaved.
        if self._interleaves:
            self._store_points(b, points)
            self._transform_block(b, weights, scratch, self._kc)
        for row_subsets in self._panel.subsets:
            groups = list(self._column_groups(row_subsets, -(-lines // lines_per_column)))
            with b.loop(row_subsets[0].rows.start, row_subsets[0].rows.stop) as rows:
                first = b.mul(rows.index, self._columns.inputs)
                read, written = inputs.at_element(b, first), products.at_element(b, first)
                row = b.offset(weights, b.mul(rows.index, TAPS * self._panel.channels * self._step))
                for block in self._panel.channel_blocks(b, self._kc):
                    filters = self._prepare_block(b, block, row, weights, scratch, points)
                    for group in groups:
                        self._emit_group(b, block, group, read, written, filters, lines_per_column * LINE_FLOATS)

    def _prepare_block(
        self, b: IRBuilder, block: ChannelBlock, row: Value, weights: Value, scratch: Value, points: Value
    ) -> _BlockFilters:
        """Return the filters of a block, and transform them unless the preceding block has done so."""
        stored = b.offset(row, b.mul(block.begin, TAPS * self._step))
        next_stored = b.offset(stored, block.length * TAPS * self._step)
        if self._interleaves:
            # The last block of the last row transforms the first ones again, to stay within the weights of the panel.
            end = b.offset(weights, self._panel.winograd.inputs[0] * TAPS * self._panel.channels * self._step)
            next_stored = b.select_pointer(b.assign(f"icmp eq ptr {next_stored}, {end}"), weights, next_stored)
        elif self._transformed:
            self._transform_block(b, stored, scratch, block.length)
        return _BlockFilters(stored, scratch, next_stored, points)

    def _column_groups(self, row_subsets: Sequence[TileSubset], prefetching: int) -> Iterator[_ColumnGroup]:
        """Yield all columns, transformed ones first; the first ``prefetching`` of them prefetch weights."""
        matrix, transformed, before = self._columns.filter_matrix, self._transformed, 0
        in_place = [column for column in range(len(matrix)) if column not in transformed]
        for columns in (transformed, *(range(column, column + 1) for column in in_place)):
            edges = {columns.start + prefetching - before, *(subset.columns.stop for subset in row_subsets)}
            edges |= {columns.stop - 2} if self._interleaves else set()
            cuts = sorted({columns.start, columns.stop, *(edge for edge in edges if edge in columns)})
            for begin, end in itertools.pairwise(cuts):
                subset = next(subset for subset in row_subsets if begin in subset.columns)
                tap = None if columns is transformed else matrix[begin].index(1)
                # All pairs but the last compute the next pair; the first column in place computes the next block's.
                interleaves = self._interleaves and (before < len(transformed) - 2 or before == len(transformed))
                yield _ColumnGroup(range(begin, end), subset, tap, before, before < prefetching, interleaves)
                before += end - begin

    def _emit_group(
        self,
        b: IRBuilder,
        block: ChannelBlock,
        group: _ColumnGroup,
        inputs: TransformedTiles,
        products: TransformedTiles,
        filters: _BlockFilters,
        prefetched_floats: int,
    ) -> None:
        """Build the GEMMs of some columns; ``inputs`` and ``products`` are those of the row of tile elements."""
        step, kc, prefetched_floats = self._step, self._kc, prefetched_floats * group.prefetches
        with b.loop(group.columns.start, group.columns.stop) as columns:
            number = b.add(columns.index, group.before - group.columns.start)
            ahead = b.add(block.length * TAPS * step, b.mul(number, block.length * prefetched_floats))
            prefetched = b.offset(filters.stored, ahead)
            if group.tap is None:
                # Pairs alternate between the two halves of the ring.
                slot = b.assign(f"and i64 {number}, {_RING_COLUMNS - 1}") if self._interleaves else number
                address = b.offset(filters.transformed, b.mul(slot, kc * step))
                stream = WeightStream(address, step, prefetched, prefetched_floats)
            else:
                address = b.offset(filters.stored, group.tap * step)
                stream = WeightStream(address, TAPS * step, prefetched, prefetched_floats)
            interleaved = self._next_pair(b, group, number, filters) if group.interleaves else None
            read, written = inputs.at_element(b, columns.index), products.at_element(b, columns.index)
            next_element = b.add(block.begin, inputs.element_stride)
            self._panel.accumulate(b, block, group.subset, read, written, stream, next_element, interleaved)

    def _next_pair(self, b: IRBuilder, group: _ColumnGroup, number: Index, filters: _BlockFilters) -> InterleavedWork:
        """Return the work that computes the next pair of columns: half of its vectors with each column of this pair.

        The first column in place computes the first pair of the next block alone.
        """
        nr, step = self._panel.nr, self._step
        if group.tap is not None:
            points = self._load_points(b, filters, 0)
            return partial(self._emit_pair, b, filters.next_stored, filters.transformed, nr, points)
        half = -(-nr // 2)  # half of the work with each column of a pair, so that both loops have equal length
        before, second = b.divmod(number, 2)
        vector, pair = b.mul(second, (nr - half) * b.width), b.add(before, 1)
        slot = b.mul(b.assign(f"and i64 {pair}, 1"), 2 * self._kc * step)
        points = self._load_points(b, filters, b.mul(pair, 2))
        written = b.offset(filters.transformed, b.add(slot, vector))
        return partial(self._emit_pair, b, b.offset(filters.stored, vector), written, half, points)

    def _load_points(self, b: IRBuilder, filters: _BlockFilters, place: Index) -> list[Value]:
        address = b.offset(filters.points, place)
        return [b.broadcast(address, number) for number in (0, 1)]

    def _emit_pair(
        self, b: IRBuilder, read: Value, written: Value, vectors: int, points: Sequence[Value], channel: Value
    ) -> None:
        """Compute some vectors of an input channel in columns ±p: g0 + p² g2 ± p g1, or for stride 2 g0 ± p g2."""
        square, point = points
        read = b.offset(read, b.mul(channel, TAPS * self._step))
        written = b.offset(written, b.mul(channel, self._step))
        for vector in range(0, vectors * b.width, b.width):
            outer, inner, last = (b.load(read, tap * self._step + vector) for tap in range(TAPS))
            shared, negated = outer, last
            if self._columns.stride == 1:
                shared, negated = b.fma(last, square, outer), inner  # the even part of the polynomial in p, and the odd
            for column, value in enumerate((negated, b.assign(f"fneg {b.vector} {negated}"))):
                b.store(b.fma(value, point, shared), written, column * self._kc * self._step + vector)

    def _store_points(self, b: IRBuilder, points: Value) -> None:
        """Store p² and p of each pair of columns, so that one loop serves all pairs."""
        for column in self._transformed[::2]:
            _, inner, last = self._columns.filter_matrix[column]
            square, point = (last, inner) if self._columns.stride == 1 else (Fraction(0), last)
            for at, number in enumerate((square, point)):
                b.store_float(float(number), points, column - self._transformed.start + at)

    def _transform_block(self, b: IRBuilder, stored: Value, scratch: Value, count: int) -> None:
        """Multiply the filters of ``count`` channels by Gᵀ; only the first pair of columns if interleaved."""
        columns = self._transformed[:2] if self._interleaves else self._transformed
        matrix, column_floats = self._columns.filter_matrix[columns.start : columns.stop], self._kc * self._step
        with b.loop(0, count) as channels:
            read = b.offset(stored, b.mul(channels.index, TAPS * self._step))
            written = b.offset(scratch, b.mul(channels.index, self._step))
            for vector in range(0, self._step, b.width):
                values = [b.load(read, tap * self._step + vector) for tap in range(TAPS)]
                for column, value in enumerate(multiply(b, matrix, values)):
                    b.store(value, written, column * column_floats + vector)
