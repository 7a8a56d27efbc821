"""Zero the border and the overhang of a feature map whose memory another one has overwritten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel
from repvgg.engine.runtime.memory import FeatureMapLayout


@final
@dataclass(frozen=True)
class BorderKernel(Kernel):
    """Zeros around the pixels of a map. A unit is an image."""

    target: FeatureMapLayout
    width: int

    def describe(self) -> str:
        return "border of zeros"

    @property
    def units_per_block(self) -> int:
        return 1

    def emit(self, name: str) -> list[IRBuilder]:
        b, layout = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.target
        height, row = layout.size[0], layout.size[1] * layout.pixel_stride
        # Memory is rows of pixels; the right end of a row and the left end of the next one are one gap.
        last = layout.interior_offset + (height - 1) * layout.row_stride + row
        with b.loop("%begin", "%end") as images:
            image = b.offset("%target", b.mul(images.index, layout.image_stride))
            with b.loop(0, layout.channels if layout.planar else 1) as planes:
                plane = b.offset(image, b.mul(planes.index, layout.plane_size))
                self._zero(b, plane, 0, layout.interior_offset)
                if height > 1 and layout.row_stride > row:
                    with b.loop(0, height - 1) as rows:
                        gap = b.add(b.mul(rows.index, layout.row_stride), layout.interior_offset + row)
                        self._zero(b, plane, gap, layout.row_stride - row)
                self._zero(b, plane, last, layout.plane_size - last)
        return [b]

    def _zero(self, b: IRBuilder, plane: Value, begin: Index, floats: int) -> None:
        target, whole = b.offset(plane, begin), floats // self.width * self.width
        if whole:
            with b.loop(0, whole, self.width) as vectors:
                b.store("zeroinitializer", target, vectors.index)
        if whole < floats:
            b.store("zeroinitializer", target, whole, floats - whole)
