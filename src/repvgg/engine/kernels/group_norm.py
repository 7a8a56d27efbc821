"""Group norm and instance norm: statistics over the pixels of an image, of a group of channels or of each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value, float_text
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel, row_address
from repvgg.engine.runtime.memory import FeatureMapLayout


@final
@dataclass(frozen=True)
class GroupNormKernel(Kernel):
    """``(x - mean) / sqrt(variance + epsilon) · weights + bias``.

    A unit is a group of an image; with a channel in each group, it is a vector of channels, whose lanes stay apart.
    Three passes: the mean, the variance around it, and the result.

    Attributes:
        groups: of channels.
        source: layout of the input.
        target: layout of the output.
        epsilon: see above.
        width: floats in a vector.
    """

    groups: int
    source: FeatureMapLayout
    target: FeatureMapLayout
    epsilon: float
    width: int

    @property
    def by_channel(self) -> bool:
        return self.groups == self.source.channels

    @property
    def unit_channels(self) -> int:
        """Channels of a unit."""
        return self.width if self.by_channel else self.source.channels // self.groups

    def describe(self) -> str:
        return "instance norm" if self.by_channel else f"group norm of {self.groups} groups"

    @property
    def units_per_block(self) -> int:
        return self.source.pixel_stride // self.width if self.by_channel else self.groups

    def emit(self, name: str) -> list[IRBuilder]:
        b, source, target = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.source, self.target
        with b.loop("%begin", "%end") as units:
            image, part = b.divmod(units.index, self.units_per_block)
            channel = b.mul(part, self.unit_channels)
            begin, out = (
                b.offset(row_address(b, pointer, layout, image, 0), channel)
                for pointer, layout in (("%source", source), ("%target", target))
            )
            weights, bias = b.offset("%weights", channel), b.offset("%bias", channel)
            mean = self._mean(b, begin, lambda value: value)

            def square(value: Value) -> Value:
                difference = b.binary("fsub", value, mean)
                return b.binary("fmul", difference, difference)

            variance = self._mean(b, begin, square)
            root = b.call_vector("llvm.sqrt", b.binary("fadd", variance, b.number(self.epsilon)))
            scale = b.binary("fdiv", b.number(1.0), root)

            def normalize(read: Value, written: Value, at: Index, count: int) -> None:
                value = b.binary("fmul", b.binary("fsub", b.load(read, at, count), mean), scale)
                result = b.fma(value, b.load(weights, at, count), b.load(bias, at, count))
                b.store(result, written, at, count)

            with b.loop(0, source.size[0]) as rows, b.loop(0, source.size[1]) as columns:
                read, written = (
                    b.offset(
                        pointer,
                        b.add(b.mul(rows.index, layout.row_stride), b.mul(columns.index, layout.pixel_stride)),
                    )
                    for pointer, layout in ((begin, source), (out, target))
                )
                whole = self.unit_channels // self.width * self.width
                if whole:
                    with b.loop(0, whole, self.width) as channels:
                        normalize(read, written, channels.index, self.width)
                if whole < self.unit_channels:
                    normalize(read, written, whole, self.unit_channels - whole)
        return [b]

    def _mean(self, b: IRBuilder, begin: Value, function: Callable[[Value], Value]) -> Value:
        """Return the mean of a function of all elements of a unit, in all lanes, or of each lane."""
        zero, source = "zeroinitializer", self.source
        whole = self.unit_channels // self.width * self.width
        # The rows are summed separately: a value passes through fewer roundings.
        with b.loop(0, source.size[0], carried=[zero]) as rows:
            row = b.offset(begin, b.mul(rows.index, source.row_stride))
            with b.loop(0, source.size[1], carried=[zero]) as columns:
                pixel = b.offset(row, b.mul(columns.index, source.pixel_stride))
                (total,) = columns.carried
                if whole:
                    with b.loop(0, whole, self.width, carried=[total]) as channels:
                        value = function(b.load(pixel, channels.index))
                        channels.next = [b.binary("fadd", channels.carried[0], value)]
                    (total,) = channels.results
                if whole < self.unit_channels:
                    count = self.unit_channels - whole
                    lanes = ", ".join(f"i1 {str(lane < count).lower()}" for lane in range(b.width))
                    value = function(b.load(pixel, whole, count))
                    value = b.assign(f"select <{b.width} x i1> <{lanes}>, {b.vector} {value}, {b.vector} {zero}")
                    total = b.binary("fadd", total, value)
                columns.next = [total]
            rows.next = [b.binary("fadd", rows.carried[0], columns.results[0])]
        (total,) = rows.results
        pixels = source.size[0] * source.size[1]
        if self.by_channel:
            return b.binary("fdiv", total, b.number(float(pixels)))
        result = b.assign(f"extractelement {b.vector} {total}, i64 0")
        for lane in range(1, b.width):
            result = b.assign(f"fadd float {result}, {b.assign(f'extractelement {b.vector} {total}, i64 {lane}')}")
        return b.splat(b.assign(f"fdiv float {result}, {float_text(float(pixels * self.unit_channels))}"))
