"""The input as the caller has it, in any order of axes, into images as the kernels want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.images import Images
from repvgg.engine.ir import Function
from repvgg.engine.kernels.kernel import UNITS


@final
@dataclass(frozen=True)
class LoadKernel:
    """Copies images of any strides. Its ``weights`` are four i64: floats between neighbours along N, C, H and W.

    Attributes:
        target: the images that it writes.
        width: floats in a vector, which it has no use for.
    """

    target: Images
    width: int

    @property
    def units_of_image(self) -> int:
        """The rows."""
        return self.target.size[0]

    @property
    def muls(self) -> int:
        """None."""
        return 0

    def functions(self, name: str) -> list[Function]:
        """One function, which moves float after float."""
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
            with write.loop(0, target.size[1]) as columns, write.loop(0, target.channels) as channels:
                offset = write.add(write.mul(columns.index, strides[3]), write.mul(channels.index, strides[1]))
                number = write.value(f"load float, ptr {write.at(read, offset)}")
                place = write.add(write.mul(columns.index, target.pitch), channels.index)
                write.line(f"store float {number}, ptr {write.at(wrote, place)}")
        return [write]
