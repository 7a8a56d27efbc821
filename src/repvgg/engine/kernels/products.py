"""Products in Winograd's domain, place by place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import final

from repvgg.engine.ir import Function, Index, Value
from repvgg.engine.kernels.tile import Tile, equal_tiles, multiply_add
from repvgg.engine.kernels.tiling import LINE, Share, Tiling, place_floats, shares
from repvgg.engine.kernels.transform import transform
from repvgg.engine.winograd import TAPS, Form

_SUMMED, _SUMMED_COLD = 64, 48  # channels that are summed in one go; the sums of sums round less than one long sum
_EXPANDED = 2**13  # floats of kernels that are transformed across at a time
_MIXED = 5 * 2**11  # floats of kernels, as they lie and transformed, of a run whose products transform the next ones
_ROOM = 5  # vectors that this takes
_PAIRS = 4  # columns that are there at a time: those that are used, and the next ones


def run_length(channels: int, *, cold: bool) -> int:
    """Channels that are summed in one go; the last run may have fewer."""
    return _equal_parts(channels, _SUMMED_COLD if cold else _SUMMED)


def late_run(channels: int, form: Form, lanes: int, room: int) -> tuple[int, bool]:
    """The same for kernels that are transformed late, so many output channels of them at a time.

    And whether products transform the kernels that come next: where there is so much room that they can.
    """
    if form.columns.moved and room >= _ROOM:
        length = _equal_parts(channels, min(_SUMMED, max(1, _MIXED // ((2 * TAPS + _PAIRS) * lanes))))
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
class Operand:
    """Transformed tiles or products in memory: places, tiles, channels.

    Attributes:
        at: address of the first.
        place: floats from one place to the next.
        tile: floats from one tile to the next.
    """

    at: Value
    place: int
    tile: int

    @classmethod
    def of(cls, at: Value, tiles: int, floats: int) -> Operand:
        """So many tiles of so many floats each."""
        return cls(at, place_floats(tiles, floats), floats)


@final
@dataclass(frozen=True)
class _Run:
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
class _Lanes:
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
@dataclass(frozen=True)
class _Mix:
    """Two columns of kernels, ±p, that are computed meanwhile.

    Attributes:
        read: address of the three columns of the first channel.
        wrote: address of what comes of them.
        vectors: of each channel.
        points: vectors of p² and p.
    """

    read: Value
    wrote: Value
    vectors: int
    points: list[Value]


@final
@dataclass(frozen=True)
class Products:
    """(tile, input channel) by (input channel, output channel), place by place.

    Kernels lie as (place, input channel, output channel). If they are transformed late, they lie as (row, input
    channel, column of 3, output channel), and each run of channels is transformed across into memory that stays in the
    first cache: a third to a half of the bytes come from afar. Columns that are one of the three are used as they lie.

    Attributes:
        form: F(m x n, 3x3).
        tile: registers; its pixels are tiles here.
        vectors: of output channels.
        tiling: the tiles; all those of a piece are multiplied.
        channels: of the input.
        late: whether kernels are transformed across while they are used.
        cold: whether the tiles come from the third cache: then the next ones are fetched to the second.
        room: vectors that are free for the kernels that come next.
    """

    form: Form
    tile: Tile
    vectors: int
    tiling: Tiling
    channels: int
    late: bool
    cold: bool
    room: int

    @property
    def _shares(self) -> tuple[tuple[Share, ...], ...]:
        return shares(self.form, self.tiling)

    def _late_run(self, width: int) -> tuple[int, bool]:
        return late_run(self.channels, self.form, self.vectors * width, self.room)

    def _kept(self, width: int) -> int:
        """Floats of kernels that are transformed at a time."""
        (length, mixes), moved = self._late_run(width), len(self.form.columns.moved)
        return (min(moved, _PAIRS) if mixes else moved) * length * self.vectors * width

    def expanded(self, width: int) -> int:
        """Floats of memory for the kernels of a run, at least 1."""
        return self._kept(width) + LINE if self.late else 1

    def write(self, write: Function, inputs: Operand, weights: Value, products: Operand, scratch: Value) -> None:
        """Write it, with so much memory; weights come to the first cache during the run of channels before."""
        if self.late:
            self._late(write, inputs, weights, products, scratch)
            return
        step, length = self.vectors * write.width, run_length(self.channels, cold=self.cold)
        for of_row in self._shares:
            with write.loop(of_row[0].rows.start, of_row[0].rows.stop) as rows:
                first = write.mul(rows.index, self.form.inputs[1])
                for share in of_row:
                    with write.loop(share.columns.start, share.columns.stop) as columns:
                        place = write.add(first, columns.index)
                        read = write.at(inputs.at, write.mul(place, inputs.place))
                        wrote = write.at(products.at, write.mul(place, products.place))
                        panel = write.at(weights, write.mul(place, self.channels * step))
                        for run in self._runs(write, length):
                            at = write.at(panel, write.mul(run.begin, step))
                            lanes = _Lanes(at, step, write.at(at, run.length * step), step)
                            ahead = self._or_next(write, run.end, inputs.place)
                            self._tiles(write, run, share, read, inputs.tile, ahead, wrote, lanes)

    def _runs(self, write: Function, length: int) -> Iterator[_Run]:
        """All runs; those between the first and a shorter last one are written once, in a loop."""
        whole, rest = divmod(self.channels, length)
        yield _Run(0, length, length, first=True)
        if whole > 1:
            with write.loop(1, whole) as runs:
                begin = write.mul(runs.index, length)
                yield _Run(begin, write.add(begin, length), length, first=False)
        if rest:
            yield _Run(whole * length, self.channels, rest, first=False)

    def _or_next(self, write: Function, channel: Index, place: int) -> Index:
        """A channel, or the first one of the next place where it would be behind the last."""
        if isinstance(channel, int):
            return place if channel == self.channels else channel
        last = write.value(f"icmp eq i64 {channel}, {self.channels}")
        return write.value(f"select i1 {last}, i64 {place}, i64 {channel}")

    def _groups(self, of_row: Sequence[Share], fetching: int, mixes: bool) -> Iterator[_Group]:
        """All columns, those whose kernels are transformed first; the first ``fetching`` of them are apart."""
        matrix, moved, before = self.form.columns.kernel_matrix, self.form.columns.moved, 0
        others = [column for column in range(len(matrix)) if column not in moved]
        for columns in (moved, *(range(column, column + 1) for column in others)):
            edges = {columns.start + fetching - before, *(share.columns.stop for share in of_row)}
            edges |= {columns.stop - 2} if mixes else set()
            cuts = sorted({columns.start, columns.stop, *(edge for edge in edges if edge in columns)})
            for begin, end in itertools.pairwise(cuts):
                share = next(share for share in of_row if begin in share.columns)
                tap = None if columns is moved else matrix[begin].index(1)
                mixed = mixes and (before < len(moved) - 2 or before == len(moved))
                yield _Group(range(begin, end), share, tap, before, before < fetching, mixed)
                before += end - begin

    def _late(self, write: Function, inputs: Operand, weights: Value, products: Operand, scratch: Value) -> None:
        step, across, (length, mixes) = self.vectors * write.width, self.form.inputs[1], self._late_run(write.width)
        lines = -(-TAPS * step // LINE)  # of each input channel, which are fetched during the first columns
        each, points = -(-lines // across), write.at(scratch, self._kept(write.width))
        if mixes:
            self._store_points(write, points)
            self._expand(write, weights, scratch, length)
        for of_row in self._shares:
            groups = list(self._groups(of_row, -(-lines // each), mixes))
            with write.loop(of_row[0].rows.start, of_row[0].rows.stop) as rows:
                first = write.mul(rows.index, across)
                read = replace(inputs, at=write.at(inputs.at, write.mul(first, inputs.place)))
                wrote = replace(products, at=write.at(products.at, write.mul(first, products.place)))
                panel = write.at(weights, write.mul(rows.index, TAPS * self.channels * step))
                for run in self._runs(write, length):
                    kernels = write.at(panel, write.mul(run.begin, TAPS * step))
                    following = write.at(kernels, run.length * TAPS * step)
                    if mixes:
                        following = self._or_first(write, following, weights)
                    elif self.form.columns.moved:
                        self._expand(write, kernels, scratch, run.length)
                    memory = _Kernels(kernels, scratch, following, points)
                    for group in groups:
                        self._columns(write, run, group, (read, wrote), memory, each * LINE)

    def _store_points(self, write: Function, points: Value) -> None:
        """p² and p of each pair of columns."""
        moved = self.form.columns.moved
        for place in moved[::2]:
            _, inner, last = self.form.columns.kernel_matrix[place]
            square, point = (last, inner) if self.form.columns.stride == 1 else (Fraction(0), last)
            for at, number in enumerate((square, point)):
                write.store_number(float(number), points, place - moved.start + at)

    def _or_first(self, write: Function, following: Value, weights: Value) -> Value:
        """The weights of the next run, or any others where there is none."""
        end = write.at(weights, self.form.inputs[0] * TAPS * self.channels * self.vectors * write.width)
        return write.choose(write.value(f"icmp eq ptr {following}, {end}"), weights, following)

    def _columns(
        self,
        write: Function,
        run: _Run,
        group: _Group,
        row: tuple[Operand, Operand],
        kernels: _Kernels,
        fetched: int,
    ) -> None:
        """Some places of a row of them: inputs and products."""
        step, (inputs, products), (length, mixes) = self.vectors * write.width, row, self._late_run(write.width)
        fetched *= group.fetches
        with write.loop(group.columns.start, group.columns.stop) as columns:
            read = write.at(inputs.at, write.mul(columns.index, inputs.place))
            wrote = write.at(products.at, write.mul(columns.index, products.place))
            number = write.add(columns.index, group.before - group.columns.start)
            ahead = run.length * TAPS * step
            later = write.at(kernels.lie, write.add(ahead, write.mul(number, run.length * fetched)))
            if group.tap is None:
                place = write.value(f"and i64 {number}, {_PAIRS - 1}") if mixes else number
                lanes = _Lanes(write.at(kernels.moved, write.mul(place, length * step)), step, later, fetched)
            else:
                lanes = _Lanes(write.at(kernels.lie, group.tap * step), TAPS * step, later, fetched)
            mix = self._mix(write, group, number, kernels) if group.mixes else None
            target = write.add(run.begin, inputs.place)
            self._tiles(write, run, group.share, read, inputs.tile, target, wrote, lanes, mix)

    def _mix(self, write: Function, group: _Group, number: Index, kernels: _Kernels) -> _Mix:
        """The next pair of columns, for half of the vectors in each of a pair; at the end the next run's first one."""
        step, (length, _) = self.vectors * write.width, self._late_run(write.width)
        if group.tap is not None:
            points = [write.broadcast(kernels.points, at) for at in (0, 1)]
            return _Mix(kernels.following, kernels.moved, self.vectors, points)
        some = -(-self.vectors // 2)
        before, half = write.divide(number, 2)
        vector, pair = write.mul(half, (self.vectors - some) * write.width), write.add(before, 1)
        place = write.mul(write.value(f"and i64 {pair}, 1"), 2 * length * step)
        points = [write.broadcast(write.at(kernels.points, write.mul(pair, 2)), at) for at in (0, 1)]
        wrote = write.at(kernels.moved, write.add(place, vector))
        return _Mix(write.at(kernels.lie, vector), wrote, some, points)

    def _expand(self, write: Function, kernels: Value, scratch: Value, count: int) -> None:
        """``· Gᵀ`` of the kernels of a run of so many channels: to (column, input channel, output channel)."""
        step, moved = self.vectors * write.width, self.form.columns.moved
        length, mixes = self._late_run(write.width)
        if mixes:  # the first pair alone
            moved = moved[:2]
        matrix, column = self.form.columns.kernel_matrix[moved.start : moved.stop], length * step
        with write.loop(0, count) as channels:
            read = write.at(kernels, write.mul(channels.index, TAPS * step))
            wrote = write.at(scratch, write.mul(channels.index, step))
            for vector in range(0, step, write.width):
                values = [write.load(read, tap * step + vector) for tap in range(TAPS)]
                for place, value in enumerate(transform(write, matrix, values)):
                    write.store(value, wrote, place * column + vector)

    def _tiles(
        self,
        write: Function,
        run: _Run,
        share: Share,
        read: Value,
        pitch: int,
        ahead: Index,
        wrote: Value,
        lanes: _Lanes,
        mix: _Mix | None = None,
    ) -> None:
        """Add a run of channels to the sums at ``wrote`` of all tiles of a place, which lie at ``read``.

        As many channels are fetched of each tile, from ``ahead`` on.
        """
        begin: int = share.first
        sizes = equal_tiles(share.count, self.tile)
        if mix and sizes[0][0] > 1:  # the first ones alone
            sizes = [(1, sizes[0][1]), (sizes[0][0] - 1, sizes[0][1]), *sizes[1:]]
        for count, tile in sizes:
            end = begin + count * tile.pixels
            with write.loop(begin, end, tile.pixels) as tiles:
                source = write.at(read, write.mul(tiles.index, pitch))
                target = write.at(wrote, write.mul(tiles.index, self.vectors * write.width))
                if self.cold:
                    for pixel in range(tile.pixels):
                        for line in range(0, run.length, LINE):
                            write.prefetch(source, write.add(ahead, pixel * pitch + line))
                sums = self._run(write, tile.pixels, write.at(source, run.begin), pitch, run.length, lanes, mix)
                for place, value in enumerate(sums):
                    at = place * write.width
                    total = write.binary("fadd", value, write.load(target, at)) if not run.first else value
                    write.store(total, target, at)
            begin, mix = end, None

    def _run(
        self, write: Function, pixels: int, read: Value, pitch: int, count: int, lanes: _Lanes, mix: _Mix | None
    ) -> list[Value]:
        with write.loop(0, count, carried=["zeroinitializer"] * (pixels * self.vectors)) as channels:
            weights = write.at(lanes.at, write.mul(channels.index, lanes.step))
            for line in range(0, lanes.fetched, LINE):
                ahead = write.add(write.mul(channels.index, lanes.fetched), line)
                write.prefetch(write.at(lanes.later, ahead), near=True)
            source = write.at(read, channels.index)
            channels.next = multiply_add(write, source, pitch, weights, channels.carried, self.vectors)
            if mix:
                self._mixed(write, channels.index, count, mix)
        return channels.results

    def _mixed(self, write: Function, channel: Value, count: int, mix: _Mix) -> None:
        """The kernels of an input channel in two columns: g0 + p² g2 ± p g1, or with stride 2 g0 ± p g2."""
        step, (square, point) = self.vectors * write.width, mix.points
        read = write.at(mix.read, write.mul(channel, TAPS * step))
        wrote = write.at(mix.wrote, write.mul(channel, step))
        for vector in range(0, mix.vectors * write.width, write.width):
            outer, inner, last = (write.load(read, tap * step + vector) for tap in range(TAPS))
            shared, turned = outer, last
            if self.form.columns.stride == 1:
                shared, turned = write.fma(last, square, outer), inner
            for column, value in enumerate((turned, write.value(f"fneg {write.vector} {turned}"))):
                write.store(write.fma(value, point, shared), wrote, column * count * step + vector)
