"""A panel of weights and the tiles that it is multiplied with: what all ways to go through it have in common.

How many channels are summed in one go.

Products with kernels that are transformed across while they are used.

Kernels lie as (row, input channel, column of 3, output channel): a third to a half of the bytes come from afar. Each
run of channels is transformed across into memory that stays in the first cache. Columns that are one of the three are
used as they lie.

Where registers are free, products transform kernels beside their own work, for that has to store them, which products
do not: while a pair of columns ±p is used, the next pair is made, and while the first column is used that is one of the
three, the first pair of the next run.

Products in Winograd's domain, place by place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import TypeAlias, final

from repvgg.engine.codegen.ir_builder import Function, Index, Value
from repvgg.engine.kernels.base import Tile, equal_tiles, multiply_add
from repvgg.engine.winograd.filters import TAPS, Form
from repvgg.engine.winograd.tiling import LINE, Operand, Share, Tiling, shares
from repvgg.engine.winograd.transforms import transform


@final
@dataclass(frozen=True)
class Run:
    """Channels that are summed in one go.

    Attributes:
        begin: the first.
        end: one behind the last.
        length: how many.
        first: whether there are no sums before them.
    """

    begin: Index
    end: Index
    length: int
    first: bool


@final
@dataclass(frozen=True)
class Lanes:
    """Weights of a run of channels.

    Attributes:
        at: address of the first.
        step: floats from one channel to the next.
        later: address of those that are fetched meanwhile.
        fetched: floats of them for each channel.
    """

    at: Value
    step: int
    later: Value
    fetched: int


#: Writes what else happens while a channel, of this number in its run, is added.
Meanwhile: TypeAlias = Callable[[Value], None]


@final
@dataclass(frozen=True)
class Panel:
    """Some vectors of output channels.

    Attributes:
        form: F(m x n, 3x3).
        tile: registers; its pixels are tiles here.
        vectors: of output channels.
        tiling: the tiles; all those of a piece are multiplied.
        channels: of the input.
        cold: whether the tiles come from the third cache: then the next ones are fetched to the second.
        room: vectors that are free for the kernels that come next.
    """

    form: Form
    tile: Tile
    vectors: int
    tiling: Tiling
    channels: int
    cold: bool
    room: int

    @property
    def shares(self) -> tuple[tuple[Share, ...], ...]:
        """The places by rows and columns, and which tiles have them."""
        return shares(self.form, self.tiling)

    def runs(self, write: Function, length: int) -> Iterator[Run]:
        """All runs of so many channels; those between the first and a shorter last one are written once, in a loop."""
        whole, rest = divmod(self.channels, length)
        yield Run(0, length, length, first=True)
        if whole > 1:
            with write.loop(1, whole) as runs:
                begin = write.mul(runs.index, length)
                yield Run(begin, write.add(begin, length), length, first=False)
        if rest:
            yield Run(whole * length, self.channels, rest, first=False)

    def add(
        self,
        write: Function,
        run: Run,
        share: Share,
        tiles: tuple[Operand, Operand],
        lanes: Lanes,
        ahead: Index,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Add a run of channels to the sums of all tiles of a place: inputs and products of the place.

        As many channels are fetched of each tile, from ``ahead`` on. What happens meanwhile happens for each tile of
        registers.
        """
        inputs, products = tiles
        begin = share.first
        for count, tile in equal_tiles(share.count, self.tile):
            end = begin + count * tile.pixels
            with write.loop(begin, end, tile.pixels) as at:
                source = write.at(inputs.at, write.mul(at.index, inputs.tile))
                target = write.at(products.at, write.mul(at.index, self.vectors * write.width))
                if self.cold:
                    for pixel in range(tile.pixels):
                        for line in range(0, run.length, LINE):
                            write.prefetch(source, write.add(ahead, pixel * inputs.tile + line))
                read = replace(inputs, at=write.at(source, run.begin))
                sums = self._sums(write, tile.pixels, read, run.length, lanes, meanwhile)
                for place, value in enumerate(sums):
                    lane = place * write.width
                    total = write.binary("fadd", value, write.load(target, lane)) if not run.first else value
                    write.store(total, target, lane)
            begin = end

    def _sums(
        self,
        write: Function,
        pixels: int,
        read: Operand,
        count: int,
        lanes: Lanes,
        meanwhile: Meanwhile | None,
    ) -> list[Value]:
        """Those of so many channels of some tiles."""
        with write.loop(0, count, carried=["zeroinitializer"] * (pixels * self.vectors)) as channels:
            weights = write.at(lanes.at, write.mul(channels.index, lanes.step))
            for line in range(0, lanes.fetched, LINE):
                ahead = write.add(write.mul(channels.index, lanes.fetched), line)
                write.prefetch(write.at(lanes.later, ahead), near=True)
            source = write.at(read.at, channels.index)
            channels.next = multiply_add(write, source, read.tile, weights, channels.carried, self.vectors)
            if meanwhile:
                meanwhile(channels.index)
        return channels.results


_SUMMED, _SUMMED_COLD = 64, 48  # channels that are summed in one go; the sums of sums round less than one long sum
_EXPANDED = 2**13  # floats of kernels that are transformed across at a time
_MIXED = 5 * 2**11  # floats of kernels, as they lie and transformed, of a run whose products transform the next ones
_ROOM = 5  # vectors that this takes
PAIRS = 4  # columns that are there at a time then: those that are used, and the next ones


def run_length(channels: int, *, cold: bool) -> int:
    """Channels that are summed in one go; the last run may have fewer."""
    return _equal_parts(channels, _SUMMED_COLD if cold else _SUMMED)


def late_run(channels: int, form: Form, lanes: int, room: int) -> tuple[int, bool]:
    """The same for kernels that are transformed late, so many output channels of them at a time.

    And whether products transform the kernels that come next: where there is so much room that they can.
    """
    if form.columns.moved and room >= _ROOM:
        length = _equal_parts(channels, min(_SUMMED, max(1, _MIXED // ((2 * TAPS + PAIRS) * lanes))))
        if channels % length == 0:
            return length, True
    return _equal_parts(channels, min(_SUMMED, max(1, _EXPANDED // (form.columns.inputs * lanes)))), False


def _equal_parts(length: int, most: int) -> int:
    """A part of a length, of at most ``most``, that divides it if some part of about that size does."""
    fewest = -(-length // most)
    counts = range(fewest, fewest + fewest // 4 + 1)
    return -(-length // next((count for count in counts if length % count == 0), fewest))


@final
@dataclass(frozen=True)
class _Group:
    """Columns of places that are computed alike.

    Attributes:
        columns: which ones.
        share: the tiles that have them.
        tap: the column of the three that their kernels are, or None where they are transformed.
        before: how many columns are computed before these.
        fetches: whether weights are fetched meanwhile.
        mixes: whether kernels are transformed meanwhile.
    """

    columns: range
    share: Share
    tap: int | None
    before: int
    fetches: bool
    mixes: bool


@final
@dataclass(frozen=True)
class _Kernels:
    """Where the kernels of a run lie that are transformed late.

    Attributes:
        lie: address as they lie.
        moved: address of those that are transformed, column by column.
        following: address of those of the next run, as they lie, or of any.
        points: address of p² and p of each pair of columns ±p.
    """

    lie: Value
    moved: Value
    following: Value
    points: Value


@final
class LateProducts:
    """Products of a panel.

    Args:
        panel: the panel.
        width: floats in a vector.
    """

    def __init__(self, panel: Panel, width: int) -> None:
        self._panel, self._step = panel, panel.vectors * width
        self._length, self._mixes = late_run(panel.channels, panel.form, self._step, panel.room)
        self._columns, self._moved = panel.form.columns, panel.form.columns.moved

    @property
    def floats(self) -> int:
        """Of memory for kernels and points."""
        return self._kept + LINE

    @property
    def _kept(self) -> int:
        """Floats of kernels that are transformed at a time."""
        return (min(len(self._moved), PAIRS) if self._mixes else len(self._moved)) * self._length * self._step

    def write(self, write: Function, inputs: Operand, weights: Value, products: Operand, scratch: Value) -> None:
        """Write it, with so much memory; weights come to the first cache during the run of channels before."""
        lines = -(-TAPS * self._step // LINE)  # of each input channel, which are fetched during the first columns
        each = -(-lines // self._columns.inputs)
        points = write.at(scratch, self._kept)
        if self._mixes:
            self._store_points(write, points)
            self._expand(write, weights, scratch, self._length)
        for of_row in self._panel.shares:
            groups = list(self._groups(of_row, -(-lines // each)))
            with write.loop(of_row[0].rows.start, of_row[0].rows.stop) as rows:
                first = write.mul(rows.index, self._columns.inputs)
                tiles = inputs.from_place(write, first), products.from_place(write, first)
                row = write.at(weights, write.mul(rows.index, TAPS * self._panel.channels * self._step))
                for run in self._panel.runs(write, self._length):
                    kernels = self._prepared(write, run, row, weights, scratch, points)
                    for group in groups:
                        self._group(write, run, group, tiles, kernels, each * LINE)

    def _prepared(
        self, write: Function, run: Run, row: Value, weights: Value, scratch: Value, points: Value
    ) -> _Kernels:
        """The kernels of a run, transformed if the run before has not done it; ``weights`` are those of the panel."""
        lie = write.at(row, write.mul(run.begin, TAPS * self._step))
        following = write.at(lie, run.length * TAPS * self._step)
        if self._mixes:  # behind the last run of all, any kernels do
            end = write.at(weights, self._panel.form.inputs[0] * TAPS * self._panel.channels * self._step)
            following = write.choose(write.value(f"icmp eq ptr {following}, {end}"), weights, following)
        elif self._moved:
            self._expand(write, lie, scratch, run.length)
        return _Kernels(lie, scratch, following, points)

    def _groups(self, of_row: Sequence[Share], fetching: int) -> Iterator[_Group]:
        """All columns, those whose kernels are transformed first; the first ``fetching`` of them are apart."""
        matrix, moved, before = self._columns.kernel_matrix, self._moved, 0
        others = [column for column in range(len(matrix)) if column not in moved]
        for columns in (moved, *(range(column, column + 1) for column in others)):
            edges = {columns.start + fetching - before, *(share.columns.stop for share in of_row)}
            edges |= {columns.stop - 2} if self._mixes else set()
            cuts = sorted({columns.start, columns.stop, *(edge for edge in edges if edge in columns)})
            for begin, end in itertools.pairwise(cuts):
                share = next(share for share in of_row if begin in share.columns)
                tap = None if columns is moved else matrix[begin].index(1)
                mixes = self._mixes and (before < len(moved) - 2 or before == len(moved))
                yield _Group(range(begin, end), share, tap, before, before < fetching, mixes)
                before += end - begin

    def _group(
        self,
        write: Function,
        run: Run,
        group: _Group,
        row: tuple[Operand, Operand],
        kernels: _Kernels,
        fetched: int,
    ) -> None:
        """Some places of a row of them: inputs and products of the row."""
        step, length, fetched = self._step, self._length, fetched * group.fetches
        with write.loop(group.columns.start, group.columns.stop) as columns:
            number = write.add(columns.index, group.before - group.columns.start)
            ahead = write.add(run.length * TAPS * step, write.mul(number, run.length * fetched))
            later = write.at(kernels.lie, ahead)
            if group.tap is None:
                place = write.value(f"and i64 {number}, {PAIRS - 1}") if self._mixes else number
                lanes = Lanes(write.at(kernels.moved, write.mul(place, length * step)), step, later, fetched)
            else:
                lanes = Lanes(write.at(kernels.lie, group.tap * step), TAPS * step, later, fetched)
            meanwhile = self._mix(write, group, number, kernels) if group.mixes else None
            inputs, products = (operand.from_place(write, columns.index) for operand in row)
            following = write.add(run.begin, inputs.place)
            self._panel.add(write, run, group.share, (inputs, products), lanes, following, meanwhile)

    def _mix(self, write: Function, group: _Group, number: Index, kernels: _Kernels) -> Meanwhile:
        """Make the next pair of columns, half of the vectors in each of a pair; at the end the next run's first one."""
        vectors, step = self._panel.vectors, self._step
        if group.tap is not None:
            points = self._points(write, kernels, 0)
            return partial(self._pair, write, kernels.following, kernels.moved, vectors, points)
        some = -(-vectors // 2)
        before, half = write.divide(number, 2)
        vector, pair = write.mul(half, (vectors - some) * write.width), write.add(before, 1)
        place = write.mul(write.value(f"and i64 {pair}, 1"), 2 * self._length * step)
        points = self._points(write, kernels, write.mul(pair, 2))
        wrote = write.at(kernels.moved, write.add(place, vector))
        return partial(self._pair, write, write.at(kernels.lie, vector), wrote, some, points)

    def _points(self, write: Function, kernels: _Kernels, place: Index) -> list[Value]:
        """Vectors of p² and p."""
        at = write.at(kernels.points, place)
        return [write.broadcast(at, number) for number in (0, 1)]

    def _pair(
        self, write: Function, read: Value, wrote: Value, vectors: int, points: Sequence[Value], channel: Value
    ) -> None:
        """Some vectors of the kernels of an input channel in two columns.

        g0 + p² g2 ± p g1, or with stride 2 g0 ± p g2.
        """
        square, point = points
        read = write.at(read, write.mul(channel, TAPS * self._step))
        wrote = write.at(wrote, write.mul(channel, self._step))
        for vector in range(0, vectors * write.width, write.width):
            outer, inner, last = (write.load(read, tap * self._step + vector) for tap in range(TAPS))
            shared, turned = outer, last
            if self._columns.stride == 1:
                shared, turned = write.fma(last, square, outer), inner
            for column, value in enumerate((turned, write.value(f"fneg {write.vector} {turned}"))):
                write.store(write.fma(value, point, shared), wrote, column * self._length * self._step + vector)

    def _store_points(self, write: Function, points: Value) -> None:
        """p² and p of each pair of columns."""
        for place in self._moved[::2]:
            _, inner, last = self._columns.kernel_matrix[place]
            square, point = (last, inner) if self._columns.stride == 1 else (Fraction(0), last)
            for at, number in enumerate((square, point)):
                write.store_number(float(number), points, place - self._moved.start + at)

    def _expand(self, write: Function, kernels: Value, scratch: Value, count: int) -> None:
        """``· Gᵀ`` of the kernels of a run of so many channels: to (column, input channel, output channel).

        If products do that, the first pair of columns alone.
        """
        moved = self._moved[:2] if self._mixes else self._moved
        matrix, column = self._columns.kernel_matrix[moved.start : moved.stop], self._length * self._step
        with write.loop(0, count) as channels:
            read = write.at(kernels, write.mul(channels.index, TAPS * self._step))
            wrote = write.at(scratch, write.mul(channels.index, self._step))
            for vector in range(0, self._step, write.width):
                values = [write.load(read, tap * self._step + vector) for tap in range(TAPS)]
                for place, value in enumerate(transform(write, matrix, values)):
                    write.store(value, wrote, place * column + vector)


@final
@dataclass(frozen=True)
class Products:
    """(tile, input channel) by (input channel, output channel), place by place.

    Kernels lie as (place, input channel, output channel), or if they are transformed late as
    :class:`repvgg.engine.winograd.gemm.LateProducts` reads them.

    Attributes:
        panel: of weights, and the tiles.
        late: whether kernels are transformed across while they are used.
    """

    panel: Panel
    late: bool

    def scratch(self, width: int) -> int:
        """Floats of memory that it needs, at least 1."""
        return LateProducts(self.panel, width).floats if self.late else 1

    def write(self, write: Function, inputs: Operand, weights: Value, products: Operand, scratch: Value) -> None:
        """Write it, with so much memory; weights come to the first cache during the run of channels before."""
        if self.late:
            LateProducts(self.panel, write.width).write(write, inputs, weights, products, scratch)
            return
        panel, across = self.panel, self.panel.form.inputs[1]
        floats = panel.channels * panel.vectors * write.width
        for of_row in panel.shares:
            with write.loop(of_row[0].rows.start, of_row[0].rows.stop) as rows:
                first = write.mul(rows.index, across)
                for share in of_row:
                    with write.loop(share.columns.start, share.columns.stop) as columns:
                        place = write.add(first, columns.index)
                        tiles = inputs.from_place(write, place), products.from_place(write, place)
                        self._place(write, share, tiles, write.at(weights, write.mul(place, floats)))

    def _place(self, write: Function, share: Share, tiles: tuple[Operand, Operand], weights: Value) -> None:
        """All products of a place, whose weights are at ``weights``."""
        panel, step = self.panel, self.panel.vectors * write.width
        for run in panel.runs(write, run_length(panel.channels, cold=panel.cold)):
            at = write.at(weights, write.mul(run.begin, step))
            lanes = Lanes(at, step, write.at(at, run.length * step), step)
            panel.add(write, run, share, tiles, lanes, self._or_next(write, run.end, tiles[0].place))

    def _or_next(self, write: Function, channel: Index, place: int) -> Index:
        """A channel, or the first one of the next place where it would be behind the last."""
        if isinstance(channel, int):
            return place if channel == self.panel.channels else channel
        last = write.value(f"icmp eq i64 {channel}, {self.panel.channels}")
        return write.value(f"select i1 {last}, i64 {place}, i64 {channel}")
