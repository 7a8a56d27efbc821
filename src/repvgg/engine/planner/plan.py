"""From layers and the size of an input to kernels, buffers and packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from repvgg.engine.codegen.jit import Isa
from repvgg.engine.graph import Conv, ConvGeometry, Floats, Gate, Layer, Linear, Pair, Pool
from repvgg.engine.kernels.base import Kernel, Packing, packed
from repvgg.engine.kernels.direct_conv import ConvKernel, choose_tile
from repvgg.engine.kernels.memory_bound import LoadKernel, PoolKernel, ScaleKernel, SigmoidKernel
from repvgg.engine.planner.algorithms import Choice, Machine, Part, Size
from repvgg.engine.planner.cost_model import Chooser, choose
from repvgg.engine.planner.memory_plan import Parts, early_layers
from repvgg.engine.runtime.memory import Images, round_up
from repvgg.engine.winograd.convolution import WinogradFused, WinogradInput, WinogradProduct
from repvgg.engine.winograd.tiling import Tiling, place_floats
from repvgg.errors import UnsupportedError

_ROWS = 8  # of a matrix product at once: images of a linear layer
NOTHING = np.zeros(0, np.float32)


@final
@dataclass(frozen=True)
class Buffer:
    """Feature maps of a whole batch.

    Attributes:
        number: which one it is; layers that are never needed at the same time share one.
        images: how each of its images lies.
        count: of images.
    """

    number: int
    images: Images
    count: int

    @property
    def floats(self) -> int:
        """Its length."""
        return self.count * self.images.image


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One kernel on its buffers.

    Attributes:
        name: of the layer.
        kernel: what it computes.
        source: what it reads; None is the input of the network.
        target: what it writes.
        weights: as the kernel reads them, or a buffer.
        bias: as the kernel reads it.
        block: images that are one image to the kernel, or such parts of images.
        parts: of an image, where a block is not made of images.
        first: image of the batch that it begins with.
        limit: images at most; None for all that follow.
    """

    name: str
    kernel: Kernel
    source: Buffer | None
    target: Buffer
    weights: Floats | Buffer = field(default_factory=lambda: NOTHING)
    bias: Floats = field(default_factory=lambda: NOTHING)
    block: int = 1
    parts: int = 1
    first: int = 0
    limit: int | None = None

    def images(self, batch: int) -> int:
        """How many of a batch it computes."""
        left = max(0, batch - self.first)
        return left if self.limit is None else min(left, self.limit)

    def muls(self, batch: int) -> int:
        """Multiplications on a batch, in whole blocks."""
        return self.kernel.muls * -(-self.images(batch) * self.parts // self.block)


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """All steps of a network on inputs of one size.

    Attributes:
        steps: in their order.
        buffers: all that they read and write, by number.
        isa: the vectors that the kernels are made for.
        flat: whether the output is (N, C) and not (N, C, H, W).
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    isa: Isa
    flat: bool

    @property
    def output(self) -> Buffer:
        """What the last step writes."""
        return self.steps[-1].target


@final
@dataclass(frozen=True)
class Ways:
    """How a plan decides.

    Attributes:
        chooser: says how a convolution is computed.
        packing: makes weights and biases as kernels read them.
        parts: says which layers take a batch in parts.
        copies: of the steps of each convolution, one after the other, with weights of their own; 1 but to measure.
    """

    chooser: Chooser = choose
    packing: Packing = packed
    parts: Parts = early_layers
    copies: int = 1


BY_TABLE = Ways()


def plan(
    layers: Sequence[Layer], input_shape: tuple[int, int, int, int], machine: Machine, ways: Ways = BY_TABLE
) -> Plan:
    """Choose a kernel for each layer, and where its images lie.

    Args:
        layers: see :func:`repvgg.engine.frontend.read`.
        input_shape: the largest batch, channels, height and width.
        machine: the vectors to use, and how many threads.
        ways: how to decide.

    Raises:
        UnsupportedError: a layer does not fit what comes to it; the text names it.
    """
    planner = _Planner(layers, input_shape, machine, ways)
    for number, layer in enumerate(layers):
        planner.take(number, layer)
    return Plan(tuple(planner.steps), tuple(planner.buffers), machine.isa, isinstance(layers[-1], (Pool, Linear)))


@final
class _Planner:
    def __init__(
        self,
        layers: Sequence[Layer],
        input_shape: tuple[int, int, int, int],
        machine: Machine,
        ways: Ways,
    ) -> None:
        self._layers, self._machine, self._batch = layers, machine, input_shape[0]
        self._ways = ways
        self._early, self._few = ways.parts(layers, input_shape)
        self._isa = isa = machine.isa
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        channels, size = input_shape[1], input_shape[2:]
        images = self._images(-1, channels, size, round_up(channels, isa.width))
        if isinstance(layers[0], Conv) and channels < isa.width:  # its taps and channels are few, too
            images = replace(images, pitch=1, planar=True)
        self._now = self._buffer(images, self._count(0))
        self.steps.append(Step("input", LoadKernel(self._now.images, isa.width), None, self._now))

    def take(self, number: int, layer: Layer) -> None:
        """Add the steps of a layer."""
        if isinstance(layer, Conv):
            self._conv(number, layer)
        elif isinstance(layer, Gate):
            self._gate(layer)
        elif isinstance(layer, Pool):
            self._now = self._pooled(layer.name)
        else:
            self._now = self._linear(layer, self._now)

    def _conv(self, number: int, layer: Conv) -> None:
        source, geometry = self._now, layer.geometry
        outputs = layer.weight.shape[0]
        self._expect(layer.name, layer.weight.shape[1] * geometry.groups)
        size = geometry.output_size(source.images.size)
        if min(size) < 1:
            raise UnsupportedError(
                f"{layer.name!r} has nothing to compute on images of {source.images.size[0]}x{source.images.size[1]}: "
                "give larger ones."
            )
        pitch = round_up(outputs, self._isa.width)
        target = self._buffer(self._images(number, outputs, size, pitch), self._count(number + 1))
        choice = self._choice(number, layer, size)
        for _ in range(self._ways.copies):
            if choice is None:
                self._direct(layer, source, target)
            for part in choice.parts if choice else ():
                if part.way == "fused":
                    self._fused(layer, part, source, target)
                else:
                    self._products(layer, part, source, target)
        self._now = target
        if number == self._early - 1:
            firsts = range(0, self._batch, self._few)
            self.steps = [replace(step, first=first, limit=self._few) for first in firsts for step in self.steps]

    def _count(self, number: int) -> int:
        """Images that come to a layer at once."""
        return self._few if number < self._early else self._batch

    def _products(self, layer: Conv, part: Part, source: Buffer, target: Buffer) -> None:
        """Input tiles, and then their products."""
        form, tiling, tile, width = part.form, part.tiling, part.tile, self._isa.width
        images, groups = source.images, layer.geometry.groups
        moved = self._buffer(Images(1, (form.places, place_floats(tiling.tiles, images.pitch)), (0, 0), 1), 1)
        transform = WinogradInput(form, images, layer.geometry.padding, tiling, width)
        self.steps.append(Step(layer.name, transform, source, moved))
        channels = images.channels, images.pitch
        how = part.late, part.room(self._isa.registers), layer.relu, width
        kernel = WinogradProduct(form, groups, *channels, target.images, tiling, tile, *how)
        self.steps.append(Step(layer.name, kernel, moved, target, *self._packed(layer, part), *_cut(tiling)))

    def _fused(self, layer: Conv, part: Part, source: Buffer, target: Buffer) -> None:
        geometry, room = layer.geometry, part.room(self._isa.registers)
        where = geometry.groups, source.images, geometry.padding, target.images
        cut = part.tiling, part.tile, part.splits, part.late
        kernel = WinogradFused(part.form, *where, *cut, room, layer.relu, self._isa.width)
        weights = self._packed(layer, part)
        self.steps.append(Step(layer.name, kernel, source, target, *weights, *_cut(part.tiling)))

    def _packed(self, layer: Conv, part: Part) -> tuple[Floats, Floats]:
        """Weights in Winograd's domain, and biases."""
        return self._ways.packing(layer, self._isa.width, part.tile.vectors, part.form, part.late)

    def _choice(self, number: int, layer: Conv, size: Pair) -> Choice | None:
        """How a layer of this number is computed whose output has this height and width."""
        groups, outputs = layer.geometry.groups, layer.weight.shape[0]
        inputs = layer.weight.shape[1] * groups
        asked = Size(inputs, outputs, size, self._count(number), groups)
        return self._ways.chooser(layer.geometry, asked, self._machine)

    def _direct(self, layer: Conv, source: Buffer, target: Buffer, block: int = 1) -> None:
        geometry, isa = layer.geometry, self._isa
        vectors = -(-target.images.channels // geometry.groups // isa.width)
        tile = choose_tile(isa, target.images.size[1], vectors)
        kernel = ConvKernel(geometry, source.images, target.images, tile, layer.relu, isa.width)
        weights = self._ways.packing(layer, isa.width, tile.vectors, None, False)
        self.steps.append(Step(layer.name, kernel, source, target, *weights, block))

    def _pooled(self, name: str) -> Buffer:
        """The means of each channel, in blocks of images as a matrix product takes them."""
        images = self._now.images
        block = min(self._batch, _ROWS)
        means = self._buffer(Images(images.channels, (1, block), (0, 0), images.pitch), -(-self._batch // block))
        self.steps.append(Step(name, PoolKernel(images, self._isa.width), self._now, means))
        return means

    def _linear(self, layer: Linear, source: Buffer) -> Buffer:
        """A matrix product as a 1x1 convolution of images of one row: the images of a block are its pixels."""
        outputs, inputs = layer.weight.shape
        if source.images.channels != inputs:
            raise UnsupportedError(f"{layer.name!r} takes {inputs} channels, and {source.images.channels} come to it.")
        pitch, block = round_up(outputs, self._isa.width), source.images.size[1]
        target = self._buffer(Images(outputs, (1, block), (0, 0), pitch), source.count, other_than=source)
        conv = Conv(layer.name, layer.weight[:, :, None, None], layer.bias, ConvGeometry((1, 1)), layer.relu)
        self._direct(conv, source, target, block)
        return target

    def _gate(self, layer: Gate) -> None:
        width, images = self._isa.width, self._now.images
        means = self._pooled(layer.name)
        hidden = self._linear(Linear(layer.name, layer.down, layer.down_bias, relu=True), means)
        factors = self._linear(Linear(layer.name, layer.up, layer.up_bias), hidden)
        self._expect(layer.name, factors.images.channels)
        self.steps.append(Step(layer.name, SigmoidKernel(factors.images.pitch, width), factors, factors))
        self.steps.append(Step(layer.name, ScaleKernel(images, layer.relu, width), self._now, self._now, factors))

    def _expect(self, name: str, channels: int) -> None:
        if channels != self._now.images.channels:
            raise UnsupportedError(
                f"{name!r} takes {channels} channels, and {self._now.images.channels} come to it: "
                "give an input_shape of (N, C, H, W) with the C of the network."
            )

    def _images(self, number: int, channels: int, size: Pair, pitch: int) -> Images:
        """The images that a layer makes, with the zeros around them that the next convolution wants.

        Gates in between keep them.
        """
        later = enumerate(self._layers[number + 1 :], number + 1)
        after_this, following = next(((at, layer) for at, layer in later if not isinstance(layer, Gate)), (0, None))
        if not isinstance(following, Conv):
            return Images(channels, size, (0, 0), pitch)
        border, after = following.geometry.padding, following.geometry.output_size(size)
        choice = self._choice(after_this, following, after) if min(after) > 0 else None
        if choice is None:
            return Images(channels, size, border, pitch)
        axes = zip(choice.end, after, following.geometry.stride, strict=True)
        more = [max(0, end - length) * stride for end, length, stride in axes]
        return Images(channels, size, border, pitch, (more[0], more[1]))

    def _buffer(self, images: Images, count: int | None = None, other_than: Buffer | None = None) -> Buffer:
        """A buffer of that very layout that nothing needs any more, or a new one; so borders stay zeros."""
        count = self._batch if count is None else count
        needed = {buffer.number for buffer in (other_than, self._current()) if buffer}
        for buffer in self.buffers:
            if (buffer.images, buffer.count) == (images, count) and buffer.number not in needed:
                return buffer
        self.buffers.append(Buffer(len(self.buffers), images, count))
        return self.buffers[-1]

    def _current(self) -> Buffer | None:
        return self._now if self.steps else None


def _cut(tiling: Tiling) -> tuple[int, int]:
    """Tiles of a block, and of an image."""
    return tiling.piece, tiling.of_image
