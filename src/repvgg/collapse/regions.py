"""The linear regions of one captured graph: where they end, where they are cut, and whether merging them pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.collapse.capture import Capture
from repvgg.collapse.cost import Cost
from repvgg.collapse.memory import Memory
from repvgg.collapse.values import Step, Value, Values
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import Source, SymbolicTensor, guarded


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
    def span(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The source, and the first and the last node of the region."""
        return self.source, self.steps[0].node, self.exit

    def modules(self, owner: nn.Module) -> list[nn.Module]:
        """The submodules of ``owner`` that the region calls."""
        targets = (str(step.node.target) for step in self.steps if step.node.op == "call_module")
        return [owner.get_submodule(target) for target in targets]

    def holds_in(self, graph: fx.Graph) -> bool:
        """Whether a chain is the same chain in another graph of the same module, or is not called there at all."""
        targets = [step.node.target for step in self.steps]
        nodes = [node for node in graph.nodes if node.op == "call_module" and node.target in targets]
        linked = all(b.args == (a,) and not b.kwargs and len(a.users) == 1 for a, b in pairwise(nodes))
        return not nodes or ([node.target for node in nodes] == targets and linked)

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
    """The regions worth replacing, for other nodes the reason why they are in none, and the channels of the inputs."""

    found: tuple[Region, ...]
    reasons: dict[fx.Node, str]
    channels: tuple[int | None, ...] = ()


def find_regions(
    captured: Capture, memory_of: Callable[[], Memory], opaque: Mapping[str, str], merge_branches: bool
) -> Regions:
    """The maximal linear regions that are worth replacing by one convolution each.

    A region ends where something non-linear, or something with another input, reads its outcome. It is cut where two
    regions would share a node, and where merging would cost more multiply-adds than its parts do.

    Args:
        captured: the graph to look at.
        memory_of: which of its nodes share memory. It is asked only if there are regions but for that: finding out
            means to look into everything that the graph calls.
        opaque: submodules that have to stay, and why.
        merge_branches: whether branches may be merged, or only chains.
    """
    if not _has_neighbours(captured):
        return Regions((), {})
    regions = _search(captured, Memory.of_values(), opaque, merge_branches)
    return _search(captured, memory_of(), opaque, merge_branches) if regions.found else regions


def _search(captured: Capture, memory: Memory, opaque: Mapping[str, str], merge_branches: bool) -> Regions:
    cuts: set[fx.Node] = {*captured.escaped, *memory.torn}
    reasons = dict.fromkeys(memory.torn, "its memory is changed in place")
    reasons |= dict.fromkeys(captured.escaped, "its outcome is kept for others to read")
    while True:
        values = Values(captured, memory, opaque, cuts, merge_branches)
        exits = [node for node in values.of if not _is_inside(values, node)]
        more = _shared(values, exits, reasons) or _too_dear(values, exits, reasons)
        more = more or _disturbed(values, memory, exits, reasons)
        if not more - cuts:
            break
        cuts |= more
    found = [Region(node, values.of[node]) for node in exits if _is_worth_it(values.of[node])]
    found = [region for region in found if _pays(region.value) and memory.change_between(*region.span) is None]
    channels = () if all(region.is_chain for region in found) else tuple(values.channels_of_inputs())
    return Regions(tuple(found), _passed_on(values, {**values.reasons, **reasons}), channels)


def _has_neighbours(captured: Capture) -> bool:
    """Whether two nodes that may be linear follow each other, as those of any region do. It costs little to ask.

    Where a batch norm is called the answer is yes: if it stays, somebody will want to know why.
    """
    if any(isinstance(captured.root.get_submodule(path), _BatchNorm) for path in captured.calls):
        return True
    calls = (node for node in captured.graph.nodes if node.op.startswith("call"))
    linear = {node for node in calls if node.op != "call_module" or _may_be_linear(captured, str(node.target))}
    return any(before in linear for node in linear for before in node.all_input_nodes)


def _may_be_linear(captured: Capture, target: str) -> bool:
    """False for torch's own activations and the like: modules without tensors that are linear for no input."""
    part = captured.root.get_submodule(target)
    own = type(part).__module__.startswith("torch.nn.modules.") and not any(part.children())
    if not own or part._parameters or part._buffers:
        return True
    try:
        guarded(part.forward, SymbolicTensor.of(Source(), 1, device="meta"))
    except NotLinearError:
        return False
    except ReparamError:
        return True
    return True


def _passed_on(values: Values, reasons: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """The reasons, and for nodes without one that of what is in front of them or behind."""
    passed: dict[fx.Node, str] = {}
    for node, value in values.of.items():
        behind = next((user for user in node.users if user in reasons), None)
        if value.source in reasons:
            passed[node] = f"{_named(value.source)!r} in front of it stays: {reasons[value.source]}"
        elif behind is not None:
            passed[node] = f"{_named(behind)!r} behind it does not take it in: {reasons[behind]}"
    return passed | reasons


def _named(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "placeholder") else node.name


def _is_inside(values: Values, node: fx.Node) -> bool:
    """Whether a node is used, and all that use it are in one region with it."""
    return bool(node.users) and all(_continues(values, node, user) for user in node.users)


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


def _disturbed(values: Values, memory: Memory, exits: list[fx.Node], reasons: dict[fx.Node, str]) -> set[fx.Node]:
    """The inputs of the exit of a region whose source may be changed in place between its first and last reading."""
    for end in exits:
        value = values.of[end]
        write = memory.change_between(*Region(end, value).span)
        inputs = {n for n in end.all_input_nodes if n in values.of and _continues(values, n, end)}
        if inputs and write is not None and _is_worth_it(value):
            reasons[end] = f"{write.name!r} may change the input in place while the branches read it"
            return inputs
    return set()
