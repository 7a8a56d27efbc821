"""What the graph of a file holds: operators by kind, and the nodes that a plain network does not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import final

_SHOWN = 6  # kinds of operators in a line


@final
@dataclass(frozen=True)
class Operation:
    """A node of a graph.

    Attributes:
        kind: its operator, in the words of the format.
        name: of the node.
        inputs: names of the values that it reads; constants may be left out.
        outputs: names of the values that it writes.
    """

    kind: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]


@final
@dataclass(frozen=True)
class Kinds:
    """The names that a format has for the operators that matter here.

    Attributes:
        norms: batch norms.
        sums: additions of two values.
        shapes: operators whose result depends on the shape of their input only.
    """

    norms: Collection[str]
    sums: Collection[str]
    shapes: Collection[str] = ()


@final
@dataclass(frozen=True)
class Inventory:
    """The operators of a file.

    Attributes:
        operators: number of nodes by operator, the most frequent first.
        norms: batch norms, a phrase each.
        sums: sums of two activations, a phrase each: branches, or residual connections.
        not_delegated: number of nodes by operator that the fast backend of the runtime does not take, where it has one.
    """

    operators: Mapping[str, int]
    norms: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    not_delegated: Mapping[str, int] = field(default_factory=dict)

    @property
    def violations(self) -> tuple[str, ...]:
        """The nodes that a plain network does not have."""
        return self.norms + self.sums

    def __str__(self) -> str:
        shown = [f"{count} {kind}" for kind, count in list(self.operators.items())[:_SHOWN]]
        rest = sum(list(self.operators.values())[_SHOWN:])
        listed = ", ".join([*shown, *([f"{rest} others"] if rest else [])])
        norms = f"{len(self.norms)} batch norms" if len(self.norms) > 1 else "1 batch norm" if self.norms else ""
        sums = (
            f"{len(self.sums)} sums of activations"
            if len(self.sums) > 1
            else "1 sum of activations"
            if self.sums
            else ""
        )
        text = f"{listed}; {norms or 'no batch norm'}, {sums or 'no sum of branches'}"
        if self.not_delegated:
            text += f"; not delegated: {', '.join(f'{count} {kind}' for kind, count in self.not_delegated.items())}"
        return text


def take_inventory(operations: Iterable[Operation], inputs: Iterable[str], kinds: Kinds) -> Inventory:
    """Count operators, and find batch norms and sums of two activations.

    An activation is a value that depends on an input of the graph; adding a constant is no sum of branches.

    Args:
        operations: in the order in which they run.
        inputs: names of the inputs of the graph.
        kinds: the names of the operators.
    """
    activations = set(inputs)
    count: Counter[str] = Counter()
    norms, sums = [], []
    for node in operations:
        count[node.kind] += 1
        read = [name for name in node.inputs if name in activations]
        if read and node.kind not in kinds.shapes:
            activations.update(node.outputs)
        if node.kind in kinds.norms:
            norms.append(f"{node.kind} {node.name} is a batch norm")
        if node.kind in kinds.sums and len(read) > 1:
            sums.append(f"{node.kind} {node.name} sums {' and '.join(read)}")
    return Inventory(MappingProxyType(dict(count.most_common())), tuple(norms), tuple(sums))
