"""Lowering: the steps of each node, kernels with packed weights on virtual buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np

from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import (
    IDENTITY,
    AdaptivePool,
    Binary,
    ChannelPool,
    Concat,
    Conv,
    ConvGeometry,
    Elementwise,
    FeatureShape,
    Floats,
    GroupNorm,
    LayerNorm,
    MatMul,
    Node,
    Pad,
    Rearrangement,
    Resize,
    Softmax,
    Spread,
    WindowPool,
    WrapPad,
)
from repvgg.engine.kernels.base import Kernel, PackWeights
from repvgg.engine.kernels.channels import ChannelsKernel, pack_norm
from repvgg.engine.kernels.conv1x1 import Conv1x1Kernel, select_1x1_tile
from repvgg.engine.kernels.copying import FillKernel, copy_kernel
from repvgg.engine.kernels.depthwise import DepthwiseKernel, pack_depthwise
from repvgg.engine.kernels.direct_conv import DirectConvKernel, select_register_tile
from repvgg.engine.kernels.elementwise import BinaryKernel, PointwiseKernel, broadcast_strides
from repvgg.engine.kernels.group_norm import GroupNormKernel
from repvgg.engine.kernels.matmul import MatMulKernel, operand_of
from repvgg.engine.kernels.memory_bound import GlobalPoolKernel, ReorderKernel
from repvgg.engine.kernels.pooling import AxisWindows, PoolKernel
from repvgg.engine.kernels.resize import ResizeKernel, resize_tables, wrap_tables
from repvgg.engine.planner.algorithms import ConvAlgorithm, WinogradRegion
from repvgg.engine.planner.steps import NO_WEIGHTS, Buffer, Step
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up
from repvgg.engine.winograd.convolution import WinogradFused, WinogradInputTransform, WinogradStagedGemm
from repvgg.engine.winograd.tiling import element_stride

LINEAR = ConvGeometry((1, 1))
_MIN_1X1_CHANNELS = 96  # with fewer, a row of pixels and all weights are in L1 anyway
LINEAR_BLOCK_IMAGES = 8  # rows of the GEMM of a linear layer: enough to reuse each weight from a register


@final
class Lowering:
    """Appends the steps of nodes to ``steps``.

    Args:
        isa: the vector instructions.
        pack: packs weights and biases in the order in which kernels read them.
        batch: the largest number of images.
        values: the buffer of each value; several values may share one.
    """

    def __init__(self, isa: VectorIsa, pack: PackWeights, batch: int, values: Sequence[Buffer]) -> None:
        self._isa, self._pack, self._batch, self._values = isa, pack, batch, values
        self._num_buffers = 2 * len(values)  # numbers below are taken
        self.steps: list[Step] = []

    def load(self, number: int) -> None:
        """Copy an input of the network to its buffer."""
        target = self._values[number]
        name = "input" if number == 0 else f"input_{number}"
        self.steps.append(Step(name, ReorderKernel(target.layout, self._isa.width), None, target, input=number))

    def lower(self, node: Node, value: int, algorithm: ConvAlgorithm | None) -> None:
        """Append the steps of a node; ``algorithm`` is that of a convolution, None for the direct kernel."""
        source, target, width = self._values[node.inputs[0]], self._values[value], self._isa.width
        match op := node.op:
            case Conv():
                self._conv(node.name, op, algorithm, source, target)
            case Elementwise():
                self._append(node, PointwiseKernel(source.layout, target.layout, op.epilogue, width), source, target)
            case Binary():
                self._binary(node, op, source, target)
            case WindowPool():
                down, across = (
                    AxisWindows(kernel, stride, padding)
                    for kernel, stride, padding in zip(
                        op.window.kernel, op.window.stride, op.window.padding, strict=True
                    )
                )
                kernel = PoolKernel(op.kind, down, across, op.counts_padding, source.layout, target.layout, width)
                self._append(node, kernel, source, target)
            case AdaptivePool():
                self._adaptive_pool(node, op, source, target)
            case ChannelPool():
                self._append(node, ChannelsKernel(op.kind, source.layout, target.layout, width), source, target)
            case Resize():
                tables = resize_tables(op, source.layout.size, target.layout.size)
                kernel_of = ResizeKernel(source.layout, target.layout, op.kind == "nearest", width)
                self._append(node, kernel_of, source, target, tables)
            case Softmax():
                kind = "log_softmax" if op.log else "softmax"
                self._append(node, ChannelsKernel(kind, source.layout, target.layout, width), source, target)
            case LayerNorm():
                norm = ChannelsKernel("layer_norm", source.layout, target.layout, width, op.epsilon)
                self._append(node, norm, source, target, *pack_norm(op, width))
            case GroupNorm():
                kernel_of_groups = GroupNormKernel(op.groups, source.layout, target.layout, op.epsilon, width)
                self._append(node, kernel_of_groups, source, target, *pack_norm(op, width))
            case MatMul():
                self._matmul(node, op, target)
            case WrapPad():
                wrapped = ResizeKernel(source.layout, target.layout, True, width, wraps=True)
                tables = wrap_tables(op, source.layout.size, target.layout.size)
                self._append(node, wrapped, source, target, tables)
            case Rearrangement():
                self._copy(node, op, source, target, (0, 0, 0))
            case Concat():
                self._concat(node, op, target)
            case Spread():
                self._spread(node, op, source, target)
            case Pad():
                self._append(node, FillKernel(target.layout, op.number, width), None, target)
                self._copy(node, IDENTITY, source, target, (op.channels[0], op.pixels[0], op.pixels[2]))

    def _spread(self, node: Node, op: Spread, source: Buffer, target: Buffer) -> None:
        width = self._isa.width
        self._append(node, FillKernel(target.layout, 0.0, width), None, target)
        kernel = copy_kernel(IDENTITY, source.layout, target.layout, (0, 0, 0), width, op.stride)
        self._append(node, kernel, source, target)

    def _append(
        self,
        node: Node,
        kernel: Kernel,
        source: Buffer | None,
        target: Buffer,
        weights: Floats | Buffer = NO_WEIGHTS,
        bias: Floats = NO_WEIGHTS,
    ) -> None:
        # A step without a source reads an input of the network, so a fill names its target instead.
        self.steps.append(Step(node.name, kernel, source or target, target, weights, bias))

    # Convolutions

    def _conv(self, name: str, conv: Conv, algorithm: ConvAlgorithm | None, source: Buffer, target: Buffer) -> None:
        if conv.is_depthwise:
            kernel = DepthwiseKernel(conv.geometry, source.layout, target.layout, conv.epilogue, self._isa.width)
            self.steps.append(Step(name, kernel, source, target, *pack_depthwise(conv, self._isa.width)))
            return
        if algorithm is None:
            self._direct_conv(name, conv, source, target)
            return
        for region in algorithm.regions:
            self._winograd(name, conv, region, source, target)

    def _winograd(self, name: str, conv: Conv, region: WinogradRegion, source: Buffer, target: Buffer) -> None:
        winograd, tiling, channel_stride = region.winograd, region.tiling, source.layout.pixel_stride
        packed = self._pack(conv, self._isa.width, region.tile.nr, winograd, region.on_the_fly)
        items = tiling.tiles_per_block, tiling.tiles_per_image * tiling.phases
        gemm: dict[str, Any] = {
            "winograd": winograd,
            "groups": conv.geometry.groups,
            "target": target.layout,
            "tiling": tiling,
            "tile": region.tile,
            "on_the_fly": region.on_the_fly,
            "free_vector_registers": region.free_vector_registers(self._isa.registers),
            "epilogue": conv.epilogue,
            "width": self._isa.width,
        }
        if region.schedule == "fused":
            splits = region.out_channel_splits
            fused = WinogradFused(
                source=source.layout, padding=conv.geometry.padding, out_channel_splits=splits, **gemm
            )
            self.steps.append(Step(name, fused, source, target, *packed, *items))
            return
        # One "image" holds the transformed tiles of the whole batch as (tile element, tile, channel).
        size = (winograd.tile_elements, element_stride(tiling.num_padded_tiles, channel_stride))
        transformed = self._temporary(FeatureMapLayout(1, size, (0, 0), 1), 1)
        transform = WinogradInputTransform(winograd, source.layout, conv.geometry.padding, tiling, self._isa.width)
        staged = WinogradStagedGemm(channels=source.layout.channels, pixel_stride=channel_stride, **gemm)
        self.steps.append(Step(name, transform, source, transformed))
        self.steps.append(Step(name, staged, transformed, target, *packed, *items))

    def _direct_conv(self, name: str, conv: Conv, source: Buffer, target: Buffer) -> None:
        geometry, isa, items = conv.geometry, self._isa, 1
        layouts = source.layout, target.layout
        if geometry == LINEAR and all(map(_is_vector, layouts)):
            # The images of a block form a row of pixels, so each weight is read once for all of them.
            items = min(self._batch, LINEAR_BLOCK_IMAGES)
            layouts = replace(source.layout, size=(1, items)), replace(target.layout, size=(1, items))
        vectors = -(-target.layout.channels // geometry.groups // isa.width)
        if _is_1x1(geometry, source.layout, target.layout):
            pixels = target.layout.size[0] * target.layout.size[1]
            tile = select_1x1_tile(isa, pixels, vectors)
            blocked = Conv1x1Kernel(geometry.stride, *layouts, tile, conv.epilogue, isa.width)
            self.steps.append(Step(name, blocked, source, target, *self._pack(conv, isa.width, tile.nr, None, False)))
            return
        tile = select_register_tile(isa, layouts[1].size[1], vectors)
        kernel = DirectConvKernel(geometry, *layouts, tile, conv.epilogue, isa.width)
        weights = self._pack(conv, isa.width, tile.nr, None, False)
        self.steps.append(Step(name, kernel, source, target, *weights, items))

    # Other operations

    def _binary(self, node: Node, op: Binary, source: Buffer, target: Buffer) -> None:
        width = self._isa.width
        other: Floats | Buffer
        if op.constant is None:
            other = self._values[node.inputs[1]]
            layout = other.layout
        else:
            channels, height, columns = op.constant.shape
            layout = FeatureMapLayout(channels, (height, columns), (0, 0), round_up(channels, width))
            padding = (0, 0), (0, 0), (0, layout.pixel_stride - channels)
            other = np.pad(op.constant.transpose(1, 2, 0), padding).ravel()
        strides = broadcast_strides(layout, target.layout, constant=op.constant is not None)
        kernel = BinaryKernel(op.kind, source.layout, target.layout, strides, op.epilogue, width)
        self._append(node, kernel, source, target, other)

    def _matmul(self, node: Node, op: MatMul, target: Buffer) -> None:
        width, columns = self._isa.width, target.layout.size[1]
        operands, buffers = [], []
        for what, value, is_left in zip((op.left, op.right), node.inputs, (True, False), strict=True):
            source = self._values[value]
            operand = operand_of(what, source.layout, is_left=is_left, width=width)
            if operand is None:
                shape = what.output(FeatureShape(source.layout.channels, source.layout.size))
                layout = FeatureMapLayout(shape.channels, shape.size, (0, 0), round_up(shape.channels, width))
                copied = self._temporary(layout, target.num_images)
                self._copy(node, what, source, copied, (0, 0, 0))
                source, operand = copied, operand_of(IDENTITY, layout, is_left=is_left, width=width)
                assert operand is not None
            operands.append(operand)
            buffers.append(source)
        left_shape = self._values[node.inputs[0]].layout
        depth = op.left.output(FeatureShape(left_shape.channels, left_shape.size)).channels
        tile = select_register_tile(self._isa, columns, -(-target.layout.channels // width))
        kernel = MatMulKernel(operands[0], operands[1], depth, target.layout, tile, op.epilogue, width)
        self._append(node, kernel, buffers[0], target, buffers[1])

    def _temporary(self, layout: FeatureMapLayout, images: int) -> Buffer:
        """Return a new buffer, which the steps of a single node use."""
        self._num_buffers += 1
        return Buffer(self._num_buffers, layout, images)

    def _adaptive_pool(self, node: Node, op: AdaptivePool, source: Buffer, target: Buffer) -> None:
        layout, width = target.layout, self._isa.width
        if op.kind == "avg" and _is_vector(layout):
            self._append(node, GlobalPoolKernel(source.layout, width), source, target)
            return
        cells = AxisWindows(), AxisWindows()
        self._append(node, PoolKernel(op.kind, *cells, False, source.layout, layout, width), source, target)

    def _concat(self, node: Node, op: Concat, target: Buffer) -> None:
        first = [0, 0, 0]
        for part, value in zip(op.parts, node.inputs, strict=True):
            source = self._values[value]
            self._copy(node, part, source, target, (first[0], first[1], first[2]))
            sizes = source.layout.channels, *source.layout.size
            length = 1
            for factor in part.axes[op.axis]:
                length *= factor.extent or sizes[factor.axis]
            first[op.axis] += length

    def _copy(
        self, node: Node, what: Rearrangement, source: Buffer, target: Buffer, first: tuple[int, int, int]
    ) -> None:
        kernel = copy_kernel(what, source.layout, target.layout, first, self._isa.width)
        self._append(node, kernel, source, target)


def _is_1x1(geometry: ConvGeometry, source: FeatureMapLayout, target: FeatureMapLayout) -> bool:
    """Whether a convolution reads one pixel for each output, and the blocked kernel suits it."""
    is_1x1 = geometry.kernel == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
    return is_1x1 and not source.planar and source.channels >= _MIN_1X1_CHANNELS and target.size != (1, 1)


def _is_vector(layout: FeatureMapLayout) -> bool:
    """Whether images follow each other without border, so that those of a batch form a matrix."""
    return layout.size == (1, 1) and layout.border == (0, 0) and layout.overhang == (0, 0) and not layout.planar
