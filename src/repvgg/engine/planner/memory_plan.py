"""Memory planning: how many images pass through a layer at once, how feature maps lie in memory, and which share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import Conv, FeatureShape, Gate, Layer
from repvgg.engine.planner.algorithms import ConvAlgorithm
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up

# Chunking pays where the feature maps of an image are large, and all of the batch together exceed the L3 cache. It
# costs reading the weights once more for each chunk.
_MIN_CHUNKED_FLOATS = 500_000  # input and output of a layer, for one image
_L3_FLOATS = 5_000_000  # feature maps that stay in L3


@final
@dataclass(frozen=True)
class BatchChunks:
    """The first layers, which process the batch chunk after chunk, each chunk through all of them.

    Attributes:
        num_layers: layers that are chunked; 0 for none.
        images: of each chunk. It divides the batch, so that no chunk writes beyond the last image.
    """

    num_layers: int
    images: int

    def images_at(self, layer: int, batch: int) -> int:
        """Images that a layer of this index reads at once."""
        return self.images if layer < self.num_layers else batch


def chunk_batch(layers: Sequence[Layer], shapes: Sequence[FeatureShape], batch: int) -> BatchChunks:
    """Chunk the leading convolutions whose feature maps would evict each other from L3.

    Args:
        layers: of the network.
        shapes: see :func:`repvgg.engine.graph.infer_shapes`.
        batch: images of the largest batch.
    """
    num_layers = largest = 0
    for layer, source, target in zip(layers, shapes[:-1], shapes[1:], strict=True):
        floats = sum(shape.channels * shape.size[0] * shape.size[1] for shape in (source, target))
        if not isinstance(layer, Conv) or floats < _MIN_CHUNKED_FLOATS or batch * floats < _L3_FLOATS:
            break
        num_layers, largest = num_layers + 1, max(largest, floats)
    divisors = (images for images in range(1, batch + 1) if batch % images == 0)
    images = max(count for count in divisors if count == 1 or count * largest <= _L3_FLOATS)
    return BatchChunks(num_layers, images) if num_layers and images < batch else BatchChunks(0, batch)


def plan_layouts(
    layers: Sequence[Layer],
    shapes: Sequence[FeatureShape],
    algorithms: Sequence[ConvAlgorithm | None],
    isa: VectorIsa,
    images_per_block: int,
) -> tuple[FeatureMapLayout, ...]:
    """Choose the layout of the input of every layer, and of the output of the network.

    Feature maps are NHWC with whole vectors of channels, and with the zero border and the overhang of tiles that the
    convolution that reads them needs. A gate works in place, so the next convolution after it decides.
    """
    layouts = []
    flat = False  # from the global pool on
    for index, shape in enumerate(shapes):
        flat = flat or (index > 0 and not isinstance(layers[index - 1], (Conv, Gate)))
        if flat:
            layouts.append(vector_layout(shape.channels, images_per_block, isa.width))
            continue
        layout = FeatureMapLayout(shape.channels, shape.size, (0, 0), round_up(shape.channels, isa.width))
        reader = next((at for at in range(index, len(layers)) if not isinstance(layers[at], Gate)), None)
        if reader is not None:
            layout = _layout_for(layout, layers[reader], shapes[reader + 1], algorithms[reader])
        layouts.append(layout)
    if isinstance(layers[0], Conv) and shapes[0].channels < isa.width:
        # NCHW: with few channels, vectors of the first convolution hold taps and channels together.
        layouts[0] = replace(layouts[0], pixel_stride=1, planar=True)
    return tuple(layouts)


def vector_layout(channels: int, images_per_block: int, width: int) -> FeatureMapLayout:
    """Lay out (N, C): the images of a block are a row of pixels, so a linear layer is a 1x1 convolution."""
    return FeatureMapLayout(channels, (1, images_per_block), (0, 0), round_up(channels, width))


def _layout_for(
    layout: FeatureMapLayout, layer: Layer, output: FeatureShape, algorithm: ConvAlgorithm | None
) -> FeatureMapLayout:
    """Add what ``layer`` reads around the feature maps."""
    if not isinstance(layer, Conv):
        return layout
    overhang = (0, 0)
    if algorithm is not None:
        axes = zip(algorithm.end, output.size, layer.geometry.stride, strict=True)
        below, right = (max(0, end - length) * stride for end, length, stride in axes)
        overhang = (below, right)
    return replace(layout, border=layer.geometry.padding, overhang=overhang)


@final
@dataclass(frozen=True)
class Buffer:
    """Memory for the feature maps of some images.

    Attributes:
        number: identifies it within a plan.
        layout: of each image.
        num_images: that it holds.
    """

    number: int
    layout: FeatureMapLayout
    num_images: int

    @property
    def floats(self) -> int:
        """Its length."""
        return self.num_images * self.layout.image_stride


@final
@dataclass(frozen=True)
class BufferAccess:
    """The buffers that a step reads and the one that it writes."""

    reads: tuple[Buffer, ...]
    writes: Buffer


def share_buffers(accesses: Sequence[BufferAccess]) -> dict[Buffer, Buffer]:
    """Map virtual buffers, one for each value, to as few buffers as their lifetimes allow.

    Only buffers of the very same layout and length share memory, so borders are zeroed once and never written.

    Args:
        accesses: of all steps, in the order in which they run.
    """
    last_use = {
        buffer: position
        for position, access in enumerate(accesses)
        for buffer in (*access.reads, access.writes)  # later positions overwrite earlier ones
    }
    shared: dict[Buffer, Buffer] = {}
    busy_until: dict[Buffer, int] = {}
    for position, access in enumerate(accesses):
        value = access.writes
        if value in shared:  # written in place, or by several steps
            continue
        free = (one for one, end in busy_until.items() if end < position)
        fitting = (one for one in free if (one.layout, one.num_images) == (value.layout, value.num_images))
        buffer = next(fitting, None) or Buffer(len(busy_until), value.layout, value.num_images)
        shared[value], busy_until[buffer] = buffer, last_use[value]
    return shared
