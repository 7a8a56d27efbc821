"""Element-wise kernels: a function of each element, and of the elements of two values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

from repvgg.engine.codegen.ir_builder import IRBuilder, Value
from repvgg.engine.graph import Epilogue
from repvgg.engine.kernels import pointwise
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel, row_address
from repvgg.engine.runtime.memory import FeatureMapLayout


def for_each_vector(
    b: IRBuilder,
    layouts: dict[str, FeatureMapLayout],
    body: Callable[[dict[str, Value], Value, Value], None],
) -> None:
    """Build loops over the rows of a unit, and the channels and pixels of each row.

    Args:
        b: the function, with :data:`KERNEL_PARAMETERS`; a unit is a row of an image.
        layouts: by the pointer that they describe; of equal size and channels.
        body: builds what is done for (address of the vector by pointer, number of the image, first channel).
    """
    first = next(iter(layouts.values()))
    with b.loop("%begin", "%end") as units:
        image, row = b.divmod(units.index, first.size[0])
        begins = {name: row_address(b, f"%{name}", layout, image, row) for name, layout in layouts.items()}
        # Channels are the outer loop: what belongs to a channel is loaded once for a row of pixels, which stays in L1.
        with b.loop(0, first.pixel_stride, b.width) as channels:
            columns = {name: b.offset(begin, channels.index) for name, begin in begins.items()}
            with b.loop(0, first.size[1]) as pixels:
                addresses = {
                    name: b.offset(column, b.mul(pixels.index, layouts[name].pixel_stride))
                    for name, column in columns.items()
                }
                body({**addresses, "column": pixels.index, "row": row}, image, channels.index)


@final
@dataclass(frozen=True)
class PointwiseKernel(Kernel):
    """``target = epilogue(source)``, also in place. Both have the same pixel stride."""

    source: FeatureMapLayout
    target: FeatureMapLayout
    epilogue: Epilogue
    width: int

    def describe(self) -> str:
        return pointwise.describe(self.epilogue)

    @property
    def units_per_block(self) -> int:
        """Rows of an image."""
        return self.target.size[0]

    def emit(self, name: str) -> list[IRBuilder]:
        b = IRBuilder(name, KERNEL_PARAMETERS, self.width)

        def body(at: dict[str, Value], image: Value, channel: Value) -> None:
            b.store(pointwise.apply(b, self.epilogue, b.load(at["source"])), at["target"])

        for_each_vector(b, {"source": self.source, "target": self.target}, body)
        return [b]


class Broadcast(NamedTuple):
    """Strides of the second operand in floats, 0 along axes that are repeated; and the offset of its first element."""

    image: int
    row: int
    pixel: int
    channel: int
    offset: int


def broadcast_strides(layout: FeatureMapLayout, target: FeatureMapLayout, *, constant: bool) -> Broadcast:
    """Return the strides of a value in an operation whose result has the layout ``target``."""
    return Broadcast(
        0 if constant else layout.image_stride,
        layout.row_stride if layout.size[0] > 1 else 0,
        layout.pixel_stride if layout.size[1] > 1 else 0,
        1 if layout.channels > 1 or target.channels == 1 else 0,
        layout.interior_offset,
    )


@final
@dataclass(frozen=True)
class BinaryKernel(Kernel):
    """``target = epilogue(source ∘ weights)``, also in place; ``kind`` is the operation ∘.

    ``weights`` is the second operand, broadcast by its strides. Source and target have the same pixel stride.
    """

    kind: str
    source: FeatureMapLayout
    target: FeatureMapLayout
    other: Broadcast
    epilogue: Epilogue
    width: int

    def describe(self) -> str:
        names = {"add": "sum", "sub": "difference", "mul": "product", "div": "quotient"}
        repeated = ", by channel" if self.other.channel and not (self.other.row or self.other.pixel) else ""
        return ", ".join(filter(None, (names.get(self.kind, self.kind) + repeated, pointwise.describe(self.epilogue))))

    @property
    def units_per_block(self) -> int:
        """Rows of an image."""
        return self.target.size[0]

    def emit(self, name: str) -> list[IRBuilder]:
        b, other = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.other

        def body(at: dict[str, Value], image: Value, channel: Value) -> None:
            row = b.add(b.mul(image, other.image), b.mul(at["row"], other.row))
            place = b.add(b.add(row, b.mul(at["column"], other.pixel)), b.mul(channel, other.channel))
            address = b.offset("%weights", b.add(place, other.offset))
            right = b.load(address) if other.channel else b.broadcast(address)
            # Padding channels may become infinite or NaN, by a division: nothing reads them.
            value = binary(b, self.kind, b.load(at["source"]), right)
            b.store(pointwise.apply(b, self.epilogue, value), at["target"])

        for_each_vector(b, {"source": self.source, "target": self.target}, body)
        return [b]


def binary(b: IRBuilder, kind: str, left: Value, right: Value) -> Value:
    """Build an operation of two vectors; NaN in either gives NaN, as in PyTorch."""
    if kind not in ("max", "min"):
        return b.binary(f"f{kind}", left, right)
    found = b.where("ogt" if kind == "max" else "olt", right, left, right, left)
    return b.where("uno", right, right, right, found)
