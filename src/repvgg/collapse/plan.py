"""What is going to be replaced in a model, found without touching it and without computing with its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, jit, nn

from repvgg.algebra import ConvMap
from repvgg.collapse.alias import Memory
from repvgg.collapse.attribute_access import Captures, borrowed, only_called, parts_named_by
from repvgg.collapse.capture import Capture, capture, has_hooks, is_leaf, join, unwrap
from repvgg.collapse.cost import CHEAPER, Cost, Policy
from repvgg.collapse.inline import Flat, flatten
from repvgg.collapse.regions import Placing, Regions, Rules, find_regions
from repvgg.collapse.report import LeftAlone
from repvgg.collapse.symbolic_eval import (
    Expected,
    LinearModule,
    Shapes,
    Values,
    depends_on_ranks,
    made_up,
    run_on_meta,
    shapes_of,
)
from repvgg.errors import ReparamError, typed_line
from repvgg.symbolic import Layout


@dataclass(frozen=True, eq=False, repr=False)
class Whole:
    """A module that is one convolution as a whole."""

    path: str
    module: nn.Module
    conv: ConvMap
    cost: Cost
    layout: Layout


@dataclass(frozen=True, eq=False, repr=False)
class Unit:
    """A module whose own forward, and those written out in it, hold linear regions."""

    path: str
    module: nn.Module
    flat: Flat
    regions: Regions

    def replaced(self) -> Iterator[nn.Module]:
        """The submodules that become parts of convolutions."""
        return (self.module.get_submodule(path) for path in self._called())

    def _called(self) -> Iterator[str]:
        for region, _ in (*self.regions.found, *self.regions.scaled):
            yield from region.called
        yield from (str(region.source.target) for region, _ in self.regions.scaled)

    def inputs(self, path: str) -> tuple[Expected | None, ...]:
        """What the module takes at ``path`` below the unit, None where nothing tells."""
        inputs = (node for node in self.flat.captures[path].graph.nodes if node.op == "placeholder")
        nodes = (self.flat.value[path, node] for node in inputs)
        return tuple(self.regions.expected(n) if isinstance(n, fx.Node) else None for n in nodes)

    def placings(self) -> list[Placing]:
        """How the regions are replaced."""
        return [placing for _, placing in (*self.regions.found, *self.regions.scaled)]

    def rewritten(self) -> set[str]:
        """The paths, below the unit, of modules that get a new forward."""
        return {path for placing in self.placings() for path in placing.rewritten}

    def changed(self) -> Iterator[str]:
        """The paths, in the model, of everything that is replaced."""
        inner = {*self._called(), *self.rewritten()}
        return (join(self.path, path) for path in inner)


@dataclass(repr=False)
class Plan:
    """Replacements, inner ones first; what is dropped; and for modules that stay, why.

    ``captured`` are the modules whose own code keeps running over what is replaced in them, with their paths;
    ``called`` is what these call.
    """

    wholes: list[Whole] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    untraced: list[LeftAlone] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    captured: dict[str, Capture] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)

    def reason(self, module: nn.Module) -> str:
        """Why a batch norm stays."""
        if id(module) not in self.called:
            return "no forward that was looked into calls it"
        return self.reasons.get(id(module), "there is no convolution next to it in one linear region")

    def hosts(self) -> Iterator[tuple[str, tuple[Expected | None, ...]]]:
        """The paths of modules that get a new forward, with what it takes, outer ones first."""
        for unit in reversed(self.units):
            written_out = {path for placing in unit.placings() for path in placing.inlined}
            for path in sorted(unit.rewritten() - written_out):
                yield join(unit.path, path), unit.inputs(path)

    def inputs(self) -> tuple[Expected | None, ...]:
        """What the model takes, as far as that is known."""
        return next((unit.inputs("") for unit in self.units if not unit.path), ())

    @property
    def may_leave_more(self) -> bool:
        """Whether there may be something to replace in the outcome, too."""
        return any(unit.regions.were_cut for unit in self.units)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to replace."""
        return not self.wholes and not self.units


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def make_plan(
    model: nn.Module,
    merge_branches: bool,
    policy: Policy = CHEAPER,
    kept: dict[int, str] | None = None,
    inputs: Sequence[Tensor] | None = None,
) -> Plan:
    """Look at ``model`` from its root and plan the replacement of every linear region that is worth it.

    Args:
        model: any module.
        merge_branches: whether branches may be merged, or only chains.
        policy: whether a merged convolution pays.
        kept: modules, by their identity, that have to stay as they are, and why.
        inputs: what the model takes; made up where shapes matter and none are given.
    """
    kept = dict(kept or {}) | dict.fromkeys(borrowed(model), "another module holds it as well")
    captures = Captures(merge_branches)
    while True:
        planner = _Planner(model, merge_branches, policy, dict(kept), captures, inputs)
        planner.plan.called.add(id(model))
        planner.visit(model, "")
        conflicts = planner.conflicts()
        if not conflicts:
            planner.drop()
            return planner.plan
        kept |= conflicts


class _Planner:
    """Walks down the modules that are really called, each once."""

    def __init__(
        self,
        model: nn.Module,
        merge_branches: bool,
        policy: Policy,
        kept: dict[int, str],
        captures: Captures,
        inputs: Sequence[Tensor] | None,
    ) -> None:
        self.plan = Plan()
        self.model = model
        self.merge_branches = merge_branches
        self.policy = policy
        self.visited: set[int] = set()
        self.kept = kept
        self.closed: dict[int, str] = {}
        self.training_only: list[tuple[str, str]] = []
        self.captures = captures
        self.given = inputs is not None
        self.inputs: dict[int, Sequence[Any] | None] = {id(model): inputs}
        edges = (child for part in model.modules() for child in part._modules.values() if child is not None)
        self.references = Counter(map(id, edges))

    def visit(self, module: nn.Module, path: str) -> None:
        """Plan for ``module`` as a whole, else for its own graph and for what it calls."""
        module, path = unwrap(module, path)
        if id(module) in self.visited or is_leaf(module) or isinstance(module, jit.ScriptModule):
            return
        self.visited.add(id(module))
        whole = None if has_hooks(module) else self._whole(module)
        if whole is not None and self._takes(module, whole.layout):
            self.plan.wholes.append(Whole(path, module, whole.conv, whole.cost, whole.layout))
            return
        try:
            captured = self.captures.of(module)
        except Exception as error:
            self.plan.untraced.append(LeftAlone(path, f"its forward cannot be traced ({_reason(error)})"))
            self.kept |= dict.fromkeys(parts_named_by(module), f"the forward of {path or 'the model'} may reach for it")
            self._visit_pieces(module, path)
            return
        self._visit_unit(module, path, captured)

    def _takes(self, module: nn.Module, layout: Layout) -> bool:
        """Whether the inputs of a module, where they are known, are of that layout: torch takes unbatched ones, too."""
        ranks = [x.dim() for x in self.inputs.get(id(module)) or () if isinstance(x, Tensor)]
        return layout.rank is None or all(rank == layout.rank for rank in ranks)

    def _whole(self, module: nn.Module) -> LinearModule | None:
        """The one convolution that ``module`` is, if it may be replaced by it and that pays."""
        found = self.captures.linear(module)
        if found is None or not found.is_worth_it or any(id(part) in self.kept for part in module.modules()):
            return None
        return found if self.policy(found.cost, Cost.of_map(found.conv)) else None

    def _is_one_step(self, module: nn.Module) -> bool:
        """Whether ``module`` is best taken as one step of a region: it is linear, and cannot be had for less."""
        found = self.captures.linear(module)
        return found is not None and (not found.is_worth_it or self._whole(module) is not None)

    def _visit_pieces(self, module: nn.Module, path: str) -> None:
        """Below a module whose flow is unknown: unless its code calls a container, it may take what is in it."""
        called = only_called(module)
        for name, child in module.named_children():
            if isinstance(child, _CONTAINERS) and name not in called:
                self._visit_pieces(child, join(path, name))
            else:
                self.visit(child, join(path, name))

    def _visit_unit(self, module: nn.Module, path: str, captured: Capture) -> None:
        flat = flatten(module, captured, lambda *call: self._look_into(module, *call))
        for inner, part in flat.captures.items():
            self.visited.add(id(module.get_submodule(inner)))
            self._note(module.get_submodule(inner), join(path, inner), part)
        opaque = {target: why for node, target in flat.calls() if (why := self._opaque(flat, node))}
        shapes = self._shapes(flat, opaque) if self.given or depends_on_ranks(module) else {}
        rules = Rules(
            opaque,
            lambda inner: self._frozen(flat, inner),
            self.merge_branches,
            self.policy,
            shapes,
            lambda target: self.captures.known_linear(module.get_submodule(target)),
            self.given,
        )
        regions = find_regions(flat, lambda: self._memory(flat), rules)
        self._keep_reasons(module, regions, opaque)
        unit = Unit(path, module, flat, regions)
        consumed = {id(part) for part in unit.replaced()}
        for _, target in flat.calls():
            child = module.get_submodule(target)
            if id(child) not in consumed:
                self.visit(child, join(path, target))
        if regions.found or regions.scaled:
            self.plan.units.append(unit)

    def _shapes(self, flat: Flat, opaque: dict[str, str]) -> Shapes:
        """The shapes of the tensors in a flat graph, as far as a run without values tells."""
        inputs = self.inputs.get(id(flat.module))
        if inputs is None and flat.module is self.model:
            values = Values(flat, Memory.of_values(), opaque, (), self.merge_branches, {})
            inputs = made_up(values.inputs())
        known = {} if inputs is None else run_on_meta(flat, inputs)
        for node, target in flat.calls():
            if all(n in known for n in node.all_input_nodes) and not node.kwargs:
                arguments = fx.map_arg(node.args, known.__getitem__)
                self.inputs.setdefault(id(flat.module.get_submodule(target)), arguments)
        return shapes_of(known)

    def _look_into(self, unit: nn.Module, path: str, caller: Capture, target: str) -> Capture | None:
        """The capture of a module that is called, if its forward may be written out in that of its caller."""
        child = unit.get_submodule(join(path, target))
        if is_leaf(child) or unwrap(child)[0] is not child or id(child) in self.visited or id(child) in self.kept:
            return None
        closed = self._closed(child, caller.calls[target])
        if closed:
            self.closed[id(child)] = f"and nothing goes across the border of {join(path, target)!r}: {closed}"
        if closed or self._is_one_step(child):
            return None
        try:
            captured = self.captures.of(child)
        except Exception:  # it is visited on its own, and the reason is given there
            return None
        return None if captured.more and not captured.by_rank else captured

    def _note(self, module: nn.Module, path: str, captured: Capture) -> None:
        """Keep account of a forward that was captured."""
        self.plan.captured[path] = captured
        self.plan.called |= {id(module.get_submodule(target)) for target in captured.calls}
        self._keep_reached_past(module, captured)
        self.training_only += [(path, target) for target in _training_only(module, captured)]

    def _memory(self, flat: Flat) -> Memory:
        return Memory(flat.graph, lambda path: self.captures.effects(flat.module.get_submodule(path)), flat.escaped)

    def _frozen(self, flat: Flat, path: str) -> str | None:
        """Why the forward of the module at ``path`` may not be rewritten, or None."""
        captured = flat.captures[path]
        more = captured.more or ("takes optional arguments" if captured.variants else None)
        return self.kept.get(id(flat.module.get_submodule(path))) or (more and f"the forward around it {more}")

    def _keep_reached_past(self, module: nn.Module, captured: Capture) -> None:
        """What is reached past its owner, a submodule or a parameter inside a called submodule, must stay."""
        for inner in (*captured.calls, *(read.rpartition(".")[0] for read in captured.reads)):
            owners = [outer for outer in captured.calls if inner == outer or inner.startswith(f"{outer}.")]
            if (owners and owners != [inner]) or (inner in captured.calls and _is_read(captured, inner)):
                self.kept[id(module.get_submodule(inner))] = "its parameters are read by something else"

    def _closed(self, child: nn.Module, calls: int) -> str | None:
        """Why nothing of a submodule must be merged with its neighbours, or None."""
        if calls > 1 or self.references[id(child)] > 1:
            return "it is used more than once"
        if has_hooks(child):
            return "it has hooks"
        return "it is a compiled script" if isinstance(child, jit.ScriptModule) else None

    def _opaque(self, flat: Flat, call: fx.Node) -> str | None:
        """Why the submodule that is called must not be merged with its neighbours, or None."""
        path, node = flat.place[call]
        child = flat.module.get_submodule(str(call.target))
        closed = self._closed(child, flat.captures[path].calls[str(node.target)])
        return closed or next((self.kept[id(part)] for part in child.modules() if id(part) in self.kept), None)

    def _keep_reasons(self, module: nn.Module, regions: Regions, opaque: dict[str, str]) -> None:
        closed = self.closed.get(id(module))
        for node, reason in regions.reasons.items():
            if node.op == "call_module":
                text = f"{reason}; {closed}" if closed else reason
                self.plan.reasons[id(module.get_submodule(str(node.target)))] = text
        for target, reason in opaque.items():
            self.plan.reasons[id(module.get_submodule(target))] = reason

    def conflicts(self) -> dict[int, str]:
        """Modules that were going to be replaced, and that turned out to be reached by other code as well."""
        found: dict[int, str] = {}
        for whole in self.plan.wholes:
            found |= {id(part): self.kept[id(part)] for part in whole.module.modules() if id(part) in self.kept}
        users = self._users()
        for unit in self.plan.units:
            entered = [unit.module.get_submodule(path) for path in unit.flat.captures]
            replaced = list(unit.replaced())
            found |= {id(part): self.kept[id(part)] for part in entered[1:] if id(part) in self.kept}
            if "" in unit.rewritten() and id(unit.module) in self.kept:
                found[id(unit.module)] = self.kept[id(unit.module)]
            for part in (*entered[1:], *replaced):
                if users[id(part)] > 1:
                    found[id(part)] = "another forward uses it as well"
            for part in replaced:
                found |= {id(inner): self.kept[id(inner)] for inner in part.modules() if id(inner) in self.kept}
        return found

    def _users(self) -> Counter[int]:
        """How many captured forwards call each module, or read its tensors past it."""
        users: Counter[int] = Counter()
        for path, captured in self.plan.captured.items():
            owners = {read.rpartition(".")[0] for read in captured.reads} - {""}
            users.update(id(self.model.get_submodule(join(path, name))) for name in {*captured.calls, *owners})
        return users

    def drop(self) -> None:
        """Of the submodules that only a training forward calls, drop those that nothing else can reach."""
        users = self._users()
        for path, target in self.training_only:
            unused = self.model.get_submodule(join(path, target))
            parts = list(unused.modules())
            inside = Counter(id(child) for part in parts for child in part._modules.values())
            alone = all(self.references[id(part)] == inside[id(part)] + (part is unused) for part in parts)
            if alone and not any(users[id(part)] or id(part) in self.kept for part in parts):
                self.plan.dropped.append(join(path, target))


def _is_read(captured: Capture, target: str) -> bool:
    return any(read.startswith(f"{target}.") for read in captured.reads)


def _training_only(module: nn.Module, captured: Capture) -> Iterator[str]:
    """Submodules with parameters that the forward calls in training mode and not in eval mode."""
    used = (*captured.calls, *captured.reads)
    if all(any(_nested(name, path) for path in used) for name, _ in module.named_parameters()):
        return
    try:
        training = capture(module, training=True)
    except Exception:  # the flow of the training forward is nobody's business but its own
        return
    for target in training.calls:
        related = any(_nested(target, other) or _nested(other, target) for other in captured.calls)
        if (
            not related
            and not _is_read(captured, target)
            and any(True for _ in module.get_submodule(target).parameters())
        ):
            yield target


def _nested(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] if isinstance(error, ReparamError) else typed_line(error)
