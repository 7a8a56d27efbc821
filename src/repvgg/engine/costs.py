"""A table of costs, in cycles: about how long a convolution takes that is computed in this way or that.

The costs are those of one core that does two multiply-adds, two loads and a store a cycle, with a second cache of a
megabyte; only their order matters.
"""

from __future__ import annotations

from repvgg.engine.kernels.conv import choose_tile, row_cycles
from repvgg.engine.kernels.products import late_run_length, run_length
from repvgg.engine.kernels.tile import Tile
from repvgg.engine.part import Machine, Part, Rectangle, Size
from repvgg.engine.winograd import winograd

_CACHE = 7 * 2**17  # bytes of the second cache that a unit may fill
_IN, _OUT = 11.0, 7.0  # cycles for each vector of a place of a tile, going in and coming out
_SPILLED = 1.25  # times that, where tiles and weights do not fit the second cache together
_STORED = 0.45  # cycles for each vector of a product that is stored, and loaded and stored
_EXPANDED = 2.7  # cycles for each vector of a kernel that is transformed late
_STARTED = 4.0  # cycles for each run of channels
_DIRECT = 1.15  # steps of the direct kernel, which has more rests, to those of others
_PIXEL = 40.0  # cycles for each pixel and panel of the direct kernel, beside its steps
_FETCHED = 22.0  # bytes of weights that come in a cycle to all threads, ahead of their use
_AGAIN = 48.0  # that come from the third cache, where they were before
_NEAR = 100.0  # that come from the second cache of each thread
_STAY = 2**23  # bytes of weights that stay in the third cache beside all else
_FULL = 2**24  # bytes of feature maps that do
_MOVED = 6.5  # bytes of transformed tiles that are written there in a cycle
_READ, _READ_FAR = 34.0, 9.7  # bytes that are read from there in a cycle, and from memory
_UNIT = 300.0  # cycles to claim a unit and to begin with it


def direct_cycles(size: Size, machine: Machine) -> float:
    """About how long the direct kernel takes for 3x3."""
    vectors = -(-size.outputs // size.groups // machine.isa.width)
    tile = choose_tile(machine.isa, size.image[1], vectors)
    panels = -(-vectors // tile.vectors)
    steps = 9 * size.inputs // size.groups
    rows = size.batch * size.image[0] * size.groups
    of_row = _DIRECT * steps * row_cycles(tile, size.image[1], vectors) + panels * (_UNIT + _PIXEL * size.image[1])
    return rows * of_row / machine.threads + 4 * steps * size.outputs / _FETCHED


def least_cycles(rectangle: Rectangle, size: Size, stride: int, machine: Machine) -> float:
    """What the multiplications of some tiles take at least, and to fetch their weights once."""
    (_, down, high), (_, across, wide) = rectangle
    form = winograd(down, across, stride)
    muls = size.batch * high * wide * form.places * size.inputs * size.outputs // size.groups
    weights = 4 * form.sets(late=True) * size.inputs * size.outputs // size.groups
    return muls / (2 * machine.isa.width * machine.threads) + weights / _FETCHED


def cycles(part: Part, size: Size, machine: Machine) -> float:
    """About how long one of the threads is busy with a part of the image."""
    form, tiling, tile, late = part.form, part.tiling, part.tile, part.late
    width, places = machine.isa.width, form.places
    channels, vectors = size.inputs // size.groups, -(-size.outputs // size.groups // width)
    panels = -(-vectors // tile.vectors)
    work = size.groups * _multiplied(part, size, width)
    if late:
        expanded = form.rows.inputs * len(form.columns.moved)
        work += _EXPANDED * tiling.pieces * size.groups * channels * vectors * expanded
    spilled = _SPILLED if part.way == "fused" and not _fits(part, size, machine) else 1.0
    work += spilled * _OUT * places * tiling.real * size.groups * vectors
    into = spilled * _IN * places * tiling.real * -(-size.inputs // width)
    units = tiling.pieces
    if part.way == "product":
        moved = 4 * places * tiling.tiles * size.inputs
        units *= size.groups * panels
        if moved > _CACHE:
            work += moved * panels / (_READ if moved < _FULL else _READ_FAR)
        into += _UNIT * tiling.batch * tiling.grid[0] + (moved / _MOVED if moved > _CACHE / 2 else 0)
    of_unit = work / units + _UNIT
    rounds = -(-units // machine.threads)
    return rounds * of_unit + into / machine.threads + _fetched(part, size, machine)


def _multiplied(part: Part, size: Size, width: int) -> float:
    """Products of all panels of a group."""
    form, tile, cold = part.form, part.tile, part.way == "product"
    channels, vectors = size.inputs // size.groups, -(-size.outputs // size.groups // width)
    whole, rest = divmod(vectors, tile.vectors)
    lanes = [tile.vectors] * whole + [rest] * bool(rest)
    step = tile.vectors * width
    run = late_run_length(channels, form, step) if part.late else run_length(channels, cold=cold)
    sums = -(-channels // run)
    each = [
        channels * Tile(tile.pixels, count).cycles + sums * (_STARTED + _STORED * tile.pixels * count)
        for count in lanes
    ]
    return part.tiling.tiles // tile.pixels * form.places * sum(each)


def _fetched(part: Part, size: Size, machine: Machine) -> float:
    """To fetch all weights once, and again for each piece that finds other things where they were."""
    of_channel = 4 * part.form.sets(late=part.late) * size.inputs // size.groups
    weights = of_channel * size.outputs
    if part.way == "product":
        near, passes = of_channel * part.tile.vectors * machine.isa.width <= _CACHE // 2, part.tiling.pieces
    else:  # all threads pass through them at the same time
        near = _fits(part, size, machine)
        passes = -(-part.tiling.pieces // machine.threads)
    rate = _NEAR if near else _AGAIN if weights < _STAY else _FETCHED
    return weights / _FETCHED + (passes - 1) * weights / rate


def _fits(part: Part, size: Size, machine: Machine) -> bool:
    """Whether all weights, a piece of transformed tiles and their products fit the second cache together."""
    weights = part.form.sets(late=part.late) * size.inputs // size.groups * size.outputs
    tiles = part.form.places * part.tiling.piece * (size.inputs + part.tile.vectors * machine.isa.width)
    return 4 * (weights + tiles) <= _CACHE
