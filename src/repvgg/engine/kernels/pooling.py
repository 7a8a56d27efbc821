"""Pools over windows and over cells of an adaptive pool; :mod:`repvgg.engine.kernels.memory_bound` has global means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel, row_address
from repvgg.engine.kernels.elementwise import binary
from repvgg.engine.runtime.memory import FeatureMapLayout

_MAX_VECTORS = 8  # accumulators: enough independent chains, and registers for what is loaded


class AxisWindows(NamedTuple):
    """Where windows begin and end along an axis: every ``stride``, or cells that divide it if ``kernel`` is 0."""

    kernel: int = 0
    stride: int = 1
    padding: int = 0


@final
@dataclass(frozen=True)
class PoolKernel(Kernel):
    """Maximum or mean of each window, clipped to the map.

    Attributes:
        kind: "max" or "avg".
        rows: the windows of the vertical axis.
        columns: the windows of the horizontal axis.
        counts_padding: whether a mean divides by the size of the window with its padding.
        source: layout of the input.
        target: layout of the output.
        width: floats in a vector.
    """

    kind: str
    rows: AxisWindows
    columns: AxisWindows
    counts_padding: bool
    source: FeatureMapLayout
    target: FeatureMapLayout
    width: int

    @property
    def vectors(self) -> int:
        """Vectors of channels that are accumulated at once; they divide those of a pixel."""
        whole = self.source.pixel_stride // self.width
        return max(count for count in range(1, _MAX_VECTORS + 1) if whole % count == 0)

    def describe(self) -> str:
        what = "adaptive" if self.rows.kernel == 0 else f"{self.rows.kernel}x{self.columns.kernel}"
        return f"{what} {'max' if self.kind == 'max' else 'average'} pool"

    @property
    def units_per_block(self) -> int:
        """Output rows of an image."""
        return self.target.size[0]

    def emit(self, name: str) -> list[IRBuilder]:
        b, source, target = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.source, self.target
        with b.loop("%begin", "%end") as units:
            image, row = b.divmod(units.index, target.size[0])
            top = _span(b, self.rows, row, source.size[0], target.size[0])
            read = row_address(b, "%source", source, image, 0)
            out = row_address(b, "%target", target, image, row)
            with b.loop(0, target.size[1]) as pixels:
                left = _span(b, self.columns, pixels.index, source.size[1], target.size[1])
                scale = self._scale(b, top, left) if self.kind == "avg" else ""
                place = b.offset(out, b.mul(pixels.index, target.pixel_stride))
                with b.loop(0, source.pixel_stride, self.vectors * self.width) as channels:
                    values = self._accumulate(b, b.offset(read, channels.index), top, left)
                    for at, value in enumerate(values):
                        value = b.binary("fdiv", value, scale) if scale else value
                        b.store(value, b.offset(place, channels.index), at * self.width)
        return [b]

    def _accumulate(self, b: IRBuilder, read: Value, top: _Span, left: _Span) -> list[Value]:
        first = "zeroinitializer" if self.kind == "avg" else b.number(float("-inf"))
        combine = "add" if self.kind == "avg" else "max"
        with b.loop(top.begin, top.end, carried=[first] * self.vectors, runs=True) as rows:
            row = b.offset(read, b.mul(rows.index, self.source.row_stride))
            # The rows of a mean are summed separately: a value passes through fewer roundings.
            begin = [first] * self.vectors if self.kind == "avg" else rows.carried
            with b.loop(left.begin, left.end, carried=begin, runs=True) as columns:
                pixel = b.offset(row, b.mul(columns.index, self.source.pixel_stride))
                columns.next = [
                    binary(b, combine, total, b.load(pixel, at * self.width))
                    for at, total in enumerate(columns.carried)
                ]
            if self.kind == "avg":
                pairs = zip(rows.carried, columns.results, strict=True)
                rows.next = [b.binary("fadd", total, row) for total, row in pairs]
            else:
                rows.next = columns.results
        return rows.results

    def _scale(self, b: IRBuilder, top: _Span, left: _Span) -> Value:
        """Return the number of elements that a mean divides by."""
        lengths = [span.counted if self.counts_padding else _minus(b, span.end, span.begin) for span in (top, left)]
        count = b.mul(*lengths)
        return b.splat(b.assign(f"uitofp i64 {count} to float"))


class _Span(NamedTuple):
    begin: Index  # inside of the map
    end: Index
    counted: Index  # elements of the window, with padding


def _span(b: IRBuilder, windows: AxisWindows, index: Value, length: int, count: int) -> _Span:
    if windows.kernel == 0:
        begin, _ = b.divmod(b.mul(index, length), count)
        end, _ = b.divmod(b.add(b.mul(b.add(index, 1), length), count - 1), count)
        return _Span(begin, end, _minus(b, end, begin))
    first = b.add(b.mul(index, windows.stride), -windows.padding)
    after = b.add(first, windows.kernel)
    begin, end = _larger(b, first, 0), _smaller(b, after, length)
    padded = _smaller(b, after, length + windows.padding)
    return _Span(begin, end, _minus(b, padded, first))


def _minus(b: IRBuilder, left: Index, right: Index) -> Index:
    return b.assign(f"sub i64 {left}, {right}")


def _larger(b: IRBuilder, one: Index, other: Index) -> Value:
    condition = b.assign(f"icmp sgt i64 {one}, {other}")
    return b.assign(f"select i1 {condition}, i64 {one}, i64 {other}")


def _smaller(b: IRBuilder, one: Index, other: Index) -> Value:
    condition = b.assign(f"icmp slt i64 {one}, {other}")
    return b.assign(f"select i1 {condition}, i64 {one}, i64 {other}")
