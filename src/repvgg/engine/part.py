"""What is asked about a convolution, and how a part of its image may be computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final

from repvgg.engine.codegen.jit import Isa
from repvgg.engine.kernels.base import Tile
from repvgg.engine.layers import Pair
from repvgg.engine.winograd.filters import Form, winograd
from repvgg.engine.winograd.tiling import Tiling

Run: TypeAlias = tuple[int, int, int, int]  # first row or column, m, tiles, and outputs of the last one, or 0 for m
Rectangle: TypeAlias = tuple[Run, Run]  # rows and columns of tiles of one form
Way: TypeAlias = Literal["product", "fused"]
Precision: TypeAlias = Literal["highest", "high", "medium"]


@final
@dataclass(frozen=True)
class Size:
    """What a convolution works on.

    Attributes:
        inputs: channels of all groups.
        outputs: channels of all groups.
        image: height and width of what comes out.
        batch: images at once.
        groups: of the convolution.
    """

    inputs: int
    outputs: int
    image: Pair
    batch: int
    groups: int = 1

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return self.inputs // self.groups

    @property
    def kernels(self) -> int:
        """One for each output channel and each input channel of its group."""
        return self.channels * self.outputs

    def vectors(self, width: int) -> int:
        """Vectors of output channels of a group."""
        return -(-self.outputs // self.groups // width)


@final
@dataclass(frozen=True)
class Machine:
    """What computes.

    Attributes:
        isa: the vectors.
        threads: that share the work.
        precision: how far rounding errors may go; see :data:`repvgg.engine.choice.LOSSES`.
    """

    isa: Isa
    threads: int = 1
    precision: Precision = "high"


@final
@dataclass(frozen=True)
class Part:
    """Winograd for a part of each image.

    Attributes:
        way: which kernels.
        form: F(m x n, 3x3).
        tiling: how the tiles of a batch are cut.
        tile: registers of the products.
        late: whether kernels are transformed across while they are used.
        splits: units that take the same tiles, each by a part of the panels.
        cycles: about how long it takes, if that is known.
    """

    way: Way
    form: Form
    tiling: Tiling
    tile: Tile
    late: bool
    splits: int = 1
    cycles: float = 0.0

    @property
    def rectangle(self) -> Rectangle:
        """Which tiles it covers."""
        (top, left), (high, wide) = self.tiling.corner, self.tiling.grid
        (down, across), (low, narrow) = self.form.outputs, self.form.tails
        return (top, down, high, low), (left, across, wide, narrow)

    def room(self, registers: int) -> int:
        """Vectors of so many that products leave free for kernels that come next.

        None where a panel has an odd number of vectors, for two columns share them, or where a place takes more than
        one tile of registers, for only the first of those would do it.
        """
        whole = self.tiling.piece <= self.tile.pixels and self.tile.vectors % 2 == 0
        return registers - self.tile.registers if whole else 0

    @property
    def end(self) -> Pair:
        """One behind the last row and column that the tiles cover; it may lie outside of the image."""
        down, across = (run[0] + run[1] * run[2] - missing(run) for run in self.rectangle)
        return down, across


def missing(run: Run) -> int:
    """Outputs that the last tile has less than the others."""
    _, outputs, _, last = run
    return outputs - last if last else 0


def form_of(rectangle: Rectangle, stride: int) -> Form:
    """What computes some tiles."""
    (_, down, _, low), (_, across, _, narrow) = rectangle
    return winograd(down, across, stride, (low, narrow))
