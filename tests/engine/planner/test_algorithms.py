import math
from typing import Any

import pytest
import torch

from repvgg.engine.codegen.jit import GENERIC_ISAS
from repvgg.engine.graph import ConvGeometry
from repvgg.engine.planner.algorithms import ConvProblem, Target, image_partitions
from repvgg.engine.planner.cost_model import candidate_algorithms, costed_regions, least_cycles, select_algorithm
from tests.engine.covering import covering

PADDED = ConvGeometry((3, 3), padding=(1, 1))
AVX512 = GENERIC_ISAS["avx512"]
STACK_BYTES = 2**21  # that every thread has on Linux


def slow(parameters: list[Any]) -> list[Any]:
    return [pytest.param(*one.values, id=one.id, marks=pytest.mark.slow) for one in parameters]


def strided(stride: int) -> ConvGeometry:
    return ConvGeometry((3, 3), (stride, stride), (1, 1))


@pytest.mark.parametrize(
    ("channels", "height", "width", "batch", "name"),
    covering([(48, 56, 56), (192, 14, 14), (640, 45, 45)], [1, 16], GENERIC_ISAS)
    + slow(covering([(96, 28, 28)], [1, 7, 16], GENERIC_ISAS)),
)
def test_large_layers_use_winograd_within_registers_and_stack(channels, height, width, batch, name):
    isa = GENERIC_ISAS[name]
    algorithm = select_algorithm(ConvProblem(PADDED, channels, channels, (height, width), batch), Target(isa, 2))
    assert algorithm is not None
    for region in algorithm.regions:
        tiling, tile = region.tiling, region.tile
        assert tile.registers <= isa.registers
        assert tiling.tiles_per_block % tile.mr == 0 or (any(region.winograd.edge_tile) and tiling.num_blocks == 1)
        assert tiling.num_padded_tiles >= tiling.num_tiles == batch * tiling.tiles_per_image
        floats = tile.nr * isa.width + (channels if region.schedule == "fused" else 0)
        assert 4 * region.winograd.tile_elements * (tiling.tiles_per_block * floats + 32) <= STACK_BYTES


def end_of(span):
    start, length, count, last = span
    return start + length * count - (length - last if last else 0)


@pytest.mark.parametrize(
    ("precision", "stride", "image"),
    covering(["high", "medium"], [1, 2], [((14, 14),), ((13, 7),), ((9, 18),), ((1, 1),)])
    + slow(covering(["high", "medium"], [1, 2], [((28, 28),)])),
)
def test_partitions_cover_each_pixel_once(precision, stride, image):
    problem, target = ConvProblem(strided(stride), 64, 64, image, 4), Target(AVX512, 2, precision)
    partitions = list(image_partitions(problem, target))
    assert len(partitions) >= 4
    for regions in partitions:
        ends = [[end_of(span) for span in spans] for spans in zip(*regions, strict=True)]
        assert ends == [[span.end for span in spans] for spans in zip(*regions, strict=True)]
        covered = torch.zeros(max(ends[0]), max(ends[1]))
        for ((top, *_), (left, *_)), bottom, right in zip(regions, *ends, strict=True):
            covered[top:bottom, left:right] += 1
        assert (covered == 1).all()
        assert all(end >= length for end, length in zip(covered.shape, image, strict=True))
    for algorithm in candidate_algorithms(problem, target):
        assert tuple(region.tiles for region in algorithm.regions) in partitions
        assert algorithm.end == tuple(max(region.end[axis] for region in algorithm.regions) for axis in (0, 1))


@pytest.mark.parametrize(
    ("stride", "image"),
    [(2, (7, 7)), (1, (9, 8)), *slow(covering([2, 1], [((7, 7),), ((14, 14),), ((28, 28),), ((56, 56),)]))],
)
def test_pruning_keeps_the_cheapest_partition(stride, image):
    """The lower bound of a region is below the estimate of every candidate for it."""
    problem, target = ConvProblem(strided(stride), 48, 64, image, 4), Target(AVX512, 2, "medium")
    cheapest = {
        tiles: min((region.estimated_cycles for region in costed_regions(tiles, problem, target)), default=math.inf)
        for partition in image_partitions(problem, target)
        for tiles in partition
    }
    assert all(least_cycles(tiles, problem, target) <= cycles for tiles, cycles in cheapest.items())
    best = min(sum(cheapest[tiles] for tiles in partition) for partition in image_partitions(problem, target))
    assert min(algorithm.estimated_cycles for algorithm in candidate_algorithms(problem, target)) == best


@pytest.mark.parametrize(("precision", "channels", "most"), [("high", 16, 4.8), ("high", 400, 23), ("medium", 100, 26)])
def test_error_growth_is_limited_by_the_square_root_of_the_channels(precision, channels, most):
    problem, target = ConvProblem(PADDED, channels, 64, (28, 28), 4), Target(AVX512, 2, precision)
    growths = {tiles.winograd(1).error_growth for partition in image_partitions(problem, target) for tiles in partition}
    assert 0.7 * most < max(growths) <= most


def test_highest_precision_uses_the_direct_kernel():
    assert select_algorithm(ConvProblem(PADDED, 192, 192, (14, 14), 1), Target(AVX512, 1, "highest")) is None


def test_dilated_convolutions_are_those_of_phase_images():
    dilated = ConvProblem(ConvGeometry((3, 3), padding=(2, 2), dilation=(2, 2)), 96, 96, (27, 30), 3)
    phases = ConvProblem(PADDED, 96, 96, (14, 15), 12)
    chosen, wanted = (select_algorithm(problem, Target(AVX512, 2)) for problem in (dilated, phases))
    assert chosen is not None
    assert wanted is not None
    assert chosen.end == wanted.end == (14, 15)
    assert chosen.estimated_cycles == wanted.estimated_cycles
    assert all(region.tiling.dilation == (2, 2) for region in chosen.regions)


WITHOUT_WINOGRAD = {
    "stride 3": (ConvGeometry((3, 3), (3, 3), (1, 1)), 96, 96),
    "stride 2 along one axis": (ConvGeometry((3, 3), (2, 1), (1, 1)), 96, 96),
    "dilated with stride 2": (ConvGeometry((3, 3), (2, 2), (2, 2), dilation=(2, 2)), 96, 96),
    "1x1": (ConvGeometry((1, 1)), 96, 96),
    "three channels": (PADDED, 3, 96),
    "groups of partial vectors": (ConvGeometry((3, 3), padding=(1, 1), groups=4), 96, 100),
}


@pytest.mark.parametrize("name", WITHOUT_WINOGRAD)
def test_what_winograd_does_not_support(name):
    geometry, in_channels, out_channels = WITHOUT_WINOGRAD[name]
    assert select_algorithm(ConvProblem(geometry, in_channels, out_channels, (28, 28), 1), Target(AVX512)) is None
