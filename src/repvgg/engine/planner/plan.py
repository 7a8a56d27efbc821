"""The planner's passes in their order, from layers to a plan: kernels with packed weights, on buffers.

The values between them::

    infer_shapes     layers, input shape   -> the shape of each feature map (in ``graph.py``)
    chunk_batch      shapes                -> how many images pass through each layer at once
    conv_problems    shapes, chunks        -> a problem for each convolution
    select           problem, target       -> an algorithm (in ``cost_model.py`` or ``autotune.py``)
    plan_layouts     shapes, algorithms    -> the memory layout of each feature map
    lower            layouts, algorithms   -> steps on virtual buffers, one buffer for each value
    share_buffers    lifetimes of values   -> as few real buffers as possible
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import Conv, ConvGeometry, FeatureShape, Floats, Gate, Layer, Linear, Pool, Shape, infer_shapes
from repvgg.engine.kernels.base import Kernel, PackWeights, pack_weights
from repvgg.engine.kernels.direct_conv import DirectConvKernel, select_register_tile
from repvgg.engine.kernels.memory_bound import GlobalPoolKernel, ReorderKernel, ScaleKernel, SigmoidKernel
from repvgg.engine.planner.algorithms import ConvAlgorithm, ConvProblem, Selector, Target, WinogradRegion
from repvgg.engine.planner.cost_model import select_algorithm
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up
from repvgg.engine.winograd.convolution import WinogradFused, WinogradInputTransform, WinogradStagedGemm
from repvgg.engine.winograd.tiling import element_stride

_LINEAR_BLOCK_IMAGES = 8  # rows of the GEMM of a linear layer: enough to reuse each weight from a register
NO_WEIGHTS = np.zeros(0, np.float32)

# Chunking pays where the feature maps of an image are large, and those of the whole batch exceed the L3 cache. It costs
# reading the weights once more for each chunk.
_MIN_CHUNKED_FLOATS = 500_000  # input and output of a layer, for one image
_L3_FLOATS = 5_000_000  # feature maps that stay in L3


# The planner's output


@final
@dataclass(frozen=True)
class Buffer:
    """Memory for feature maps: ``number`` identifies it within a plan, ``layout`` is that of each image."""

    number: int
    layout: FeatureMapLayout
    num_images: int

    @property
    def floats(self) -> int:
        return self.num_images * self.layout.image_stride


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One kernel on its buffers.

    The kernel works on blocks. A block holds ``items_per_block`` items; an item is an image, or a tile of an image.

    Attributes:
        name: of the layer.
        kernel: what it computes.
        source: what it reads; None is the input of the network.
        target: what it writes.
        weights: packed for the kernel, or a buffer of factors.
        bias: packed for the kernel.
        items_per_block: see above.
        items_per_image: 1, or the tiles of an image.
        first_image: the first image of the batch that it processes.
        max_images: how many it processes at most; None for all from the first.
    """

    name: str
    kernel: Kernel
    source: Buffer | None
    target: Buffer
    weights: Floats | Buffer = field(default_factory=lambda: NO_WEIGHTS)
    bias: Floats = field(default_factory=lambda: NO_WEIGHTS)
    items_per_block: int = 1
    items_per_image: int = 1
    first_image: int = 0
    max_images: int | None = None

    def num_images(self, batch: int) -> int:
        left = max(0, batch - self.first_image)
        return left if self.max_images is None else min(left, self.max_images)

    def num_multiplies(self, batch: int) -> int:
        """Count its multiplications on a batch, in whole blocks."""
        return self.kernel.num_multiplies * -(-self.num_images(batch) * self.items_per_image // self.items_per_block)


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """All steps of a network for inputs of one size."""

    input_shape: Shape  # (N, C, H, W), where N is the largest batch
    steps: tuple[Step, ...]  # in execution order
    buffers: tuple[Buffer, ...]  # all that the steps read and write, by number
    isa: VectorIsa  # the vector instructions that the kernels use
    flat: bool  # whether the output is (N, C) and not (N, C, H, W)

    @property
    def output(self) -> Buffer:
        return self.steps[-1].target


# The passes


def plan(layers: Sequence[Layer], input_shape: Shape, target: Target, select: Selector = select_algorithm) -> Plan:
    """Run all passes; :func:`lower` runs the last three of them.

    Args:
        layers: see :func:`repvgg.engine.frontend.read`.
        input_shape: (N, C, H, W), where N is the largest batch.
        target: the instruction set, threads and precision to plan for.
        select: selects the algorithm of each convolution.

    Raises:
        UnsupportedError: a layer does not fit its input; the message names it.
    """
    shapes = infer_shapes(layers, input_shape)
    chunks = chunk_batch(layers, shapes, input_shape[0])
    problems = conv_problems(layers, shapes, chunks, input_shape[0])
    algorithms = [select(problem, target) if problem else None for problem in problems]
    return lower(layers, input_shape, shapes, chunks, algorithms, target.isa)


def conv_problems(
    layers: Sequence[Layer], shapes: Sequence[FeatureShape], chunks: BatchChunks, batch: int
) -> list[ConvProblem | None]:
    """Return what the algorithm of each layer depends on; None for layers that are no convolutions."""
    return [
        ConvProblem(layer.geometry, source.channels, target.channels, target.size, chunks.images_at(index, batch))
        if isinstance(layer, Conv)
        else None
        for index, (layer, source, target) in enumerate(zip(layers, shapes[:-1], shapes[1:], strict=True))
    ]


# Batch chunks


@final
@dataclass(frozen=True)
class BatchChunks:
    """Division of the batch for the first layers: each chunk passes through all of them before the next one."""

    num_layers: int  # layers that are chunked; 0 for none
    images: int  # in a chunk; a divisor of the batch, so that no chunk writes beyond the last image

    def images_at(self, layer: int, batch: int) -> int:
        """Return how many images the layer of this index reads at once."""
        return self.images if layer < self.num_layers else batch


def chunk_batch(layers: Sequence[Layer], shapes: Sequence[FeatureShape], batch: int) -> BatchChunks:
    """Chunk the leading convolutions whose feature maps would evict each other from L3."""
    num_layers = largest = 0
    for layer, source, target in zip(layers, shapes[:-1], shapes[1:], strict=True):
        floats = sum(shape.channels * shape.size[0] * shape.size[1] for shape in (source, target))
        if not isinstance(layer, Conv) or floats < _MIN_CHUNKED_FLOATS or batch * floats < _L3_FLOATS:
            break
        num_layers, largest = num_layers + 1, max(largest, floats)
    divisors = (images for images in range(1, batch + 1) if batch % images == 0)
    images = max(count for count in divisors if count == 1 or count * largest <= _L3_FLOATS)
    return BatchChunks(num_layers, images) if num_layers and images < batch else BatchChunks(0, batch)


# Layouts


def plan_layouts(
    layers: Sequence[Layer],
    shapes: Sequence[FeatureShape],
    algorithms: Sequence[ConvAlgorithm | None],
    isa: VectorIsa,
    images_per_block: int,
) -> tuple[FeatureMapLayout, ...]:
    """Choose the layout of the input of each layer, and of the output of the network.

    Feature maps are NHWC with whole vectors of channels. The convolution that reads them determines their border of
    zeros and the overhang for its tiles. From the global pool on, values are (N, C).
    """
    layouts = []
    flat = False
    for index, shape in enumerate(shapes):
        flat = flat or (index > 0 and not isinstance(layers[index - 1], (Conv, Gate)))
        if flat:
            layouts.append(vector_layout(shape.channels, images_per_block, isa.width))
            continue
        layout = FeatureMapLayout(shape.channels, shape.size, (0, 0), round_up(shape.channels, isa.width))
        # A gate works in place, so the next convolution after it determines the layout.
        reader = next((at for at in range(index, len(layers)) if not isinstance(layers[at], Gate)), None)
        if reader is not None:
            layout = _layout_for(layout, layers[reader], shapes[reader + 1], algorithms[reader])
        layouts.append(layout)
    if isinstance(layers[0], Conv) and shapes[0].channels < isa.width:
        # NCHW: with few channels, vectors of the first convolution hold taps and channels together.
        layouts[0] = replace(layouts[0], pixel_stride=1, planar=True)
    return tuple(layouts)


def vector_layout(channels: int, images_per_block: int, width: int) -> FeatureMapLayout:
    """Return the layout of (N, C): the images of a block form a row of pixels, so a linear layer is a 1x1 conv."""
    return FeatureMapLayout(channels, (1, images_per_block), (0, 0), round_up(channels, width))


def _layout_for(
    layout: FeatureMapLayout, layer: Layer, output: FeatureShape, algorithm: ConvAlgorithm | None
) -> FeatureMapLayout:
    """Add the border and overhang that ``layer`` reads."""
    if not isinstance(layer, Conv):
        return layout
    overhang = (0, 0)
    if algorithm is not None:
        axes = zip(algorithm.end, output.size, layer.geometry.stride, strict=True)
        below, right = (max(0, end - length) * stride for end, length, stride in axes)
        overhang = (below, right)
    return replace(layout, border=layer.geometry.padding, overhang=overhang)


# Lowering


def lower(
    layers: Sequence[Layer],
    input_shape: Shape,
    shapes: Sequence[FeatureShape],
    chunks: BatchChunks,
    algorithms: Sequence[ConvAlgorithm | None],
    isa: VectorIsa,
    pack: PackWeights = pack_weights,
    repeats: int = 1,
) -> Plan:
    """Choose layouts, lower layers to steps, and let the values of the steps share buffers.

    Args:
        layers: of the network.
        input_shape: (N, C, H, W), where N is the largest batch.
        shapes: see :func:`repvgg.engine.graph.infer_shapes`.
        chunks: see :func:`chunk_batch`.
        algorithms: of each layer; None for the direct kernel, and for layers that are no convolutions.
        isa: the vector instructions.
        pack: packs weights and biases in the order in which kernels read them.
        repeats: copies of the steps of each convolution, each with separate weights; more than 1 for autotuning.
    """
    batch = input_shape[0]
    block = min(batch, _LINEAR_BLOCK_IMAGES)
    layouts = plan_layouts(layers, shapes, algorithms, isa, block)
    lowering, num_chunked = _Lowering(isa, pack, batch), 0
    value = lowering.load(layouts[0], chunks.images_at(0, batch))
    for index, layer in enumerate(layers):
        layout, following = layouts[index + 1], index + 1
        match layer:
            case Conv():
                target = lowering.buffer(layout, chunks.images_at(following, batch))
                for _ in range(repeats):
                    lowering.conv(layer, algorithms[index], value, target)
                value = target
            case Gate():
                lowering.gate(layer, value, block)
            case Pool():
                value = lowering.pool(layer.name, value, layout)
            case Linear():
                value = lowering.linear(layer, value, layout)
        if following == chunks.num_layers:
            num_chunked = len(lowering.steps)
    # Before the steps are repeated for each chunk: every value of a chunk is dead when the next chunk begins.
    steps, buffers = _assign_buffers(lowering.steps)
    chunked = [
        replace(step, first_image=start, max_images=chunks.images)
        for start in range(0, batch, chunks.images)
        for step in steps[:num_chunked]
    ]
    return Plan(input_shape, (*chunked, *steps[num_chunked:]), buffers, isa, isinstance(layers[-1], (Pool, Linear)))


@final
class _Lowering:
    """Appends the steps of layers to ``steps``. Each value gets a new virtual buffer."""

    def __init__(self, isa: VectorIsa, pack: PackWeights, batch: int) -> None:
        self._isa, self._pack, self._batch = isa, pack, batch
        self._num_buffers = 0
        self.steps: list[Step] = []

    def buffer(self, layout: FeatureMapLayout, num_images: int) -> Buffer:
        self._num_buffers += 1
        return Buffer(self._num_buffers, layout, num_images)

    def load(self, layout: FeatureMapLayout, num_images: int) -> Buffer:
        target = self.buffer(layout, num_images)
        self.steps.append(Step("input", ReorderKernel(layout, self._isa.width), None, target))
        return target

    def conv(self, layer: Conv, algorithm: ConvAlgorithm | None, source: Buffer, target: Buffer) -> None:
        if algorithm is None:
            self._direct_conv(layer, source, target)
            return
        for region in algorithm.regions:
            weights = self._pack(layer, self._isa.width, region.tile.nr, region.winograd, region.on_the_fly)
            if region.schedule == "fused":
                self._fused(layer, region, source, target, weights)
            else:
                self._staged(layer, region, source, target, weights)

    def _fused(
        self, layer: Conv, region: WinogradRegion, source: Buffer, target: Buffer, weights: tuple[Floats, Floats]
    ) -> None:
        kernel = WinogradFused(
            winograd=region.winograd,
            groups=layer.geometry.groups,
            source=source.layout,
            padding=layer.geometry.padding,
            target=target.layout,
            tiling=region.tiling,
            tile=region.tile,
            out_channel_splits=region.out_channel_splits,
            on_the_fly=region.on_the_fly,
            free_vector_registers=region.free_vector_registers(self._isa.registers),
            relu=layer.relu,
            width=self._isa.width,
        )
        items = region.tiling.tiles_per_block, region.tiling.tiles_per_image
        self.steps.append(Step(layer.name, kernel, source, target, *weights, *items))

    def _staged(
        self, layer: Conv, region: WinogradRegion, source: Buffer, target: Buffer, weights: tuple[Floats, Floats]
    ) -> None:
        winograd, tiling, channel_stride = region.winograd, region.tiling, source.layout.pixel_stride
        # One "image" holds the transformed tiles of the whole batch as (tile element, tile, channel).
        size = (winograd.tile_elements, element_stride(tiling.num_padded_tiles, channel_stride))
        transformed = self.buffer(FeatureMapLayout(1, size, (0, 0), 1), 1)
        transform = WinogradInputTransform(winograd, source.layout, layer.geometry.padding, tiling, self._isa.width)
        gemm = WinogradStagedGemm(
            winograd=winograd,
            groups=layer.geometry.groups,
            channels=source.layout.channels,
            pixel_stride=channel_stride,
            target=target.layout,
            tiling=tiling,
            tile=region.tile,
            on_the_fly=region.on_the_fly,
            free_vector_registers=region.free_vector_registers(self._isa.registers),
            relu=layer.relu,
            width=self._isa.width,
        )
        items = tiling.tiles_per_block, tiling.tiles_per_image
        self.steps.append(Step(layer.name, transform, source, transformed))
        self.steps.append(Step(layer.name, gemm, transformed, target, *weights, *items))

    def _direct_conv(self, layer: Conv, source: Buffer, target: Buffer, items_per_block: int = 1) -> None:
        geometry, isa = layer.geometry, self._isa
        vectors = -(-target.layout.channels // geometry.groups // isa.width)
        tile = select_register_tile(isa, target.layout.size[1], vectors)
        kernel = DirectConvKernel(geometry, source.layout, target.layout, tile, layer.relu, isa.width)
        weights = self._pack(layer, isa.width, tile.nr, None, False)
        self.steps.append(Step(layer.name, kernel, source, target, *weights, items_per_block))

    def pool(self, name: str, source: Buffer, layout: FeatureMapLayout) -> Buffer:
        block = layout.size[1]
        means = self.buffer(layout, -(-self._batch // block))
        self.steps.append(Step(name, GlobalPoolKernel(source.layout, self._isa.width), source, means))
        return means

    def linear(self, layer: Linear, source: Buffer, layout: FeatureMapLayout) -> Buffer:
        target = self.buffer(layout, source.num_images)
        conv = Conv(layer.name, layer.weight[:, :, None, None], layer.bias, ConvGeometry((1, 1)), layer.relu)
        self._direct_conv(conv, source, target, items_per_block=layout.size[1])
        return target

    def gate(self, layer: Gate, maps: Buffer, block: int) -> None:
        # The product is computed in place: the feature maps are the largest values of a network.
        width = self._isa.width
        narrow, wide = (vector_layout(weight.shape[0], block, width) for weight in (layer.down, layer.up))
        means = self.pool(layer.name, maps, wide)
        hidden = self.linear(Linear(layer.name, layer.down, layer.down_bias, relu=True), means, narrow)
        factors = self.linear(Linear(layer.name, layer.up, layer.up_bias), hidden, wide)
        self.steps.append(Step(layer.name, SigmoidKernel(factors.layout.pixel_stride, width), factors, factors))
        self.steps.append(Step(layer.name, ScaleKernel(maps.layout, layer.relu, width), maps, maps, factors))


# Buffer sharing


@final
@dataclass(frozen=True)
class BufferAccess:
    """The buffers that a step reads and the one that it writes."""

    reads: tuple[Buffer, ...]
    writes: Buffer


def share_buffers(accesses: Sequence[BufferAccess]) -> dict[Buffer, Buffer]:
    """Map virtual buffers, one for each value, to as few buffers as their lifetimes allow.

    ``accesses`` are those of all steps in execution order. Linear scan: a value takes the first free buffer that fits.
    """
    last_use = {
        buffer: position
        for position, access in enumerate(accesses)
        for buffer in (*access.reads, access.writes)  # later positions overwrite earlier ones
    }
    shared: dict[Buffer, Buffer] = {}
    busy_until: dict[Buffer, int] = {}
    for position, access in enumerate(accesses):
        value = access.writes
        if value in shared:  # written in place, or by several steps
            continue
        free = (one for one, end in busy_until.items() if end < position)
        # Only of the very same layout and length, so that borders are zeroed once and never written.
        fitting = (one for one in free if (one.layout, one.num_images) == (value.layout, value.num_images))
        buffer = next(fitting, None) or Buffer(len(busy_until), value.layout, value.num_images)
        shared[value], busy_until[buffer] = buffer, last_use[value]
    return shared


def _assign_buffers(steps: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Buffer, ...]]:
    """Replace the virtual buffers of steps by shared ones."""
    accesses = []
    inputs: dict[Buffer, Buffer] = {}  # transformed tiles -> the feature maps that they come from
    for step in steps:
        reads = [buffer for buffer in (step.source, step.weights) if isinstance(buffer, Buffer)]
        if step.source in inputs:
            # A staged layer could overwrite its input once all tiles are transformed. It does not, so that both
            # schedules need the same buffers.
            reads.append(inputs[step.source])
        if isinstance(step.kernel, WinogradInputTransform) and step.source is not None:
            inputs[step.target] = step.source
        accesses.append(BufferAccess(tuple(reads), step.target))
    shared = share_buffers(accesses)
    replaced = tuple(
        replace(
            step,
            source=step.source and shared[step.source],
            target=shared[step.target],
            weights=shared[step.weights] if isinstance(step.weights, Buffer) else step.weights,
        )
        for step in steps
    )
    return replaced, tuple(dict.fromkeys(shared.values()))
