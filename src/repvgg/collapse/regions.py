"""The linear regions of one flat graph: where they end, where they are cut, and whether merging them pays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.collapse.alias import Memory
from repvgg.collapse.capture import Capture, is_leaf
from repvgg.collapse.cost import Cost, Policy
from repvgg.collapse.inline import Flat
from repvgg.collapse.symbolic_eval import Expected, Linear, Shapes, Step, Value, Values, is_scaling, transposed_at
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import Source, SymbolicTensor, guarded

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


def asks_what_stays(node: fx.Node) -> bool:
    """Whether a node asks a tensor for what is the same at both ends of a linear region: its rank, dtype or device."""
    if node.op == "call_method":
        return node.target in ("dim", "ndimension") and len(node.args) == 1
    return node.target is getattr and node.args[1] in ("ndim", "dtype", "device")


def has_neighbours(flat: Flat) -> bool:
    """Whether two nodes that may be linear follow each other, as those of any region do. It costs little to ask.

    Where a batch norm is called the answer is yes: if it stays, somebody will want to know why. So it is where a module
    of another kind is one node, as it is more than one operation.
    """
    parts = {target: flat.module.get_submodule(target) for _, target in flat.calls()}
    if any(isinstance(part, _BatchNorm) or not is_leaf(part) for part in parts.values()):
        return True
    calls = (node for node in flat.graph.nodes if node.op.startswith("call"))
    linear = {node for node in calls if node.op != "call_module" or _may_be_linear(parts[str(node.target)])}
    return any(before in linear for node in linear for before in node.all_input_nodes)


def _may_be_linear(part: nn.Module) -> bool:
    """False for torch's own activations and the like: modules without tensors that are linear for no input."""
    if not is_leaf(part) or part._parameters or part._buffers:
        return True
    try:
        guarded(part.forward, SymbolicTensor.of(Source(), 1, device="meta"))
    except NotLinearError:
        return False
    except ReparamError:
        return True
    return True


@dataclass(frozen=True)
class Rules:
    """What a search is bound by.

    Attributes:
        opaque: submodules that have to stay, by their path below the unit, and why.
        frozen: why the forward of the module at a path may not be rewritten, or None.
        merge_branches: whether branches may be merged, or only chains.
        policy: whether a merged convolution pays.
        shapes: of the tensors in the graph, as far as they are known.
        linear: the convolution that the submodule at a path is as a whole, if it is one and that was found out.
        at_these_sizes: whether the shapes are those that costs are to be told for.
    """

    opaque: Mapping[str, str]
    frozen: Frozen
    merge_branches: bool
    policy: Policy
    shapes: Shapes
    linear: Linear
    at_these_sizes: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Regions:
    """The regions worth replacing, each with its place, and for other nodes the reason why they are in none.

    Attributes:
        scaled: regions that scale and shift what a transposed convolution puts out.
        expected: the channels and the layout of the tensor of a node, or None where its functions do not tell.
        were_cut: whether regions were cut, so that a search over the outcome may find more.
    """

    found: tuple[tuple[Region, Placing], ...]
    reasons: dict[fx.Node, str]
    scaled: tuple[tuple[Region, Placing], ...] = ()
    expected: Callable[[fx.Node], Expected | None] = lambda _: None
    were_cut: bool = False


def find_regions(flat: Flat, memory_of: Callable[[], Memory], rules: Rules) -> Regions:
    """The maximal linear regions that are worth replacing by one convolution each.

    A region ends where something non-linear, or something with another input, reads its outcome. It is cut where two
    regions would share a node, where merging does not pay, and where the code that it stands in cannot be rewritten.

    Args:
        flat: the graph to look at.
        memory_of: which of its nodes share memory. It is asked only if there are regions but for that: finding out
            means to look into everything that the graph calls.
        rules: what the search is bound by.
    """
    if not has_neighbours(flat):
        return Regions((), {})
    regions = _search(flat, Memory.of_values(), rules)
    found = (*regions.found, *regions.scaled)
    if not found:
        return regions
    memory = memory_of()
    calm = not memory.unsafe and all(memory.change_between(*region.span) is None for region, _ in found)
    return regions if calm else replace(_search(flat, memory, rules), were_cut=True)


def _search(flat: Flat, memory: Memory, rules: Rules) -> Regions:
    search = _Search(flat, memory, rules)
    while search.cut():
        pass
    return search.outcome()


class _Search:
    """One search: values over a growing set of cuts, until nothing more has to be cut."""

    def __init__(self, flat: Flat, memory: Memory, rules: Rules) -> None:
        self.flat, self.memory, self.rules = flat, memory, rules
        escaped = flat.escaped
        self.cuts: set[fx.Node] = {*escaped, *memory.torn}
        self.reasons = dict.fromkeys(memory.torn, "its memory is changed in place")
        self.reasons |= dict.fromkeys(escaped, "its outcome is kept for others to read")
        self.were_cut = False
        self._evaluate()

    def _evaluate(self) -> None:
        of = self.rules
        told = (of.merge_branches, of.shapes, of.linear, of.at_these_sizes)
        self.values = Values(self.flat, self.memory, of.opaque, self.cuts, *told)
        self.exits = [node for node in self.values.of if not self._is_inside(node)]

    def cut(self) -> bool:
        """Cut wherever there is an obstacle, and tell whether there was any; one for each source, as cuts add up."""
        by_source: dict[fx.Node, list[fx.Node]] = {}
        for node in self.exits:
            by_source.setdefault(self.values.of[node].source, []).append(node)
        more = set().union(*map(self._obstacle, by_source.values())) - self.cuts
        if more:
            self.cuts |= more
            self.were_cut = True
            self._evaluate()
        return bool(more)

    def _obstacle(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Where to cut the regions of one source, those that end at ``exits``, next."""
        for obstacle in (self._shared, self._too_dear, self._disturbed, self._misplaced):
            more = obstacle(exits)
            if more - self.cuts:
                return more
        return set()

    def outcome(self) -> Regions:
        """The regions that remain."""
        regions = [region for region in map(self._region, self.exits) if self._undisturbed(region)]
        worth = [region for region in regions if self._is_worth_it(region.value) and self._pays(region.value)]
        found, scaled = self._placed(worth), self._placed(filter(self._is_scaling, regions))
        reasons = _passed_on(self.values, {*self.cuts, *self.reasons}, {**self.values.reasons, **self.reasons})
        return Regions(found, reasons, scaled, self.values.expected, self.were_cut)

    def _placed(self, regions: Iterable[Region]) -> tuple[tuple[Region, Placing], ...]:
        placed = ((region, place(region, self.rules.frozen)) for region in regions)
        return tuple((region, placing) for region, placing in placed if isinstance(placing, Placing))

    def _is_scaling(self, region: Region) -> bool:
        """Whether all that a region does is to scale and shift the outcome of a transposed convolution of its own."""
        source, value = region.source, region.value
        users = [user for user in source.users if not asks_what_stays(user)]
        alone = source not in self.values.left and source not in self.cuts and users == [value.steps[0].node]
        return (
            alone
            and region.is_path
            and transposed_at(self.flat, source) is not None
            and is_scaling(value.symbol.map)
            and any(step.effective for step in value.steps)
        )

    def _region(self, node: fx.Node) -> Region:
        return Region(self.flat, node, self.values.of[node])

    def _is_inside(self, node: fx.Node) -> bool:
        """Whether a node is used, and all that use it are in one region with it, or ask for what never changes."""
        users = [user for user in node.users if not asks_what_stays(user)]
        return bool(users) and all(self._continues(node, user) for user in users)

    def _continues(self, node: fx.Node, user: fx.Node) -> bool:
        of = self.values.of
        return user in of and any(step.node is node for step in of[user].steps)

    def _inputs(self, node: fx.Node) -> set[fx.Node]:
        """The arguments of a node that are in one region with it."""
        return {n for n in node.all_input_nodes if n in self.values.of and self._continues(n, node)}

    def _shared(self, exits: list[fx.Node]) -> set[fx.Node]:
        """The last node that more than one region needs: all but one of its uses have to read it as a tensor."""
        owners: dict[fx.Node, int] = {}
        for end in exits:
            for step in self.values.of[end].steps:
                owners[step.node] = owners.get(step.node, 0) + 1
        shared = [node for node, count in owners.items() if count > 1]
        if not shared:
            return set()
        last = max(shared, key=self.values.place.__getitem__)
        for user in last.users:
            self.reasons[user] = "the outcome of what is in front of it is used elsewhere too"
        return {last}

    def _too_dear(self, exits: list[fx.Node]) -> set[fx.Node]:
        """The inputs of the node, in a region that does not pay, at which merging loses most."""
        for end in exits:
            value = self.values.of[end]
            if not self._is_worth_it(value) or self._pays(value):
                continue
            joining = [step for step in value.steps if self._inputs(step.node)]
            if not joining:
                continue
            step = max(joining, key=self._loss)
            if self._loss(step) > 0 or not self.rules.policy.is_cheaper:
                after, before = Cost.of_symbol(value.symbol), value.cost
                times = f"{after.multiply_adds / max(before.multiply_adds, 1e-9):.2g} times the multiply-adds"
                self.reasons[step.node] = (
                    f"merging it would cost {times} and {after.weights:,} instead of {before.weights:,} weights"
                )
                return self._inputs(step.node)
        return set()

    def _loss(self, step: Step) -> float:
        """How much dearer this step's merging with its inputs makes them: the larger of two relative increases."""
        inputs = [self.values.of[n] for n in self._inputs(step.node)]
        apart = sum((Cost.of_symbol(value.symbol) for value in inputs), step.cost)
        more = Cost.of_symbol(self.values.of[step.node].symbol) - apart
        return max(more.multiply_adds / max(apart.multiply_adds, 1), more.weights / max(apart.weights, 1))

    def _disturbed(self, exits: list[fx.Node]) -> set[fx.Node]:
        """The inputs of the exit of a region whose source may be changed in place while it is read."""
        for end in exits:
            region = self._region(end)
            inputs = self._inputs(end)
            write = inputs and self.memory.change_between(*region.span)
            if write and self._is_worth_it(region.value):
                self.reasons[end] = f"{write.name!r} may change the input in place while the branches read it"
                return inputs
        return set()

    def _misplaced(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Where to cut a region that the code around it does not let be replaced."""
        for end in exits:
            region = self._region(end)
            if not self._is_worth_it(region.value) or not self._pays(region.value):
                continue
            reason = place(region, self.rules.frozen)
            inputs = set() if isinstance(reason, Placing) else self._seams(region)
            if inputs:
                self.reasons |= {user: str(reason) for node in inputs for user in node.users}
                return inputs
        return set()

    def _seams(self, region: Region) -> set[fx.Node]:
        """Nodes of a region read by another forward than their own; else where branches meet; else all."""
        owner, nodes = self.flat.owner, [step.node for step in region.steps]
        seams = {n for node in nodes for n in self._inputs(node) if owner(n) != owner(node)}
        meeting = {n for node in nodes if len(self._inputs(node)) > 1 for n in self._inputs(node)}
        every = {n for node in nodes for n in self._inputs(node)}
        return next((cuts for cuts in (seams, meeting, every) if cuts - self.cuts), set())

    def _undisturbed(self, region: Region) -> bool:
        return self.memory.change_between(*region.span) is None

    def _is_worth_it(self, value: Value) -> bool:
        """At least one convolution and at least one more thing to fold."""
        convolutions = any("conv" in step.operations for step in value.steps)
        return convolutions and not value.symbol.is_flattened and sum(self._weight(step) for step in value.steps) >= 2

    def _weight(self, step: Step) -> int:
        """How many things a step is: a module of torch's own is one, whatever it does."""
        effective = [operation for operation in step.operations if operation != "identity"]
        own = step.node.op == "call_module" and is_leaf(self.flat.module.get_submodule(str(step.node.target)))
        return min(len(effective), 1) if own else len(effective)

    def _pays(self, value: Value) -> bool:
        return self.rules.policy(value.cost, Cost.of_symbol(value.symbol))


def _passed_on(values: Values, firm: Collection[fx.Node], reasons: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """The reasons, and for nodes without one that of what is in front of them or behind."""
    passed: dict[fx.Node, str] = {}
    for node, value in values.of.items():
        behind = next((user for user in node.users if user in reasons), None)
        stays = value.source in values.left or value.source in firm
        if value.source in reasons and (behind is None or stays):
            passed[node] = f"{_named(value.source)!r} in front of it stays: {reasons[value.source]}"
        elif behind is not None:
            passed[node] = f"{_named(behind)!r} behind it does not take it in: {reasons[behind]}"
    return passed | reasons


def _named(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "placeholder") else node.name
