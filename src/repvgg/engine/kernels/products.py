"""Products in Winograd's domain, place by place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.ir import Function, Value
from repvgg.engine.kernels.tile import Tile, multiply_add
from repvgg.engine.kernels.tiling import LINE, equal_runs, place_floats
from repvgg.engine.kernels.transform import transform
from repvgg.engine.winograd import TAPS, Form

_SUMMED, _SUMMED_COLD = 64, 48  # channels that are summed in one go; the sums of sums round less than one long sum

_EXPANDED = 2**13  # floats of kernels that are transformed across at a time


def late_runs(channels: int, form: Form, lanes: int) -> list[tuple[int, int]]:
    """The same for kernels that are transformed late, so many output channels of them at a time."""
    most = max(1, _EXPANDED // (form.columns.inputs * lanes))
    return equal_runs(channels, -(-channels // min(most, _SUMMED)))


def runs(channels: int, *, cold: bool) -> list[tuple[int, int]]:
    """(begin, end) of the channels that are summed in one go, about equally many each."""
    return equal_runs(channels, -(-channels // (_SUMMED_COLD if cold else _SUMMED)))


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
    """Channels that are summed in one go, and channels of the same tiles that are fetched meanwhile."""

    begin: int
    end: int
    ahead: tuple[int, int]


@final
@dataclass(frozen=True)
class _Lanes:
    """Weights of a run of channels.

    Attributes:
        at: address of the first.
        later: address of those that are fetched meanwhile.
        fetched: floats of them for each channel.
    """

    at: Value
    later: Value
    fetched: int


@final
@dataclass(frozen=True)
class Products:
    """(tile, input channel) by (input channel, output channel), place by place.

    Kernels lie as (place, input channel, output channel). If they are transformed late, they lie as (row, input
    channel, column of 3, output channel), and each run of channels is transformed across into memory that stays in the
    first cache: a third to a half of the bytes come from afar.

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

    def scratch(self, write: Function) -> Value | None:
        """Memory for the kernels of a run."""
        if not self.late:
            return None
        step = self.vectors * write.width
        longest = max(end - begin for begin, end in late_runs(self.channels, self.form, step))
        return write.scratch(self.form.columns.inputs * longest * step)

    def write(self, write: Function, inputs: Operand, weights: Value, products: Operand, scratch: Value | None) -> None:
        """Write it; weights come to the first cache during the run of channels before."""
        if scratch is not None:
            self._late(write, inputs, weights, products, scratch)
            return
        step, parts = self.vectors * write.width, runs(self.channels, cold=self.cold)
        following = [*parts[1:], (inputs.place, inputs.place + parts[0][1])]
        with write.loop(0, self.form.places) as places:
            read = write.at(inputs.at, write.mul(places.index, inputs.place))
            wrote = write.at(products.at, write.mul(places.index, products.place))
            panel = write.at(weights, write.mul(places.index, self.channels * step))
            for (begin, end), ahead in zip(parts, following, strict=True):
                lanes = _Lanes(write.at(panel, begin * step), write.at(panel, end * step), step)
                self._tiles(write, _Run(begin, end, ahead), read, inputs.tile, wrote, lanes)

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
            for begin, end in late_runs(self.channels, self.form, step):
                self._expand(write, write.at(panel, begin * TAPS * step), scratch, end - begin)
                run = _Run(begin, end, (inputs.place + begin, inputs.place + end))
                following = write.at(panel, end * TAPS * step)
                for some, fetched in (((0, fetching), each * LINE), ((fetching, columns), 0)):
                    if some[0] == some[1]:
                        continue
                    with write.loop(*some) as across:
                        read = write.at(row, write.mul(across.index, inputs.place))
                        target = write.at(wrote, write.mul(across.index, products.place))
                        lanes = write.at(scratch, write.mul(across.index, (end - begin) * step))
                        later = write.at(following, write.mul(across.index, (end - begin) * fetched))
                        self._tiles(write, run, read, inputs.tile, target, _Lanes(lanes, later, fetched))

    def _expand(self, write: Function, kernels: Value, scratch: Value, count: int) -> None:
        """``· Gᵀ`` of the kernels of a run of so many channels: to (column, input channel, output channel)."""
        step = self.vectors * write.width
        with write.loop(0, count) as channels:
            read = write.at(kernels, write.mul(channels.index, TAPS * step))
            wrote = write.at(scratch, write.mul(channels.index, step))
            for vector in range(0, step, write.width):
                values = [write.load(read, tap * step + vector) for tap in range(TAPS)]
                for column, value in enumerate(transform(write, self.form.columns.kernel_matrix, values)):
                    write.store(value, wrote, column * count * step + vector)

    def _tiles(self, write: Function, run: _Run, read: Value, pitch: int, wrote: Value, lanes: _Lanes) -> None:
        """Add a run of channels to the sums at ``wrote`` of all tiles of a place, which lie at ``read``."""
        with write.loop(0, self.tiles, self.tile.pixels) as tiles:
            source = write.at(read, write.mul(tiles.index, pitch))
            target = write.at(wrote, write.mul(tiles.index, self.vectors * write.width))
            if self.cold:
                for pixel in range(self.tile.pixels):
                    for line in range(*run.ahead, LINE):
                        write.prefetch(source, pixel * pitch + line)
            sums = self._run(write, write.at(source, run.begin), pitch, run.end - run.begin, lanes)
            for place, value in enumerate(sums):
                at = place * write.width
                total = write.binary("fadd", value, write.load(target, at)) if run.begin else value
                write.store(total, target, at)

    def _run(self, write: Function, read: Value, pitch: int, count: int, lanes: _Lanes) -> list[Value]:
        step = self.vectors * write.width
        with write.loop(0, count, carried=["zeroinitializer"] * (self.tile.pixels * self.vectors)) as channels:
            weights, source = write.at(lanes.at, write.mul(channels.index, step)), write.at(read, channels.index)
            following = (
                write.at(lanes.later, write.mul(channels.index, lanes.fetched)) if lanes.fetched else lanes.later
            )
            for line in range(0, lanes.fetched, LINE):
                write.prefetch(following, line, near=True)
            channels.next = multiply_add(write, source, pitch, weights, channels.carried, self.vectors)
        return channels.results
