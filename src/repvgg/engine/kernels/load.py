"""The input as the caller has it, in any order of axes, into images as the kernels want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.images import Images
from repvgg.engine.ir import Function, Value
from repvgg.engine.kernels.kernel import UNITS


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
