import pytest
import torch

from repvgg.engine.graph import ConvGeometry
from repvgg.engine.kernels.base import RegisterTile
from repvgg.engine.winograd.filters import POINTS, winograd2d
from repvgg.engine.winograd.tiling import Tiling
from tests.engine.helpers import expected, isas, random_conv
from tests.engine.winograd.helpers import compute, compute_regions

SCHEDULES = ("staged", "fused")
NARROW_AND_WIDE = [isas()[0], isas()[-1]]
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


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "stride", "outputs"), EACH)
def test_against_float64(name, stride, outputs, schedule, isa):
    vectors, channels, size, groups, padding = CASES[name]
    geometry = ConvGeometry((3, 3), (stride, stride), (padding, padding), groups=groups)
    conv = random_conv(vectors * isa.width, channels, geometry)
    winograd = winograd2d(outputs, stride=stride)
    out, x = compute(conv, size, winograd, isa, schedule)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=atol(winograd))


@pytest.mark.parametrize("isa", NARROW_AND_WIDE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "winograd", [winograd2d(2, 7), winograd2d(5, 4), winograd2d(4, 1, 2), winograd2d(1, 3, 2)], ids=str
)
@pytest.mark.parametrize(
    ("inputs", "channels", "groups", "tile"),
    [
        (127, 37, 1, RegisterTile(3, 2)),
        (128, 64, 2, RegisterTile(7, 3)),
        (16, 16, 1, RegisterTile(2, 1)),
        (19, 80, 1, RegisterTile(2, 3)),
        (96, 80, 1, RegisterTile(4, 3)),
    ],
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


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_regions_with_stride_2(schedule, isa):
    """15 and 14 inputs to 8 and 7 outputs: rows as 4 + 4, columns as 2 · 3 + 1, each region with its own transform."""
    conv = random_conv(2 * isa.width, 3 * isa.width, ConvGeometry((3, 3), (2, 2), (1, 1)))
    regions = [
        (winograd2d(4, 3, 2), Tiling((2, 2), 6, 3)),
        (winograd2d(4, 1, 2), Tiling((2, 1), 3, 3, (0, 6))),
    ]
    out, x = compute_regions(conv, (15, 14), regions, isa, schedule, 3, RegisterTile(3, 2))
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=ATOL)


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize("isa", NARROW_AND_WIDE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("on_the_fly", [False, True])
@pytest.mark.parametrize(
    ("winograd", "size", "groups", "batch"),
    [
        (winograd2d(3, 7, edge_tile=(2, 0)), (8, 14), 1, 3),
        (winograd2d(4, 5, edge_tile=(2, 4)), (6, 14), 1, 3),
        (winograd2d(5, 4, edge_tile=(1, 3)), (11, 7), 2, 2),
        (winograd2d(2, 6, edge_tile=(0, 3)), (4, 9), 1, 1),
        (winograd2d(4, 2, 2, edge_tile=(3, 1)), (14, 9), 1, 3),
        (winograd2d(1, 3, 2, edge_tile=(0, 1)), (3, 7), 1, 2),
    ],
    ids=str,
)
def test_edge_tiles(winograd, size, groups, batch, on_the_fly, schedule, isa):
    """Tiles of up to four sizes with the same transformed filters, and more of them than a register tile takes."""
    stride = winograd.rows.stride
    conv = random_conv(96 + 4 * batch, 64, ConvGeometry((3, 3), (stride, stride), (1, 1), groups=groups))
    tile = RegisterTile(5, 3)
    out, x = compute(conv, size, winograd, isa, schedule, batch=batch, tile=tile, on_the_fly=on_the_fly)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=atol(winograd))


@pytest.mark.parametrize("isa", NARROW_AND_WIDE, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    ("outputs", "groups", "on_the_fly", "parts"), [(5, 1, False, 1), (5, 1, True, 3), (6, 2, False, 2)]
)
def test_out_channel_splits(outputs, groups, on_the_fly, parts, isa):
    """Several units take a block by parts of the panels, of which the last is narrower; each transforms the tiles."""
    channels = groups * (2 * outputs + 1) * isa.width
    conv = random_conv(2 * isa.width * groups, channels, ConvGeometry((3, 3), padding=(1, 1), groups=groups))
    for splits in (2, 3):
        out, x = compute(conv, (9, 7), winograd2d(4), isa, "fused", on_the_fly=on_the_fly, splits=splits, parts=parts)
        torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=ATOL)
