"""The planner's passes in their order, and the last of them: lowering layers to steps, each a kernel on its buffers."""

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
from repvgg.engine.planner.memory_plan import (
    BatchChunks,
    Buffer,
    BufferAccess,
    chunk_batch,
    plan_layouts,
    share_buffers,
    vector_layout,
)
from repvgg.engine.runtime.memory import FeatureMapLayout
from repvgg.engine.winograd.convolution import WinogradFused, WinogradInputTransform, WinogradStagedGemm
from repvgg.engine.winograd.tiling import element_stride

_LINEAR_BLOCK_IMAGES = 8  # rows of the GEMM of a linear layer: enough to reuse each weight from a register
NO_WEIGHTS = np.zeros(0, np.float32)


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
        weights: packed for the kernel, or a buffer.
        bias: packed for the kernel.
        items_per_block: see above.
        items_per_image: 1, or the tiles of an image.
        first_image: index of the first image of the batch that it processes.
        max_images: of the batch that it processes; None for all from the first.
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
        """Count the images of a batch that it processes."""
        left = max(0, batch - self.first_image)
        return left if self.max_images is None else min(left, self.max_images)

    def num_multiplies(self, batch: int) -> int:
        """Count its multiplications on a batch, in whole blocks."""
        return self.kernel.num_multiplies * -(-self.num_images(batch) * self.items_per_image // self.items_per_block)


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """All steps of a network for inputs of one size.

    Attributes:
        input_shape: the largest batch, channels, height and width.
        steps: in the order in which they run.
        buffers: all that they read and write, by number.
        isa: the vector instructions that the kernels are written for.
        flat: whether the output is (N, C) and not (N, C, H, W).
    """

    input_shape: Shape
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    isa: VectorIsa
    flat: bool

    @property
    def output(self) -> Buffer:
        """The buffer that holds the output of the network."""
        return self.steps[-1].target


def plan(layers: Sequence[Layer], input_shape: Shape, target: Target, select: Selector = select_algorithm) -> Plan:
    """Run the planner: shape inference, algorithm selection, layouts, lowering, buffer sharing.

    Args:
        layers: see :func:`repvgg.engine.frontend.read`.
        input_shape: the largest batch, channels, height and width.
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
    """Describe each convolution to the selector; None stands for the other layers."""
    return [
        ConvProblem(layer.geometry, source.channels, target.channels, target.size, chunks.images_at(index, batch))
        if isinstance(layer, Conv)
        else None
        for index, (layer, source, target) in enumerate(zip(layers, shapes[:-1], shapes[1:], strict=True))
    ]


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
    """Lower layers to steps on shared buffers.

    Args:
        layers: of the network.
        input_shape: the largest batch, channels, height and width.
        shapes: see :func:`repvgg.engine.graph.infer_shapes`.
        chunks: see :func:`repvgg.engine.planner.memory_plan.chunk_batch`.
        algorithms: of each layer; None for the direct kernel, and for layers that are no convolutions.
        isa: the vector instructions.
        pack: makes weights and biases as kernels read them.
        repeats: times that the steps of each convolution are repeated, each time with weights of their own. More than
            1 is for measuring alone.
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
    # Buffers are shared before steps are repeated, because every value of a chunk is dead when the next chunk begins.
    steps, buffers = _share_buffers(lowering.steps)
    chunked = [
        replace(step, first_image=start, max_images=chunks.images)
        for start in range(0, batch, chunks.images)
        for step in steps[:num_chunked]
    ]
    return Plan(input_shape, (*chunked, *steps[num_chunked:]), buffers, isa, isinstance(layers[-1], (Pool, Linear)))


@final
class _Lowering:
    """Appends the steps of layers. Every value has a virtual buffer of its own.

    Attributes:
        steps: so far.
    """

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
            region.winograd,
            layer.geometry.groups,
            source.layout,
            layer.geometry.padding,
            target.layout,
            region.tiling,
            region.tile,
            region.out_channel_splits,
            region.on_the_fly,
            region.free_vector_registers(self._isa.registers),
            layer.relu,
            self._isa.width,
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
            winograd,
            layer.geometry.groups,
            source.layout.channels,
            channel_stride,
            target.layout,
            tiling,
            region.tile,
            region.on_the_fly,
            region.free_vector_registers(self._isa.registers),
            layer.relu,
            self._isa.width,
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
        """Scale ``maps`` in place."""
        width = self._isa.width
        narrow, wide = (vector_layout(weight.shape[0], block, width) for weight in (layer.down, layer.up))
        means = self.pool(layer.name, maps, wide)
        hidden = self.linear(Linear(layer.name, layer.down, layer.down_bias, relu=True), means, narrow)
        factors = self.linear(Linear(layer.name, layer.up, layer.up_bias), hidden, wide)
        self.steps.append(Step(layer.name, SigmoidKernel(factors.layout.pixel_stride, width), factors, factors))
        self.steps.append(Step(layer.name, ScaleKernel(maps.layout, layer.relu, width), maps, maps, factors))


def _share_buffers(steps: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Buffer, ...]]:
    """Replace the virtual buffers of steps by shared ones."""
    accesses = []
    inputs: dict[Buffer, Buffer] = {}  # the feature maps that are transformed, by the transformed tiles
    for step in steps:
        reads = [buffer for buffer in (step.source, step.weights) if isinstance(buffer, Buffer)]
        if step.source in inputs:
            # A layer never overwrites its own input, although a staged one could once all tiles are transformed: so
            # both schedules need the same buffers.
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
