"""How the tiles of Winograd's images are cut into pieces of work."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

from repvgg.engine.codegen.ir_builder import Function, Index, Value
from repvgg.engine.graph import Pair
from repvgg.engine.winograd.filters import Filter, Form, tail

LINE = 16  # floats of a line of the cache


@final
@dataclass(frozen=True)
class Tiling:
    """The tiles of a part of each image of a batch, in pieces, which may begin and end within an image.

    All pieces have the same length, so the last one may have tiles that stand for nothing. With tails
    (:attr:`repvgg.engine.winograd.filters.Form.tails`) there is one piece.

    Attributes:
        grid: tiles of an image, down and across, tails among them.
        piece: tiles of a piece.
        batch: images of the largest batch.
        corner: row and column of the first output of the first tile.
    """

    grid: Pair
    piece: int
    batch: int
    corner: Pair = (0, 0)

    @property
    def of_image(self) -> int:
        """Tiles of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def real(self) -> int:
        """Tiles that stand for something."""
        return self.batch * self.of_image

    @property
    def pieces(self) -> int:
        """Pieces of the largest batch."""
        return -(-self.real // self.piece)

    @property
    def tiles(self) -> int:
        """Tiles of the largest batch, those that stand for nothing among them."""
        return self.pieces * self.piece


@final
@dataclass(frozen=True)
class Kind:
    """Tiles of one size among those of a piece.

    Attributes:
        form: theirs, without tails.
        tiling: they alone.
        places: theirs among those of the whole form.
        top: their first row of tiles.
        before: tiles of a piece that lie before them.
    """

    form: Form
    tiling: Tiling
    places: tuple[int, ...]
    top: int
    before: int


@final
@dataclass(frozen=True)
class Share:
    """Places that the same tiles of a piece have, which lie one after the other.

    Attributes:
        rows: of the places.
        columns: of the places.
        first: the first tile.
        count: how many.
    """

    rows: range
    columns: range
    first: int
    count: int


@final
@dataclass(frozen=True)
class _Run:
    """Tiles down or across that have one size.

    Attributes:
        part: their filter.
        places: theirs among those of all.
        top: the first one.
        count: how many.
        corner: the first output.
    """

    part: Filter
    places: tuple[int, ...]
    top: int
    count: int
    corner: int


@lru_cache(maxsize=1024)
def kinds(form: Form, tiling: Tiling) -> tuple[Kind, ...]:
    """The tiles of a piece, in their order: those that have a place in common lie side by side.

    (whole, tail), (whole, whole), (tail, whole), (tail, tail), as (down, across).
    """
    down, across = _runs(form, tiling, 0), _runs(form, tiling, 1)
    pairs = [*((down[0], run) for run in reversed(across)), *((run, other) for run in down[1:] for other in across)]
    out: list[Kind] = []
    before = 0
    for rows, columns in pairs:
        piece = tiling.batch * rows.count * columns.count if any(form.tails) else tiling.piece
        alone = Tiling((rows.count, columns.count), piece, tiling.batch, (rows.corner, columns.corner))
        places = tuple(at * form.columns.inputs + other for at in rows.places for other in columns.places)
        out.append(Kind(Form(rows.part, columns.part), alone, places, rows.top, before))
        before += piece
    return tuple(out)


@lru_cache(maxsize=1024)
def shares(form: Form, tiling: Tiling) -> tuple[tuple[Share, ...], ...]:
    """All places, by rows and then by columns, and which tiles of a piece have them."""
    every = kinds(form, tiling)
    down, across = (_alike(form, tiling, axis) for axis in (0, 1))
    return tuple(tuple(_share(form, every, rows, columns) for columns in across) for rows in down)


def place_tiles(form: Form, tiling: Tiling) -> int:
    """Places of the tiles of a piece, of all of them together."""
    return sum(kind.form.places * kind.tiling.piece for kind in kinds(form, tiling))


def _share(form: Form, every: Sequence[Kind], rows: range, columns: range) -> Share:
    place = rows.start * form.columns.inputs + columns.start
    some = [kind for kind in every if place in kind.places]
    return Share(rows, columns, some[0].before, sum(kind.tiling.piece for kind in some))


def _alike(form: Form, tiling: Tiling, axis: int) -> list[range]:
    """Rows or columns of places, one behind the other, that a tail has as well, or that it has not."""
    every, last = range(form.inputs[axis]), _runs(form, tiling, axis)[-1].places
    groups = [list(group) for _, group in itertools.groupby(every, key=lambda place: place in last)]
    return [range(group[0], group[-1] + 1) for group in groups]


def _runs(form: Form, tiling: Tiling, axis: int) -> list[_Run]:
    """The tiles down or across; a tail comes last."""
    whole, short = (form.rows, form.columns)[axis], form.tails[axis]
    count, corner, places = tiling.grid[axis], tiling.corner[axis], tuple(range(whole.inputs))
    if not short:
        return [_Run(whole, places, 0, count, corner)]
    last = _Run(*tail(short, whole), count - 1, 1, corner + (count - 1) * whole.outputs)
    return [_Run(whole, places, 0, count - 1, corner), last]


def equal_runs(length: int, count: int) -> list[tuple[int, int]]:
    """(begin, end) of so many parts of a length, about equally long each."""
    cuts = [length * part // count for part in range(count + 1)]
    return list(itertools.pairwise(cuts))


def place_floats(tiles: int, floats: int) -> int:
    """Floats from one place of so many tiles of so many floats each to the next.

    A line more than they need: places that lie whole pages apart would all fall into one set of the cache.
    """
    return tiles * floats + LINE


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
