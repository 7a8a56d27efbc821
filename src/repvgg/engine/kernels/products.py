"""Products in Winograd's domain, place by place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from repvgg.engine.ir import Function, Index, Value
from repvgg.engine.kernels.tile import Tile, multiply_add
from repvgg.engine.kernels.tiling import LINE, place_floats
from repvgg.engine.kernels.transform import transform
from repvgg.engine.winograd import TAPS, Form

_SUMMED, _SUMMED_COLD = 64, 48  # channels that are summed in one go; the sums of sums round less than one long sum
_EXPANDED = 2**13  # floats of kernels that are transformed across at a time


def run_length(channels: int, *, cold: bool) -> int:
    """Channels that are summed in one go; the last run may have fewer."""
    return _equal_parts(channels, _SUMMED_COLD if cold else _SUMMED)


def late_run_length(channels: int, form: Form, lanes: int) -> int:
    """The same for kernels that are transformed late, so many output channels of them at a time."""
    return _equal_parts(channels, min(_SUMMED, max(1, _EXPANDED // (form.columns.inputs * lanes))))


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
class Products:
    """(tile, input channel) by (input channel, output channel), place by place.

    Kernels lie as (place, input channel, output channel). If they are transformed late, they lie as (row, input
    channel, column of 3, output channel), and each run of channels is transformed across into memory that stays in the
    first cache: a third to a half of the bytes come from afar. Columns that are one of the three are used as they lie.

    Attributes:
        form: F(m x n, 3x3).
        tile: registers; its pixels are tiles here, and divide ``tiles``.
        vectors: of output channels.
        tiles: all of them.
        channels: of the input.
        late: whether kernels are transformed across while they are used.
        cold: whether the tiles come from the third cache: then the next ones are fetched to the second.
    """

    form: Form
    tile: Tile
    vectors: int
    tiles: int
    channels: int
    late: bool
    cold: bool

    def expanded(self, width: int) -> int:
        """Floats of memory for the kernels of a run, at least 1."""
        step = self.vectors * width
        moved = len(self.form.columns.moved) * late_run_length(self.channels, self.form, step) * step
        return max(1, moved * self.late)

    def write(self, write: Function, inputs: Operand, weights: Value, products: Operand, scratch: Value) -> None:
        """Write it, with so much memory; weights come to the first cache during the run of channels before."""
        if self.late:
            self._late(write, inputs, weights, products, scratch)
            return
        step, length = self.vectors * write.width, run_length(self.channels, cold=self.cold)
        with write.loop(0, self.form.places) as places:
            read = write.at(inputs.at, write.mul(places.index, inputs.place))
            wrote = write.at(products.at, write.mul(places.index, products.place))
            panel = write.at(weights, write.mul(places.index, self.channels * step))
            for run in self._runs(write, length):
                at = write.at(panel, write.mul(run.begin, step))
                lanes = _Lanes(at, step, write.at(at, run.length * step), step)
                ahead = self._or_next(write, run.end, inputs.place)
                self._tiles(write, run, read, inputs.tile, ahead, wrote, lanes)

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

    def _groups(self, fetching: int) -> Iterator[tuple[range, int | None, int]]:
        """Like columns, where their kernels lie (a column of the three, or transformed), how many came before.

        The first ones, ``fetching`` of them, are apart from others.
        """
        matrix, moved, before = self.form.columns.kernel_matrix, self.form.columns.moved, 0
        others = [column for column in range(len(matrix)) if column not in moved]
        for columns in (moved, *(range(column, column + 1) for column in others)):
            cut = min(len(columns), max(0, fetching - before))
            for some in filter(len, (columns[:cut], columns[cut:])):
                yield some, None if columns is moved else matrix[some.start].index(1), before
                before += len(some)

    def _late(self, write: Function, inputs: Operand, weights: Value, products: Operand, scratch: Value) -> None:
        step, (rows, columns) = self.vectors * write.width, self.form.inputs
        lines = -(-TAPS * step // LINE)  # of each input channel, which are fetched during the first columns
        each = -(-lines // columns)
        fetching = -(-lines // each)
        with write.loop(0, rows) as places:
            first = write.mul(places.index, columns)
            row = write.at(inputs.at, write.mul(first, inputs.place))
            wrote = write.at(products.at, write.mul(first, products.place))
            panel = write.at(weights, write.mul(places.index, TAPS * self.channels * step))
            for run in self._runs(write, late_run_length(self.channels, self.form, step)):
                kernels = write.at(panel, write.mul(run.begin, TAPS * step))
                following = write.at(kernels, run.length * TAPS * step)
                if self.form.columns.moved:
                    self._expand(write, kernels, scratch, run.length)
                for some, tap, before in self._groups(fetching):
                    with write.loop(some.start, some.stop) as across:
                        read = write.at(row, write.mul(across.index, inputs.place))
                        target = write.at(wrote, write.mul(across.index, products.place))
                        fetched = each * LINE if before < fetching else 0
                        number = write.add(across.index, before - some.start)
                        later = write.at(following, write.mul(number, run.length * fetched))
                        moved = write.at(scratch, write.mul(number, run.length * step))  # those come first
                        at, pitch = (moved, step) if tap is None else (write.at(kernels, tap * step), TAPS * step)
                        lanes = _Lanes(at, pitch, later, fetched)
                        ahead = write.add(run.begin, inputs.place)
                        self._tiles(write, run, read, inputs.tile, ahead, target, lanes)

    def _expand(self, write: Function, kernels: Value, scratch: Value, count: int) -> None:
        """``· Gᵀ`` of the kernels of a run of so many channels: to (column, input channel, output channel)."""
        step, moved = self.vectors * write.width, self.form.columns.moved
        matrix = self.form.columns.kernel_matrix[moved.start : moved.stop]
        with write.loop(0, count) as channels:
            read = write.at(kernels, write.mul(channels.index, TAPS * step))
            wrote = write.at(scratch, write.mul(channels.index, step))
            for vector in range(0, step, write.width):
                values = [write.load(read, tap * step + vector) for tap in range(TAPS)]
                for column, value in enumerate(transform(write, matrix, values)):
                    write.store(value, wrote, column * count * step + vector)

    def _tiles(
        self, write: Function, run: _Run, read: Value, pitch: int, ahead: Index, wrote: Value, lanes: _Lanes
    ) -> None:
        """Add a run of channels to the sums at ``wrote`` of all tiles of a place, which lie at ``read``.

        As many channels are fetched of each tile, from ``ahead`` on.
        """
        with write.loop(0, self.tiles, self.tile.pixels) as tiles:
            source = write.at(read, write.mul(tiles.index, pitch))
            target = write.at(wrote, write.mul(tiles.index, self.vectors * write.width))
            if self.cold:
                for pixel in range(self.tile.pixels):
                    for line in range(0, run.length, LINE):
                        write.prefetch(source, write.add(ahead, pixel * pitch + line))
            sums = self._run(write, write.at(source, run.begin), pitch, run.length, lanes)
            for place, value in enumerate(sums):
                at = place * write.width
                total = write.binary("fadd", value, write.load(target, at)) if not run.first else value
                write.store(total, target, at)

    def _run(self, write: Function, read: Value, pitch: int, count: int, lanes: _Lanes) -> list[Value]:
        with write.loop(0, count, carried=["zeroinitializer"] * (self.tile.pixels * self.vectors)) as channels:
            weights = write.at(lanes.at, write.mul(channels.index, lanes.step))
            for line in range(0, lanes.fetched, LINE):
                ahead = write.add(write.mul(channels.index, lanes.fetched), line)
                write.prefetch(write.at(lanes.later, ahead), near=True)
            source = write.at(read, channels.index)
            channels.next = multiply_add(write, source, pitch, weights, channels.carried, self.vectors)
        return channels.results
