"""What is left of a squeeze-excite gate beside its pool and its two matrices: a sigmoid, and the scaling of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.images import Images
from repvgg.engine.ir import Function
from repvgg.engine.kernels.kernel import UNITS


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
