"""A table of costs, in cycles: about how long a convolution takes that is computed in this way or that.

The costs are those of one core that does two multiply-adds, two loads and a store a cycle, with a second cache of a
megabyte; only their order matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

from repvgg.engine.graph import ConvGeometry
from repvgg.engine.kernels.base import Tile, equal_tiles
from repvgg.engine.kernels.direct_conv import choose_tile, row_cycles
from repvgg.engine.planner.algorithms import (
    Choice,
    Machine,
    Part,
    Rectangle,
    Size,
    every_cover,
    every_part,
    form_of,
    may_use_winograd,
    missing,
)
from repvgg.engine.winograd.gemm import late_run, run_length
from repvgg.engine.winograd.tiling import kinds, place_tiles, shares

_CACHE = 7 * 2**17  # bytes of the second cache that a unit may fill
_IN, _OUT = 11.0, 7.0  # cycles for each vector of a place of a tile, going in and coming out
_SPILLED = 1.25  # times that, where tiles and weights do not fit the second cache together
_STORED = 0.45  # cycles for each vector of a product that is stored, and loaded and stored
_EXPANDED, _MIXED = 2.7, 2.2  # cycles for each vector of a kernel that is transformed late, apart or within products
_STARTED = 4.0  # cycles for each run of channels
_DIRECT = 1.15  # steps of the direct kernel, which has more rests, to those of others
_PIXEL = 40.0  # cycles for each pixel and panel of the direct kernel, beside its steps
_FETCHED = 22.0  # bytes of weights that come in a cycle to all threads, ahead of their use
_AGAIN = 48.0  # that come from the third cache, where they were before
_NEAR = 100.0  # that come from the second cache of each thread
_STAY = 2**23  # bytes of weights that stay in the third cache beside all else
_FULL = 2**24  # bytes of feature maps that do
_MOVED = 6.5  # bytes of transformed tiles that are written there in a cycle
_CROSSED, _CROSSED_AHEAD = 1.5, 4.0  # that come from another processor, and do ahead of their use
_READ, _READ_FAR = 34.0, 9.7  # bytes that are read from there in a cycle, and from memory
_UNIT = 300.0  # cycles to claim a unit and to begin with it


def direct_cycles(size: Size, machine: Machine) -> float:
    """About how long the direct kernel takes for 3x3."""
    vectors = size.vectors(machine.isa.width)
    tile = choose_tile(machine.isa, size.image[1], vectors)
    panels = -(-vectors // tile.vectors)
    steps = 9 * size.channels
    rows = size.batch * size.image[0] * size.groups
    of_row = _DIRECT * steps * row_cycles(tile, size.image[1], vectors) + panels * (_UNIT + _PIXEL * size.image[1])
    return rows * of_row / machine.threads + 4 * steps * size.outputs / _FETCHED


def least_cycles(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> float:
    """What the multiplications of some tiles take at least, and to fetch their weights once."""
    form = form_of(rectangle, stride)
    down, across = (
        run[2] * whole.inputs - missing(run) * stride
        for whole, run in zip((form.rows, form.columns), rectangle, strict=True)
    )
    muls = size.batch * down * across * size.kernels
    weights = 4 * form.sets(late=True) * size.kernels
    return muls / (2 * machine.isa.width * machine.threads) + weights / _FETCHED


def cycles(part: Part, size: Size, machine: Machine) -> float:
    """About how long one of the threads is busy with a part of the image."""
    form, tiling, tile, late = part.form, part.tiling, part.tile, part.late
    width, vectors = machine.isa.width, size.vectors(machine.isa.width)
    panels = -(-vectors // tile.vectors)
    length, mixes = run_length(size.channels, cold=part.way == "product"), False
    if late:
        length, mixes = late_run(size.channels, form, tile.vectors * width, part.room(machine.isa.registers))
    work = size.groups * _multiplied(part, size, width, length)
    if late:
        expanded = form.rows.inputs * len(form.columns.moved)
        each = _MIXED if mixes else _EXPANDED
        work += each * tiling.pieces * size.groups * size.channels * vectors * expanded
    spilled = _SPILLED if part.way == "fused" and not _fits(part, size, machine) else 1.0
    moved = sum(kind.form.places * kind.tiling.real for kind in kinds(form, tiling))
    work += spilled * _OUT * moved * size.groups * vectors
    into = spilled * _IN * moved * -(-size.inputs // width) * part.splits
    units = tiling.pieces * part.splits
    if part.way == "product":
        shared = 4 * tiling.pieces * place_tiles(form, tiling) * size.inputs
        units *= size.groups * panels
        if shared > _CACHE:
            work += shared * panels / (_READ if shared < _FULL else _READ_FAR)
        into += _UNIT * tiling.batch * tiling.grid[0] + shared / _moved_rate(shared, machine)
    of_unit = work / units + _UNIT
    rounds = -(-units // machine.threads)
    return rounds * of_unit + into / machine.threads + _fetched(part, size, machine)


def _moved_rate(moved: int, machine: Machine) -> float:
    """Bytes of so many of transformed tiles that go from one kernel to the other in a cycle."""
    if machine.threads > 1:
        return _CROSSED_AHEAD if moved > _CACHE else _CROSSED
    return _MOVED if moved > _CACHE / 2 else math.inf


def _multiplied(part: Part, size: Size, width: int, length: int) -> float:
    """Products of all panels of a group, in runs of so many channels."""
    whole, rest = divmod(size.vectors(width), part.tile.vectors)
    counts = [(whole, part.tile.vectors), (1, rest)]
    places = sum(
        many * len(share.rows) * len(share.columns) * number * _of_tile(size.channels, tile, vectors, length)
        for many, vectors in counts
        if many * vectors
        for of_row in shares(part.form, part.tiling)
        for share in of_row
        for number, tile in equal_tiles(share.count, part.tile)
    )
    return part.tiling.pieces * places


def _of_tile(channels: int, tile: Tile, vectors: int, length: int) -> float:
    """Products of all channels of some tiles in a place by a panel of so many vectors."""
    sums = _STARTED + _STORED * tile.pixels * vectors
    return channels * Tile(tile.pixels, vectors).cycles + -(-channels // length) * sums


def _fetched(part: Part, size: Size, machine: Machine) -> float:
    """To fetch all weights once, and again for each piece that finds other things where they were."""
    of_channel = 4 * part.form.sets(late=part.late) * size.channels
    weights = of_channel * size.outputs
    if part.way == "product":
        near, passes = of_channel * part.tile.vectors * machine.isa.width <= _CACHE // 2, part.tiling.pieces
    else:  # threads of the same split pass through them at the same time
        near = _fits(part, size, machine)
        passes = -(-part.tiling.pieces * part.splits // machine.threads)
    rate = _NEAR if near else _AGAIN if weights < _STAY else _FETCHED
    return weights / _FETCHED + (passes - 1) * weights / rate


def _fits(part: Part, size: Size, machine: Machine) -> bool:
    """Whether a unit's weights, transformed tiles and products fit the second cache together."""
    weights = part.form.sets(late=part.late) * size.kernels // part.splits
    tiles = place_tiles(part.form, part.tiling) * (size.inputs + part.tile.vectors * machine.isa.width)
    return 4 * (weights + tiles) <= _CACHE


#: Says how a convolution is computed: by the Winograd that comes back, or directly where None does.
Chooser: TypeAlias = Callable[[ConvGeometry, Size, Machine], Choice | None]


@lru_cache(maxsize=1024)  # equal layers come again, and each is asked about twice
def choose(geometry: ConvGeometry, size: Size, machine: Machine) -> Choice | None:
    """The fastest way by the table: Winograd with the tiles that come back, or None for the direct kernel."""
    if not may_use_winograd(geometry, size, machine):
        return None
    every = every_choice(size, geometry.stride[0], machine)
    best = min(every, key=lambda choice: choice.cycles, default=None)
    return best if best and best.cycles < direct_cycles(size, machine) else None


def every_choice(size: Size, stride: int, machine: Machine) -> Iterator[Choice]:
    """All covers of the image, each part in its fastest way, but for those that surely are slow.

    Smaller tiles one way and larger ones the other have fewer weights than large ones both ways.
    """
    covers = list(every_cover(size, stride, machine))
    bounds = {pieces: sum(least_cycles(piece, size, stride, machine) for piece in pieces) for pieces in covers}
    best = float("inf")
    for pieces in sorted(covers, key=lambda pieces: bounds[pieces]):
        if bounds[pieces] > best:
            break
        parts = [_part(piece, size, stride, machine) for piece in pieces]
        if all(parts):
            choice = Choice(tuple(part for part in parts if part))
            best = min(best, choice.cycles)
            yield choice


@lru_cache(maxsize=4096)  # covers share parts
def _part(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> Part | None:
    """The fastest way for some rows and columns of tiles; None if nothing fits."""
    return min(costed_parts(rectangle, size, stride, machine), key=lambda part: part.cycles, default=None)


def costed_parts(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> Iterator[Part]:
    """All ways to cut and to compute some tiles, with what they cost."""
    for part in every_part(rectangle, size, stride, machine):
        yield replace(part, cycles=cycles(part, size, machine))
