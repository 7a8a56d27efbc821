"""Memory-bound kernels at both ends of a classifier: input reorder, and global average pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.codegen.ir_builder import IRBuilder, Value
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel
from repvgg.engine.runtime.memory import FeatureMapLayout

_MAX_POOL_VECTORS = 8  # accumulators of a row; with those of all rows, they fit 16 registers


@final
@dataclass(frozen=True)
class ReorderKernel(Kernel):
    """Copy of the caller's images, of any strides, to the layout ``target`` of the first layer.

    Its ``weights`` are four i64: the strides along N, C, H and W in floats.
    """

    target: FeatureMapLayout
    width: int

    def describe(self) -> str:
        return "input reorder"

    @property
    def units_per_block(self) -> int:
        """Rows of an image."""
        return self.target.size[0]

    def emit(self, name: str) -> list[IRBuilder]:
        b, target = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.target
        # Strides are read at run time: one kernel serves contiguous, channels_last and sliced inputs.
        strides = [
            b.assign(f"load i64, ptr {b.assign(f'getelementptr i64, ptr %weights, i64 {axis}')}") for axis in range(4)
        ]
        with b.loop("%begin", "%end") as units:
            image, row = b.divmod(units.index, target.size[0])
            read = b.offset("%source", b.add(b.mul(image, strides[0]), b.mul(row, strides[2])))
            offset = b.add(b.mul(image, target.image_stride), b.mul(row, target.row_stride))
            written = b.offset("%target", b.add(offset, target.interior_offset))
            if target.planar:
                _copy_planes(b, target, read, written, strides)
            else:
                _copy_pixels(b, target, read, written, strides, 0)
        return [b]


def _copy_planes(b: IRBuilder, target: FeatureMapLayout, read: Value, written: Value, strides: list[Value]) -> None:
    """Copy a row of each channel to NCHW, by vectors if its pixels are contiguous in the source."""
    whole = target.size[1] // b.width * b.width
    contiguous = b.assign(f"icmp eq i64 {strides[3]}, 1")
    with b.when(contiguous):
        if whole:
            with b.loop(0, target.channels) as channels:
                begin = b.offset(read, b.mul(channels.index, strides[1]))
                end = b.offset(written, b.mul(channels.index, target.channel_stride))
                with b.loop(0, whole, b.width) as columns:
                    b.store(b.load(begin, columns.index), end, columns.index)
        if whole < target.size[1]:
            _copy_pixels(b, target, read, written, strides, whole)
    with b.when(b.assign(f"xor i1 {contiguous}, true")):
        _copy_pixels(b, target, read, written, strides, 0)


def _copy_pixels(
    b: IRBuilder, target: FeatureMapLayout, read: Value, written: Value, strides: list[Value], first: int
) -> None:
    """Copy a row from column ``first`` on, float by float."""
    with b.loop(first, target.size[1]) as columns, b.loop(0, target.channels) as channels:
        offset = b.add(b.mul(columns.index, strides[3]), b.mul(channels.index, strides[1]))
        number = b.assign(f"load float, ptr {b.offset(read, offset)}")
        place = b.add(b.mul(columns.index, target.pixel_stride), b.mul(channels.index, target.channel_stride))
        b.emit(f"store float {number}, ptr {b.offset(written, place)}")


@final
@dataclass(frozen=True)
class GlobalPoolKernel(Kernel):
    """Mean over all pixels of each channel, to a row of ``source.pixel_stride`` floats for each image.

    ``source.pixel_stride`` is a multiple of the vector length ``width``.
    """

    source: FeatureMapLayout
    width: int

    @property
    def vectors(self) -> int:
        """Vectors of channels in a unit; they divide those of a pixel, so that there is no remainder."""
        whole = self.source.pixel_stride // self.width
        return max(count for count in range(1, _MAX_POOL_VECTORS + 1) if whole % count == 0)

    def describe(self) -> str:
        return "global average pool"

    @property
    def units_per_block(self) -> int:
        """Groups of ``vectors`` vectors of channels."""
        return self.source.pixel_stride // self.width // self.vectors

    def emit(self, name: str) -> list[IRBuilder]:
        b, source = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.source
        lanes = self.vectors * self.width
        scale = b.splat(b.assign(f"fdiv float 1.0, {source.size[0] * source.size[1]}.0"))
        with b.loop("%begin", "%end") as units:
            # Units are groups of channels, not rows: no sums of different threads have to be added.
            image, part = b.divmod(units.index, self.units_per_block)
            channel = b.mul(part, lanes)
            read = b.add(b.add(b.mul(image, source.image_stride), channel), source.interior_offset)
            target = b.offset("%target", b.add(b.mul(image, source.pixel_stride), channel))
            for vector, total in enumerate(self._sum(b, b.offset("%source", read))):
                b.store(b.binary("fmul", total, scale), target, vector * self.width)
        return [b]

    def _sum(self, b: IRBuilder, first_pixel: Value) -> list[Value]:
        zeros = ["zeroinitializer"] * self.vectors
        # Each row is summed separately, and then the sums: a value passes through fewer roundings.
        with b.loop(0, self.source.size[0], carried=zeros) as rows:
            begin = b.offset(first_pixel, b.mul(rows.index, self.source.row_stride))
            with b.loop(0, self.source.size[1], carried=zeros) as columns:
                pixel = b.offset(begin, b.mul(columns.index, self.source.pixel_stride))
                columns.next = [
                    b.binary("fadd", total, b.load(pixel, vector * self.width))
                    for vector, total in enumerate(columns.carried)
                ]
            pairs = zip(rows.carried, columns.results, strict=True)
            rows.next = [b.binary("fadd", total, row) for total, row in pairs]
        return rows.results
