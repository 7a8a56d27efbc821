from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import Guarded, expected, inside, isas, maps, random_conv, run

from repvgg.engine.images import Images, round_up
from repvgg.engine.kernels.conv import pack
from repvgg.engine.kernels.tile import Tile
from repvgg.engine.kernels.winograd import Tiling, WinogradInput, WinogradProduct, place_floats
from repvgg.engine.layers import ConvGeometry
from repvgg.engine.winograd import POINTS, winograd


@pytest.mark.parametrize("outputs", POINTS)
def test_the_matrices_are_exact(outputs):
    """In fractions: m outputs of a filter of 3, for unit vectors in the place of the inputs and of the kernel."""
    form = winograd(outputs)
    for tap in range(3):
        for place in range(form.inputs):
            kernel = [row[tap] for row in form.kernel_matrix]
            inputs = [row[place] for row in form.input_matrix]
            products = [a * b for a, b in zip(kernel, inputs, strict=True)]
            for at, row in enumerate(form.output_matrix):
                total = sum(a * b for a, b in zip(row, products, strict=True))
                assert total == (at + tap == place)


# (input vectors, output channels, image, groups, padding)
CASES = {
    "whole tiles": (1, 32, (8, 8), 1, 1),
    "odd image": (2, 16, (7, 13), 1, 1),
    "odd channels": (1, 37, (9, 6), 1, 1),
    "one pixel": (1, 5, (1, 1), 1, 1),
    "without padding": (1, 16, (10, 7), 1, 0),
    "groups": (2, 64, (6, 5), 2, 1),
}


def kernels(conv, size, form, isa, batch, images, tile, piece) -> tuple[WinogradInput, WinogradProduct]:
    geometry, outputs = conv.geometry, conv.weight.shape[0]
    inputs = conv.weight.shape[1] * geometry.groups
    down, across = geometry.output_size(size)
    grid = -(-down // form.outputs), -(-across // form.outputs)
    more = grid[0] * form.outputs - down, grid[1] * form.outputs - across
    source = Images(inputs, size, geometry.padding, round_up(inputs, isa.width), more)
    target = Images(outputs, (down, across), (1, 2), round_up(outputs, isa.width), (1, 0))
    tiling = Tiling(grid, images, piece, batch // images)
    product = WinogradProduct(form, geometry.groups, inputs, source.pitch, target, tiling, tile, conv.relu, isa.width)
    return WinogradInput(form, source, geometry.padding, tiling, isa.width), product


def computed(conv, size, form, isa, batch=2, images=1, tile=None, piece=None, parts=1, seed=0):
    """(out, x) of both kernels, with canaries around all buffers and zeros left in the border."""
    tile = tile or Tile(3, 2)
    first, second = kernels(conv, size, form, isa, batch, images, tile, piece or 2 * tile.pixels)
    source, target = Guarded(batch * first.source.image), Guarded(batch * second.target.image)
    moved = Guarded(form.inputs**2 * place_floats(first.tiling, first.source.pitch), np.nan)
    x, out = inside(first.source, source.inside), inside(second.target, target.inside)
    x[...] = np.random.default_rng(seed).standard_normal(x.shape)
    out[...] = np.nan
    nothing = np.zeros(1, np.float32)
    run(first, source.inside, moved.inside, nothing, nothing, batch, isa, parts)
    weights, bias = pack(replace(conv, weight=form.transformed(conv.weight)), isa.width, tile.vectors)
    run(second, moved.inside, target.inside, weights, bias, batch // images, isa, parts)
    for memory in (source, moved, target):
        memory.assert_whole()
    found = out.copy()
    out[...] = 0
    assert not maps(second.target, target.inside).any()
    return torch.from_numpy(found).double(), x


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("outputs", POINTS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, outputs, isa):
    vectors, channels, size, groups, padding = CASES[name]
    geometry = ConvGeometry((3, 3), padding=(padding, padding), groups=groups)
    conv = random_conv(vectors * isa.width, channels, geometry)
    out, x = computed(conv, size, winograd(outputs), isa)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("images", "tile", "parts"), [(1, Tile(1, 1), 5), (2, Tile(7, 3), 1), (4, Tile(4, 2), 3)])
def test_blocks_pieces_and_units_in_any_order(images, tile, parts):
    isa = isas()[-1]
    conv = random_conv(isa.width, 4 * isa.width - 1, ConvGeometry((3, 3), padding=(1, 1)), relu=False)
    out, x = computed(conv, (9, 6), winograd(4), isa, batch=4, images=images, tile=tile, parts=parts)
    torch.testing.assert_close(out, expected(conv, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("outputs", POINTS)
def test_the_error_is_near_that_of_a_direct_convolution(outputs):
    """Of 192 channels, relative to the largest output: a few roundings of float32."""
    isa = isas()[-1]
    conv = random_conv(192, 32, ConvGeometry((3, 3), padding=(1, 1)), relu=False)
    out, x = computed(conv, (14, 14), winograd(outputs), isa, batch=1)
    wanted = expected(conv, x)
    assert (out - wanted).abs().max() < 4e-6 * wanted.abs().max()
