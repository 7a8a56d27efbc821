import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import Guarded, expected, inside, isas, maps, random_conv, run

from repvgg.engine.images import Images, round_up
from repvgg.engine.kernels.conv import pack
from repvgg.engine.kernels.fused import WinogradFused
from repvgg.engine.kernels.tile import Tile
from repvgg.engine.kernels.tiling import Tiling, place_floats
from repvgg.engine.kernels.transform import transform_rectangle
from repvgg.engine.kernels.winograd import WinogradInput, WinogradProduct
from repvgg.engine.layers import ConvGeometry
from repvgg.engine.winograd import POINTS, minimal_filter, winograd


@pytest.mark.parametrize(("stride", "outputs"), POINTS)
def test_the_matrices_are_exact(stride, outputs):
    """In fractions: m outputs of a filter of 3, for unit vectors in the place of the inputs and of the kernel."""
    form = minimal_filter(outputs, stride)
    assert form.inputs == len(form.input_matrix) == len(form.kernel_matrix)
    for tap in range(3):
        for place in range(form.inputs):
            kernel = [row[tap] for row in form.kernel_matrix]
            inputs = [row[place] for row in form.input_matrix]
            products = [a * b for a, b in zip(kernel, inputs, strict=True)]
            for at, row in enumerate(form.output_matrix):
                total = sum(a * b for a, b in zip(row, products, strict=True))
                assert total == (at * stride + tap == place)


WAYS = ("product", "fused")
ERRORS = {(1, 5): 2e-4}  # of outputs of about 1, of few channels; of others:
ERROR = 2e-5

# (input vectors, output channels, image, groups, padding)
CASES = {
    "whole tiles": (1, 32, (8, 8), 1, 1),
    "odd image": (2, 16, (7, 13), 1, 1),
    "odd channels": (1, 37, (9, 6), 1, 1),
    "one pixel": (1, 5, (1, 1), 1, 1),
    "without padding": (1, 16, (10, 7), 1, 0),
    "groups": (2, 64, (6, 5), 2, 1),
}


def computed(conv, size, form, isa, way="product", batch=2, tile=None, piece=None, parts=1, seed=0):
    """(out, x) of a whole convolution, with canaries around all buffers and zeros left in the border."""
    tile = tile or Tile(3, 2)
    after = conv.geometry.output_size(size)
    grid = -(-after[0] // form.outputs[0]), -(-after[1] // form.outputs[1])
    tiling = Tiling(grid, piece or 2 * tile.pixels, batch)
    return run_parts(conv, size, [(form, tiling)], isa, way, batch, tile, parts, seed)


def run_parts(conv, size, pairs, isa, way, batch, tile, parts=1, seed=0):
    """The same, each image in several parts."""
    after = conv.geometry.output_size(size)
    inputs = conv.weight.shape[1] * conv.geometry.groups
    ends = [
        max(tiling.corner[axis] + tiling.grid[axis] * form.outputs[axis] for form, tiling in pairs) for axis in (0, 1)
    ]
    more = [max(0, end - length) * step for end, length, step in zip(ends, after, conv.geometry.stride, strict=True)]
    come = Images(inputs, size, conv.geometry.padding, round_up(inputs, isa.width), (more[0], more[1]))
    go = Images(conv.weight.shape[0], after, (1, 2), round_up(conv.weight.shape[0], isa.width), (1, 0))
    source, target = Guarded(batch * come.image), Guarded(batch * go.image)
    x, out = inside(come, source.inside), inside(go, target.inside)
    x[...] = np.random.default_rng(seed).standard_normal(x.shape)
    out[...] = np.nan
    for form, tiling in pairs:
        weights, bias = pack(replace(conv, weight=form.transformed(conv.weight)), isa.width, tile.vectors)
        if way == "fused":
            kernel = WinogradFused(
                form, conv.geometry.groups, come, conv.geometry.padding, go, tiling, tile, conv.relu, isa.width
            )
            run(kernel, source.inside, target.inside, weights, bias, tiling.pieces, isa, parts)
            continue
        moved = Guarded(form.places * place_floats(tiling.tiles, come.pitch), np.nan)
        nothing = np.zeros(1, np.float32)
        first = WinogradInput(form, come, conv.geometry.padding, tiling, isa.width)
        run(first, source.inside, moved.inside, nothing, nothing, batch, isa, parts)
        second = WinogradProduct(form, conv.geometry.groups, inputs, come.pitch, go, tiling, tile, conv.relu, isa.width)
        run(second, moved.inside, target.inside, weights, bias, tiling.pieces, isa, parts)
        moved.assert_whole()
    for memory in (source, target):
        memory.assert_whole()
    found = out.copy()
    out[...] = 0
    assert not maps(go, target.inside).any()
    return torch.from_numpy(found).double(), x


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("stride", "outputs"), POINTS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, stride, outputs, way, isa):
    vectors, channels, size, groups, padding = CASES[name]
    geometry = ConvGeometry((3, 3), (stride, stride), (padding, padding), groups=groups)
    conv = random_conv(vectors * isa.width, channels, geometry)
    out, x = computed(conv, size, winograd(outputs, stride=stride), isa, way)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=ERRORS.get((stride, outputs), ERROR))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("piece", "tile", "parts"), [(3, Tile(1, 1), 5), (14, Tile(7, 3), 1), (24, Tile(4, 2), 3)])
def test_pieces_across_images_and_units_in_any_order(piece, tile, parts, way):
    isa = isas()[-1]
    conv = random_conv(isa.width, 4 * isa.width - 1, ConvGeometry((3, 3), padding=(1, 1)), relu=False)
    out, x = computed(conv, (9, 6), winograd(4), isa, way, batch=4, tile=tile, piece=piece, parts=parts)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_an_image_with_stride_2(way, isa):
    """15 and 14 inputs to 8 and 7 outputs: rows as 4 + 4, columns as 2 · 3 + 1, each part with its own transform."""
    conv = random_conv(2 * isa.width, 3 * isa.width, ConvGeometry((3, 3), (2, 2), (1, 1)))
    pairs = [
        (winograd(4, 3, 2), Tiling((2, 2), 6, 3)),
        (winograd(4, 1, 2), Tiling((2, 1), 3, 3, (0, 6))),
    ]
    out, x = run_parts(conv, (15, 14), pairs, isa, way, 3, Tile(3, 2))
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=ERROR)


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_an_image_with_tiles_of_other_sizes(way, isa):
    """14 rows as 3 · 4 + 2, and 9 columns as 2 · 4 + 1, of which the last tile sticks out."""
    conv = random_conv(2 * isa.width, 3 * isa.width, ConvGeometry((3, 3), padding=(1, 1)))
    rows, columns = ((0, 4, 3), (12, 2, 1)), ((0, 4, 2), (8, 2, 1))
    pairs = [
        (winograd(down, across), Tiling((high, wide), 6, 4, (top, left)))
        for top, down, high in rows
        for left, across, wide in columns
    ]
    out, x = run_parts(conv, (14, 9), pairs, isa, way, 4, Tile(3, 2))
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=2e-5)


LIMITS = {(1, 2): 5e-7, (1, 4): 1.2e-6, (1, 5): 2e-5, (2, 1): 5e-7, (2, 2): 5e-7, (2, 3): 5e-7, (2, 4): 8e-7}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("stride", "outputs"), POINTS)
def test_the_error_is_near_that_of_a_direct_convolution(stride, outputs, way):
    """Of 192 channels, relative to the largest output: a few roundings of float32 but for F(5x5)."""
    isa, limit = isas()[-1], LIMITS[stride, outputs]
    conv = random_conv(192, 32, ConvGeometry((3, 3), (stride, stride), (1, 1)), relu=False)
    out, x = computed(conv, (14, 14), winograd(outputs, stride=stride), isa, way, batch=1)
    wanted = expected(conv, x)
    assert (out - wanted).abs().max() < limit * wanted.abs().max()


FORMS = [winograd(rows, columns, stride) for stride, rows in POINTS for other, columns in POINTS if other == stride]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_transforms_are_the_products_with_their_matrices(form):
    """All three, as they are written with few operations, on integers, for which floats of 64 bits are nearly exact."""
    for name in ("input_matrix", "kernel_matrix", "output_matrix"):
        rows, columns = getattr(form.rows, name), getattr(form.columns, name)
        values = np.random.default_rng(0).integers(-9, 9, (len(rows[0]), len(columns[0]))).astype(np.float64)
        found = transform_rectangle(Interpreter(), rows, columns, list(values.ravel()))
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
    """F(4x4): 12 operations for each of 12 columns and rows of an input, and of 10 of an output."""
    form = winograd(4)
    for name, most in (("input_matrix", 144), ("output_matrix", 120)):
        assert operations(form, name) <= most


def test_with_stride_2_only_the_outer_taps_cost_operations():
    """F(4x4): 4 for each pair of points and 2 for infinity, for each of 9 columns and rows of 9 inputs."""
    assert operations(winograd(4, stride=2), "input_matrix") <= 9 * 10 + 9 * 10
    assert operations(winograd(3, stride=2), "input_matrix") <= 7 * 4 + 7 * 4
    assert operations(winograd(1, stride=2), "input_matrix") == 0


def operations(form, name):
    """Additions and the like that a transform takes."""
    counter = Counter()
    values = [0] * len(getattr(form.rows, name)[0]) * len(getattr(form.columns, name)[0])
    transform_rectangle(counter, getattr(form.rows, name), getattr(form.columns, name), values)
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
