"""Storage and layout of values: which of them replace another one in place, and the border that their readers need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repvgg.engine.codegen.jit import VectorIsa
from repvgg.engine.graph import (
    ADD,
    Binary,
    Conv,
    Elementwise,
    FeatureShape,
    Graph,
    GroupNorm,
    LayerNorm,
    Node,
    Pair,
    Softmax,
)
from repvgg.engine.planner.algorithms import ConvAlgorithm
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up


def share_storage(graph: Graph, shapes: Sequence[FeatureShape]) -> list[int]:
    """Return a number for each value; values of the same number are in the same memory, one after the other.

    The result of an element-wise operation replaces an input that nothing reads later: feature maps are the largest
    values of a network. So does that of a convolution that adds to its second input, which the fusion has checked.
    """
    storage = list(range(len(shapes)))
    last_use = {value: users[-1] for value, users in enumerate(graph.users()) if users}
    last_use |= dict.fromkeys((output.value for output in graph.outputs), len(graph.nodes))
    for index, node in enumerate(graph.nodes):
        value = graph.value_of(index)
        replaced = next(
            (one for one in _replaceable(node) if last_use[one] == index and shapes[one] == shapes[value]), None
        )
        if replaced is not None:
            storage[value] = storage[replaced]
    return storage


def _replaceable(node: Node) -> Sequence[int]:
    match node.op:
        case Elementwise() | Softmax() | LayerNorm() | GroupNorm() | Binary():
            return node.inputs
        case Conv() if ADD in node.op.epilogue:
            return node.inputs[1:]
    return ()


def plan_layouts(
    graph: Graph,
    shapes: Sequence[FeatureShape],
    algorithms: Sequence[ConvAlgorithm | None],
    storage: Sequence[int],
    isa: VectorIsa,
) -> tuple[FeatureMapLayout, ...]:
    """Choose the layout of each value.

    Feature maps are NHWC with whole vectors of channels. The convolutions that read values of the same memory determine
    its border of zeros and the overhang for their tiles.
    """
    borders: dict[int, Pair] = {}
    overhangs: dict[int, Pair] = {}
    for index, (node, algorithm) in enumerate(zip(graph.nodes, algorithms, strict=True)):
        if isinstance(node.op, Conv):
            place = storage[node.inputs[0]]
            borders[place] = _larger(borders.get(place, (0, 0)), node.op.geometry.padding)
            overhang = _overhang(node.op, shapes[graph.value_of(index)], algorithm)
            overhangs[place] = _larger(overhangs.get(place, (0, 0)), overhang)
    layouts = [
        FeatureMapLayout(
            shape.channels,
            shape.size,
            borders.get(place, (0, 0)),
            round_up(shape.channels, isa.width),
            overhangs.get(place, (0, 0)),
        )
        for shape, place in zip(shapes, storage, strict=True)
    ]
    users = graph.users()
    fixed = {output.value for output in graph.outputs} | {one for value, one in enumerate(storage) if one != value}
    for value in range(len(graph.channels)):
        readers = [(graph.nodes[index].op, algorithms[index]) for index in users[value]]
        direct = all(
            isinstance(op, Conv) and not op.is_depthwise and algorithm is None and ADD not in op.epilogue
            for op, algorithm in readers
        )
        if direct and readers and value not in fixed and shapes[value].channels < isa.width:
            # NCHW: with few channels, vectors of the first convolution hold taps and channels together.
            layouts[value] = replace(layouts[value], pixel_stride=1, planar=True)
    return tuple(layouts)


def _overhang(conv: Conv, output: FeatureShape, algorithm: ConvAlgorithm | None) -> Pair:
    if algorithm is None:
        return 0, 0
    axes = zip(algorithm.end, output.size, conv.geometry.stride, conv.geometry.dilation, strict=True)
    below, right = (max(0, end * dilation - length) * stride for end, length, stride, dilation in axes)
    return below, right


def _larger(one: Pair, other: Pair) -> Pair:
    return max(one[0], other[0]), max(one[1], other[1])
