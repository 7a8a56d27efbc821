"""Kernels over the channels of each pixel: softmax, layer norm, maximum and mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value, float_text
from repvgg.engine.graph import Floats, GroupNorm, LayerNorm
from repvgg.engine.kernels import pointwise
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel, row_address
from repvgg.engine.kernels.elementwise import binary
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up


@final
@dataclass(frozen=True)
class ChannelsKernel(Kernel):
    """One of the operations of the module; ``weights`` and ``bias`` are those of a layer norm.

    Attributes:
        kind: "softmax", "log_softmax", "layer_norm", "max" or "avg".
        source: layout of the input.
        target: layout of the output.
        width: floats in a vector.
        epsilon: of a layer norm.
    """

    kind: str
    source: FeatureMapLayout
    target: FeatureMapLayout
    width: int
    epsilon: float = 0.0

    def describe(self) -> str:
        names = {"max": "maximum of channels", "avg": "mean of channels"}
        return names.get(self.kind, self.kind.replace("_", " "))

    @property
    def units_per_block(self) -> int:
        """Rows of an image."""
        return self.target.size[0]

    def emit(self, name: str) -> list[IRBuilder]:
        b, source, target = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.source, self.target
        with b.loop("%begin", "%end") as units:
            image, row = b.divmod(units.index, target.size[0])
            begin = row_address(b, "%source", source, image, row)
            out = row_address(b, "%target", target, image, row)
            with b.loop(0, source.size[1]) as columns:
                pixel = b.offset(begin, b.mul(columns.index, source.pixel_stride))
                place = b.offset(out, b.mul(columns.index, target.pixel_stride))
                if self.kind in ("softmax", "log_softmax"):
                    self._softmax(b, pixel, place)
                elif self.kind == "layer_norm":
                    self._layer_norm(b, pixel, place)
                else:
                    self._pool(b, pixel, place)
        return [b]

    def _softmax(self, b: IRBuilder, pixel: Value, place: Value) -> None:
        largest = b.splat(self._reduce(b, "max", pixel, lambda value: value, float("-inf")))

        def power(value: Value) -> Value:
            return pointwise.exp(b, b.binary("fsub", value, largest))

        total = b.splat(self._reduce(b, "add", pixel, power, 0.0))
        logarithm = pointwise.log(b, total) if self.kind == "log_softmax" else ""
        with b.loop(0, self.source.pixel_stride, self.width) as channels:
            value = b.load(pixel, channels.index)
            if logarithm:
                value = b.binary("fsub", b.binary("fsub", value, largest), logarithm)
            else:
                value = b.binary("fdiv", power(value), total)
            b.store(value, place, channels.index)

    def _layer_norm(self, b: IRBuilder, pixel: Value, place: Value) -> None:
        mean = b.splat(self._mean(b, self._reduce(b, "add", pixel, lambda value: value, 0.0)))

        def square(value: Value) -> Value:
            difference = b.binary("fsub", value, mean)
            return b.binary("fmul", difference, difference)

        variance = b.splat(self._mean(b, self._reduce(b, "add", pixel, square, 0.0)))
        root = b.call_vector("llvm.sqrt", b.binary("fadd", variance, b.number(self.epsilon)))
        scale = b.binary("fdiv", b.number(1.0), root)
        with b.loop(0, self.source.pixel_stride, self.width) as channels:
            difference = b.binary("fsub", b.load(pixel, channels.index), mean)
            value = b.binary("fmul", difference, scale)
            weight, bias = b.load("%weights", channels.index), b.load("%bias", channels.index)
            b.store(b.fma(value, weight, bias), place, channels.index)

    def _pool(self, b: IRBuilder, pixel: Value, place: Value) -> None:
        if self.kind == "max":
            value = self._reduce(b, "max", pixel, lambda value: value, float("-inf"))
        else:
            value = self._mean(b, self._reduce(b, "add", pixel, lambda value: value, 0.0))
        b.store(b.assign(f"insertelement {b.vector} zeroinitializer, float {value}, i64 0"), place)

    def _mean(self, b: IRBuilder, total: Value) -> Value:
        return b.assign(f"fdiv float {total}, {float_text(self.source.channels)}")

    def _reduce(
        self, b: IRBuilder, kind: str, pixel: Value, function: Callable[[Value], Value], neutral: float
    ) -> Value:
        """Return the sum or the maximum of a function of all channels, a float."""
        channels, start = self.source.channels, b.number(neutral)
        whole = channels // b.width * b.width

        def step(total: Value, at: Index, count: int) -> Value:
            value = function(b.load(pixel, at))
            if count < b.width:  # padding channels do not count
                lanes = ", ".join(f"i1 {str(lane < count).lower()}" for lane in range(b.width))
                value = b.assign(f"select <{b.width} x i1> <{lanes}>, {b.vector} {value}, {b.vector} {start}")
            return binary(b, kind, total, value)

        total = start
        if whole:
            with b.loop(0, whole, b.width, carried=[start]) as vectors:
                vectors.next = [step(vectors.carried[0], vectors.index, b.width)]
            (total,) = vectors.results
        if whole < channels:
            total = step(total, whole, channels - whole)
        # The lanes one after the other: the order is the same on all processors of this vector length.
        result = b.assign(f"extractelement {b.vector} {total}, i64 0")
        for lane in range(1, b.width):
            other = b.assign(f"extractelement {b.vector} {total}, i64 {lane}")
            result = b.assign(f"fadd float {result}, {other}") if kind == "add" else _larger(b, result, other)
        return result


def _larger(b: IRBuilder, one: Value, other: Value) -> Value:
    larger = b.assign(f"select i1 {b.assign(f'fcmp ogt float {other}, {one}')}, float {other}, float {one}")
    return b.assign(f"select i1 {b.assign(f'fcmp uno float {other}, {other}')}, float {other}, float {larger}")


def pack_norm(op: LayerNorm | GroupNorm, width: int) -> tuple[Floats, Floats]:
    """Pad weights and biases by zeros to whole vectors."""
    padding = (0, round_up(len(op.weight), width) - len(op.weight))
    return np.pad(op.weight, padding), np.pad(op.bias, padding)
