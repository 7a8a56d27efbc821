"""An analytical cost model for convolutions, and the selection of algorithms by it.

Costs are cycles of one core that issues two fused multiply-adds, two loads and one store a cycle. The constants are
those of the target's processor, :class:`repvgg.engine.planner.machine_costs.MachineCosts`; ``LOG.md`` has the
experiments. Only the order of the candidates matters. On a machine where it is wrong, use ``compile(search=True)``,
which measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.kernels.base import RegisterTile, balanced_tiles
from repvgg.engine.kernels.direct_conv import estimate_row_cycles, select_register_tile
from repvgg.engine.planner.algorithms import (
    MAX_PANEL_VECTORS,
    ConvAlgorithm,
    ConvProblem,
    Target,
    TileRegion,
    WinogradRegion,
    candidate_regions,
    candidates_with,
    image_partitions,
    register_tiles,
    supports_winograd,
)
from repvgg.engine.planner.machine_costs import MachineCosts
from repvgg.engine.winograd.gemm import MAX_CHANNEL_BLOCK, channel_block, on_the_fly_channel_block
from repvgg.engine.winograd.tiling import num_tile_elements, tile_groups, tile_subsets


@lru_cache(maxsize=1024)  # most layers of a network repeat the problem of another
def select_algorithm(problem: ConvProblem, target: Target) -> ConvAlgorithm | None:
    """Select the candidate with the lowest estimate; None is the direct kernel."""
    if not supports_winograd(problem, target):
        return None
    candidates = candidate_algorithms(problem, target)
    best = min(candidates, key=lambda algorithm: algorithm.estimated_cycles, default=None)
    return best if best and best.estimated_cycles < estimate_direct_cycles(problem, target) else None


def candidate_algorithms(problem: ConvProblem, target: Target) -> Iterator[ConvAlgorithm]:
    """Yield the partitions of the image with the cheapest candidate for each region: branch and bound.

    Partitions come in the order of a lower bound, up to the first whose bound exceeds the best estimate so far.
    """
    partitions = list(image_partitions(problem, target))
    bounds = {regions: sum(least_cycles(region, problem, target) for region in regions) for regions in partitions}
    best = float("inf")
    for regions in sorted(partitions, key=lambda regions: bounds[regions]):
        if bounds[regions] > best:
            break
        cheapest = [_cheapest_region(region, problem, target) for region in regions]
        if all(cheapest):  # else some region has no candidate whose data fit on the stack
            algorithm = ConvAlgorithm(tuple(region for region in cheapest if region))
            best = min(best, algorithm.estimated_cycles)
            yield algorithm


@lru_cache(maxsize=4096)  # partitions have regions in common
def _cheapest_region(region: TileRegion, problem: ConvProblem, target: Target) -> WinogradRegion | None:
    bounds = {tile: least_cycles(region, problem, target, tile) for tile in register_tiles(region, problem, target)}
    best: WinogradRegion | None = None
    for tile in sorted(bounds, key=lambda tile: bounds[tile]):
        if best and bounds[tile] > best.estimated_cycles:
            break
        for candidate in candidates_with(tile, region, problem, target):
            cycles = estimate_cycles(candidate, problem, target)
            # Of equal estimates, the smallest tile.
            if best is None or (cycles, tile.nr, tile.mr) < (best.estimated_cycles, best.tile.nr, best.tile.mr):
                best = replace(candidate, estimated_cycles=cycles)
    return best


def costed_regions(region: TileRegion, problem: ConvProblem, target: Target) -> Iterator[WinogradRegion]:
    """Yield every candidate for some tiles with its estimate."""
    for candidate in candidate_regions(region, problem, target):
        yield replace(candidate, estimated_cycles=estimate_cycles(candidate, problem, target))


def estimate_direct_cycles(problem: ConvProblem, target: Target) -> float:
    """Estimate the cycles of the direct kernel for a 3x3 convolution."""
    costs = target.costs
    (rows, columns), vectors = problem.output_size, problem.group_out_vectors(target.isa.width)
    tile = select_register_tile(target.isa, columns, vectors)
    num_panels = -(-vectors // tile.nr)
    multiply_adds = 9 * problem.group_in_channels  # for each output
    cycles_per_row = costs.direct_factor * multiply_adds * estimate_row_cycles(tile, columns, vectors)
    cycles_per_row += num_panels * (costs.work_unit_cycles + costs.direct_cycles_per_pixel * columns)
    num_rows = problem.batch * rows * problem.groups
    weight_bytes = 4 * multiply_adds * problem.out_channels
    return num_rows * cycles_per_row / target.threads + weight_bytes / costs.memory_bytes_per_cycle


def least_cycles(region: TileRegion, problem: ConvProblem, target: Target, tile: RegisterTile | None = None) -> float:
    """Return a lower bound of the estimates for a region: its multiplications, its transforms, and reading the weights.

    It is close: most of the search is to discard partitions and register tiles by it. Without ``tile``, it is that of
    the best register tile.
    """
    costs = target.costs
    winograd, stride, width = region.winograd(problem.stride), problem.stride, target.isa.width
    rows, columns = (
        span.num_tiles * filters.inputs - span.missing * stride
        for filters, span in zip((winograd.rows, winograd.columns), region, strict=True)
    )
    elements = problem.num_phase_images * rows * columns
    channels, num_k_blocks = problem.group_in_channels, -(-problem.group_in_channels // MAX_CHANNEL_BLOCK)
    vectors, in_vectors = problem.groups * problem.group_out_vectors(width), -(-problem.in_channels // width)
    gemm = channels * _least_cycles_per_vector(target.isa, tile) + num_k_blocks * costs.accumulate_cycles
    work = elements * vectors * gemm
    transforms = costs.input_transform_cycles * in_vectors + costs.output_transform_cycles * vectors
    work += elements * transforms
    # Either all weights are read, or those of an on-the-fly transform, which takes cycles at least once.
    ahead_bytes, on_the_fly_bytes = (
        4 * winograd.filter_elements(on_the_fly=on_the_fly) * problem.num_filters for on_the_fly in (False, True)
    )
    filters = winograd.rows.inputs * len(winograd.columns.transformed) * channels * vectors
    cycles = min(costs.interleaved_cycles, costs.on_the_fly_cycles) * filters / target.threads
    on_the_fly_cycles = on_the_fly_bytes / costs.memory_bytes_per_cycle + cycles
    return work / target.threads + min(ahead_bytes / costs.memory_bytes_per_cycle, on_the_fly_cycles)


@lru_cache(maxsize=256)
def _least_cycles_per_vector(isa: VectorIsa, tile: RegisterTile | None) -> float:
    """Return the cycles of a multiply-add of vectors in a register tile or its remainders, or in the best tile."""
    widest, rows = (tile.nr, (tile.mr,)) if tile else (MAX_PANEL_VECTORS, range(1, isa.registers))
    tiles = (RegisterTile(mr, nr) for nr in range(1, widest + 1) for mr in rows)
    return min(one.cycles / (one.mr * one.nr) for one in tiles if one.registers <= isa.registers)


def estimate_cycles(region: WinogradRegion, problem: ConvProblem, target: Target) -> float:
    """Estimate how many cycles each thread spends on a region."""
    costs = target.costs
    winograd, tiling, tile = region.winograd, region.tiling, region.tile
    vectors = problem.group_out_vectors(target.isa.width)
    num_panels = -(-vectors // tile.nr)
    num_units = tiling.num_blocks * region.out_channel_splits

    # Work that is divided into units: GEMMs, filter transforms, output transforms.
    channels, interleaved = problem.group_in_channels, False
    if region.on_the_fly:
        free = region.free_vector_registers(target.isa.registers)
        kc, interleaved = on_the_fly_channel_block(channels, winograd, tile.nr * target.isa.width, free)
    else:
        kc = channel_block(channels, prefetch_tiles=region.schedule == "staged")
    work = problem.groups * (tiling.num_blocks * _gemm_cycles(region, channels, vectors, kc, costs))
    if region.on_the_fly:  # each block of tiles transforms the filters again
        cycles = costs.interleaved_cycles if interleaved else costs.on_the_fly_cycles
        filter_elements = winograd.rows.inputs * len(winograd.columns.transformed)
        work += cycles * tiling.num_blocks * problem.groups * channels * vectors * filter_elements
    fits_l2 = region.schedule == "fused" and _fits_l2(region, problem, target)
    factor = costs.l2_miss_factor if region.schedule == "fused" and not fits_l2 else 1.0
    elements = sum(kind.winograd.tile_elements * kind.tiling.num_tiles for kind in tile_groups(winograd, tiling))
    work += factor * costs.output_transform_cycles * elements * problem.groups * vectors

    # Work that threads share evenly: input transforms, which each split of a fused block repeats.
    in_vectors = -(-problem.in_channels // target.isa.width)
    shared = factor * costs.input_transform_cycles * elements * in_vectors * region.out_channel_splits
    if region.schedule == "staged":
        tile_bytes = 4 * tiling.num_blocks * num_tile_elements(winograd, tiling) * problem.in_channels
        num_units *= problem.groups * num_panels
        if tile_bytes > costs.l2_budget_bytes:
            in_l3 = tile_bytes < costs.l3_tiles_bytes
            read_rate = costs.tiles_l3_read_bytes_per_cycle if in_l3 else costs.tiles_memory_read_bytes_per_cycle
            work += tile_bytes * num_panels / read_rate
        num_rows = tiling.batch * tiling.grid[0]  # a unit of the input transform is a row of tiles
        shared += costs.work_unit_cycles * num_rows + tile_bytes / _tiles_write_rate(tile_bytes, target)

    cycles_per_unit = work / num_units + costs.work_unit_cycles
    rounds = -(-num_units // target.threads)  # the last round may leave threads idle
    return rounds * cycles_per_unit + shared / target.threads + _weight_read_cycles(region, problem, target, fits_l2)


def _gemm_cycles(region: WinogradRegion, channels: int, vectors: int, kc: int, costs: MachineCosts) -> float:
    """Estimate the GEMMs of all tile elements and panels, for one block and one group."""
    num_k_blocks = -(-channels // kc)
    full_panels, rest = divmod(vectors, region.tile.nr)
    cycles = 0.0
    for num_panels, nr in ((full_panels, region.tile.nr), (1, rest)):
        if num_panels * nr == 0:
            continue
        for row in tile_subsets(region.winograd, region.tiling):
            for subset in row:
                for count, tile in balanced_tiles(subset.count, region.tile):
                    k_block = costs.k_block_cycles + costs.accumulate_cycles * tile.mr * nr
                    of_tile = channels * RegisterTile(tile.mr, nr).cycles + num_k_blocks * k_block
                    cycles += num_panels * len(subset.rows) * len(subset.columns) * count * of_tile
    return cycles


def _tiles_write_rate(tile_bytes: int, target: Target) -> float:
    """Return the bytes per cycle at which transformed tiles reach the GEMM."""
    costs = target.costs
    if target.threads > 1:  # most tiles were transformed by another core
        many = tile_bytes > costs.l2_budget_bytes
        return costs.tiles_prefetched_bytes_per_cycle if many else costs.tiles_shared_bytes_per_cycle
    return costs.tiles_write_bytes_per_cycle if tile_bytes > costs.l2_budget_bytes / 2 else math.inf


def _weight_read_cycles(region: WinogradRegion, problem: ConvProblem, target: Target, fits_l2: bool) -> float:
    """Estimate reading all weights once from memory, and again for each later block from the cache that holds them."""
    costs = target.costs
    bytes_per_channel = 4 * region.winograd.filter_elements(on_the_fly=region.on_the_fly) * problem.group_in_channels
    weight_bytes = bytes_per_channel * problem.out_channels
    if region.schedule == "staged":
        panel_bytes = bytes_per_channel * region.tile.nr * target.isa.width
        in_l2, passes = panel_bytes <= costs.l2_budget_bytes // 2, region.tiling.num_blocks
    else:
        in_l2 = fits_l2  # threads with the same split read the same weights at the same time: one pass for all
        passes = -(-region.tiling.num_blocks * region.out_channel_splits // target.threads)
    if in_l2:
        rate = costs.l2_reread_bytes_per_cycle
    else:
        rate = (
            costs.l3_reread_bytes_per_cycle if weight_bytes < costs.l3_weights_bytes else costs.memory_bytes_per_cycle
        )
    return weight_bytes / costs.memory_bytes_per_cycle + (passes - 1) * weight_bytes / rate


def _fits_l2(region: WinogradRegion, problem: ConvProblem, target: Target) -> bool:
    """Return whether the weights, transformed tiles and products of a fused work unit fit L2 together."""
    weights = (
        region.winograd.filter_elements(on_the_fly=region.on_the_fly) * problem.num_filters // region.out_channel_splits
    )
    channels = problem.in_channels + region.tile.nr * target.isa.width
    return 4 * (weights + num_tile_elements(region.winograd, region.tiling) * channels) <= target.costs.l2_budget_bytes
