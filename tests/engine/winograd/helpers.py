"""A Winograd convolution of either schedule, in guarded memory."""

import numpy as np
import torch

from repvgg.engine.kernels.base import RegisterTile, pack_weights
from repvgg.engine.planner.algorithms import WinogradRegion
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up
from repvgg.engine.winograd.convolution import WinogradFused, WinogradInputTransform, WinogradStagedGemm
from repvgg.engine.winograd.filters import POINTS, winograd2d
from repvgg.engine.winograd.tiling import Tiling, element_stride
from tests.engine.helpers import Guarded, interior, run, with_border

ALL_TRANSFORMS = [
    winograd2d(rows, columns, stride) for stride, rows in POINTS for other, columns in POINTS if other == stride
]


def compute(
    conv, size, winograd, isa, schedule="staged", batch=2, tile=None, block=None, parts=1, on_the_fly=False, splits=1
):
    """Return (out, x) of a whole convolution; ``block`` is its tiles, ``parts`` how many calls take its units."""
    tile = tile or RegisterTile(3, 2)
    out_size = conv.geometry.output_size(size)
    dilation = conv.geometry.dilation
    steps = [count * step for count, step in zip(winograd.outputs, dilation, strict=True)]
    grid, images = (-(-out_size[0] // steps[0]), -(-out_size[1] // steps[1])), batch * dilation[0] * dilation[1]
    if block is None:
        block = images * grid[0] * grid[1] if any(winograd.edge_tile) else 2 * tile.mr
    regions = [(winograd, Tiling(grid, block, images, dilation=dilation))]
    return compute_regions(conv, size, regions, isa, schedule, batch, tile, parts, on_the_fly, splits)


def compute_regions(conv, size, regions, isa, schedule, batch, tile, parts=1, on_the_fly=False, splits=1):
    """Return (out, x) of a convolution whose regions, pairs of transform and tiling, cover the image.

    Check the canaries around all buffers, and that the border of the output remains zero.
    """
    geometry, width = conv.geometry, isa.width
    out_size = geometry.output_size(size)
    in_channels, out_channels = conv.weight.shape[1] * geometry.groups, conv.weight.shape[0]
    ends = [WinogradRegion("staged", winograd, tiling, tile, on_the_fly).end for winograd, tiling in regions]
    axes = zip(map(max, zip(*ends, strict=True)), out_size, geometry.stride, geometry.dilation, strict=True)
    below, right = (max(0, end * dilation - length) * stride for end, length, stride, dilation in axes)
    source = FeatureMapLayout(in_channels, size, geometry.padding, round_up(in_channels, width), (below, right))
    target = FeatureMapLayout(out_channels, out_size, (1, 2), round_up(out_channels, width), (1, 0))
    read, written = Guarded(batch * source.image_stride), Guarded(batch * target.image_stride)
    x, out = interior(source, read.data), interior(target, written.data)
    x[...] = np.random.default_rng(0).standard_normal(x.shape)
    out[...] = np.nan
    for winograd, tiling in regions:
        weights, bias = pack_weights(conv, width, tile.nr, winograd, on_the_fly)
        free = isa.registers - tile.registers
        if schedule == "fused":
            where = (geometry.groups, source, geometry.padding, target, tiling, tile, splits)
            fused = WinogradFused(winograd, *where, on_the_fly, free, conv.epilogue, width)
            run(fused, read.data, written.data, weights, bias, tiling.num_blocks, isa, parts)
            continue
        floats = winograd.tile_elements * element_stride(tiling.num_padded_tiles, source.pixel_stride)
        transformed, unused = Guarded(floats, np.nan), np.zeros(1, np.float32)
        first = WinogradInputTransform(winograd, source, geometry.padding, tiling, width)
        run(first, read.data, transformed.data, unused, unused, batch, isa, parts)
        where = (geometry.groups, in_channels, source.pixel_stride, target, tiling, tile)
        second = WinogradStagedGemm(winograd, *where, on_the_fly, free, conv.epilogue, width)
        run(second, transformed.data, written.data, weights, bias, tiling.num_blocks, isa, parts)
        transformed.assert_intact()
    for memory in (read, written):
        memory.assert_intact()
    found = out.copy()
    out[...] = 0
    assert not with_border(target, written.data).any()
    return torch.from_numpy(found).double(), x
