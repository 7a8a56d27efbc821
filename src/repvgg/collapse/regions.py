"""The linear regions of one captured graph: where they end, where they are cut, and whether merging them pays."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx, nn

from repvgg.collapse.capture import Capture
from repvgg.collapse.cost import Cost
from repvgg.collapse.values import Step, Value, Values

_IN_PLACE_FUNCTIONS = ("iadd", "isub", "imul", "itruediv", "setitem")


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes of a graph that are one convolution of ``source``; only the last one, ``exit``, is used outside."""

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
    def is_chain(self) -> bool:
        """Whether the region is a chain of submodules, each called on the outcome of the one before and on no more."""
        previous = self.source
        for step in self.steps:
            if step.node.op != "call_module" or step.node.args != (previous,) or step.node.kwargs:
                return False
            previous = step.node
        return True


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions worth replacing, and for other nodes the reason why they are in none."""

    found: tuple[Region, ...]
    reasons: dict[fx.Node, str]


def find_regions(module: nn.Module, captured: Capture, opaque: Collection[str], merge_branches: bool) -> Regions:
    """The maximal linear regions that are worth replacing by one convolution each.

    A region ends where something non-linear, or something with another input, reads its outcome. It is cut where two
    regions would share a node, and where merging would cost more multiply-adds than its parts do.
    """
    cuts: set[fx.Node] = set()
    reasons: dict[fx.Node, str] = {}
    while True:
        values = Values(captured, opaque, cuts, merge_branches)
        exits = [node for node in values.of if not all(_continues(values, node, user) for user in node.users)]
        more = _shared(values, exits, reasons) or _too_dear(values, exits, reasons)
        if not more - cuts:
            break
        cuts |= more
    regions = [Region(node, values.of[node]) for node in exits if _is_worth_it(values.of[node])]
    found = tuple(region for region in regions if _pays(region.value) and not _disturbed(module, region, reasons))
    return Regions(found, {**values.reasons, **reasons})


def _continues(values: Values, node: fx.Node, user: fx.Node) -> bool:
    return user in values.of and any(step.node is node for step in values.of[user].steps)


def _shared(values: Values, exits: list[fx.Node], reasons: dict[fx.Node, str]) -> set[fx.Node]:
    """The last node that more than one region needs: all but one of its uses have to read it as a tensor."""
    owners: dict[fx.Node, int] = {}
    for end in exits:
        for step in values.of[end].steps:
            owners[step.node] = owners.get(step.node, 0) + 1
    shared = [node for node in values.of if owners.get(node, 0) > 1]
    if not shared:
        return set()
    for user in shared[-1].users:
        reasons[user] = "the outcome of what is in front of it is used elsewhere too"
    return {shared[-1]}


def _too_dear(values: Values, exits: list[fx.Node], reasons: dict[fx.Node, str]) -> set[fx.Node]:
    """The inputs of the node, in a region that does not pay, at which merging loses most."""
    for end in exits:
        value = values.of[end]
        if not _is_worth_it(value) or _pays(value):
            continue
        step = max(value.steps, key=lambda step: _loss(values, step))
        inputs = {n for n in step.node.all_input_nodes if n in values.of and _continues(values, n, step.node)}
        if inputs and _loss(values, step) > 0:
            after, before = Cost.of_map(value.symbol.map), value.cost
            times = f"{after.multiply_adds / before.multiply_adds:.2g} times the multiply-adds"
            reasons[step.node] = (
                f"merging it would cost {times} and {after.weights:,} instead of {before.weights:,} weights"
            )
            return inputs
    return set()


def _loss(values: Values, step: Step) -> float:
    """How much dearer this step's merging with its inputs makes them: the larger of the two relative increases."""
    inputs = [values.of[n] for n in step.node.all_input_nodes if _continues(values, n, step.node)]
    apart = sum((Cost.of_map(value.symbol.map) for value in inputs), step.cost)
    merged = Cost.of_map(values.of[step.node].symbol.map)
    more = merged - apart
    return max(more.multiply_adds / max(apart.multiply_adds, 1), more.weights / max(apart.weights, 1))


def _is_worth_it(value: Value) -> bool:
    """At least one convolution and at least one more thing to fold, at this level of the module tree."""
    convolutions = any("conv" in step.operations for step in value.steps)
    return convolutions and sum(step.effective for step in value.steps) >= 2


def _pays(value: Value) -> bool:
    return Cost.of_map(value.symbol.map).pays_for(value.cost)


def _disturbed(module: nn.Module, region: Region, reasons: dict[fx.Node, str]) -> bool:
    """Whether the tensor that the region reads may be changed in place between its first and its last reading."""
    inside = {step.node for step in region.steps}
    aliases = {region.source, *(user for user in region.source.users if user not in inside)}
    nodes = list(region.exit.graph.nodes)
    between = nodes[nodes.index(region.steps[0].node) : nodes.index(region.exit)]
    for node in between:
        if node not in inside and aliases.intersection(node.all_input_nodes) and _may_write(module, node):
            reasons[region.exit] = f"{node.name!r} may change the input in place while the branches read it"
            return True
    return False


def _may_write(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        parts = module.get_submodule(str(node.target)).modules()
        return any(getattr(part, "inplace", False) for part in parts)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE_FUNCTIONS or bool(node.kwargs.get("inplace"))
