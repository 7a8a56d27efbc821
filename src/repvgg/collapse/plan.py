"""What is going to be replaced in a model, found without touching it and without computing with its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import jit, nn

from repvgg.algebra import ConvMap
from repvgg.collapse.capture import Capture, capture
from repvgg.collapse.cost import Cost
from repvgg.collapse.effects import Captures
from repvgg.collapse.modules import has_hooks, join, unwrap
from repvgg.collapse.reach import borrowed, parts_named_by
from repvgg.collapse.regions import Regions, find_regions
from repvgg.collapse.report import LeftAlone
from repvgg.errors import ReparamError
from repvgg.symbolic import Source, SymbolicTensor, run

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Whole:
    """A module that is one convolution as a whole."""

    path: str
    module: nn.Module
    conv: ConvMap
    cost: Cost


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A module whose own forward holds linear regions."""

    path: str
    module: nn.Module
    captured: Capture
    regions: Regions

    def replaced(self) -> Iterator[nn.Module]:
        """The submodules that become parts of convolutions."""
        for region in self.regions.found:
            yield from region.modules(self.module)


@dataclass
class Plan:
    """Replacements, inner ones first; what is dropped; and for modules that stay, why.

    ``captured`` are the modules whose own code keeps running over what is replaced in them, with their paths;
    ``called`` is what these call.
    """

    wholes: list[Whole] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
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

    @property
    def empty(self) -> bool:
        """Whether there is nothing to replace."""
        return not self.wholes and not self.rewrites


def make_plan(model: nn.Module, merge_branches: bool, kept: dict[int, str] | None = None) -> Plan:
    """Look at ``model`` from its root and plan the replacement of every linear region that is worth it.

    Args:
        model: any module.
        merge_branches: whether branches may be merged, or only chains.
        kept: modules, by their identity, that have to stay as they are, and why.
    """
    kept = dict(kept or {}) | dict.fromkeys(borrowed(model), "another module holds it as well")
    captures = Captures()
    while True:
        planner = _Planner(model, merge_branches, dict(kept), captures)
        planner.plan.called.add(id(model))
        planner.visit(model, "")
        conflicts = planner.conflicts()
        if not conflicts:
            planner.drop()
            return planner.plan
        kept |= conflicts


class _Planner:
    """Walks down the modules that are really called, each once."""

    def __init__(self, model: nn.Module, merge_branches: bool, kept: dict[int, str], captures: Captures) -> None:
        self.plan = Plan()
        self.model = model
        self.merge_branches = merge_branches
        self.visited: set[int] = set()
        self.kept = kept
        self.training_only: list[tuple[str, str]] = []
        self.captures = captures
        edges = (child for part in model.modules() for child in part._modules.values() if child is not None)
        self.references = Counter(map(id, edges))

    def visit(self, module: nn.Module, path: str) -> None:
        """Plan for ``module`` as a whole, else for its own graph and for what it calls."""
        module, path = unwrap(module, path)
        leaf = not any(module.children()) and type(module).__module__.startswith("torch.nn.")
        if id(module) in self.visited or leaf or isinstance(module, jit.ScriptModule):
            return
        self.visited.add(id(module))
        if self._is_whole(module, path):
            return
        try:
            captured = self.captures.of(module)
        except Exception as error:
            self.plan.untraced.append(LeftAlone(path, f"its forward cannot be traced ({_first_line(error)})"))
            self.kept |= dict.fromkeys(parts_named_by(module), f"the forward of {path or 'the model'} may reach for it")
            self._visit_pieces(module, path)
            return
        self._visit_graph(module, path, captured)

    def _is_whole(self, module: nn.Module, path: str) -> bool:
        if has_hooks(module) or any(id(part) in self.kept for part in module.modules()):
            return False
        source = Source(self.merge_branches)
        try:
            outcome = run(module, source, device="meta", strict=True)
        except ReparamError:
            return False
        if not isinstance(outcome, SymbolicTensor):
            return False
        effective = sum(operation != "identity" for operation in source.operations)
        cost = Cost.of_ledger(source)
        if "conv" not in source.operations or effective < 2 or not Cost.of_map(outcome.map).pays_for(cost):
            return False
        self.plan.wholes.append(Whole(path, module, outcome.map, cost))
        return True

    def _visit_pieces(self, module: nn.Module, path: str) -> None:
        """Below a module whose flow is unknown: a container's own forward may not be what is called."""
        for name, child in module.named_children():
            if isinstance(child, _CONTAINERS):
                self._visit_pieces(child, join(path, name))
            else:
                self.visit(child, join(path, name))

    def _visit_graph(self, module: nn.Module, path: str, captured: Capture) -> None:
        self.plan.captured[path] = captured
        self.plan.called |= {id(module.get_submodule(target)) for target in captured.calls}
        self._keep_reached_past(module, captured)
        opaque = {target: reason for target in captured.calls if (reason := self._opaque(module, captured, target))}
        regions = find_regions(captured, lambda: self.captures.memory(module), opaque, self.merge_branches)
        alone = self.kept.get(id(module)) or (captured.more and f"the forward around it {captured.more}")
        if alone:
            regions = _chains_only(regions, captured, alone)
        consumed = {str(step.node.target) for region in regions.found for step in region.steps}
        self._keep_reasons(module, regions, opaque)
        for target in captured.calls:
            if target not in consumed or target in opaque:
                self.visit(module.get_submodule(target), join(path, target))
        self.training_only += [(path, target) for target in _training_only(module, captured)]
        if regions.found:
            self.plan.rewrites.append(Rewrite(path, module, captured, regions))

    def _keep_reached_past(self, module: nn.Module, captured: Capture) -> None:
        """What is reached past its owner, a submodule or a parameter inside a called submodule, must stay."""
        for inner in (*captured.calls, *(read.rpartition(".")[0] for read in captured.reads)):
            owners = [outer for outer in captured.calls if inner == outer or inner.startswith(f"{outer}.")]
            if (owners and owners != [inner]) or (inner in captured.calls and _is_read(captured, inner)):
                self.kept[id(module.get_submodule(inner))] = "its parameters are read by something else"

    def _opaque(self, module: nn.Module, captured: Capture, target: str) -> str | None:
        """Why the submodule at ``target`` must not be merged with its neighbours, or None."""
        child = module.get_submodule(target)
        if captured.calls[target] > 1 or self.references[id(child)] > 1:
            return "it is used more than once"
        if has_hooks(child):
            return "it has hooks"
        reason = next((self.kept[id(part)] for part in child.modules() if id(part) in self.kept), None)
        return "it is a compiled script" if isinstance(child, jit.ScriptModule) else reason

    def _keep_reasons(self, module: nn.Module, regions: Regions, opaque: dict[str, str]) -> None:
        for node, reason in regions.reasons.items():
            if node.op == "call_module":
                self.plan.reasons[id(module.get_submodule(str(node.target)))] = reason
        for target, reason in opaque.items():
            self.plan.reasons[id(module.get_submodule(target))] = reason

    def conflicts(self) -> dict[int, str]:
        """Modules that were going to be replaced, and that turned out to be reached by other code as well."""
        found: dict[int, str] = {}
        for whole in self.plan.wholes:
            found |= {id(part): self.kept[id(part)] for part in whole.module.modules() if id(part) in self.kept}
        users = self._users()
        for rewrite in self.plan.rewrites:
            if id(rewrite.module) in self.kept and not all(region.is_chain for region in rewrite.regions.found):
                found[id(rewrite.module)] = self.kept[id(rewrite.module)]
            for part in rewrite.replaced():
                if id(part) in self.kept or users[id(part)] > 1:
                    found[id(part)] = self.kept.get(id(part), "another forward uses it as well")
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


def _chains_only(regions: Regions, captured: Capture, reason: str) -> Regions:
    """The regions that need no new forward, and that are what they are for other values of optional arguments too."""
    found = tuple(
        region
        for region in regions.found
        if region.is_chain and all(region.holds_in(variant.graph) for variant in captured.variants)
    )
    others = {step.node: reason for region in regions.found if region not in found for step in region.steps}
    return Regions(found, regions.reasons | others, regions.channels)


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


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, ReparamError) else f"{type(error).__name__}: {line}"
