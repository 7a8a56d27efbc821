"""The linear regions of a recording: where they end, whether merging pays, and where the result is inserted."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from repvgg.collapse.absorb import NormAbsorption
from repvgg.collapse.alias import AliasAnalysis
from repvgg.collapse.cost import Policy, cheaper
from repvgg.collapse.insertion import InsertionPoint, Replacement
from repvgg.collapse.recording import Recording
from repvgg.collapse.region import Region, Step, Value, describe, reads_invariant_metadata
from repvgg.collapse.sums import parts_of_sums
from repvgg.collapse.symbolic_eval import SymbolicValues, transposed_conv_at


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of a search for regions.

    Attributes:
        opaque: nodes that must stay, with the reason.
        escaped: nodes whose tensors other code may read, with the reason.
        merge_branches: whether branches may merge, or only chains.
        fixed_sizes: whether costs are those at the recorded sizes, borders included.
        policy: whether a merge pays.
        find_insertion: where the merged convolution of a region goes, or the reason why it cannot be inserted.
        why_not_absorbed: why the nodes of a region may not all change together where convolutions absorb a norm; the
            region is that of the norm and all of them.
    """

    opaque: Mapping[fx.Node, str]
    escaped: Mapping[fx.Node, str]
    merge_branches: bool
    policy: Policy
    find_insertion: Callable[[Region], InsertionPoint | str]
    fixed_sizes: bool = False
    why_not_absorbed: Callable[[Region], str | None] = lambda _: None


@dataclass(frozen=True, eq=False, repr=False)
class Regions:
    """The regions worth replacing, and for other nodes the reason why they are in none.

    Attributes:
        merged: regions that become one convolution.
        scaled: regions that scale and shift the output of a transposed convolution.
        absorbed: norms that convolutions in ``merged`` absorb.
        reasons: why a node is in no region.
        were_cut: whether regions were cut. A cut is a greedy choice, so a search over the result may find more.
    """

    merged: tuple[Replacement, ...]
    scaled: tuple[Replacement, ...]
    reasons: dict[fx.Node, str]
    were_cut: bool = False
    absorbed: tuple[Replacement, ...] = ()

    @property
    def all(self) -> tuple[Replacement, ...]:
        """All replacements."""
        return (*self.merged, *self.scaled, *self.absorbed)


def find_regions(recording: Recording, options: SearchOptions) -> Regions:
    """Find the maximal linear regions that are worth replacing by one convolution each.

    A region ends where something non-linear, or something with another input, reads its output. It is cut where two
    regions would share a node, where merging does not pay, and where the surrounding code cannot be rewritten.
    """
    return _Search(recording, options).result()


class _Search:
    """Symbolic values over a growing set of cuts, until no region needs another cut."""

    def __init__(self, recording: Recording, options: SearchOptions) -> None:
        self.recording, self.aliasing, self.options = recording, AliasAnalysis(recording), options
        self.reasons = dict.fromkeys(self.aliasing.clobbered, "its memory is modified in place")
        self.reasons |= options.escaped
        self.firm = frozenset(self.reasons)
        self.unprofitable: set[fx.Node] = set()  # steps that larger regions were cut at for their cost
        self.unpaid: dict[fx.Node, str] = {}  # why the larger regions that nodes were in did not pay
        # What is known from the start does not count, as a second pass would find it again; but writes may go.
        self.were_cut = bool(self.aliasing.unsafe_writes)
        self.values = SymbolicValues(
            recording, self.aliasing, options.opaque, options.merge_branches, options.fixed_sizes, self.reasons
        )
        self._insertions: dict[Value, InsertionPoint | str] = {}

    def _cut_all(self) -> None:
        """Cut regions that cannot be replaced whole, until there are none."""
        order = self.values.order
        waiting = [(order[source], source) for source in self.values.by_source]
        heapq.heapify(waiting)
        queued = {source for _, source in waiting}
        while waiting:
            _, source = heapq.heappop(waiting)
            queued.discard(source)
            # One obstacle at a time: a cut changes the regions after it, and may remove their obstacles.
            more = self._next_cuts(self._exits(source))
            if not more:
                continue
            self.were_cut = True
            for changed in self.values.cut(more) - queued:
                heapq.heappush(waiting, (order[changed], changed))
                queued.add(changed)

    def _exits(self, source: fx.Node) -> list[fx.Node]:
        """Return the nodes at which regions of a source end, in execution order."""
        nodes = sorted(self.values.by_source.get(source, ()), key=self.values.order.__getitem__)
        return [node for node in nodes if not self._is_interior(node)]

    def _next_cuts(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the nodes at which to cut the regions of one source next; the regions end at ``exits``."""
        # Shared nodes first: until they are cut, costs of regions count them twice.
        for find in (self._cut_shared, self._cut_unprofitable, self._cut_overwritten, self._cut_not_insertable):
            more = find(exits) - self.values.cuts
            if more:
                return more
        return set()

    def result(self) -> Regions:
        """Return the regions that remain after all cuts."""
        self._cut_all()
        values = self.values
        exits = [node for node in sorted(values.by_node, key=values.order.__getitem__) if not self._is_interior(node)]
        regions = [Region(self.recording, node, values.by_node[node]) for node in exits]
        regions = [region for region in regions if self.aliasing.write_between(*region.span) is None]
        sums = self._insertable(self._parts_of_sums())
        addends = {addend for found in sums for addend in found.region.addends}
        regions = [region for region in regions if region.exit not in addends]
        merged = (*self._insertable(region for region in regions if self._is_candidate(region.value)), *sums)
        scaled = self._insertable(filter(self._scales_transposed, regions))
        absorption = NormAbsorption(
            values, {n: self.reasons[n] for n in self.firm}, merged, self._convolution_at, self.options.why_not_absorbed
        )
        merged = (*(absorption.targets.pop(found.region.exit, found) for found in merged), *absorption.targets.values())
        known = {**values.reasons, **self.reasons}
        reasons = _propagated(values, {*values.cuts, *self.reasons}, known, self.unpaid)
        # That the larger region would not pay says more than why the smaller one does not exist.
        unpaid = {node for node, value in values.by_node.items() if value.source in self.unprofitable}
        reasons |= {node: reason for node, reason in absorption.reasons.items() if node not in unpaid}
        return Regions(merged, scaled, reasons, self.were_cut, tuple(absorption.norms))

    def _convolution_at(self, end: fx.Node) -> Replacement | str:
        """Return the region of a convolution that ends at a node and has nothing to merge, or why there is none."""
        region = Region(self.recording, end, self.values.by_node[end])
        if self._is_interior(end) or not self._pays(region.value) or region.value.symbol.why_unreadable() is not None:
            return "its convolution is no region of its own"
        if self.aliasing.write_between(*region.span) is not None:
            return "its input is modified in place"
        point = self._find_insertion(region)
        return point if isinstance(point, str) else Replacement(region, point)

    def _parts_of_sums(self) -> Iterator[Region]:
        """Return the parts of sums that become one convolution each."""
        if self.options.merge_branches:
            for region in parts_of_sums(self.values, self.firm, self.options.policy, self._is_candidate):
                if self.aliasing.write_between(*region.span) is None:
                    yield region

    def _insertable(self, regions: Iterable[Region]) -> tuple[Replacement, ...]:
        points = ((region, self._find_insertion(region)) for region in regions)
        return tuple(Replacement(region, point) for region, point in points if isinstance(point, InsertionPoint))

    def _find_insertion(self, region: Region) -> InsertionPoint | str:
        if region.value not in self._insertions:
            self._insertions[region.value] = self.options.find_insertion(region)
        return self._insertions[region.value]

    def _scales_transposed(self, region: Region) -> bool:
        """Whether a region only scales and shifts the output of a transposed convolution that nothing else reads."""
        source, value = region.source, region.value
        # Any other reader would see the scaled output.
        users = [user for user in source.users if not reads_invariant_metadata(user)]
        exclusive = (
            source not in self.values.fixed and source not in self.values.cuts and users == [value.steps[0].node]
        )
        return (
            exclusive
            and region.is_chain
            and transposed_conv_at(self.recording, source) is not None
            and value.symbol.map.is_depthwise
            and value.symbol.map.is_pointwise
            and any(step.computes for step in value.steps)
        )

    def _is_interior(self, node: fx.Node) -> bool:
        """Whether a node is used, and only by nodes of its region or for metadata that merging does not change."""
        users = [user for user in node.users if not reads_invariant_metadata(user)]
        return bool(users) and all(self._continues(node, user) for user in users)

    def _continues(self, node: fx.Node, user: fx.Node) -> bool:
        value = self.values.by_node.get(user)
        return value is not None and value.continues(node)

    def _inputs_in_region(self, node: fx.Node) -> set[fx.Node]:
        return {value.step.node for value in self.values.by_node[node].inputs if value.step is not None}

    def _cut_shared(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the last node that more than one region contains: its users must read a real tensor."""
        if len(exits) < 2:
            return set()
        # From the last node to the first, so that as much as possible before the cut stays in one region.
        nodes = self.values.by_source[self.values.by_node[exits[0]].source]
        ends: dict[fx.Node, set[fx.Node]] = {end: {end} for end in exits}
        for node in sorted(nodes, key=self.values.order.__getitem__, reverse=True):
            found = ends.get(node, set())
            if len(found) > 1:
                self.reasons |= dict.fromkeys(node.users, "its input is used elsewhere too")
                return {node}
            for n in self._inputs_in_region(node):
                ends.setdefault(n, set()).update(found)
        return set()

    def _cut_unprofitable(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the inputs of the step at which merging costs most, in a region that does not pay."""
        for end in exits:
            value = self.values.by_node[end]
            if not value.is_worthwhile or self._pays(value):
                continue
            # A step without an input inside the region is its first one, and there is nothing before it to separate.
            joining = [step for step in value.steps if self._inputs_in_region(step.node)]
            if not joining:
                continue
            step = max(joining, key=self._relative_increase)
            # A custom policy may refuse for other reasons than the increase; then cut at any step.
            if self._relative_increase(step) > 0 or self.options.policy is not cheaper:
                after, before = value.merged_cost, value.cost
                times = f"{after.multiply_adds / max(before.multiply_adds, 1e-9):.2g} times the multiply-adds"
                self.unprofitable.add(step.node)
                text = f"merging it would cost {times} and {after.weights:,} instead of {before.weights:,} weights"
                self.reasons[step.node] = text
                self.unpaid |= {inner.node: text for inner in value.steps}
                return self._inputs_in_region(step.node)
        return set()

    def _relative_increase(self, step: Step) -> float:
        """Return the relative increase of multiply-adds or weights, the larger, on merging a step with its inputs."""
        value = self.values.by_node[step.node]
        apart = sum((inner.merged_cost for inner in value.inputs), step.cost)
        more = value.merged_cost - apart
        return max(more.multiply_adds / max(apart.multiply_adds, 1), more.weights / max(apart.weights, 1))

    def _cut_overwritten(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the inputs of the exit of a region whose source may be modified in place before the region ends."""
        for end in exits:
            region = Region(self.recording, end, self.values.by_node[end])
            inputs = self._inputs_in_region(end)
            write = region.value.is_worthwhile and inputs and self.aliasing.write_between(*region.span)
            if write:
                self.reasons[end] = f"{describe(self.recording, write)} may change its input in place before it ends"
                return inputs
        return set()

    def _cut_not_insertable(self, exits: list[fx.Node]) -> set[fx.Node]:
        """Return the nodes at which to cut a region whose surrounding code cannot be rewritten."""
        for end in exits:
            region = Region(self.recording, end, self.values.by_node[end])
            reason = self._find_insertion(region) if self._is_candidate(region.value) else None
            # A seam between two forwards is the best place: what remains on either side needs no rewritten code.
            inputs = self._cut_candidates(region) if isinstance(reason, str) else set()
            if inputs:
                self.reasons |= {user: str(reason) for node in inputs for user in node.users}
                return inputs
        return set()

    def _cut_candidates(self, region: Region) -> set[fx.Node]:
        """Return the nodes at which to cut a region that has no place, by the first of these rules that finds any.

        - the node after which nothing rearranges axes, in front of branches;
        - nodes whose axes are then rearranged;
        - nodes that are read in another forward;
        - nodes where branches meet;
        - nodes around functions, as calls of modules can merge in place;
        - all.
        """
        owner, nodes = self.recording.owner, [step.node for step in region.steps]
        rearranged = {node for node in (self._end_of_rearrangement(region),) if node is not None}
        seams = {n for node in nodes for n in self._inputs_in_region(node) if owner(n) != owner(node)}
        joins = {n for node in nodes if len(self._inputs_in_region(node)) > 1 for n in self._inputs_in_region(node)}
        every = {n for node in nodes for n in self._inputs_in_region(node)}
        functions = {step.node for step in region.steps if step.computes and step.node.op != "call_module"}
        around = {n for node in functions for n in self._inputs_in_region(node)} | functions & every
        kept = {node for node in every if self.values.by_node[node].symbol.has_axes_of_source}
        ends = {n for node in every - kept for n in self._inputs_in_region(node) & kept}
        ends |= set() if region.value.symbol.has_axes_of_source else self._inputs_in_region(region.exit) & kept
        return next(
            (cuts for cuts in (rearranged, ends, seams, joins, around, every) if cuts - self.values.cuts), set()
        )

    def _end_of_rearrangement(self, region: Region) -> fx.Node | None:
        """Return the last of the first nodes of a region that only rearrange or average axes, if no later one does.

        A region with branches that starts there is one convolution: such as heads that read the mean of an image.
        """
        value, last = region.value, region.source
        if region.is_chain or region.addends or value.symbol.has_axes_of_source:
            return None
        inside = {step.node for step in value.steps}
        for step in value.steps:
            if step.computes or len(inside.intersection(last.users)) > 1:  # branches start here
                break
            last = step.node
        known = self.values.by_node.get(last)  # none of the source
        return last if known is not None and known.symbol.arrangement == value.symbol.arrangement else None

    def _is_candidate(self, value: Value) -> bool:
        return value.is_worthwhile and self._pays(value)

    def _pays(self, value: Value) -> bool:
        return self.options.policy(value.cost, value.merged_cost)


def _propagated(
    values: SymbolicValues, firm: Collection[fx.Node], reasons: dict[fx.Node, str], unpaid: Mapping[fx.Node, str]
) -> dict[fx.Node, str]:
    """Extend the reasons to nodes without one: that of their input, or of a user.

    That a larger region would not pay (``unpaid``) says more than why the input of a node is not folded.
    """
    derived: dict[fx.Node, str] = {}
    for node, value in values.by_node.items():
        user = next((user for user in node.users if user in reasons), None)
        input_is_fixed = value.source in values.fixed or value.source in firm
        if value.source in reasons and (user is None or input_is_fixed):
            if node in unpaid:
                derived[node] = unpaid[node]
                continue
            name = describe(values.recording, value.source)
            is_call = value.source.op in ("call_function", "call_method")
            text = f"its input comes from {name}, which" if is_call else f"its input {name}"
            derived[node] = f"{text} is not folded: {reasons[value.source]}"
        elif user is not None:
            derived[node] = f"it cannot be folded into {describe(values.recording, user)}: {reasons[user]}"
    return derived | reasons
