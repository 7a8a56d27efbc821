"""Where the one convolution of a region is put, and what code has to change for it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from torch import fx

from repvgg.collapse.capture import Capture
from repvgg.collapse.flat import Flat
from repvgg.collapse.values import Step, Value

Frozen: TypeAlias = Callable[[str], str | None]


@dataclass(frozen=True, eq=False, repr=False)
class Region:
    """Nodes of a flat graph that are one convolution of ``source``; only the last one, ``exit``, is used outside."""

    flat: Flat
    exit: fx.Node
    value: Value

    @property
    def source(self) -> fx.Node:
        """The node whose tensor the region reads."""
        return self.value.source

    @property
    def steps(self) -> tuple[Step, ...]:
        """The nodes, in the order of execution."""
        return self.value.steps

    @property
    def span(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The source, and the first and the last node of the region."""
        return self.source, self.steps[0].node, self.exit

    @property
    def called(self) -> list[str]:
        """The paths of the submodules that the region calls."""
        return [str(step.node.target) for step in self.steps if step.node.op == "call_module"]

    @property
    def is_path(self) -> bool:
        """Whether the region has no branches: each node is a function of the one before, and of constants.

        What only hands a tensor on stays as it is, and may ask others for their shape.
        """
        inside = {self.source, *(step.node for step in self.steps)}
        previous = self.source
        for step in self.steps:
            inputs = [n for n in step.node.all_input_nodes if n in inside]
            if inputs != [previous] and (step.effective or inputs[:1] != [previous]):
                return False
            previous = step.node
        return True

    @property
    def first_convolution(self) -> fx.Node:
        """What the merged convolution takes the place of, where the region is a path: else the source is one."""
        return next((step.node for step in self.steps if "conv" in step.operations), self.source)


@dataclass(frozen=True)
class Placing:
    """How a region is replaced.

    Attributes:
        in_place: the convolution takes the place of the first one of a path and what follows is taken out, each in its
            own module; else one call of it in one forward takes the place of the whole region.
        host: the path of the module whose forward calls the convolution.
        rewritten: paths of the modules that need a new forward, or are written out in that of their caller.
        inlined: those of them that are written out.
    """

    in_place: bool
    host: str
    rewritten: frozenset[str]
    inlined: frozenset[str]


def place(region: Region, frozen: Frozen) -> Placing | str:
    """How ``region`` is replaced, or why it cannot be."""
    placing = _along_path(region) if region.is_path else _at_one_call(region)
    reasons = (frozen(path) for path in sorted(placing.rewritten))
    return next((reason for reason in reasons if reason), None) or _other_flows(region, placing) or placing


def _along_path(region: Region) -> Placing:
    """In place: forwards change only where a function of theirs, not a module they call, is folded."""
    owner = region.flat.owner
    functions = (step.node for step in region.steps if step.node.op != "call_module" and step.effective)
    host = owner(region.first_convolution)
    return Placing(True, host, frozenset(map(owner, functions)), frozenset())


def _at_one_call(region: Region) -> Placing:
    """One call in the innermost forward around all of the region; those within it are written out there."""
    lines = [region.flat.lineage(region.flat.owner(step.node)) for step in region.steps]
    host = next(path for path in lines[0] if all(path in line for line in lines))
    rewritten = frozenset(path for line in lines for path in line[: line.index(host) + 1])
    return Placing(False, host, rewritten, rewritten - {host})


def _other_flows(region: Region, placing: Placing) -> str | None:
    """Why a region in place would change what forwards with optional arguments do for other values of them."""
    owners = {region.flat.owner(step.node) for step in region.steps}
    lines = [region.flat.lineage(path) for path in owners]
    shared = set(lines[0]).intersection(*lines)
    touched = {path for line in lines for path in line if path not in shared} | owners
    touched.add(next(path for path in lines[0] if path in shared))
    for path in sorted(touched):
        captured = region.flat.captures[path]
        if captured.variants and not (owners == {path} and _same_chain(region, captured)):
            return f"the forward around it {captured.more or 'takes optional arguments'}"
    return None


def _same_chain(region: Region, captured: Capture) -> bool:
    """Whether a region of calls is the same chain, or is not there at all, for other values of optional arguments."""
    targets = [region.flat.place[step.node][1].target for step in region.steps]
    if any(step.node.op != "call_module" for step in region.steps):
        return False
    return all(_is_chain(targets, variant.graph) for variant in captured.variants)


def _is_chain(targets: Collection[object], graph: fx.Graph) -> bool:
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target in targets]
    linked = all(b.args == (a,) and not b.kwargs and len(a.users) == 1 for a, b in pairwise(nodes))
    return not nodes or ([node.target for node in nodes] == list(targets) and linked)
