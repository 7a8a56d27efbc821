import pytest
import torch

from repvgg.engine.graph import ConvGeometry
from repvgg.engine.kernels.base import RegisterTile
from repvgg.engine.winograd.filters import POINTS, winograd2d
from repvgg.engine.winograd.gemm import on_the_fly_channel_block
from repvgg.engine.winograd.tiling import Tiling
from tests.engine.covering import covering
from tests.engine.emulation import emulated_isas
from tests.engine.helpers import every_isa, expected, isas, random_conv
from tests.engine.winograd.helpers import compute, compute_regions

SCHEDULES = ("staged", "fused")
NARROW_AND_WIDE = [isas()[0], isas()[-1], *emulated_isas()]
ATOL = 2e-5  # outputs are about 1, channels are few; larger tiles: times their error growth over that of F(4x4)

# (input vectors, output channels, image, groups, padding)
CASES = {
    "whole tiles": (1, 32, (8, 8), 1, 1),
    "odd image": (2, 16, (7, 13), 1, 1),
    "odd channels": (1, 37, (9, 6), 1, 1),
    "one pixel": (1, 5, (1, 1), 1, 1),
    "without padding": (1, 16, (10, 7), 1, 0),
    "groups": (2, 64, (6, 5), 2, 1),
}


def atol(winograd):
    return ATOL * max(1.0, winograd.error_growth / winograd2d(4).error_growth)


# What takes long to compile runs on fewer images.
SLOW_TO_COMPILE = {(1, 3), (1, 6), (1, 7)}
EACH = [
    (name, *points)
    for points in POINTS
    for name in CASES
    if points not in SLOW_TO_COMPILE or name in ("odd image", "groups")
]


@pytest.mark.parametrize(
    ("name", "stride", "outputs", "schedule", "isa"),
    covering(
        EACH,
        SCHEDULES,
        every_isa(),
        views=[
            lambda name, stride, outputs, schedule, isa: ((stride, outputs), schedule, isa, CASES[name][3]),
            lambda name, stride, outputs, schedule, isa: (name, schedule, isa, stride),
        ],
    ),
)
def test_against_float64(name, stride, outputs, schedule, isa):
    vectors, channels, size, groups, padding = CASES[name]
    geometry = ConvGeometry((3, 3), (stride, stride), (padding, padding), groups=groups)
    conv = random_conv(vectors * isa.width, channels, geometry)
    winograd = winograd2d(outputs, stride=stride)
    out, x = compute(conv, size, winograd, isa, schedule)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=atol(winograd))


def interleaves(inputs, groups, tile, winograd, isa):
    """Whether the filter transform of the full panels is interleaved with their GEMMs."""
    free = isa.registers - tile.registers
    return on_the_fly_channel_block(inputs // groups, winograd, tile.nr * isa.width, free)[1]


@pytest.mark.parametrize(
    ("inputs", "channels", "groups", "tile", "winograd", "schedule", "isa"),
    covering(
        [
            (127, 37, 1, RegisterTile(3, 2)),
            (128, 64, 2, RegisterTile(7, 3)),
            (16, 16, 1, RegisterTile(2, 1)),
            (19, 80, 1, RegisterTile(2, 3)),
            (96, 80, 1, RegisterTile(4, 3)),
        ],
        [winograd2d(2, 7), winograd2d(5, 4), winograd2d(4, 1, 2), winograd2d(1, 3, 2)],
        SCHEDULES,
        NARROW_AND_WIDE,
        views=[
            lambda inputs, channels, groups, tile, winograd, schedule, isa: (
                winograd,
                schedule,
                isa,
                interleaves(inputs, groups, tile, winograd, isa),
            ),
            lambda inputs, channels, groups, tile, winograd, schedule, isa: (inputs, schedule, isa),
        ],
    ),
)
def test_on_the_fly_filter_transform(inputs, channels, groups, tile, winograd, schedule, isa):
    """Several channel blocks, and a last panel with fewer vectors than the others, whose blocks are longer.

    The transform is interleaved with the GEMM where the tile leaves registers and all blocks are equally long.
    """
    stride = winograd.rows.stride
    conv = random_conv(inputs, channels, ConvGeometry((3, 3), (stride, stride), (1, 1), groups=groups))
    out, x = compute(conv, (9, 13), winograd, isa, schedule, tile=tile, on_the_fly=True)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=atol(winograd))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("block", "tile", "parts"), [(3, RegisterTile(1, 1), 5), (14, RegisterTile(7, 3), 1), (24, RegisterTile(4, 2), 3)]
)
def test_blocks_across_images_and_units_in_any_order(block, tile, parts, schedule):
    isa = isas()[-1]
    conv = random_conv(isa.width, 4 * isa.width - 1, ConvGeometry((3, 3), padding=(1, 1)), relu=False)
    out, x = compute(conv, (9, 6), winograd2d(4), isa, schedule, batch=4, tile=tile, block=block, parts=parts)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=2e-5)


# Both schedules meet every instruction set above: here each of them once is enough.
SCHEDULES_AND_ISAS = covering(
    SCHEDULES, every_isa(), views=[lambda schedule, isa: (schedule,), lambda schedule, isa: (isa,)]
)


@pytest.mark.parametrize(
    ("geometry", "size", "down", "across", "schedule", "isa"),
    covering(
        [
            (ConvGeometry((3, 3), padding=(2, 2), dilation=(2, 2)), (13, 18)),  # phase images of 7 or 6 by 9
            (ConvGeometry((3, 3), padding=(4, 4), dilation=(4, 4)), (22, 10)),  # of 6 or 5 by 3 or 2
            (ConvGeometry((3, 3), padding=(1, 0), dilation=(2, 3), groups=2), (9, 14)),  # padding is no multiple
            (ConvGeometry((3, 3), padding=(6, 1), dilation=(6, 1)), (4, 7)),  # fewer rows than phases
        ],
        [(2, 4), (4, 4), (3, 5)],
        SCHEDULES,
        every_isa(),
        views=[
            lambda geometry, size, down, across, schedule, isa: (size, schedule),
            lambda geometry, size, down, across, schedule, isa: (down, schedule, isa),
        ],
    ),
)
def test_dilation_by_phase_images(geometry, size, down, across, schedule, isa):
    """Phase images of unequal sizes; and canaries: a phase image reads and writes its own pixels alone."""
    conv = random_conv(2 * isa.width, 4 * isa.width, geometry)
    sizes = [-(-n // d) for n, d in zip(geometry.output_size(size), geometry.dilation, strict=True)]
    edges = [n % m if n > m else 0 for n, m in zip(sizes, (down, across), strict=True)]
    winograd = winograd2d(down, across, edge_tile=tuple(edges) if (down, across) == (3, 5) else (0, 0))
    out, x = compute(conv, size, winograd, isa, schedule, batch=3, parts=2)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=atol(winograd))


@pytest.mark.parametrize(("schedule", "isa"), SCHEDULES_AND_ISAS)
def test_regions_with_stride_2(schedule, isa):
    """15 and 14 inputs to 8 and 7 outputs: rows as 4 + 4, columns as 2 · 3 + 1, each region with its own transform."""
    conv = random_conv(2 * isa.width, 3 * isa.width, ConvGeometry((3, 3), (2, 2), (1, 1)))
    regions = [
        (winograd2d(4, 3, 2), Tiling((2, 2), 6, 3)),
        (winograd2d(4, 1, 2), Tiling((2, 1), 3, 3, (0, 6))),
    ]
    out, x = compute_regions(conv, (15, 14), regions, isa, schedule, 3, RegisterTile(3, 2))
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=ATOL)


@pytest.mark.parametrize(("schedule", "isa"), SCHEDULES_AND_ISAS)
def test_regions_with_tiles_of_different_sizes(schedule, isa):
    """14 rows as 3 · 4 + 2, and 9 columns as 2 · 4 + 1, whose last tile overhangs the image."""
    conv = random_conv(2 * isa.width, 3 * isa.width, ConvGeometry((3, 3), padding=(1, 1)))
    rows, columns = ((0, 4, 3), (12, 2, 1)), ((0, 4, 2), (8, 2, 1))
    regions = [
        (winograd2d(down, across), Tiling((height, width), 6, 4, (top, left)))
        for top, down, height in rows
        for left, across, width in columns
    ]
    out, x = compute_regions(conv, (14, 9), regions, isa, schedule, 4, RegisterTile(3, 2))
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("winograd", "size", "groups", "batch", "on_the_fly", "schedule", "isa"),
    covering(
        [
            (winograd2d(3, 7, edge_tile=(2, 0)), (8, 14), 1, 3),
            (winograd2d(4, 5, edge_tile=(2, 4)), (6, 14), 1, 3),
            (winograd2d(5, 4, edge_tile=(1, 3)), (11, 7), 2, 2),
            (winograd2d(2, 6, edge_tile=(0, 3)), (4, 9), 1, 1),
            (winograd2d(4, 2, 2, edge_tile=(3, 1)), (14, 9), 1, 3),
            (winograd2d(1, 3, 2, edge_tile=(0, 1)), (3, 7), 1, 2),
        ],
        [False, True],
        SCHEDULES,
        NARROW_AND_WIDE,
        views=[
            lambda winograd, size, groups, batch, on_the_fly, schedule, isa: (winograd,),
            # Which axes have edge tiles; where both have, there are four sizes of tiles.
            lambda winograd, size, groups, batch, on_the_fly, schedule, isa: (
                tuple(map(bool, winograd.edge_tile)),
                on_the_fly,
                schedule,
                isa,
            ),
            lambda winograd, size, groups, batch, on_the_fly, schedule, isa: (
                groups,
                batch > 1,
                winograd.rows.stride,
                on_the_fly,
                schedule,
                isa,
            ),
        ],
    ),
)
def test_edge_tiles(winograd, size, groups, batch, on_the_fly, schedule, isa):
    """Tiles of up to four sizes with the same transformed filters, and more of them than a register tile takes."""
    stride = winograd.rows.stride
    conv = random_conv(96 + 4 * batch, 64, ConvGeometry((3, 3), (stride, stride), (1, 1), groups=groups))
    tile = RegisterTile(5, 3)
    out, x = compute(conv, size, winograd, isa, schedule, batch=batch, tile=tile, on_the_fly=on_the_fly)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=atol(winograd))


@pytest.mark.parametrize(
    ("outputs", "groups", "on_the_fly", "parts", "splits", "isa"),
    covering([(5, 1, False, 1), (5, 1, True, 3), (6, 2, False, 2)], (2, 3), NARROW_AND_WIDE),
)
def test_out_channel_splits(outputs, groups, on_the_fly, parts, splits, isa):
    """Several units take a block by parts of the panels, of which the last is narrower; each transforms the tiles."""
    channels = groups * (2 * outputs + 1) * isa.width
    conv = random_conv(2 * isa.width * groups, channels, ConvGeometry((3, 3), padding=(1, 1), groups=groups))
    out, x = compute(conv, (9, 7), winograd2d(4), isa, "fused", on_the_fly=on_the_fly, splits=splits, parts=parts)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=ATOL)
