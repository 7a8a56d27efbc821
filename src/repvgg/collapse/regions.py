"""The linear regions of an inlined graph: where they end, whether merging pays, and where the result is inserted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.collapse.capture import is_leaf
from repvgg.collapse.cost import Cost, Policy, cheaper
from repvgg.collapse.inline import AliasAnalysis, InlinedGraph
from repvgg.collapse.insertion import InsertionPoint, Replacement
from repvgg.collapse.symbolic_eval import EvaluationOptions, Region, Step, SymbolicValues, Value, transposed_conv_at
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import InputSpec, Source, SymbolicTensor, guarded

FindInsertion: TypeAlias = Callable[[Region], InsertionPoint | str]


@dataclass(frozen=True, kw_only=True)
class SearchOptions(EvaluationOptions):
    """Options of a search for regions.

    Attributes:
        find_insertion: where the merged convolution of a region goes, or the reason why it cannot be inserted.
        policy: whether a merge pays.
    """

    find_insertion: FindInsertion
    policy: Policy


@dataclass(frozen=True, eq=False, repr=False)
class Regions:
    """The regions worth replacing, and for other nodes the reason why they are in none.

    Attributes:
        merged: regions that become one convolution.
        scaled: regions that scale and shift the output of a transposed convolution.
        reasons: why a node is in no region.
        spec: returns channels and layout of a node's tensor, None where the graph does not determine them.
        were_cut: whether regions were cut. A cut is a greedy choice, so a search over the result may find more.
    """

    merged: tuple[Replacement, ...]
    scaled: tuple[Replacement, ...]
    reasons: dict[fx.Node, str]
    spec: Callable[[fx.Node], InputSpec | None] = lambda _: None
    were_cut: bool = False

    @property
    def all(self) -> tuple[Replacement, ...]:
        """All replacements."""
        return (*self.merged, *self.scaled)


def find_regions(
    inlined: InlinedGraph, analyse_aliasing: Callable[[], AliasAnalysis], options: SearchOptions
) -> Regions:
    """Find the maximal linear regions that are worth replacing by one convolution each.

    A region ends where something non-linear, or something with another input, reads its output. It is cut where two
    regions would share a node, where merging does not pay, and where the surrounding code cannot be rewritten.
    ``analyse_aliasing`` is called only if there are regions, because it analyses all modules that the graph calls.
    """
    if not _has_adjacent_linear_nodes(inlined):
        return Regions((), (), {})
    regions = _search(inlined, AliasAnalysis.without_aliasing(), options)
    if not regions.all:
        return regions
    # In-place operations rarely matter. Search without them, and only repeat the search if they do.
    aliasing = analyse_aliasing()
    safe = not aliasing.unsafe_writes and all(
        aliasing.write_between(*found.region.span) is None for found in regions.all
    )
    return regions if safe else replace(_search(inlined, aliasing, options), were_cut=True)


def _search(inlined: InlinedGraph, aliasing: AliasAnalysis, options: SearchOptions) -> Regions:
    search = _Search(inlined, aliasing, options)
    while search.cut():
        pass
    return search.result()


class _Search:
    """Symbolic values over a growing set of cuts, until no region needs another cut."""

    def __init__(self, inlined: InlinedGraph, aliasing: AliasAnalysis, options: SearchOptions) -> None:
        self.inlined, self.aliasing, self.options = inlined, aliasing, options
        escaped = inlined.escaped
        self.cuts: set[fx.Node] = {*escaped, *aliasing.clobbered}
        self.reasons = dict.fromkeys(aliasing.clobbered, "its memory is modified in place")
        self.reasons |= dict.fromkeys(escaped, "its output is stored where other code can read it")
        self.were_cut = False  # cuts that are known from the start do not count: a second pass would find them again
        self._evaluate()

    def _evaluate(self) -> None:
        self.values = SymbolicValues(self.inlined, self.aliasing, self.options, self.cuts)
        self.exits = [node for node in self.values.by_node if not self._is_interior(node)]

    def cut(self) -> bool:
        """Cut regions that cannot be replaced whole; return whether anything was cut."""
        by_source: dict[fx.Node, list[fx.Node]] = {}
        for node in self.exits:
            by_source.setdefault(self.values.by_node[node].source, []).append(node)
        # One obstacle per source and round: a cut changes the regions after it, and may remove their obstacles.
        more = set().union(*map(self._next_cuts, by_source.values())) - self.cuts
        if more:
            self.cuts |= more
            self.were_cut = True
            self._evaluate()
        return bool(more)

    def _next_cuts(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the nodes at which to cut the regions of one source next; the regions end at ``exits``."""
        # Shared nodes first: until they are cut, costs of regions count them twice.
        for find in (self._cut_shared, self._cut_unprofitable, self._cut_overwritten, self._cut_not_insertable):
            more = find(exits)
            if more - self.cuts:
                return more
        return set()

    def result(self) -> Regions:
        """Return the regions that remain."""
        regions = [Region(self.inlined, node, self.values.by_node[node]) for node in self.exits]
        regions = [region for region in regions if self.aliasing.write_between(*region.span) is None]
        worthwhile = [region for region in regions if self._is_worthwhile(region.value) and self._pays(region.value)]
        merged = self._insertable(worthwhile)
        scaled = self._insertable(filter(self._scales_transposed, regions))
        reasons = _propagated(self.values, {*self.cuts, *self.reasons}, {**self.values.reasons, **self.reasons})
        return Regions(merged, scaled, reasons, self.values.spec, self.were_cut)

    def _insertable(self, regions: Iterable[Region]) -> tuple[Replacement, ...]:
        points = ((region, self.options.find_insertion(region)) for region in regions)
        return tuple(Replacement(region, point) for region, point in points if isinstance(point, InsertionPoint))

    def _scales_transposed(self, region: Region) -> bool:
        """Whether a region only scales and shifts the output of a transposed convolution that nothing else reads."""
        source, value = region.source, region.value
        # Any other reader would see the scaled output.
        users = [user for user in source.users if not reads_invariant_metadata(user)]
        exclusive = source not in self.values.fixed and source not in self.cuts and users == [value.steps[0].node]
        return (
            exclusive
            and region.is_chain
            and transposed_conv_at(self.inlined, source) is not None
            and value.symbol.map.is_depthwise
            and value.symbol.map.is_pointwise
            and any(step.computes for step in value.steps)
        )

    def _is_interior(self, node: fx.Node) -> bool:
        """Whether a node is used, and only by nodes of its region or for metadata that merging does not change."""
        users = [user for user in node.users if not reads_invariant_metadata(user)]
        return bool(users) and all(self._continues(node, user) for user in users)

    def _continues(self, node: fx.Node, user: fx.Node) -> bool:
        values = self.values.by_node
        return user in values and any(step.node is node for step in values[user].steps)

    def _inputs_in_region(self, node: fx.Node) -> set[fx.Node]:
        return {n for n in node.all_input_nodes if n in self.values.by_node and self._continues(n, node)}

    def _cut_shared(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the last node that more than one region contains: its users must read a real tensor."""
        count: dict[fx.Node, int] = {}
        for end in exits:
            for step in self.values.by_node[end].steps:
                count[step.node] = count.get(step.node, 0) + 1
        shared = [node for node, number in count.items() if number > 1]
        if not shared:
            return set()
        # The last one, so that as much as possible before it stays in one region.
        last = max(shared, key=self.values.order.__getitem__)
        for user in last.users:
            self.reasons[user] = "its input is used elsewhere too"
        return {last}

    def _cut_unprofitable(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the inputs of the step at which merging costs most, in a region that does not pay."""
        for end in exits:
            value = self.values.by_node[end]
            if not self._is_worthwhile(value) or self._pays(value):
                continue
            # A step without an input inside the region is its first one, and there is nothing before it to separate.
            joining = [step for step in value.steps if self._inputs_in_region(step.node)]
            if not joining:
                continue
            step = max(joining, key=self._relative_increase)
            # A custom policy may refuse for other reasons than the increase; then cut at any step.
            if self._relative_increase(step) > 0 or self.options.policy is not cheaper:
                after, before = Cost.of_symbol(value.symbol), value.cost
                times = f"{after.multiply_adds / max(before.multiply_adds, 1e-9):.2g} times the multiply-adds"
                self.reasons[step.node] = (
                    f"merging it would cost {times} and {after.weights:,} instead of {before.weights:,} weights"
                )
                return self._inputs_in_region(step.node)
        return set()

    def _relative_increase(self, step: Step) -> float:
        """Return the relative increase of multiply-adds or weights, the larger, on merging a step with its inputs."""
        inputs = [self.values.by_node[n] for n in self._inputs_in_region(step.node)]
        apart = sum((Cost.of_symbol(value.symbol) for value in inputs), step.cost)
        more = Cost.of_symbol(self.values.by_node[step.node].symbol) - apart
        return max(more.multiply_adds / max(apart.multiply_adds, 1), more.weights / max(apart.weights, 1))

    def _cut_overwritten(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the inputs of the exit of a region whose source may be modified in place before the region ends."""
        for end in exits:
            region = Region(self.inlined, end, self.values.by_node[end])
            inputs = self._inputs_in_region(end)
            write = inputs and self.aliasing.write_between(*region.span)
            if write and self._is_worthwhile(region.value):
                self.reasons[end] = f"{write.name!r} may change the input in place while the branches read it"
                return inputs
        return set()

    def _cut_not_insertable(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the nodes at which to cut a region whose surrounding code cannot be rewritten."""
        for end in exits:
            region = Region(self.inlined, end, self.values.by_node[end])
            if not self._is_worthwhile(region.value) or not self._pays(region.value):
                continue
            reason = self.options.find_insertion(region)
            # A seam between two forwards is the best place: what remains on either side needs no rewritten code.
            inputs = set() if isinstance(reason, InsertionPoint) else self._cut_candidates(region)
            if inputs:
                self.reasons |= {user: str(reason) for node in inputs for user in node.users}
                return inputs
        return set()

    def _cut_candidates(self, region: Region) -> set[fx.Node]:
        """Return nodes that are read in another forward; if there are none, nodes where branches meet; else all."""
        owner, nodes = self.inlined.owner, [step.node for step in region.steps]
        seams = {n for node in nodes for n in self._inputs_in_region(node) if owner(n) != owner(node)}
        joins = {n for node in nodes if len(self._inputs_in_region(node)) > 1 for n in self._inputs_in_region(node)}
        every = {n for node in nodes for n in self._inputs_in_region(node)}
        return next((cuts for cuts in (seams, joins, every) if cuts - self.cuts), set())

    def _is_worthwhile(self, value: Value) -> bool:
        """Whether there is at least one convolution and at least one more operation to fold."""
        has_conv = any("conv" in step.operations for step in value.steps)
        return has_conv and not value.symbol.is_flattened and sum(self._weight(step) for step in value.steps) >= 2

    def _weight(self, step: Step) -> int:
        # A padded nn.Conv2d is two operations of the algebra, but nothing is gained by "merging" it.
        operations = [operation for operation in step.operations if operation != "identity"]
        is_one = step.node.op == "call_module" and is_leaf(self.inlined.module.get_submodule(str(step.node.target)))
        return min(len(operations), 1) if is_one else len(operations)

    def _pays(self, value: Value) -> bool:
        return self.options.policy(value.cost, Cost.of_symbol(value.symbol))


def _propagated(values: SymbolicValues, firm: Collection[fx.Node], reasons: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """Extend the reasons to nodes without one: that of their input, or of a user."""
    derived: dict[fx.Node, str] = {}
    for node, value in values.by_node.items():
        user = next((user for user in node.users if user in reasons), None)
        input_is_fixed = value.source in values.fixed or value.source in firm
        if value.source in reasons and (user is None or input_is_fixed):
            derived[node] = f"its input {_label(value.source)!r} is not folded: {reasons[value.source]}"
        elif user is not None:
            derived[node] = f"it cannot be folded into {_label(user)!r}: {reasons[user]}"
    return derived | reasons


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "placeholder") else node.name


def reads_invariant_metadata(node: fx.Node) -> bool:
    """Whether a node reads rank, dtype or device of a tensor, which are the same at both ends of a linear region."""
    if node.op == "call_method":
        return node.target in ("dim", "ndimension") and len(node.args) == 1
    return node.target is getattr and node.args[1] in ("ndim", "dtype", "device")


def _has_adjacent_linear_nodes(inlined: InlinedGraph) -> bool:
    """Whether two nodes that may be linear follow each other, as in every region: a quick test before the search.

    It is also passed by a graph that calls a batch norm, so that the search finds a reason why that one stays, and by
    one that calls a module that is not torch's own, because one call may be several operations.
    """
    parts = {target: inlined.module.get_submodule(target) for _, target in inlined.calls()}
    if any(isinstance(part, _BatchNorm) or not is_leaf(part) for part in parts.values()):
        return True
    # Functions and methods all count as linear: evaluating them is the search itself.
    calls = (node for node in inlined.graph.nodes if node.op.startswith("call"))
    linear = {node for node in calls if node.op != "call_module" or _may_be_linear(parts[str(node.target)])}
    return any(before in linear for node in linear for before in node.all_input_nodes)


def _may_be_linear(part: nn.Module) -> bool:
    """Whether a module may be linear; False for torch's own activations, which have no tensors and never are."""
    if not is_leaf(part) or part._parameters or part._buffers:
        return True
    try:
        guarded(part.forward, SymbolicTensor.of(Source(), 1, device="meta"))
    except NotLinearError:
        return False
    except ReparamError:
        return True
    return True
