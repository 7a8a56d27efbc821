"""The mean over all pixels of each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.images import Images
from repvgg.engine.ir import Function, Value
from repvgg.engine.kernels.kernel import UNITS

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
