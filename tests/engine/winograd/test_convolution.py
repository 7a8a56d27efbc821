import math
import struct

import numpy as np
import pytest
import torch

from repvgg.engine.graph import ConvGeometry
from repvgg.engine.kernels.base import RegisterTile, pack_weights
from repvgg.engine.planner.algorithms import WinogradRegion
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up
from repvgg.engine.winograd.convolution import WinogradFused, WinogradInputTransform, WinogradStagedGemm
from repvgg.engine.winograd.filters import POINTS, edge_filter, winograd1d, winograd2d
from repvgg.engine.winograd.tiling import Tiling, element_stride
from repvgg.engine.winograd.transforms import multiply, multiply_both_sides
from tests.engine.helpers import Guarded, expected, inside, isas, maps, random_conv, run


@pytest.mark.parametrize("pair", POINTS, ids=str)
def test_the_matrices_are_exact(pair):
    stride, outputs = pair
    whole = winograd1d(outputs, stride)
    assert_exact(whole)
    for few in range(1, outputs):
        short, places = edge_filter(few, whole)
        assert_exact(short)
        assert short.filter_matrix == tuple(whole.filter_matrix[place] for place in places)
        assert stride == 2 or short.error_growth <= whole.error_growth + 1e-9


def assert_exact(form):
    """In fractions: m outputs of a filter of 3, for unit vectors in the place of the inputs and of the kernel."""
    assert form.inputs == len(form.input_matrix) == len(form.filter_matrix)
    for tap in range(3):
        for place in range(form.inputs):
            kernel = [row[tap] for row in form.filter_matrix]
            inputs = [row[place] for row in form.input_matrix]
            products = [a * b for a, b in zip(kernel, inputs, strict=True)]
            for at, row in enumerate(form.output_matrix):
                total = sum(a * b for a, b in zip(row, products, strict=True))
                assert total == (at * form.stride + tap == place)


WAYS = ("product", "fused")
ERROR = 2e-5  # of outputs of about 1, of few channels; times the loss of F(4x4) and more, of larger tiles

# (input vectors, output channels, image, groups, padding)
CASES = {
    "whole tiles": (1, 32, (8, 8), 1, 1),
    "odd image": (2, 16, (7, 13), 1, 1),
    "odd channels": (1, 37, (9, 6), 1, 1),
    "one pixel": (1, 5, (1, 1), 1, 1),
    "without padding": (1, 16, (10, 7), 1, 0),
    "groups": (2, 64, (6, 5), 2, 1),
}


def error(form):
    return ERROR * max(1.0, form.error_growth / winograd2d(4).error_growth)


def computed(conv, size, form, isa, way="product", batch=2, tile=None, piece=None, parts=1, late=False, splits=1):
    """(out, x) of a whole convolution, with canaries around all buffers and zeros left in the border."""
    tile = tile or RegisterTile(3, 2)
    after = conv.geometry.output_size(size)
    grid = -(-after[0] // form.outputs[0]), -(-after[1] // form.outputs[1])
    if piece is None:
        piece = batch * grid[0] * grid[1] if any(form.edge_tile) else 2 * tile.mr
    tiling = Tiling(grid, piece, batch)
    return run_parts(conv, size, [(form, tiling)], isa, way, batch, tile, parts, late, splits)


def run_parts(conv, size, pairs, isa, way, batch, tile, parts=1, late=False, splits=1):
    """The same, each image in several parts."""
    after = conv.geometry.output_size(size)
    inputs = conv.weight.shape[1] * conv.geometry.groups
    parts_of = [WinogradRegion("staged", form, tiling, tile, late) for form, tiling in pairs]
    ends = [max(part.end[axis] for part in parts_of) for axis in (0, 1)]
    more = [max(0, end - length) * step for end, length, step in zip(ends, after, conv.geometry.stride, strict=True)]
    come = FeatureMapLayout(inputs, size, conv.geometry.padding, round_up(inputs, isa.width), (more[0], more[1]))
    go = FeatureMapLayout(conv.weight.shape[0], after, (1, 2), round_up(conv.weight.shape[0], isa.width), (1, 0))
    source, target = Guarded(batch * come.image_stride), Guarded(batch * go.image_stride)
    x, out = inside(come, source.inside), inside(go, target.inside)
    x[...] = np.random.default_rng(0).standard_normal(x.shape)
    out[...] = np.nan
    for form, tiling in pairs:
        weights, bias = pack_weights(conv, isa.width, tile.nr, form, late)
        how = tiling, tile, late, isa.registers - tile.registers, conv.relu, isa.width
        if way == "fused":
            kernel = WinogradFused(
                form, conv.geometry.groups, come, conv.geometry.padding, go, tiling, tile, splits, *how[2:]
            )
            run(kernel, source.inside, target.inside, weights, bias, tiling.num_blocks, isa, parts)
            continue
        moved = Guarded(form.tile_elements * element_stride(tiling.num_padded_tiles, come.pixel_stride), np.nan)
        nothing = np.zeros(1, np.float32)
        first = WinogradInputTransform(form, come, conv.geometry.padding, tiling, isa.width)
        run(first, source.inside, moved.inside, nothing, nothing, batch, isa, parts)
        second = WinogradStagedGemm(form, conv.geometry.groups, inputs, come.pixel_stride, go, *how)
        run(second, moved.inside, target.inside, weights, bias, tiling.num_blocks, isa, parts)
        moved.assert_whole()
    for memory in (source, target):
        memory.assert_whole()
    found = out.copy()
    out[...] = 0
    assert not maps(go, target.inside).any()
    return torch.from_numpy(found).double(), x


# what takes long to compile is computed on fewer images
FEWER = {(1, 3), (1, 6), (1, 7)}
EACH = [
    (name, *points) for points in POINTS for name in CASES if points not in FEWER or name in ("odd image", "groups")
]


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "stride", "outputs"), EACH)
def test_against_float64(name, stride, outputs, way, isa):
    vectors, channels, size, groups, padding = CASES[name]
    geometry = ConvGeometry((3, 3), (stride, stride), (padding, padding), groups=groups)
    conv = random_conv(vectors * isa.width, channels, geometry)
    form = winograd2d(outputs, stride=stride)
    out, x = computed(conv, size, form, isa, way)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=error(form))


@pytest.mark.parametrize("isa", [isas()[0], isas()[-1]], ids=lambda isa: isa.name)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "form", [winograd2d(2, 7), winograd2d(5, 4), winograd2d(4, 1, 2), winograd2d(1, 3, 2)], ids=str
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
def test_kernels_that_are_transformed_while_they_are_used(inputs, channels, groups, tile, form, way, isa):
    """In several runs of channels, and a panel with fewer vectors than others, whose runs are longer than theirs.

    The products transform the next kernels where the tile leaves room, and all runs are equally long: not in each case.
    """
    stride = form.rows.stride
    conv = random_conv(inputs, channels, ConvGeometry((3, 3), (stride, stride), (1, 1), groups=groups))
    out, x = computed(conv, (9, 13), form, isa, way, tile=tile, late=True)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=error(form))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("piece", "tile", "parts"), [(3, RegisterTile(1, 1), 5), (14, RegisterTile(7, 3), 1), (24, RegisterTile(4, 2), 3)]
)
def test_pieces_across_images_and_units_in_any_order(piece, tile, parts, way):
    isa = isas()[-1]
    conv = random_conv(isa.width, 4 * isa.width - 1, ConvGeometry((3, 3), padding=(1, 1)), relu=False)
    out, x = computed(conv, (9, 6), winograd2d(4), isa, way, batch=4, tile=tile, piece=piece, parts=parts)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_an_image_with_stride_2(way, isa):
    """15 and 14 inputs to 8 and 7 outputs: rows as 4 + 4, columns as 2 · 3 + 1, each part with its own transform."""
    conv = random_conv(2 * isa.width, 3 * isa.width, ConvGeometry((3, 3), (2, 2), (1, 1)))
    pairs = [
        (winograd2d(4, 3, 2), Tiling((2, 2), 6, 3)),
        (winograd2d(4, 1, 2), Tiling((2, 1), 3, 3, (0, 6))),
    ]
    out, x = run_parts(conv, (15, 14), pairs, isa, way, 3, RegisterTile(3, 2))
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=ERROR)


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_an_image_with_tiles_of_other_sizes(way, isa):
    """14 rows as 3 · 4 + 2, and 9 columns as 2 · 4 + 1, of which the last tile sticks out."""
    conv = random_conv(2 * isa.width, 3 * isa.width, ConvGeometry((3, 3), padding=(1, 1)))
    rows, columns = ((0, 4, 3), (12, 2, 1)), ((0, 4, 2), (8, 2, 1))
    pairs = [
        (winograd2d(down, across), Tiling((high, wide), 6, 4, (top, left)))
        for top, down, high in rows
        for left, across, wide in columns
    ]
    out, x = run_parts(conv, (14, 9), pairs, isa, way, 4, RegisterTile(3, 2))
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", [isas()[0], isas()[-1]], ids=lambda isa: isa.name)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("form", "size", "groups", "batch"),
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
def test_tails(form, size, groups, batch, late, way, isa):
    """Tiles of up to four sizes with the same kernels, and more of them than registers take at once."""
    stride = form.rows.stride
    conv = random_conv(96 + 4 * batch, 64, ConvGeometry((3, 3), (stride, stride), (1, 1), groups=groups))
    out, x = computed(conv, size, form, isa, way, batch=batch, tile=RegisterTile(5, 3), late=late)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=error(form))


@pytest.mark.parametrize("isa", [isas()[0], isas()[-1]], ids=lambda isa: isa.name)
@pytest.mark.parametrize(("outputs", "groups", "late", "parts"), [(5, 1, False, 1), (5, 1, True, 3), (6, 2, False, 2)])
def test_pieces_that_several_units_take(outputs, groups, late, parts, isa):
    """By parts of the panels, of which the last is narrower; each unit transforms the tiles for itself."""
    channels = groups * (2 * outputs + 1) * isa.width
    conv = random_conv(2 * isa.width * groups, channels, ConvGeometry((3, 3), padding=(1, 1), groups=groups))
    for splits in (2, 3):
        out, x = computed(conv, (9, 7), winograd2d(4), isa, "fused", late=late, splits=splits, parts=parts)
        torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=ERROR)


FORMS = [winograd2d(rows, columns, stride) for stride, rows in POINTS for other, columns in POINTS if other == stride]


SOME = [form for form in FORMS if form.rows == form.columns or form.outputs in ((2, 7), (5, 4), (4, 1))]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("form", SOME, ids=str)
def test_the_loss_says_how_large_the_error_is(form, late):
    """Of 192 channels, relative to the outputs, root mean square: 0.9e-7 to 2.1e-7 for each 1 of loss."""
    isa, stride = isas()[-1], form.rows.stride
    conv = random_conv(192, 32, ConvGeometry((3, 3), (stride, stride), (1, 1)), relu=False)
    out, x = computed(conv, (14, 14), form, isa, batch=1, late=late)
    wanted = expected(conv, x)
    found = ((out - wanted).square().mean() / wanted.square().mean()).sqrt()
    assert 0.6e-7 * form.error_growth < found < 2.4e-7 * form.error_growth


def test_losses():
    """Of direct sums 1, and of F(4x4) half of what 0, ±1, ±2 have, which is 10.8."""
    assert winograd2d(1, stride=2).error_growth == 1
    found = [winograd2d(outputs).error_growth for outputs in (2, 3, 4, 5, 6, 7)]
    assert found == pytest.approx([1.67, 2.62, 4.78, 9.69, 20.6, 49.2], rel=0.01)
    assert winograd2d(2, 7).error_growth == pytest.approx(
        math.sqrt(winograd2d(2).error_growth * winograd2d(7).error_growth)
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_transforms_are_the_products_with_their_matrices(form):
    """All three, as they are written with few operations, on integers, for which floats of 64 bits are nearly exact."""
    for name in ("input_matrix", "filter_matrix", "output_matrix"):
        rows, columns = getattr(form.rows, name), getattr(form.columns, name)
        values = np.random.default_rng(0).integers(-9, 9, (len(rows[0]), len(columns[0]))).astype(np.float64)
        found = multiply_both_sides(Interpreter(), rows, columns, list(values.ravel()))
        exact = np.array(rows, np.float64) @ values @ np.array(columns, np.float64).T
        np.testing.assert_allclose(found, exact.ravel(), rtol=1e-5, atol=1e-4)


class Interpreter:
    """Computes what a function would, in place of writing it."""

    def binary(self, operation, left, right):
        return {"fadd": left + right, "fsub": left - right, "fmul": left * right}[operation]

    def fma(self, left, right, addend):
        return left * right + addend

    def constant(self, number):
        return struct.unpack("<d", struct.pack("<Q", int(number, 16)))[0]


def test_mirrored_points_save_operations():
    """F(4x4): 12 operations for each of 12 columns and rows of an input, and 13 for each of 10 of an output."""
    form = winograd2d(4)
    for name, most in (("input_matrix", 144), ("output_matrix", 130)):
        assert operations(form, name) <= most


def test_a_pair_of_points_costs_a_kernel_three_operations():
    counter = Counter()
    multiply(counter, winograd2d(7).columns.filter_matrix, [0] * 3)
    assert counter.count == 4 * 3


def test_with_stride_2_only_the_outer_taps_cost_operations():
    """F(4x4): 4 for each pair of points and 2 for infinity, for each of 9 columns and rows of 9 inputs."""
    assert operations(winograd2d(4, stride=2), "input_matrix") <= 9 * 10 + 9 * 10
    assert operations(winograd2d(3, stride=2), "input_matrix") <= 7 * 4 + 7 * 4
    assert operations(winograd2d(1, stride=2), "input_matrix") == 0


def operations(form, name):
    """Additions and the like that a transform takes."""
    counter = Counter()
    values = [0] * len(getattr(form.rows, name)[0]) * len(getattr(form.columns, name)[0])
    multiply_both_sides(counter, getattr(form.rows, name), getattr(form.columns, name), values)
    return counter.count


class Counter(Interpreter):
    """Counts operations."""

    def __init__(self):
        self.count = 0

    def binary(self, operation, left, right):
        self.count += 1
        return 0

    def fma(self, left, right, addend):
        return self.binary("", 0, 0)
