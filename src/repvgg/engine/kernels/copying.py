"""Copies: rearrangements and concatenations, and constants around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from repvgg.engine.codegen.ir_builder import IRBuilder, Value, float_text
from repvgg.engine.graph import C, H, Pair, Rearrangement, W
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel, row_address
from repvgg.engine.runtime.memory import FeatureMapLayout

_MIN_VECTOR_SHARE = 4  # vectors are used from a quarter of their lanes on


class CopyLoop(NamedTuple):
    """A loop of a copy: steps, and how far each goes in source and target, in floats."""

    extent: int
    source: int
    target: int


@final
@dataclass(frozen=True)
class CopyKernel(Kernel):
    """Copy of elements to a part of the target.

    Attributes:
        rows: the loops over the rows of the part, the outermost first; a unit is one row.
        columns: the loops within a row, the innermost last.
        source_offset: of the first element, in floats.
        target_offset: the same.
        source_image: floats from one image to the next.
        target_image: the same.
        width: floats in a vector.
    """

    rows: tuple[CopyLoop, ...]
    columns: tuple[CopyLoop, ...]
    source_offset: int
    target_offset: int
    source_image: int
    target_image: int
    width: int

    def describe(self) -> str:
        return "copy"

    @property
    def units_per_block(self) -> int:
        return math.prod(loop.extent for loop in self.rows)

    def emit(self, name: str) -> list[IRBuilder]:
        b = IRBuilder(name, KERNEL_PARAMETERS, self.width)
        with b.loop("%begin", "%end") as units:
            rest, row = b.divmod(units.index, self.units_per_block)
            read, written = b.mul(rest, self.source_image), b.mul(rest, self.target_image)
            inner = self.units_per_block
            for loop in self.rows:
                inner //= loop.extent
                index, row = b.divmod(row, inner)
                read, written = b.add(read, b.mul(index, loop.source)), b.add(written, b.mul(index, loop.target))
            source = b.offset("%source", b.add(read, self.source_offset))
            target = b.offset("%target", b.add(written, self.target_offset))
            _copy(b, self.columns, source, target)
        return [b]


def _copy(b: IRBuilder, loops: Sequence[CopyLoop], source: Value, target: Value) -> None:
    if not loops:
        number = b.assign(f"load float, ptr {source}")
        b.emit(f"store float {number}, ptr {target}")
        return
    loop, *inner = loops
    if not inner and (loop.source, loop.target) == (1, 1) and loop.extent * _MIN_VECTOR_SHARE >= b.width:
        _copy_contiguous(b, loop.extent, source, target)
        return
    with b.loop(0, loop.extent) as steps:
        _copy(
            b,
            inner,
            b.offset(source, b.mul(steps.index, loop.source)),
            b.offset(target, b.mul(steps.index, loop.target)),
        )


def _copy_contiguous(b: IRBuilder, floats: int, source: Value, target: Value) -> None:
    whole = floats // b.width * b.width
    if whole:
        with b.loop(0, whole, b.width) as vectors:
            b.store(b.load(source, vectors.index), target, vectors.index)
    if whole < floats:
        b.store(b.load(source, whole, floats - whole), target, whole, floats - whole)


def copy_kernel(
    what: Rearrangement,
    source: FeatureMapLayout,
    target: FeatureMapLayout,
    first: tuple[int, int, int],
    width: int,
    spread: Pair = (1, 1),
) -> CopyKernel:
    """Return the kernel of a rearrangement, whose result begins at the element ``first`` (C, H, W) of the target.

    ``spread`` is the distance of its rows and columns there.
    """
    sizes = source.channels, *source.size
    read, (channel, row, pixel) = _strides(source), _strides(target)
    written = channel, row * spread[0], pixel * spread[1]
    loops: list[list[CopyLoop]] = []
    for axis in (C, H, W):
        extents = [factor.extent or sizes[factor.axis] for factor in what.axes[axis]]
        inner = [math.prod(extents[at + 1 :]) for at in range(len(extents))]
        loops.append(
            [
                CopyLoop(extent, factor.stride * read[factor.axis], many * written[axis])
                for factor, extent, many in zip(what.axes[axis], extents, inner, strict=True)
            ]
        )
    channels, rows, columns = loops
    if not rows:  # a single row: its pixels are units
        rows, columns = columns, []
    return CopyKernel(
        tuple(rows),
        (*columns, *channels),
        source.interior_offset + sum(offset * stride for offset, stride in zip(what.offset, read, strict=True)),
        target.interior_offset + sum(offset * stride for offset, stride in zip(first, _strides(target), strict=True)),
        source.image_stride,
        target.image_stride,
        width,
    )


def _strides(layout: FeatureMapLayout) -> tuple[int, int, int]:
    return layout.channel_stride, layout.row_stride, layout.pixel_stride


@final
@dataclass(frozen=True)
class FillKernel(Kernel):
    """A constant in all elements, without the border."""

    target: FeatureMapLayout
    number: float
    width: int

    def describe(self) -> str:
        return "fill"

    @property
    def units_per_block(self) -> int:
        """Rows of an image."""
        return self.target.size[0]

    def emit(self, name: str) -> list[IRBuilder]:
        b, target = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.target
        constant = b.constant(float_text(self.number))
        with b.loop("%begin", "%end") as units:
            image, row = b.divmod(units.index, target.size[0])
            begin = row_address(b, "%target", target, image, row)
            with b.loop(0, target.size[1] * target.pixel_stride, self.width) as vectors:
                b.store(constant, begin, vectors.index)
        return [b]
