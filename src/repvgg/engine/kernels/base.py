"""What every kernel is to the planner, and the signature of the function that it becomes.

The inner loop of every product: a tile of sums in registers, fed by vectors of weights and broadcast inputs.

Weights and biases as the kernels read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, final

import numpy as np

from repvgg.engine.codegen.ir_builder import Function, Index, Value
from repvgg.engine.graph import Conv, Floats
from repvgg.engine.runtime.memory import round_up
from repvgg.engine.winograd.filters import TAPS, Form

POINTERS = (("ptr", "source"), ("ptr", "target"), ("ptr", "weights"), ("ptr", "bias"))

#: A kernel's function computes units [begin, end) of the work on a batch; whoever calls it counts the units.
UNITS = (*POINTERS, ("i64", "batch"), ("i64", "begin"), ("i64", "end"))


class Kernel(Protocol):
    """Everything that the code of one kind of layer depends on: a frozen value, so that equal layers share code."""

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        ...

    @property
    def units_of_image(self) -> int:
        """Pieces of work for each image of a batch, or for each block of a :class:`repvgg.engine.planner.plan.Step`."""
        ...

    @property
    def muls(self) -> int:
        """Multiplications for each of those."""
        ...

    def functions(self, name: str) -> list[Function]:
        """The function called ``name``, which takes :data:`UNITS`, after those that it calls."""
        ...


def call_panel(
    write: Function, part: Index, panels: int, functions: Sequence[Function], arguments: Sequence[tuple[str, Index]]
) -> None:
    """Call the second of two functions for the last panel of a group, which may be narrower, else the first."""
    is_last = write.value(f"icmp eq i64 {part}, {panels - 1}")
    is_other = write.value(f"xor i1 {is_last}, true")
    for condition, function in ((is_other, functions[0]), (is_last, functions[1])):
        with write.when(condition):
            write.call(function.name, arguments)


@final
@dataclass(frozen=True)
class Tile:
    """What is summed in registers at once: so many pixels times so many vectors of output channels."""

    pixels: int
    vectors: int

    def __str__(self) -> str:
        return f"{self.pixels}x{self.vectors} registers"

    @property
    def registers(self) -> int:
        """Vectors that it takes: the sums, a step of weights, and an input."""
        return self.pixels * self.vectors + self.vectors + 1

    @property
    def cycles(self) -> float:
        """About how long one step takes.

        A processor does two multiply-adds and two loads a cycle, and the next addition to a sum waits four cycles.
        Weights are loaded twice, those to come ahead of their use; wide panels crowd the first cache.
        """
        return max(self.pixels * self.vectors / 2, (self.pixels + 2 * self.vectors) / 2, 4.0) + 0.02 * self.vectors**2


def multiply_add(
    write: Function, inputs: Value, pitch: int, weights: Value, sums: Sequence[Value], vectors: int
) -> list[Value]:
    """Add one input channel to all sums of a tile, which lie as (pixel, vector).

    Args:
        write: the function.
        inputs: address of the channel of the first pixel.
        pitch: floats from there to that of the next pixel.
        weights: address of the weights of the channel.
        sums: as they are.
        vectors: of the tile.
    """
    lanes = [write.load(weights, vector * write.width) for vector in range(vectors)]
    out: list[Value] = []
    for pixel in range(len(sums) // vectors):
        value = write.broadcast(inputs, pixel * pitch)
        out += [write.fma(value, lane, sums[pixel * vectors + at]) for at, lane in enumerate(lanes)]
    return out


def equal_tiles(count: int, tile: Tile) -> list[tuple[int, Tile]]:
    """So many pixels as tiles that are about equal, and at most as large: how many, and of which size."""
    number = -(-count // tile.pixels)
    size, more = divmod(count, number)
    pairs = (more, size + 1), (number - more, size)
    return [(many, Tile(pixels, tile.vectors)) for many, pixels in pairs if many]


#: From a convolution, floats in a vector, vectors of a panel, a form of Winograd or None, and whether kernels are
#: transformed late, to weights and biases.
Packing: TypeAlias = Callable[[Conv, int, int, Form | None, bool], tuple[Floats, Floats]]

_NUMBERS = itertools.count()


def pack(conv: Conv, width: int, vectors: int, together: int = 1) -> tuple[Floats, Floats]:
    """Weights and biases in the order that the kernel reads them, with zeros for channels beyond the last.

    Args:
        conv: the convolution.
        width: floats in a vector.
        vectors: of a panel.
        together: taps that lie side by side for each input channel.

    Returns:
        Two arrays of one axis; both have whole vectors for each group.
    """
    groups = conv.geometry.groups
    outputs = conv.weight.shape[0] // groups
    wide = round_up(outputs, width)
    kernel = conv.weight.reshape(groups, outputs, conv.weight.shape[1], -1, together).transpose(0, 3, 2, 4, 1)
    kernel = np.pad(kernel, (*((0, 0),) * 4, (0, wide - outputs)))  # group, taps, input, tap, output
    step = vectors * width
    panels = [kernel[group, ..., at : at + step].ravel() for group in range(groups) for at in range(0, wide, step)]
    bias = np.pad(conv.bias.reshape(groups, outputs), ((0, 0), (0, wide - outputs)))
    return np.concatenate(panels), bias.ravel()


def packed(layer: Conv, width: int, vectors: int, form: Form | None, late: bool) -> tuple[Floats, Floats]:
    """Weights, in Winograd's domain if there is a form, and biases, in the order that kernels read them."""
    if form is None:
        return pack(layer, width, vectors)
    moved = replace(layer, weight=form.transformed(layer.weight, late=late))
    return pack(moved, width, vectors, together=TAPS if late else 1)


def any_weights(layer: Conv, width: int, vectors: int, form: Form | None, late: bool) -> tuple[Floats, Floats]:
    """As many numbers as :func:`packed` would make, without the work: for those who only look at the time.

    No two arrays are equal, so that none is taken for another.
    """
    outputs, inputs = layer.weight.shape[:2]
    groups = layer.geometry.groups
    wide = groups * round_up(outputs // groups, width)
    places = form.sets(late=late) if form else layer.geometry.kernel[0] * layer.geometry.kernel[1]
    weights = np.full(places * inputs * wide, 0.01, np.float32)
    weights[0] = next(_NUMBERS)
    return weights, np.zeros(wide, np.float32)
