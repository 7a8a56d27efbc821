"""Winograd convolution kernels in two schedules: staged (two kernels) and fused (one).

*Staged*: :class:`WinogradInputTransform` transforms all tiles of the batch, (tile element, tile, channel). Then each
unit of :class:`WinogradStagedGemm` multiplies a block of tiles by one panel of filters, for all tile elements, into
products that stay in its L2, and applies the output transform with bias and ReLU. Filters are read once for each block,
which is large: suited to layers with many channels and small images, where they come from memory.

*Fused*: a unit of :class:`WinogradFused` takes a block of tiles through input transform, GEMMs with all panels (or a
part of them) and output transform; neither transformed inputs nor products leave its L2. Suited to large images. Units
of the same block and different panels (``out_channel_splits``) repeat the input transform: reading cache lines that
another core wrote costs more on many machines, on some as much as a thousand FMAs a line.

Feature maps are NHWC. Filters are packed as (group, panel, tile element, input channel, output channel of the panel),
or as :class:`repvgg.engine.winograd.gemm.OnTheFlyGemm` reads them. Strides and offsets are in floats.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.graph import Epilogue, Pair
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, POINTER_PARAMETERS, Kernel, RegisterTile, call_for_panel
from repvgg.engine.runtime.memory import FeatureMapLayout
from repvgg.engine.winograd.filters import Winograd2d
from repvgg.engine.winograd.gemm import BatchedGemm, PanelGemm
from repvgg.engine.winograd.tiling import (
    TileGroup,
    Tiling,
    TransformedTiles,
    element_stride,
    locate_image,
    num_tile_elements,
    pixel_steps,
    tile_groups,
)
from repvgg.engine.winograd.transforms import (
    OutputBlock,
    OutputTransform,
    emit_input_transform,
    first_input_offset,
    tiles_of_block,
)

_L2_TILE_FLOATS = 2**18  # 1 MiB: transformed tiles that stay in L2 from one panel to the next


# Staged


@final
@dataclass(frozen=True)
class WinogradInputTransform(Kernel):
    """``Bᵀ d B`` of all input tiles; the border and overhang of ``source`` contain all of them."""

    winograd: Winograd2d
    source: FeatureMapLayout
    padding: Pair
    tiling: Tiling
    width: int

    def describe(self) -> str:
        return f"{self.winograd}, input transform"

    @property
    def units_per_block(self) -> int:
        """Rows of tiles of a map."""
        return self.tiling.grid[0] * self.tiling.phases

    def emit(self, name: str) -> list[IRBuilder]:
        b, tiling = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.tiling
        with b.loop("%begin", "%end") as units:
            image, row = b.divmod(units.index, tiling.grid[0])
            groups = tile_groups(self.winograd, tiling)
            for first_row, some in itertools.groupby(groups, key=lambda group: group.first_row):
                of_row = list(some)
                if of_row[0].tiling.grid[0] == tiling.grid[0]:
                    self._emit_row(b, of_row, image, row)
                    continue
                # The last row of tiles has an edge transform: one of two bodies runs.
                with b.when(b.assign(f"icmp {'eq' if first_row else 'ult'} i64 {row}, {tiling.grid[0] - 1}")):
                    self._emit_row(b, of_row, image, 0 if first_row else row)
        return [b]

    def _emit_row(self, b: IRBuilder, groups: Sequence[TileGroup], image: Value, row: Index) -> None:
        """Build the transform of a row of tiles; ``row`` is its index in its group."""
        source, tiling = self.source, self.tiling
        target = TransformedTiles.allocate("%target", tiling.num_padded_tiles, source.pixel_stride)
        for group in groups:
            winograd, own = group.winograd, group.tiling
            within = b.add(b.mul(image, own.tiles_per_image), b.mul(row, own.grid[1]))
            first = b.add(within, group.first_tile)
            steps = zip(winograd.tile_strides, pixel_steps(source, tiling), strict=True)
            down, right = (stride * step for stride, step in steps)
            read = b.add(locate_image(b, source, tiling, image)[0], b.mul(row, down))
            # Along a row, tiles overlap: most of the next tile is in L1.
            begin = b.offset("%source", b.add(read, first_input_offset(winograd, source, own, self.padding)))
            with b.loop(0, own.grid[1]) as across:
                pixel = b.offset(begin, b.mul(across.index, right))
                written = b.mul(b.add(first, across.index), source.pixel_stride)
                next_tile = b.offset(pixel, right)
                emit_input_transform(b, group, source, pixel, target, written, next_tile)


@final
@dataclass(frozen=True)
class WinogradStagedGemm(Kernel):
    """GEMMs in the transformed domain, and ``Aᵀ M A`` of the products with bias and epilogue.

    Attributes:
        winograd: F(m x n, 3x3).
        groups: of the convolution; if there are several, the output channels of each are whole vectors.
        channels: input channels of all groups.
        pixel_stride: from one transformed tile to the next.
        target: layout of the output.
        tiling: the tiles.
        tile: register tile; ``mr`` counts Winograd tiles.
        on_the_fly: whether filters are stored as ``G g``.
        free_vector_registers: left by the register tile, for an interleaved filter transform.
        epilogue: functions of the outputs.
        width: floats in a vector.
    """

    winograd: Winograd2d
    groups: int
    channels: int
    pixel_stride: int
    target: FeatureMapLayout
    tiling: Tiling
    tile: RegisterTile
    on_the_fly: bool
    free_vector_registers: int
    epilogue: Epilogue
    width: int

    @property
    def in_channels(self) -> int:
        """Input channels of a group."""
        return self.channels // self.groups

    @property
    def group_vectors(self) -> int:
        """Vectors of output channels of a group."""
        return -(-self.target.channels // self.groups // self.width)

    @property
    def padded_channels(self) -> int:
        """Output channels of all groups, each padded to whole vectors: the length of the biases."""
        return self.groups * self.group_vectors * self.width

    @property
    def num_panels(self) -> int:
        """Panels of a group; the last one may have fewer vectors."""
        return -(-self.group_vectors // self.tile.nr)

    def describe(self) -> str:
        return f"{self.winograd}, GEMM, tiles of {self.tile}"

    @property
    def units_per_block(self) -> int:
        """Panels of all groups."""
        return self.groups * self.num_panels

    @property
    def num_multiplies(self) -> int:
        """Multiplications of a block of tiles."""
        return num_tile_elements(self.winograd, self.tiling) * self.in_channels * self.target.channels

    def emit(self, name: str) -> list[IRBuilder]:
        """Build a function for a block by a full panel, one for a block by a group's last panel, and the driver.

        Unit ``panel · blocks + block``: consecutive units read the same filters.
        """
        last = self.group_vectors - (self.num_panels - 1) * self.tile.nr
        shapes = dict.fromkeys((self.tile.nr, last))
        blocks = [_emit_staged_block(f"{name}_block{at}", self, nr) for at, nr in enumerate(shapes)]
        return [*blocks, _emit_staged_driver(name, self, [blocks[0], blocks[-1]])]


def _emit_staged_driver(name: str, kernel: WinogradStagedGemm, blocks: Sequence[IRBuilder]) -> IRBuilder:
    b, tiling = IRBuilder(name, KERNEL_PARAMETERS, kernel.width), kernel.tiling
    with b.loop("%begin", "%end") as units:
        panel, block = b.divmod(units.index, "%batch")
        group, panel_of_group = b.divmod(panel, kernel.num_panels)
        vector = b.add(b.mul(group, kernel.group_vectors), b.mul(panel_of_group, kernel.tile.nr))
        channel = b.mul(vector, kernel.width)
        read = b.add(b.mul(block, tiling.tiles_per_block * kernel.pixel_stride), b.mul(group, kernel.in_channels))
        filter_floats = kernel.winograd.filter_elements(on_the_fly=kernel.on_the_fly) * kernel.in_channels
        arguments = (
            ("ptr", b.offset("%source", read)),
            ("ptr", b.offset("%target", channel)),
            ("ptr", b.offset("%weights", b.mul(channel, filter_floats))),
            ("ptr", b.offset("%bias", channel)),
            ("i64", block),
        )
        call_for_panel(b, panel_of_group, kernel.num_panels, blocks, arguments)
    return b


def _emit_staged_block(name: str, kernel: WinogradStagedGemm, nr: int) -> IRBuilder:
    """Build a block of tiles by a panel of ``nr`` vectors."""
    b = IRBuilder(name, (*POINTER_PARAMETERS, ("i64", "block")), kernel.width, internal=True)
    tiling, winograd, step = kernel.tiling, kernel.winograd, nr * kernel.width
    inputs = TransformedTiles.allocate("%source", tiling.num_padded_tiles, kernel.pixel_stride)
    # On the stack: each worker has a separate one, which stays in the L2 of its core from one unit to the next.
    memory = b.scratch(winograd.tile_elements * element_stride(tiling.tiles_per_block, step))
    products = TransformedTiles.allocate(memory, tiling.tiles_per_block, step)
    discarded, output = b.scratch(kernel.width), OutputBlock("%target", "%bias", "%block")
    prefetch_tiles = winograd.tile_elements * inputs.element_stride > _L2_TILE_FLOATS
    channels, free = kernel.in_channels, kernel.free_vector_registers
    gemm = BatchedGemm(PanelGemm(winograd, kernel.tile, nr, tiling, channels, prefetch_tiles, free), kernel.on_the_fly)
    gemm.emit(b, inputs, "%weights", products, b.scratch(gemm.scratch_floats(b.width)))
    # Right after the GEMMs, while the products are in L2.
    for group in tile_groups(winograd, tiling):
        OutputTransform(group, kernel.target, kernel.epilogue, nr, kernel.padded_channels).emit(
            b, products, output, discarded
        )
    return b


# Fused


@final
@dataclass(frozen=True)
class WinogradFused(Kernel):
    """``Aᵀ[U ⊙ (Bᵀ d B)]A`` with bias and epilogue.

    Attributes:
        winograd: F(m x n, 3x3).
        groups: of the convolution; if there are several, the output channels of each are whole vectors.
        source: layout of the input; its border and overhang contain all tiles.
        padding: of the convolution.
        target: layout of the output.
        tiling: the tiles.
        tile: register tile; ``mr`` counts Winograd tiles.
        out_channel_splits: parts of the panels of each group, a unit for each.
        on_the_fly: whether filters are stored as ``G g``.
        free_vector_registers: left by the register tile, for an interleaved filter transform.
        epilogue: functions of the outputs.
        width: floats in a vector.
    """

    winograd: Winograd2d
    groups: int
    source: FeatureMapLayout
    padding: Pair
    target: FeatureMapLayout
    tiling: Tiling
    tile: RegisterTile
    out_channel_splits: int
    on_the_fly: bool
    free_vector_registers: int
    epilogue: Epilogue
    width: int

    @property
    def in_channels(self) -> int:
        """Input channels of a group."""
        return self.source.channels // self.groups

    @property
    def group_vectors(self) -> int:
        """Vectors of output channels of a group."""
        return -(-self.target.channels // self.groups // self.width)

    @property
    def padded_channels(self) -> int:
        """Output channels of all groups, each padded to whole vectors: the length of the biases."""
        return self.groups * self.group_vectors * self.width

    def describe(self) -> str:
        part = f" by 1/{self.out_channel_splits} of the panels" if self.out_channel_splits > 1 else ""
        return f"{self.winograd}, blocks of {self.tiling.tiles_per_block} tiles{part}, tiles of {self.tile}"

    @property
    def units_per_block(self) -> int:
        return self.out_channel_splits

    @property
    def num_multiplies(self) -> int:
        """Multiplications of a block of tiles."""
        return num_tile_elements(self.winograd, self.tiling) * self.in_channels * self.target.channels

    def emit(self, name: str) -> list[IRBuilder]:
        """Build a function for a block by a part of the panels, and the driver.

        Unit ``split · blocks + block``: consecutive units read the same filters.
        """
        function = _emit_fused_block(f"{name}_block", self)
        b = IRBuilder(name, KERNEL_PARAMETERS, self.width)
        with b.loop("%begin", "%end") as units:
            split, block = b.divmod(units.index, "%batch")
            pointers = ((kind, f"%{pointer}") for kind, pointer in POINTER_PARAMETERS)
            b.call(function.name, [*pointers, ("i64", block), ("i64", split)])
        return [function, b]

    def gemm(self, nr: int) -> BatchedGemm:
        """Return the GEMMs of a block and a panel of ``nr`` vectors."""
        panel = PanelGemm(
            self.winograd,
            self.tile,
            nr,
            self.tiling,
            self.in_channels,
            prefetch_tiles=False,  # this unit has just written them to its L2
            free_vector_registers=self.free_vector_registers,
        )
        return BatchedGemm(panel, self.on_the_fly)


@final
@dataclass(frozen=True)
class _Scratch:
    """Memory of a unit: transformed filters, products, and a vector for discarded outputs."""

    filters: Value
    products: Value
    discarded: Value


def _emit_fused_block(name: str, kernel: WinogradFused) -> IRBuilder:
    b = IRBuilder(name, (*POINTER_PARAMETERS, ("i64", "block"), ("i64", "split")), kernel.width, internal=True)
    tiles, channels = kernel.tiling.tiles_per_block, kernel.source.pixel_stride
    nr, elements = min(kernel.tile.nr, kernel.group_vectors), kernel.winograd.tile_elements
    memory = b.scratch(elements * element_stride(tiles, channels))
    transformed = TransformedTiles.allocate(memory, tiles, channels)
    # Products of one panel at a time: the next panel overwrites them once their outputs are stored.
    products = b.scratch(elements * element_stride(tiles, nr * kernel.width))
    full_panels, rest = divmod(kernel.group_vectors, nr)
    # The narrower last panel has longer channel blocks, so it may need more scratch.
    filter_floats = max(kernel.gemm(vectors).scratch_floats(b.width) for vectors in (nr, rest or nr))
    scratch = _Scratch(b.scratch(filter_floats), products, b.scratch(kernel.width))
    _emit_fused_inputs(b, kernel, transformed)
    begin, end, has_rest = _panels_of_split(b, kernel, full_panels, rest)
    # The input transform above covers the channels of all groups at once; the GEMMs are separate.
    with b.loop(0, kernel.groups) as groups:
        address = b.offset(transformed.address, b.mul(groups.index, kernel.in_channels))
        read = TransformedTiles(address, transformed.element_stride, transformed.tile_stride)
        first = b.mul(groups.index, kernel.group_vectors)
        with b.loop(begin, end) as panels:
            _emit_fused_panel(b, kernel, read, b.add(first, b.mul(panels.index, nr)), nr, scratch)
        if rest:
            with b.when(has_rest):
                _emit_fused_panel(b, kernel, read, b.add(first, full_panels * nr), rest, scratch)
    return b


def _panels_of_split(b: IRBuilder, kernel: WinogradFused, full_panels: int, rest: int) -> tuple[Index, Index, Value]:
    """Return the first full panel of a split, one past its last, and whether it has the narrower last panel."""
    count, splits = full_panels + bool(rest), kernel.out_channel_splits
    # With one split the bounds are known, and the loop over panels needs no guard.
    if splits == 1:
        return 0, full_panels, "true"
    following = b.add("%split", 1)
    begin, end = (b.divmod(b.mul(at, count), splits)[0] for at in ("%split", following))
    last = b.assign(f"icmp eq i64 {following}, {splits}")
    return begin, b.assign(f"select i1 {last}, i64 {full_panels}, i64 {end}"), last


def _emit_fused_inputs(b: IRBuilder, kernel: WinogradFused, transformed: TransformedTiles) -> None:
    source = kernel.source
    for group in tile_groups(kernel.winograd, kernel.tiling):
        first, count = tiles_of_block(b, group.tiling, "%block")
        corner = b.offset("%source", first_input_offset(group.winograd, source, group.tiling, kernel.padding))
        with b.loop(0, count) as tiles:
            tile = b.add(first, tiles.index)
            read, following = (_tile_offset(b, source, group, at) for at in (tile, b.add(tile, 1)))
            written = b.mul(b.add(tiles.index, group.first_tile), transformed.tile_stride)
            pixel = b.offset(corner, read)
            emit_input_transform(b, group, source, pixel, transformed, written, b.offset(corner, following))


def _tile_offset(b: IRBuilder, source: FeatureMapLayout, group: TileGroup, tile: Index) -> Index:
    """Return the floats from the first tile of a group to another."""
    strides, steps = group.winograd.tile_strides, pixel_steps(source, group.tiling)
    image, place = b.divmod(tile, group.tiling.tiles_per_image)
    down, across = b.divmod(place, group.tiling.grid[1])
    row, column = b.mul(down, strides[0] * steps[0]), b.mul(across, strides[1] * steps[1])
    return b.add(locate_image(b, source, group.tiling, image)[0], b.add(row, column))


def _emit_fused_panel(
    b: IRBuilder, kernel: WinogradFused, read: TransformedTiles, vector: Index, nr: int, scratch: _Scratch
) -> None:
    """Build GEMMs and output transform of a block, for the panel of ``nr`` vectors that begins at ``vector``."""
    tiling, channel = kernel.tiling, b.mul(vector, kernel.width)
    filter_floats = kernel.winograd.filter_elements(on_the_fly=kernel.on_the_fly) * kernel.in_channels
    panel = b.offset("%weights", b.mul(channel, filter_floats))
    products = TransformedTiles.allocate(scratch.products, tiling.tiles_per_block, nr * kernel.width)
    kernel.gemm(nr).emit(b, read, panel, products, scratch.filters)
    output = OutputBlock(b.offset("%target", channel), b.offset("%bias", channel), "%block")
    for group in tile_groups(kernel.winograd, tiling):
        OutputTransform(group, kernel.target, kernel.epilogue, nr, kernel.padded_channels).emit(
            b, products, output, scratch.discarded
        )
