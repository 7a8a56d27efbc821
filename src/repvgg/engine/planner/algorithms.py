"""The search space of a 3x3 convolution: the direct kernel (``None``), or Winograd with tiles, schedule and blocking.

A Winograd region runs by one of two schedules:

* ``staged``: one kernel transforms all input tiles, a second one multiplies panel by panel: each weight is read once;
* ``fused``: one kernel takes a block of tiles at a time through all three steps, so transformed tiles stay in L2.

This module only enumerates candidates: :mod:`repvgg.engine.planner.cost_model` estimates their speed, and
:mod:`repvgg.engine.planner.autotune` measures it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, final

from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import ConvGeometry, Pair
from repvgg.engine.kernels.base import RegisterTile
from repvgg.engine.planner.machine_costs import AVX512_COSTS, MachineCosts
from repvgg.engine.runtime.memory import round_up
from repvgg.engine.winograd.filters import Winograd2d, winograd2d
from repvgg.engine.winograd.tiling import Tiling
from repvgg.errors import UsageError

Schedule: TypeAlias = Literal["staged", "fused"]
Precision: TypeAlias = Literal["highest", "high", "medium"]

#: The m of F(m, 3) that have interpolation points, by stride.
TILE_OUTPUTS: dict[int, tuple[int, ...]] = {1: (2, 3, 4, 5, 6, 7), 2: (1, 2, 3, 4)}

#: Error budget of each precision: the largest ``error_growth / √C`` of a tile, for C input channels of a group. As
#: measured, an error growth of 1 is an RMS error of 1.2e-7, and OpenVINO's fp32 layers have 3.7e-8·√C: "high" stays
#: below 4x that error for 17 channels or more, "medium" below 9x.
ERROR_GROWTH_LIMITS: dict[str, float] = {"highest": 0.0, "high": 1.15, "medium": 2.6}
_MIN_ERROR_GROWTH_LIMIT = 4.8  # F(4x4) is allowed with any number of channels

# Fused kernels have transformed tiles and products on the stack, staged ones the products. Threads have 2 MiB or more
# on Linux, 512 KiB on macOS.
_FUSED_STACK_BYTES = 5 * 2**18 if sys.platform == "linux" else 3 * 2**17
_STAGED_STACK_BYTES = 2**19 if sys.platform == "linux" else 3 * 2**16

MAX_PANEL_VECTORS = 4  # the weights of wider panels crowd the inputs out of L1
_MAX_FUSED_REGISTER_TILES = 8  # per block: weights are then reused often enough, and more tiles would not fit L2


def check_precision(precision: str) -> None:
    """Raise UsageError for an error budget that there is not."""
    if precision not in ERROR_GROWTH_LIMITS:
        known = ", ".join(map(repr, ERROR_GROWTH_LIMITS))
        raise UsageError(f"precision must be one of {known}, not {precision!r}.")


@final
@dataclass(frozen=True)
class Target:
    """What a plan is made for: vector instructions, number of threads, error budget, and the costs of the processor."""

    isa: VectorIsa
    threads: int = 1
    precision: Precision = "high"
    costs: MachineCosts = AVX512_COSTS


@final
@dataclass(frozen=True)
class ConvProblem:
    """A convolution and the size of its output: with the target, what the selection of an algorithm depends on."""

    geometry: ConvGeometry
    in_channels: int  # of all groups
    out_channels: int  # of all groups
    output_size: Pair  # height and width
    batch: int  # images processed at once

    @property
    def groups(self) -> int:
        return self.geometry.groups

    @property
    def stride(self) -> int:
        """The stride of both axes; Winograd supports no others."""
        return self.geometry.stride[0]

    @property
    def phase_size(self) -> Pair:
        """Height and width of the outputs of the largest phase image, see :mod:`repvgg.engine.winograd.tiling`."""
        height, width = (-(-n // d) for n, d in zip(self.output_size, self.geometry.dilation, strict=True))
        return height, width

    @property
    def num_phase_images(self) -> int:
        """Phase images of the batch: images if there is no dilation."""
        return self.batch * self.geometry.dilation[0] * self.geometry.dilation[1]

    @property
    def group_in_channels(self) -> int:
        return self.in_channels // self.groups

    @property
    def num_multiplies(self) -> int:
        """Multiplications of the direct kernel."""
        taps, pixels = math.prod(self.geometry.kernel), math.prod(self.output_size)
        return taps * self.num_filters * pixels * self.batch

    @property
    def num_filters(self) -> int:
        """Filters: one for each output channel and input channel of its group."""
        return self.group_in_channels * self.out_channels

    def group_out_vectors(self, width: int) -> int:
        """Vectors of ``width`` floats that hold the output channels of a group."""
        return -(-self.out_channels // self.groups // width)


class TileSpan(NamedTuple):
    """Neighbouring tiles of one size along an axis."""

    start: int  # first output row or column
    outputs: int  # the m of F(m, 3)
    num_tiles: int
    last: int  # outputs of the last tile if it is an edge tile, which uses a subset of the interpolation points; else 0

    @property
    def missing(self) -> int:
        """How many outputs the last tile lacks, compared to the others."""
        return self.outputs - self.last if self.last else 0

    @property
    def end(self) -> int:
        """One past the last output that the tiles cover, which may lie outside of the image."""
        return self.start + self.outputs * self.num_tiles - self.missing


class TileRegion(NamedTuple):
    """A rectangle of tiles of one size: the product of a span of rows and a span of columns."""

    rows: TileSpan
    columns: TileSpan

    def winograd(self, stride: int) -> Winograd2d:
        """The F(m x n, 3x3) that computes these tiles."""
        return winograd2d(self.rows.outputs, self.columns.outputs, stride, (self.rows.last, self.columns.last))


@final
@dataclass(frozen=True)
class WinogradRegion:
    """A candidate for a rectangle of tiles.

    Attributes:
        schedule: "staged" or "fused"; see the module.
        winograd: F(m x n, 3x3).
        tiling: the tiles of the batch, and their division into blocks.
        tile: the register tile of the GEMMs, ``mr`` Winograd tiles by ``nr`` vectors of output channels.
        on_the_fly: whether weights are stored as ``G·g``, and multiplied by Gᵀ just before their use.
        out_channel_splits: work units for each block, each with a part of the panels.
        estimated_cycles: by the cost model; 0 if unknown.
    """

    schedule: Schedule
    winograd: Winograd2d
    tiling: Tiling
    tile: RegisterTile
    on_the_fly: bool
    out_channel_splits: int = 1
    estimated_cycles: float = 0.0

    @property
    def tiles(self) -> TileRegion:
        (top, left), (rows, columns) = self.tiling.corner, self.tiling.grid
        (down, across), (last_row, last_column) = self.winograd.outputs, self.winograd.edge_tile
        return TileRegion(TileSpan(top, down, rows, last_row), TileSpan(left, across, columns, last_column))

    @property
    def end(self) -> Pair:
        """One past the last output row and column that the tiles cover."""
        rows, columns = self.tiles
        return rows.end, columns.end

    def free_vector_registers(self, registers: int) -> int:
        """Count the registers that the GEMMs leave for an interleaved transform of filters; 0 if impossible."""
        # An odd number of vectors cannot be halved between the two columns of a pair; and of several register tiles for
        # a tile element, only the first would have work to interleave.
        interleaves = self.tiling.tiles_per_block <= self.tile.mr and self.tile.nr % 2 == 0
        return registers - self.tile.registers if interleaves else 0


@final
@dataclass(frozen=True)
class ConvAlgorithm:
    """Winograd in one or several regions, which together cover the output image."""

    regions: tuple[WinogradRegion, ...]

    @property
    def estimated_cycles(self) -> float:
        return sum(region.estimated_cycles for region in self.regions)

    @property
    def end(self) -> Pair:
        """One past the last output row and column that any tile covers, of a phase image if there is dilation."""
        ends = [region.end for region in self.regions]
        return max(row for row, _ in ends), max(column for _, column in ends)


#: Selects the algorithm of a convolution; None is the direct kernel.
Selector: TypeAlias = Callable[[ConvProblem, Target], ConvAlgorithm | None]


def supports_winograd(problem: ConvProblem, target: Target) -> bool:
    """Return whether a convolution has other candidates than the direct kernel."""
    geometry, width = problem.geometry, target.isa.width
    if geometry.kernel != (3, 3) or geometry.stride not in ((1, 1), (2, 2)):
        return False
    if geometry.dilation != (1, 1) and geometry.stride != (1, 1):
        return False
    # The GEMMs of a group write whole vectors, so a narrower group would overwrite the channels of the next one.
    whole_vectors = problem.groups == 1 or problem.out_channels // problem.groups % width == 0
    return problem.in_channels >= width and whole_vectors and target.precision != "highest"


def image_partitions(problem: ConvProblem, target: Target) -> Iterator[tuple[TileRegion, ...]]:
    """Yield the sets of regions that cover the output within the error budget."""
    limit = ERROR_GROWTH_LIMITS[target.precision] * math.sqrt(problem.group_in_channels)
    limit = max(limit, _MIN_ERROR_GROWTH_LIMIT)
    # Rows and columns are independent: tiles that are large along one axis only have fewer weights.
    rows, columns = (list(_axis_partitions(length, problem.stride)) for length in problem.phase_size)
    for row_spans, column_spans in itertools.product(rows, columns):
        regions = tuple(TileRegion(down, across) for down, across in itertools.product(row_spans, column_spans))
        if all(region.winograd(problem.stride).error_growth <= limit for region in regions):
            yield regions


def _axis_partitions(length: int, stride: int) -> Iterator[tuple[TileSpan, ...]]:
    """Yield the partitions of an axis of ``length`` outputs into tiles.

    The last tile may overhang the image, be an edge tile (a subset of the interpolation points, the same weights), or
    be a smaller tile with different weights.
    """
    for outputs in TILE_OUTPUTS[stride]:
        yield (TileSpan(0, outputs, -(-length // outputs), 0),)
        count, rest = divmod(length, outputs)
        if not (count and rest):
            continue
        yield (TileSpan(0, outputs, count + 1, rest),)
        smaller = min((m for m in TILE_OUTPUTS[stride] if rest <= m < outputs), default=0)
        if smaller:
            yield (TileSpan(0, outputs, count, 0), TileSpan(count * outputs, smaller, 1, 0))


def candidate_regions(region: TileRegion, problem: ConvProblem, target: Target) -> Iterator[WinogradRegion]:
    """Yield every combination of schedule, register tile, block size and split, without cost estimates."""
    for tile in register_tiles(region, problem, target):
        yield from candidates_with(tile, region, problem, target)


def candidates_with(
    tile: RegisterTile, region: TileRegion, problem: ConvProblem, target: Target
) -> Iterator[WinogradRegion]:
    """Yield the candidates with one register tile."""
    winograd, width = region.winograd(problem.stride), target.isa.width
    grid, corner = (region.rows.num_tiles, region.columns.num_tiles), (region.rows.start, region.columns.start)
    num_tiles, vectors = problem.num_phase_images * grid[0] * grid[1], problem.group_out_vectors(width)
    blocks: list[tuple[Schedule, int]] = [
        *(("staged", block) for block in _staged_blocks(winograd, num_tiles, tile, width)),
        *(("fused", block) for block in _fused_blocks(winograd, num_tiles, tile, problem, width)),
    ]
    for schedule, tiles_per_block in blocks:
        tiling = Tiling(grid, tiles_per_block, problem.num_phase_images, corner, problem.geometry.dilation)
        splits = {1}
        if schedule == "fused" and target.threads <= -(-vectors // tile.nr):
            splits.add(target.threads)  # a single block keeps all threads busy if each has different panels
        for on_the_fly, split in itertools.product((False, True), splits):
            yield WinogradRegion(schedule, winograd, tiling, tile, on_the_fly, split)


def register_tiles(region: TileRegion, problem: ConvProblem, target: Target) -> Iterator[RegisterTile]:
    """Yield the register tiles that use at least half of the register file; ``mr`` is at most the number of tiles."""
    vectors = problem.group_out_vectors(target.isa.width)
    num_tiles = problem.num_phase_images * region.rows.num_tiles * region.columns.num_tiles
    for nr in range(1, min(vectors, MAX_PANEL_VECTORS) + 1):
        most = min(num_tiles, (target.isa.registers - nr - 1) // nr)  # nr registers hold weights, one an input
        yield from (RegisterTile(mr, nr) for mr in range(max(1, most // 2), most + 1))


def _staged_blocks(winograd: Winograd2d, num_tiles: int, tile: RegisterTile, width: int) -> Iterator[int]:
    """Yield the number of tiles per block with the fewest padding tiles whose products fit on the stack, if any."""
    bytes_per_tile = 4 * winograd.tile_elements * tile.nr * width
    if any(winograd.edge_tile):  # edge tiles lack some tile elements, so blocks would differ: all tiles form one
        if num_tiles * bytes_per_tile <= _STAGED_STACK_BYTES:
            yield num_tiles
        return
    most = min(_STAGED_STACK_BYTES // (bytes_per_tile * tile.mr), -(-num_tiles // tile.mr))
    if most:
        sizes = [count * tile.mr for count in range(max(1, most // 2), most + 1)]
        yield min(sizes, key=lambda size: (round_up(num_tiles, size), -size))


def _fused_blocks(
    winograd: Winograd2d, num_tiles: int, tile: RegisterTile, problem: ConvProblem, width: int
) -> Iterator[int]:
    """Yield the numbers of tiles per block whose transformed tiles and products fit on the stack."""
    floats_per_element = round_up(problem.in_channels, width) + tile.nr * width
    step, most = tile.mr, -(-num_tiles // tile.mr)
    if any(winograd.edge_tile):  # one block, as above
        step, most = num_tiles, 1
    for count in range(1, min(_MAX_FUSED_REGISTER_TILES, most) + 1):
        # 32 floats: two cache lines of padding for each tile element, see element_stride
        if 4 * winograd.tile_elements * (count * step * floats_per_element + 32) <= _FUSED_STACK_BYTES:
            yield count * step
