"""A panel of weights and the tiles that it is multiplied with: what all ways to go through it have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias, final

from repvgg.engine.ir import Function, Index, Value
from repvgg.engine.kernels.tile import Tile, equal_tiles, multiply_add
from repvgg.engine.kernels.tiling import LINE, Share, Tiling, place_floats, shares
from repvgg.engine.winograd import Form


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

    def from_place(self, write: Function, place: Index) -> Operand:
        """Those from a place on."""
        return replace(self, at=write.at(self.at, write.mul(place, self.place)))


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
