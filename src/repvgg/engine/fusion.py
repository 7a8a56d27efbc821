"""Fusion: batch norms are folded, element-wise operations and additions go to the epilogues of other operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from repvgg.engine.graph import (
    ADD,
    RELU,
    Binary,
    Conv,
    Elementwise,
    FeatureShape,
    Floats,
    Graph,
    MatMul,
    Node,
    Pad,
    Pair,
    infer_shapes,
)

_SCALE_KINDS = ("add", "sub", "mul", "div")


def fuse(graph: Graph, sizes: Sequence[Pair]) -> Graph:
    """Return a graph with fewer passes over memory that computes the same, up to rounding.

    * A factor and a summand for each channel, as of a batch norm, are folded into the convolution before them.
    * An element-wise operation goes to the epilogue of the operation before it.
    * An addition goes to the epilogue of the convolution that computes one of the summands, if nothing else reads the
      other one from there on: the sum replaces it in memory.
    * A symmetric frame of zeros becomes the padding of the convolution that reads it.

    Args:
        graph: of the frontend.
        sizes: (H, W) of each input; all sizes that the graph holds for give the same result.
    """
    return _Fusion(graph, infer_shapes(graph, sizes)).run()


@final
class _Fusion:
    """One pass in execution order. A node that is fused moves to the place of an earlier one, never to a later place.

    So once the other readers of a value are before a node that overwrites it, they stay there.
    """

    def __init__(self, graph: Graph, shapes: Sequence[FeatureShape]) -> None:
        self._graph, self._shapes = graph, shapes
        self._users = graph.users()
        self._returned = {output.value for output in graph.outputs}
        self._nodes: list[Node | None] = list(graph.nodes)
        self._place = list(range(len(graph.nodes)))  # where each node has moved
        # By value of the result: the value of the given graph that it stands for, after all that was fused into it.
        self._last = list(range(len(shapes)))
        self._alias = list(range(len(shapes)))  # by value of the given graph: the value of the result

    def run(self) -> Graph:
        for index, node in enumerate(self._graph.nodes):
            current = replace(node, inputs=tuple(self._alias[value] for value in node.inputs))
            self._nodes[index] = current
            place, fused = self._fused(index, current)
            if fused is None:
                continue
            self._nodes[index], self._nodes[place], self._place[index] = None, fused, place
            value, target = self._graph.value_of(index), self._graph.value_of(place)
            self._alias[value], self._last[target] = target, value
        return self._renumbered()

    def _fused(self, index: int, node: Node) -> tuple[int, Node | None]:
        """Return the place and the node that a node becomes with one before it."""
        first = len(self._graph.channels)
        if isinstance(node.op, Binary) and node.op.kind == "add" and len(node.inputs) == 2:
            producer = max(node.inputs) - first  # the summand that is computed last
            before = self._producer(producer)
            if before is not None and self._may_add(index, node, producer, before):
                assert isinstance(before.op, Conv)
                summed = replace(before.op, epilogue=(*before.op.epilogue, ADD, *node.op.epilogue))
                return producer, replace(before, op=summed, inputs=(*before.inputs, min(node.inputs)))
            return 0, None
        producer = node.inputs[0] - first
        before = self._producer(producer)
        if before is None or len(node.inputs) != 1:
            return 0, None
        if isinstance(before.op, Pad) and isinstance(node.op, Conv):
            padded = _with_padding(before.op, node.op)
            return producer, padded and replace(node, op=padded, inputs=before.inputs)
        op = _with_epilogue(before.op, node.op, self._shapes[self._graph.value_of(index)])
        return producer, op and replace(before, op=op)

    def _producer(self, index: int) -> Node | None:
        """Return the node at a place if a single node reads its value."""
        if index < 0:
            return None
        last = self._last[self._graph.value_of(index)]
        return self._nodes[index] if len(self._users[last]) == 1 and last not in self._returned else None

    def _may_add(self, index: int, node: Node, producer: int, before: Node) -> bool:
        other = min(node.inputs)
        value = self._graph.value_of(producer)
        if not isinstance(before.op, Conv) or ADD in before.op.epilogue or other in (value, *before.inputs):
            return False
        last = self._last[other]
        if last in self._returned or self._shapes[last] != self._shapes[self._last[value]]:
            return False
        return all(self._place[user] < producer for user in self._users[last] if user != index)

    def _renumbered(self) -> Graph:
        first = len(self._graph.channels)
        numbers = {value: value for value in range(first)}
        nodes: list[Node] = []
        for index, node in enumerate(self._nodes):
            if node is not None:
                numbers[first + index] = first + len(nodes)
                nodes.append(replace(node, inputs=tuple(numbers[value] for value in node.inputs)))
        outputs = tuple(replace(one, value=numbers[self._alias[one.value]]) for one in self._graph.outputs)
        return replace(self._graph, nodes=tuple(nodes), outputs=outputs)


def _with_padding(pad: Pad, conv: Conv) -> Conv | None:
    above, below, left, right = pad.pixels
    if (above, left) != (below, right) or pad.channels != (0, 0) or pad.number != 0.0:
        return None
    vertical, horizontal = conv.geometry.padding
    return replace(conv, geometry=replace(conv.geometry, padding=(vertical + above, horizontal + left)))


def _with_epilogue(before: object, after: object, shape: FeatureShape) -> Conv | Binary | Elementwise | MatMul | None:
    """Return the operation that computes ``after`` of the result of ``before``, or None."""
    if isinstance(after, Elementwise) and isinstance(before, (Conv, Binary, Elementwise, MatMul)):
        if after.epilogue == RELU and before.epilogue[-1:] == RELU:
            return before
        return replace(before, epilogue=(*before.epilogue, *after.epilogue))
    if not isinstance(before, Conv):
        return None
    affine = _channel_affine(after, shape.channels)
    if affine is None:
        return None
    scale, shift = affine
    epilogue = after.epilogue if isinstance(after, (Conv, Binary)) else ()
    slopes = after.slopes if isinstance(after, Conv) else None
    if (scale == 1).all() and (shift == 0).all():
        if slopes is not None and before.slopes is not None:
            return None
        slopes = before.slopes if slopes is None else slopes
        return replace(before, epilogue=(*before.epilogue, *epilogue), slopes=slopes)
    if before.epilogue:
        return None
    weight = (before.weight * scale[:, None, None, None]).astype(np.float32)
    bias = (before.bias * scale + shift).astype(np.float32)
    return replace(before, weight=weight, bias=bias, epilogue=epilogue, slopes=slopes)


def _channel_affine(op: object, channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the factor and the summand of each channel, in float64, if an operation has nothing else."""
    if isinstance(op, Conv):
        geometry = op.geometry
        if not op.is_depthwise or geometry.kernel != (1, 1) or geometry.stride != (1, 1) or geometry.padding != (0, 0):
            return None
        return op.weight.ravel().astype(np.float64), op.bias.astype(np.float64)
    if not isinstance(op, Binary) or op.constant is None or op.kind not in _SCALE_KINDS:
        return None
    if op.constant.shape[1:] != (1, 1):
        return None
    given: Floats = op.constant
    constant = np.broadcast_to(given.ravel(), (channels,)).astype(np.float64)
    ones, zeros = np.ones(channels), np.zeros(channels)
    match op.kind:
        case "add":
            return ones, constant
        case "sub":
            return ones, -constant
        case "mul":
            return constant, zeros
        case _:
            return 1 / constant, zeros
