"""What a graph of ONNX nodes holds, read off the protobuf itself."""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType
from typing import Any

_SHAPES_ONLY = {"Shape", "Size"}  # what they give depends on the shape of their input, not on its values
_SUMS = {"Add", "Sum"}


def operators(graph: Any) -> MappingProxyType[str, int]:
    """How many nodes of each type a graph has, the most frequent first."""
    return MappingProxyType(dict(Counter(node.op_type for node in graph.node).most_common()))


def plain_violations(graph: Any) -> tuple[str, ...]:
    """The nodes that a plain network does not have, each as a short text; empty for a plain one.

    These are batch norms, and sums of two activations, that is of two values that both depend on the input of the
    graph; adding a constant is fine. Nodes in subgraphs (loops, conditions) are not looked at.
    """
    activations = {value.name for value in graph.input} - {value.name for value in graph.initializer}
    found = []
    for node in graph.node:
        inputs = [name for name in node.input if name in activations]
        if inputs and node.op_type not in _SHAPES_ONLY:
            activations.update(node.output)
        if node.op_type == "BatchNormalization":
            found.append(f"{_name(node)} is a batch norm")
        if node.op_type in _SUMS and len(inputs) > 1:
            found.append(f"{_name(node)} sums {' and '.join(inputs)}")
    return tuple(found)


def _name(node: Any) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"
