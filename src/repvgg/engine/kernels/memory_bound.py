"""The input as the caller has it, in any order of axes, into images as the kernels want them.

The mean over all pixels of each channel.

What is left of a squeeze-excite gate beside its pool and its two matrices: a sigmoid, and the scaling of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.codegen.ir_builder import Function, Value
from repvgg.engine.kernels.base import UNITS
from repvgg.engine.runtime.memory import Images


@final
@dataclass(frozen=True)
class LoadKernel:
    """Copies images of any strides. Its ``weights`` are four i64: floats between neighbours along N, C, H and W.

    Attributes:
        target: the images that it writes.
        width: floats in a vector.
    """

    target: Images
    width: int

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        return "images as they come, into rows with borders"

    @property
    def units_of_image(self) -> int:
        """The rows."""
        return self.target.size[0]

    @property
    def muls(self) -> int:
        """None."""
        return 0

    def functions(self, name: str) -> list[Function]:
        """One function."""
        write, target = Function(name, UNITS, self.width), self.target
        strides = [
            write.value(f"load i64, ptr {write.value(f'getelementptr i64, ptr %weights, i64 {axis}')}")
            for axis in range(4)
        ]
        with write.loop("%begin", "%end") as units:
            image, row = write.divide(units.index, target.size[0])
            read = write.at("%source", write.add(write.mul(image, strides[0]), write.mul(row, strides[2])))
            place = write.add(write.mul(image, target.image), write.mul(row, target.row))
            wrote = write.at("%target", write.add(place, target.inside))
            if target.planar:
                _planes(write, target, read, wrote, strides)
            else:
                _pixels(write, target, read, wrote, strides, 0)
        return [write]


def _planes(write: Function, target: Images, read: Value, wrote: Value, strides: list[Value]) -> None:
    """A row of each channel, by vectors where its numbers are neighbours."""
    whole = target.size[1] // write.width * write.width
    near = write.value(f"icmp eq i64 {strides[3]}, 1")
    with write.when(near):
        if whole:
            with write.loop(0, target.channels) as channels:
                begin = write.at(read, write.mul(channels.index, strides[1]))
                end = write.at(wrote, write.mul(channels.index, target.channel))
                with write.loop(0, whole, write.width) as columns:
                    write.store(write.load(begin, columns.index), end, columns.index)
        if whole < target.size[1]:
            _pixels(write, target, read, wrote, strides, whole)
    with write.when(write.value(f"xor i1 {near}, true")):
        _pixels(write, target, read, wrote, strides, 0)


def _pixels(write: Function, target: Images, read: Value, wrote: Value, strides: list[Value], first: int) -> None:
    """A row from column ``first`` on, float after float."""
    with write.loop(first, target.size[1]) as columns, write.loop(0, target.channels) as channels:
        offset = write.add(write.mul(columns.index, strides[3]), write.mul(channels.index, strides[1]))
        number = write.value(f"load float, ptr {write.at(read, offset)}")
        place = write.add(write.mul(columns.index, target.pitch), write.mul(channels.index, target.channel))
        write.line(f"store float {number}, ptr {write.at(wrote, place)}")


_MOST_VECTORS = 8


@final
@dataclass(frozen=True)
class PoolKernel:
    """Global average pooling, to one row of ``source.pitch`` floats an image, a multiple of ``width``.

    Each row is summed by itself, and then the sums of rows: that rounds less than one long sum.

    Attributes:
        source: the images that it reads.
        width: floats in a vector.
    """

    source: Images
    width: int

    @property
    def vectors(self) -> int:
        """Vectors that are summed at once: a divisor of all, so that no rest is left."""
        whole = self.source.pitch // self.width
        return max(count for count in range(1, _MOST_VECTORS + 1) if whole % count == 0)

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        return "mean over all pixels"

    @property
    def units_of_image(self) -> int:
        """Runs of ``vectors`` vectors of channels."""
        return self.source.pitch // self.width // self.vectors

    @property
    def muls(self) -> int:
        """None that count."""
        return 0

    def functions(self, name: str) -> list[Function]:
        """One function."""
        write, source = Function(name, UNITS, self.width), self.source
        lanes = self.vectors * self.width
        scale = write.splat(write.value(f"fdiv float 1.0, {source.size[0] * source.size[1]}.0"))
        with write.loop("%begin", "%end") as units:
            image, part = write.divide(units.index, self.units_of_image)
            channel = write.mul(part, lanes)
            read = write.add(write.add(write.mul(image, source.image), channel), source.inside)
            target = write.at("%target", write.add(write.mul(image, source.pitch), channel))
            for vector, total in enumerate(self._sum(write, write.at("%source", read))):
                write.store(write.binary("fmul", total, scale), target, vector * self.width)
        return [write]

    def _sum(self, write: Function, corner: Value) -> list[Value]:
        zeros = ["zeroinitializer"] * self.vectors
        with write.loop(0, self.source.size[0], carried=zeros) as rows:
            begin = write.at(corner, write.mul(rows.index, self.source.row))
            with write.loop(0, self.source.size[1], carried=zeros) as columns:
                pixel = write.at(begin, write.mul(columns.index, self.source.pitch))
                columns.next = [
                    write.binary("fadd", total, write.load(pixel, vector * self.width))
                    for vector, total in enumerate(columns.carried)
                ]
            pairs = zip(rows.carried, columns.results, strict=True)
            rows.next = [write.binary("fadd", total, row) for total, row in pairs]
        return rows.results


@final
@dataclass(frozen=True)
class SigmoidKernel:
    """``1 / (1 + exp(-x))`` of rows of ``length`` floats, one row an image, where they lie."""

    length: int
    width: int

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        return "sigmoid"

    @property
    def units_of_image(self) -> int:
        """The row."""
        return 1

    @property
    def muls(self) -> int:
        """None that count."""
        return 0

    def functions(self, name: str) -> list[Function]:
        """One function, float after float, by the exponential of the C library."""
        write = Function(name, UNITS, self.width)
        write.declare("declare float @llvm.exp.f32(float)")
        begin, end = write.mul("%begin", self.length), write.mul("%end", self.length)
        with write.loop(begin, end) as floats:
            number = write.value(f"load float, ptr {write.at('%source', floats.index)}")
            power = write.value(f"call float @llvm.exp.f32(float {write.value(f'fneg float {number}')})")
            gate = write.value(f"fdiv float 1.0, {write.value(f'fadd float 1.0, {power}')}")
            write.line(f"store float {gate}, ptr {write.at('%target', floats.index)}")
        return [write]


@final
@dataclass(frozen=True)
class ScaleKernel:
    """Images times a factor a channel, where they lie, and a ReLU if asked. Its ``weights`` are the factors.

    Attributes:
        images: the images; ``images.pitch`` is a multiple of ``width``, and the factors are rows of as many floats.
        relu: whether a ReLU follows.
        width: floats in a vector.
    """

    images: Images
    relu: bool
    width: int

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        return "scale by channel"

    @property
    def units_of_image(self) -> int:
        """The rows."""
        return self.images.size[0]

    @property
    def muls(self) -> int:
        """None that count."""
        return 0

    def functions(self, name: str) -> list[Function]:
        """One function."""
        write, images = Function(name, UNITS, self.width), self.images
        with write.loop("%begin", "%end") as units:
            image, row = write.divide(units.index, images.size[0])
            place = write.add(write.mul(image, images.image), write.mul(row, images.row))
            corner = write.at("%target", write.add(place, images.inside))
            factors = write.at("%weights", write.mul(image, images.pitch))
            with write.loop(0, images.pitch, self.width) as channels:
                factor, column = write.load(factors, channels.index), write.at(corner, channels.index)
                with write.loop(0, images.size[1]) as columns:
                    pixel = write.at(column, write.mul(columns.index, images.pitch))
                    scaled = write.binary("fmul", write.load(pixel), factor)
                    write.store(write.relu(scaled) if self.relu else scaled, pixel)
        return [write]
