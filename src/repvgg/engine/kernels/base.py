"""What all kernels share: their interface and signature, the register tile and its micro-kernel, packed weights.

Matrix kernels are organised as in BLIS and XNNPACK: a register tile of ``mr`` rows (pixels, or Winograd tiles) by
``nr`` vectors of output channels is accumulated over the input channels, by a rank-1 update for each of them. Weights
are packed into panels of ``nr`` vectors, in the order in which they are read. Strides and offsets are in floats.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import numpy as np

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.graph import Conv, Floats
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up
from repvgg.engine.winograd.filters import TAPS, Winograd2d

LINE_FLOATS = 16  # a cache line of 64 bytes

POINTER_PARAMETERS = (("ptr", "source"), ("ptr", "target"), ("ptr", "weights"), ("ptr", "bias"))

#: Parameters of a kernel's function, which computes units [begin, end) of the ``batch * units_per_block`` units of
#: ``batch`` blocks; ``kernel_function`` in ``runtime/thread_pool.c`` is the same.
KERNEL_PARAMETERS = (*POINTER_PARAMETERS, ("i64", "batch"), ("i64", "begin"), ("i64", "end"))


class Kernel(ABC):
    """Everything that the code of a layer depends on, as a frozen dataclass: equal kernels share their code."""

    @abstractmethod
    def describe(self) -> str:
        """Return what it computes and how, for a profile."""

    @property
    @abstractmethod
    def units_per_block(self) -> int:
        """Units of work in a block: an image, or Winograd tiles (see :class:`repvgg.engine.planner.plan.Step`)."""

    @property
    def num_multiplies(self) -> int:
        """Float multiplications in a block; 0 for kernels that are bound by memory."""
        return 0

    @abstractmethod
    def emit(self, name: str) -> list[IRBuilder]:
        """Return the function called ``name``, with :data:`KERNEL_PARAMETERS`, after the functions that it calls."""


def row_address(b: IRBuilder, pointer: Value, layout: FeatureMapLayout, image: Index, row: Index) -> Value:
    """Return the address of the first pixel of a row of a feature map at ``pointer``."""
    row_offset = b.add(b.mul(image, layout.image_stride), b.mul(row, layout.row_stride))
    return b.offset(pointer, b.add(row_offset, layout.interior_offset))


# Micro-kernel


@final
@dataclass(frozen=True)
class RegisterTile:
    """Accumulators in vector registers: ``mr`` pixels or Winograd tiles by ``nr`` vectors of output channels."""

    mr: int
    nr: int

    def __str__(self) -> str:
        return f"{self.mr}x{self.nr} registers"

    @property
    def registers(self) -> int:
        """Vector registers in use: accumulators, the weights of an input channel, and a broadcast input."""
        return self.mr * self.nr + self.nr + 1

    @property
    def cycles(self) -> float:
        """Estimated cycles of a rank-1 update, on a core with two FMAs and two loads a cycle and an FMA latency of 4.

        The largest of: FMA throughput, load throughput, FMA latency.
        """
        # Weights count as two loads, one of them the prefetch. The quadratic term is fitted to measurements: the
        # weights of wide panels evict inputs from L1.
        return max(self.mr * self.nr / 2, (self.mr + 2 * self.nr) / 2, 4.0) + 0.02 * self.nr**2


def rank_1_update(
    b: IRBuilder, inputs: Value, input_stride: int, weights: Value, accumulators: Sequence[Value], nr: int
) -> list[Value]:
    """Add one input channel to a register tile: ``acc[m, n] += input[m] · weight[n]``.

    Args:
        b: the function.
        inputs: address of the channel of the first pixel.
        input_stride: from there to the same channel of the next pixel.
        weights: address of the ``nr`` vectors of weights of the channel.
        accumulators: (mr, nr) vectors, row-major.
        nr: vectors of the tile.
    """
    # nr registers for the weights, and one for each broadcast input in turn: RegisterTile.registers counts them.
    loaded = [b.load(weights, vector * b.width) for vector in range(nr)]
    out: list[Value] = []
    for pixel in range(len(accumulators) // nr):
        value = b.broadcast(inputs, pixel * input_stride)
        out += [b.fma(value, weight, accumulators[pixel * nr + at]) for at, weight in enumerate(loaded)]
    return out


def balanced_tiles(count: int, tile: RegisterTile) -> list[tuple[int, RegisterTile]]:
    """Divide ``count`` pixels into the fewest tiles of at most ``tile.mr``, of about equal size: (number, tile)."""
    # 13 pixels in tiles of at most 6 are 5 + 4 + 4, not 6 + 6 + 1: a tile of 1 waits for the latency of its FMAs.
    number = -(-count // tile.mr)
    size, more = divmod(count, number)
    pairs = (more, size + 1), (number - more, size)
    return [(many, RegisterTile(mr, tile.nr)) for many, mr in pairs if many]


def call_for_panel(
    b: IRBuilder, panel: Index, num_panels: int, functions: Sequence[IRBuilder], arguments: Sequence[tuple[str, Index]]
) -> None:
    """Call ``functions[1]`` for the last panel of a group, which may be narrower, and ``functions[0]`` for others."""
    is_last = b.assign(f"icmp eq i64 {panel}, {num_panels - 1}")
    is_other = b.assign(f"xor i1 {is_last}, true")
    for condition, function in ((is_other, functions[0]), (is_last, functions[1])):
        with b.when(condition):
            b.call(function.name, arguments)


# Packed weights

#: ``(conv, width, nr, winograd or None, on_the_fly) -> (weights, bias)``: see :func:`pack_weights`.
PackWeights: TypeAlias = Callable[[Conv, int, int, Winograd2d | None, bool], tuple[Floats, Floats]]

_PLACEHOLDER_NUMBERS = itertools.count()


def pack_panels(conv: Conv, width: int, nr: int, adjacent_taps: int = 1) -> tuple[Floats, Floats]:
    """Pack the weights (O, I, taps) of a convolution into panels, and pad its biases.

    Args:
        conv: the convolution; each group's output channels are padded by zeros to whole vectors.
        width: floats in a vector.
        nr: vectors of a panel; the last panel of a group may have fewer.
        adjacent_taps: t taps that are adjacent in memory for each input channel.

    Returns:
        Weights (group, panel, tap / t, input channel, t, output channel of the panel) and biases (group, output
        channel), both flat; the slopes of "prelu" follow the biases.
    """
    groups, step = conv.geometry.groups, nr * width
    outputs, inputs = conv.weight.shape[0] // groups, conv.weight.shape[1]
    padded = round_up(outputs, width)
    weights = conv.weight.reshape(groups, outputs, inputs, -1, adjacent_taps).transpose(0, 3, 2, 4, 1)
    # Each weight is written once, to its place: large layers have 400 MB of them.
    packed = np.empty((groups, weights[0, ..., 0].size * padded), np.float32)
    for group in range(groups):
        for at in range(0, padded, step):
            end = min(at + step, padded)
            panel = packed[group, at * (packed.shape[1] // padded) : end * (packed.shape[1] // padded)]
            panel = panel.reshape(*weights.shape[1:4], end - at)
            used = max(0, min(end, outputs) - at)
            panel[..., :used], panel[..., used:] = weights[group, ..., at : at + used], 0
    vectors = [conv.bias] if conv.slopes is None else [conv.bias, conv.slopes]
    padding = (0, 0), (0, padded - outputs)
    return packed.ravel(), np.concatenate([np.pad(one.reshape(groups, outputs), padding).ravel() for one in vectors])


def pack_weights(
    layer: Conv, width: int, nr: int, winograd: Winograd2d | None, on_the_fly: bool
) -> tuple[Floats, Floats]:
    """Pack the weights of a direct convolution, or the transformed filters of Winograd, and the biases.

    With an on-the-fly transform, the three columns of ``G g`` of an input channel are adjacent.
    """
    if winograd is None:
        return pack_panels(layer, width, nr)
    transformed = replace(layer, weight=winograd.transform_filters(layer.weight, on_the_fly=on_the_fly))
    return pack_panels(transformed, width, nr, adjacent_taps=TAPS if on_the_fly else 1)


def placeholder_weights(
    layer: Conv, width: int, nr: int, winograd: Winograd2d | None, on_the_fly: bool
) -> tuple[Floats, Floats]:
    """Return arrays of the size that :func:`pack_weights` returns, without its work: for timing."""
    outputs, inputs = layer.weight.shape[:2]
    groups = layer.geometry.groups
    padded = groups * round_up(outputs // groups, width)
    taps = layer.geometry.kernel[0] * layer.geometry.kernel[1]
    elements = winograd.filter_elements(on_the_fly=on_the_fly) if winograd else taps
    weights = np.full(elements * inputs * padded, 0.01, np.float32)
    weights[0] = next(_PLACEHOLDER_NUMBERS)  # equal arrays would share memory, and be in the cache from another step
    return weights, np.zeros(padded, np.float32)
