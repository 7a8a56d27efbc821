"""The planner's passes in their order, from a graph to a plan: kernels with packed weights, on buffers.

The values between them::

    infer_shapes     graph, input shapes   -> the shape of each value (in ``graph.py``)
    chunk_batch      shapes                -> how many images pass through each layer at once
    conv_problems    shapes, chunks        -> a problem for each convolution
    select           problem, target       -> an algorithm (in ``cost_model.py`` or ``autotune.py``)
    share_storage    lifetimes of values   -> which values replace another one in place (in ``layouts.py``)
    plan_layouts     shapes, algorithms    -> the memory layout of each value (in ``layouts.py``)
    lower            layouts, algorithms   -> steps on virtual buffers (in ``lowering.py``)
    plan_memory      lifetimes of buffers  -> their offsets in one arena (in ``memory_plan.py``)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import Conv, FeatureShape, Graph, Shape, infer_shapes
from repvgg.engine.kernels.base import PackWeights, pack_weights
from repvgg.engine.kernels.border import BorderKernel
from repvgg.engine.planner.algorithms import ConvAlgorithm, ConvProblem, Selector, Target
from repvgg.engine.planner.cost_model import select_algorithm
from repvgg.engine.planner.layouts import plan_layouts, share_storage
from repvgg.engine.planner.lowering import LINEAR_BLOCK_IMAGES, Lowering
from repvgg.engine.planner.memory_plan import BufferAccess, MemoryPlan, plan_memory
from repvgg.engine.planner.steps import Buffer, OutputBuffer, Plan, Step
from repvgg.engine.runtime.memory import round_up
from repvgg.engine.winograd.convolution import WinogradInputTransform

# Chunking pays where the feature maps of an image are large, and those of the whole batch exceed the L3 cache. It costs
# reading the weights once more for each chunk.
_MIN_CHUNKED_FLOATS = 500_000  # input and output of a layer, for one image
_L3_FLOATS = 5_000_000  # feature maps that stay in L3


# The passes


def plan(graph: Graph, input_shapes: Sequence[Shape], target: Target, select: Selector = select_algorithm) -> Plan:
    """Run all passes.

    Args:
        graph: see :func:`repvgg.engine.frontend.read`.
        input_shapes: (N, C, H, W) of each input, where N is the largest batch.
        target: the instruction set, threads and precision to plan for.
        select: selects the algorithm of each convolution.

    Raises:
        UnsupportedError: an operation does not fit its input; the message names it.
    """
    batch = input_shapes[0][0]
    shapes = infer_shapes(graph, [(height, width) for _, _, height, width in input_shapes])
    chunks = chunk_batch(graph, shapes, batch)
    problems = conv_problems(graph, shapes, chunks, batch)
    algorithms = [select(problem, target) if problem else None for problem in problems]
    return assemble(graph, input_shapes, shapes, chunks, algorithms, target.isa)


def conv_problems(
    graph: Graph, shapes: Sequence[FeatureShape], chunks: BatchChunks, batch: int
) -> list[ConvProblem | None]:
    """Return what the algorithm of each node depends on; None for those without a choice."""
    problems: list[ConvProblem | None] = []
    for index, node in enumerate(graph.nodes):
        source, target = shapes[node.inputs[0]], shapes[graph.value_of(index)]
        has_choice = isinstance(node.op, Conv) and not node.op.is_depthwise
        images = chunks.images_at(index, batch)
        problems.append(
            ConvProblem(node.op.geometry, source.channels, target.channels, target.size, images)
            if isinstance(node.op, Conv) and has_choice
            else None
        )
    return problems


def assemble(
    graph: Graph,
    input_shapes: Sequence[Shape],
    shapes: Sequence[FeatureShape],
    chunks: BatchChunks,
    algorithms: Sequence[ConvAlgorithm | None],
    isa: VectorIsa,
    pack: PackWeights = pack_weights,
    repeats: int = 1,
) -> Plan:
    """Run the passes that follow the selection of algorithms.

    Args:
        graph: the network.
        input_shapes: (N, C, H, W) of each input, where N is the largest batch.
        shapes: see :func:`repvgg.engine.graph.infer_shapes`.
        chunks: see :func:`chunk_batch`.
        algorithms: of each node; None for the direct kernel, and for nodes that are no convolutions.
        isa: the vector instructions.
        pack: packs weights and biases in the order in which kernels read them.
        repeats: copies of the steps of each convolution, each with separate weights; more than 1 for autotuning.
    """
    batch = input_shapes[0][0]
    storage = share_storage(graph, shapes)
    layouts = plan_layouts(graph, shapes, algorithms, storage, isa)
    buffers: dict[int, Buffer] = {}
    for value, layout in enumerate(layouts):
        images = chunks.images_at(value, batch) if value <= chunks.num_layers else batch
        if layout.size == (1, 1):  # linear layers process whole blocks of images
            images = round_up(images, min(images, LINEAR_BLOCK_IMAGES))
        buffers.setdefault(storage[value], Buffer(len(layouts) + storage[value], layout, images))
    values = [buffers[storage[value]] for value in range(len(layouts))]
    lowering = Lowering(isa, pack, batch, values)
    for number in range(len(graph.channels)):
        lowering.load(number)
    num_chunked = 0
    for index, node in enumerate(graph.nodes):
        for _ in range(repeats):
            lowering.lower(node, graph.value_of(index), algorithms[index])
        if index + 1 == chunks.num_layers:
            num_chunked = len(lowering.steps)
    # Before the steps are repeated for each chunk: every value of a chunk is dead when the next chunk begins.
    returned = [values[output.value] for output in graph.outputs]
    steps, num_chunked, memory = _placed(lowering.steps, num_chunked, returned, isa.width)
    chunked = [
        replace(step, first_image=start, max_images=chunks.images)
        for start in range(0, batch, chunks.images)
        for step in steps[:num_chunked]
    ]
    outputs = tuple(OutputBuffer(memory.placed[values[output.value]], output) for output in graph.outputs)
    real = tuple(dict.fromkeys(memory.placed.values()))
    everything = *chunked, *steps[num_chunked:]
    return Plan(tuple(input_shapes), everything, real, isa, outputs, memory.floats, memory.largest_live_set)


# Batch chunks


@final
@dataclass(frozen=True)
class BatchChunks:
    """Division of the batch for the first layers: each chunk passes through all of them before the next one."""

    num_layers: int  # layers that are chunked; 0 for none
    images: int  # in a chunk; a divisor of the batch, so that no chunk writes beyond the last image

    def images_at(self, layer: int, batch: int) -> int:
        """Return how many images the layer of this index reads at once."""
        return self.images if layer < self.num_layers else batch


def chunk_batch(graph: Graph, shapes: Sequence[FeatureShape], batch: int) -> BatchChunks:
    """Chunk the leading chain of convolutions whose feature maps would evict each other from L3."""
    num_layers = largest = 0
    users, returned = graph.users(), {output.value for output in graph.outputs}
    nodes = graph.nodes if len(graph.channels) == 1 else ()
    for index, node in enumerate(nodes):
        in_chain = isinstance(node.op, Conv) and node.inputs == (index,) and users[index] == [index]
        floats = sum(math.prod(shape.axes) for shape in shapes[index : index + 2])
        if not in_chain or index in returned or floats < _MIN_CHUNKED_FLOATS or batch * floats < _L3_FLOATS:
            break
        num_layers, largest = num_layers + 1, max(largest, floats)
    divisors = (images for images in range(1, batch + 1) if batch % images == 0)
    images = max(count for count in divisors if count == 1 or count * largest <= _L3_FLOATS)
    return BatchChunks(num_layers, images) if num_layers and images < batch else BatchChunks(0, batch)


# Memory


def _placed(
    steps: Sequence[Step], num_chunked: int, returned: Sequence[Buffer], width: int
) -> tuple[tuple[Step, ...], int, MemoryPlan]:
    """Replace virtual buffers by those of an arena, and zero borders that another buffer has overwritten.

    Returns:
        The steps, how many of them are repeated for each chunk of the batch, and the plan of the arena.
    """
    accesses = []
    inputs: dict[Buffer, Buffer] = {}  # transformed tiles -> the feature maps that they come from
    for step in steps:
        reads = [buffer for buffer in (step.source, step.weights) if isinstance(buffer, Buffer)]
        if step.source in inputs:
            # A staged layer could overwrite its input once all tiles are transformed. It does not, so that both
            # schedules need the same buffers.
            reads.append(inputs[step.source])
        if isinstance(step.kernel, WinogradInputTransform) and step.source is not None:
            inputs[step.target] = step.source
        accesses.append(BufferAccess(tuple(reads), step.target))
    memory = plan_memory(accesses, num_chunked, returned)
    placed = memory.placed
    replaced: list[Step] = []
    first_after = num_chunked
    for number, (step, cleared) in enumerate(zip(steps, memory.cleared, strict=True)):
        # A step without a source reads an input of the network, so these name their target instead.
        replaced += (Step(step.name, BorderKernel(one.layout, width), one, one) for one in cleared)
        first_after += len(cleared) if number < num_chunked else 0
        replaced.append(
            replace(
                step,
                source=step.source and placed[step.source],
                target=placed[step.target],
                weights=placed[step.weights] if isinstance(step.weights, Buffer) else step.weights,
            )
        )
    return tuple(replaced), first_after, memory
