"""Depthwise convolution: each channel is convolved separately, a vector of channels at a time.

A unit of work is one output row, which is divided into register tiles of neighbouring pixels by a vector of channels. A
weight is loaded once for a tile, and inputs are operands of the FMAs, which two loads a cycle sustain. The vectors of
the same pixels follow each other, so that whole cache lines are used while they are in L1, and the input and output
rows that follow are prefetched: large maps come from memory, which hardware prefetchers do not hide over so many
streams. The border of the input is zeros in memory. Weights are packed as (tap, channel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.graph import Conv, ConvGeometry, Epilogue, Floats
from repvgg.engine.kernels import pointwise
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up

# Accumulators. Eight hide the latency of the FMAs, 4 at two a cycle. With few taps, the next tile begins in time to
# hide it, and the inputs of four pixels evict each other from L1 less, where strides are powers of two.
_TILE_PIXELS, _SMALL_TILE_PIXELS, _FEW_TAPS = 8, 4, 9
_MAX_UNROLLED_TAPS = 9  # of a row of the kernel


@final
@dataclass(frozen=True)
class DepthwiseKernel(Kernel):
    """A depthwise convolution with bias and epilogue; ``width`` is that of a vector in floats."""

    geometry: ConvGeometry
    source: FeatureMapLayout
    target: FeatureMapLayout
    epilogue: Epilogue
    width: int

    def describe(self) -> str:
        return "depthwise"

    @property
    def units_per_block(self) -> int:
        """Output rows of an image."""
        return self.target.size[0]

    @property
    def num_multiplies(self) -> int:
        taps = self.geometry.kernel[0] * self.geometry.kernel[1]
        return taps * self.target.channels * self.target.size[0] * self.target.size[1]

    def emit(self, name: str) -> list[IRBuilder]:
        b, source, target = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.source, self.target
        padding, columns = self.geometry.padding, target.size[1]
        before = padding[0] * source.row_stride + padding[1] * source.pixel_stride
        with b.loop("%begin", "%end") as units:
            image, row = b.divmod(units.index, target.size[0])
            read = b.add(b.mul(image, source.image_stride), b.mul(row, self.geometry.stride[0] * source.row_stride))
            written = b.add(b.mul(image, target.image_stride), b.mul(row, target.row_stride))
            begin = b.offset("%source", b.add(read, source.interior_offset - before))
            out = b.offset("%target", b.add(written, target.interior_offset))
            size = min(_SMALL_TILE_PIXELS if math.prod(self.geometry.kernel) <= _FEW_TAPS else _TILE_PIXELS, columns)
            whole = columns // size * size
            with b.loop(0, whole, size) as tiles:
                self._emit_channels(b, (begin, out), tiles.index, size)
            if columns > whole:
                self._emit_channels(b, (begin, out), whole, columns - whole)
        return [b]

    def _emit_channels(self, b: IRBuilder, rows: Sequence[Value], column: Index, pixels: int) -> None:
        """Build ``pixels`` neighbouring outputs of all channels."""
        with b.loop(0, self.target.pixel_stride, self.width) as channels:
            pointers = [b.offset(pointer, channels.index) for pointer in (*rows, "%weights", "%bias")]
            self._emit_tile(b, pointers, column, pixels)

    def _emit_tile(self, b: IRBuilder, pointers: list[Value], column: Index, pixels: int) -> None:
        """Build ``pixels`` neighbouring outputs of a vector of channels."""
        source, target, weights, bias = pointers
        geometry, layout = self.geometry, self.source
        step = geometry.stride[1] * layout.pixel_stride
        first = b.offset(source, b.mul(column, step))
        kernel_rows, taps = geometry.kernel
        below = (geometry.dilation[0] * (kernel_rows - 1) + geometry.stride[0]) * layout.row_stride
        for at in range(pixels * geometry.stride[1]):
            b.prefetch(first, below + at * layout.pixel_stride)
        with b.loop(0, kernel_rows, carried=[b.load(bias)] * pixels) as rows:
            begin = b.offset(first, b.mul(rows.index, geometry.dilation[0] * layout.row_stride))
            row_weights = b.offset(weights, b.mul(rows.index, taps * self.target.pixel_stride))
            unrolled = taps if taps <= _MAX_UNROLLED_TAPS else 1
            with b.loop(0, taps // unrolled, carried=rows.carried) as groups:
                sums = groups.carried
                for tap in range(unrolled):
                    number = b.add(b.mul(groups.index, unrolled), tap)
                    weight = b.load(row_weights, b.mul(number, self.target.pixel_stride))
                    pixel = b.offset(begin, b.mul(number, geometry.dilation[1] * layout.pixel_stride))
                    sums = [b.fma(b.load(pixel, at * step), weight, total) for at, total in enumerate(sums)]
                groups.next = sums
            rows.next = groups.results
        out = b.offset(target, b.mul(column, self.target.pixel_stride))
        for at in range(pixels):
            b.prefetch(out, self.target.row_stride + at * self.target.pixel_stride, write=True)
        slopes = b.offset(bias, self.target.pixel_stride)
        for at, value in enumerate(rows.results):
            place = at * self.target.pixel_stride
            b.store(pointwise.apply(b, self.epilogue, value, partial(b.load, out, place), slopes), out, place)


def pack_depthwise(conv: Conv, width: int) -> tuple[Floats, Floats]:
    """Pack weights as (tap, channel), and biases followed by the slopes of "prelu"; channels are padded by zeros."""
    channels = conv.weight.shape[0]
    padding = (0, round_up(channels, width) - channels)
    weights = np.pad(conv.weight.reshape(channels, -1).T, ((0, 0), padding))
    vectors = [conv.bias] if conv.slopes is None else [conv.bias, conv.slopes]
    return weights.ravel(), np.concatenate([np.pad(vector, padding) for vector in vectors])
