"""What the planner produces: buffers, steps on them, and the plan of a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np

from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import Floats, Output, Shape
from repvgg.engine.kernels.base import Kernel
from repvgg.engine.runtime.memory import FeatureMapLayout

NO_WEIGHTS = np.zeros(0, np.float32)


@final
@dataclass(frozen=True)
class Buffer:
    """Memory for feature maps: ``number`` identifies it within a plan, ``layout`` is that of each image.

    ``offset`` is where it begins in the arena of the plan, in floats.
    """

    number: int
    layout: FeatureMapLayout
    num_images: int
    offset: int = 0

    @property
    def floats(self) -> int:
        return self.num_images * self.layout.image_stride


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One kernel on its buffers.

    The kernel works on blocks. A block holds ``items_per_block`` items; an item is an image, or a tile of an image.

    Attributes:
        name: of the layer.
        kernel: what it computes.
        source: what it reads; None is an input of the network.
        target: what it writes.
        weights: packed for the kernel, or a buffer, the second operand.
        bias: packed for the kernel.
        items_per_block: see above.
        items_per_image: 1, or the tiles of an image.
        first_image: the first image of the batch that it processes.
        max_images: how many it processes at most; None for all from the first.
        input: number of the input that it reads if ``source`` is None.
    """

    name: str
    kernel: Kernel
    source: Buffer | None
    target: Buffer
    weights: Floats | Buffer = field(default_factory=lambda: NO_WEIGHTS)
    bias: Floats = field(default_factory=lambda: NO_WEIGHTS)
    items_per_block: int = 1
    items_per_image: int = 1
    first_image: int = 0
    max_images: int | None = None
    input: int = 0

    def num_images(self, batch: int) -> int:
        left = max(0, batch - self.first_image)
        return left if self.max_images is None else min(left, self.max_images)

    def offset_in(self, buffer: Buffer) -> int:
        """Return the floats from the begin of a buffer to the first image that the step reads or writes there."""
        # A buffer that holds one chunk of the batch begins with the first image of the step.
        holds_batch = self.max_images is not None and buffer.num_images > self.max_images
        return self.first_image * buffer.layout.image_stride if holds_batch else 0

    def num_multiplies(self, batch: int) -> int:
        """Count its multiplications on a batch, in whole blocks."""
        return self.kernel.num_multiplies * -(-self.num_images(batch) * self.items_per_image // self.items_per_block)


@final
@dataclass(frozen=True)
class OutputBuffer:
    """A tensor that the network returns, and the buffer that holds it."""

    buffer: Buffer
    tensor: Output


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """All steps of a network for inputs of one size."""

    input_shapes: tuple[Shape, ...]  # (N, C, H, W) of each input, where N is the largest batch
    steps: tuple[Step, ...]  # in execution order
    buffers: tuple[Buffer, ...]  # all that the steps read and write, by number
    isa: VectorIsa  # the vector instructions that the kernels use
    outputs: tuple[OutputBuffer, ...]  # the tensors that the network returns
    memory_floats: int = 0  # the arena that holds all buffers; those of other lifetimes overlap
    largest_live_set: int = 0  # floats of the buffers that live at the same time, at most: a lower bound
