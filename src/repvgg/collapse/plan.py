"""Plan what to replace in a model, without modifying it and without computing with its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, fx, jit, nn

from repvgg.collapse.attribute_access import ModuleAnalysis, names_only_called, parts_read_by_forward
from repvgg.collapse.capture import Capture, capture, has_hooks, is_leaf, join, unwrap
from repvgg.collapse.cost import Cost, Policy
from repvgg.collapse.inline import AliasAnalysis, InlinedGraph, inline
from repvgg.collapse.insertion import InsertionPoint, find_insertion_point
from repvgg.collapse.regions import Regions, SearchOptions, find_regions
from repvgg.collapse.report import Skipped
from repvgg.collapse.symbolic_eval import (
    EvaluationOptions,
    ModuleMap,
    Shapes,
    SymbolicValues,
    has_rank_agnostic_norm,
    run_on_meta,
    shapes_of,
    synthetic_inputs,
)
from repvgg.errors import ReparamError, typed_line
from repvgg.symbolic import InputSpec, Layout

Reasons: TypeAlias = dict[nn.Module, str]  # modules that must stay, and why

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Options:
    """Options of the user.

    Attributes:
        merge_branches: whether branches may merge, or only chains.
        policy: whether a merge pays.
        inputs: example inputs of the model; synthetic ones are used where shapes matter and none are given.
    """

    merge_branches: bool
    policy: Policy
    inputs: Sequence[Tensor] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LinearModule:
    """A module that becomes one convolution as a whole."""

    path: str
    module: nn.Module
    map: ModuleMap


@dataclass(frozen=True, eq=False, repr=False)
class InlinedScope:
    """A module with linear regions in its own forward or in the forwards that are inlined into it."""

    path: str
    module: nn.Module
    inlined: InlinedGraph
    regions: Regions

    def replaced_modules(self) -> Iterator[nn.Module]:
        """Yield the submodules that become parts of convolutions."""
        return (self.module.get_submodule(path) for path in self._replaced_paths())

    def _replaced_paths(self) -> Iterator[str]:
        for found in self.regions.all:
            yield from found.region.called_modules
        yield from (str(found.region.source.target) for found in self.regions.scaled)

    def input_specs(self, path: str) -> tuple[InputSpec | None, ...]:
        """Return what the module at ``path`` below the scope takes; None where the graph does not determine it."""
        inputs = (node for node in self.inlined.captures[path].graph.nodes if node.op == "placeholder")
        nodes = (self.inlined.inlined[path, node] for node in inputs)
        return tuple(self.regions.spec(n) if isinstance(n, fx.Node) else None for n in nodes)

    def insertion_points(self) -> list[InsertionPoint]:
        """Return where the merged convolutions go."""
        return [found.insertion for found in self.regions.all]

    def rewritten_paths(self) -> set[str]:
        """Return the paths, below the scope, of modules that get a new forward."""
        return {path for point in self.insertion_points() for path in point.rewritten}

    def changed_paths(self) -> Iterator[str]:
        """Yield the paths, in the model, of everything that is replaced or gets a new forward."""
        return (join(self.path, path) for path in {*self._replaced_paths(), *self.rewritten_paths()})


@dataclass(repr=False)
class Plan:
    """Replacements, inner ones first, and facts about the modules that were visited.

    Attributes:
        linear_modules: modules that become one convolution each.
        scopes: modules in whose graphs regions become convolutions.
        dropped: paths of submodules that only a training forward calls.
        untraced: modules whose forward cannot be traced; their children are planned one by one.
        reasons: why a module stays.
        captured: by path, the modules whose own code still runs, and calls what is replaced in them.
        called: the model, and all that the captured forwards call.
        conflicts: planned replacements of modules that other code turned out to use as well, with the reason. If there
            are any, the plan is invalid, and a new one must be made with these modules excluded.
    """

    linear_modules: list[LinearModule] = field(default_factory=list)
    scopes: list[InlinedScope] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    untraced: list[Skipped] = field(default_factory=list)
    reasons: Reasons = field(default_factory=dict)
    captured: dict[str, Capture] = field(default_factory=dict)
    called: set[nn.Module] = field(default_factory=set)
    conflicts: Reasons = field(default_factory=dict)

    def reason(self, module: nn.Module) -> str:
        """Return why a batch norm stays."""
        if module not in self.called:
            return "no traced forward calls it"
        return self.reasons.get(module, "there is no convolution next to it in one linear region")

    def rewritten_hosts(self) -> Iterator[tuple[str, tuple[InputSpec | None, ...]]]:
        """Yield the paths of modules that get a new forward, with their inputs, outer ones first."""
        for scope in reversed(self.scopes):
            inlined = {path for point in scope.insertion_points() for path in point.inlined}
            for path in sorted(scope.rewritten_paths() - inlined):
                yield join(scope.path, path), scope.input_specs(path)

    def changed_paths(self) -> list[str]:
        """Return the paths of all modules that are replaced, rewritten or dropped."""
        paths = [linear.path for linear in self.linear_modules] + self.dropped
        return paths + [path for scope in self.scopes for path in scope.changed_paths()]

    def model_inputs(self) -> tuple[InputSpec | None, ...]:
        """Return what the model takes, as far as its graph determines it."""
        return next((scope.input_specs("") for scope in self.scopes if not scope.path), ())

    def first_convolutions(self) -> Iterator[str]:
        """Yield the path of the first part of everything that becomes one convolution."""
        yield from (linear.path for linear in self.linear_modules)
        for scope in self.scopes:
            for found in scope.regions.all:
                node = found.region.first_convolution
                inner = str(node.target) if node.op == "call_module" else scope.inlined.owner(node)
                yield join(scope.path, inner)

    @property
    def may_leave_more(self) -> bool:
        """Whether the plain model may contain further regions, because some were cut."""
        return any(scope.regions.were_cut for scope in self.scopes)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to replace."""
        return not self.linear_modules and not self.scopes


def make_plan(model: nn.Module, options: Options, excluded: Reasons, analysis: ModuleAnalysis) -> Plan:
    """Walk ``model`` from its root and plan the replacement of every linear region that is worth it.

    The plan may have ``conflicts``: which code uses a module is known only after the whole walk.

    Args:
        model: any module.
        options: options of the user.
        excluded: modules that must stay, and why.
        analysis: a cache of facts about the modules of this model.
    """
    planner = _Planner(model, options, excluded, analysis)
    planner.plan.called.add(model)
    planner.visit(model, "")
    planner.plan.conflicts = planner.find_conflicts()
    if not planner.plan.conflicts:
        planner.drop_training_only()
    return planner.plan


class _Planner:
    """Visit the modules that are called, each once."""

    def __init__(self, model: nn.Module, options: Options, excluded: Reasons, analysis: ModuleAnalysis) -> None:
        self.plan = Plan()
        self.model = model
        self.options = options
        self.analysis = analysis
        self.excluded = dict(excluded)
        self.visited: set[nn.Module] = set()
        self.boundary_reasons: Reasons = {}
        self.training_only: list[tuple[str, str]] = []
        self.inputs: dict[nn.Module, Sequence[Any] | None] = {model: options.inputs}
        # In how many places a module is registered; a shared one must not change for one caller alone.
        self.references = Counter(
            child for part in model.modules() for child in part._modules.values() if child is not None
        )

    def visit(self, module: nn.Module, path: str) -> None:
        """Plan for ``module`` as a whole, else for its graph and the modules that it calls."""
        module, path = unwrap(module, path)
        # A module that is called from several places is planned once; _why_closed prevents merges across its boundary.
        if module in self.visited or is_leaf(module) or isinstance(module, jit.ScriptModule):
            return
        self.visited.add(module)
        # Hooks on a module, or in it, would no longer run if it became one convolution.
        found = None if has_hooks(module) else self._profitable_map(module)
        if found is not None and self._accepts(module, found.layout):
            self.plan.linear_modules.append(LinearModule(path, module, found))
            return
        try:
            captured = self.analysis.capture(module)
        except Exception as error:
            line = str(error).partition("\n")[0] if isinstance(error, ReparamError) else typed_line(error)
            self.plan.untraced.append(Skipped(path, f"its forward cannot be traced ({line})"))
            reason = f"the forward of {path or 'the model'} may access it"
            # Without a graph, only the bytecode shows what this forward may access.
            self.excluded |= dict.fromkeys(parts_read_by_forward(module), reason)
            self._visit_children(module, path)
            return
        self._visit_scope(module, path, captured)

    def _accepts(self, module: nn.Module, layout: Layout) -> bool:
        # Where inputs are known: torch's layers also take single images without a batch axis, which have another rank.
        ranks = [x.dim() for x in self.inputs.get(module) or () if isinstance(x, Tensor)]
        return layout.rank is None or all(rank == layout.rank for rank in ranks)

    def _profitable_map(self, module: nn.Module) -> ModuleMap | None:
        """The convolution that ``module`` is equal to, if it may be replaced by it and that pays."""
        found = self.analysis.linear_map(module)
        if found is None or not found.is_mergeable or any(part in self.excluded for part in module.modules()):
            return None
        return found if self.options.policy(found.cost, Cost.of_map(found.conv)) else None

    def _is_one_step(self, module: nn.Module) -> bool:
        """Whether ``module`` should be one step of a region: it is linear, and inlining it gains nothing."""
        found = self.analysis.linear_map(module)
        return found is not None and (not found.is_mergeable or self._profitable_map(module) is not None)

    def _visit_children(self, module: nn.Module, path: str) -> None:
        # The flow of this forward is unknown. Unless its code only calls a container, it may index into it.
        called = names_only_called(module)
        for name, child in module.named_children():
            if isinstance(child, _CONTAINERS) and name not in called:
                self._visit_children(child, join(path, name))
            else:
                self.visit(child, join(path, name))

    def _visit_scope(self, module: nn.Module, path: str, captured: Capture) -> None:
        inlined = inline(module, captured, lambda *call: self._capture_callee(module, *call))
        for inner, part in inlined.captures.items():
            submodule = module.get_submodule(inner)
            self.visited.add(submodule)
            self._register_capture(submodule, join(path, inner), part)
        opaque = {target: why for node, target in inlined.calls() if (why := self._why_opaque(inlined, node))}
        has_inputs = self.options.inputs is not None
        # Without such a norm, the functions determine all layouts, and the run on meta tensors can be saved.
        shapes = self._find_shapes(inlined, opaque) if has_inputs or has_rank_agnostic_norm(module) else {}
        options = SearchOptions(
            opaque=opaque,
            merge_branches=self.options.merge_branches,
            shapes=shapes,
            known_maps=lambda target: self.analysis.known_linear_map(module.get_submodule(target)),
            fixed_sizes=has_inputs,
            find_insertion=lambda region: find_insertion_point(region, lambda path: self._why_frozen(inlined, path)),
            policy=self.options.policy,
        )
        regions = find_regions(inlined, lambda: self._analyse_aliasing(inlined), options)
        self._record_reasons(module, regions, opaque)
        scope = InlinedScope(path, module, inlined, regions)
        replaced = set(scope.replaced_modules())
        for _, target in inlined.calls():
            child = module.get_submodule(target)
            if child not in replaced:
                self.visit(child, join(path, target))
        if regions.all:  # after the children, so that inner replacements come first
            self.plan.scopes.append(scope)

    def _find_shapes(self, inlined: InlinedGraph, opaque: dict[str, str]) -> Shapes:
        """Run the graph on meta tensors; also records the inputs of the modules that it calls."""
        # Inputs of inner scopes were recorded when the calls around them were run.
        inputs = self.inputs.get(inlined.module)
        if inputs is None and inlined.module is self.model:
            options = EvaluationOptions(opaque, self.options.merge_branches)
            values = SymbolicValues(inlined, AliasAnalysis.without_aliasing(), options)
            inputs = synthetic_inputs(values.input_specs())
        known = {} if inputs is None else run_on_meta(inlined, inputs)
        for node, target in inlined.calls():
            if all(n in known for n in node.all_input_nodes) and not node.kwargs:
                arguments = fx.map_arg(node.args, known.__getitem__)
                self.inputs.setdefault(inlined.module.get_submodule(target), arguments)
        return shapes_of(known)

    def _capture_callee(self, scope: nn.Module, path: str, caller: Capture, target: str) -> Capture | None:
        """Return the capture of a called module if its forward may be inlined into that of its caller."""
        # Torch's own leaf modules are single steps of a region; a wrapper's forward only dispatches.
        child = scope.get_submodule(join(path, target))
        if is_leaf(child) or unwrap(child)[0] is not child or child in self.visited or child in self.excluded:
            return None
        why_closed = self._why_closed(child, caller.calls[target])
        if why_closed:
            boundary = f"and nothing merges across the boundary of {join(path, target)!r}: {why_closed}"
            self.boundary_reasons[child] = boundary
        # A module that is linear as a whole keeps its call: the report then shows it as one part.
        if why_closed or self._is_one_step(child):
            return None
        try:
            captured = self.analysis.capture(child)
        except Exception:  # it is visited on its own, and the reason is recorded there
            return None
        return None if captured.caveat and not captured.by_rank else captured

    def _register_capture(self, module: nn.Module, path: str, captured: Capture) -> None:
        self.plan.captured[path] = captured
        self.plan.called |= {module.get_submodule(target) for target in captured.calls}
        self._exclude_foreign_access(module, captured)
        self.training_only += [(path, target) for target in _training_only_calls(module, captured)]

    def _exclude_foreign_access(self, module: nn.Module, captured: Capture) -> None:
        """Exclude what a forward accesses past its owner: a part or a parameter inside a module that it also calls."""
        for inner in (*captured.calls, *(read.rpartition(".")[0] for read in captured.reads)):
            owners = [outer for outer in captured.calls if is_inside(inner, outer)]
            if (owners and owners != [inner]) or (inner in captured.calls and _reads_parameters_of(captured, inner)):
                self.excluded[module.get_submodule(inner)] = "its parameters are read by something else"

    def _analyse_aliasing(self, inlined: InlinedGraph) -> AliasAnalysis:
        effects = self.analysis.effects
        return AliasAnalysis(inlined.graph, lambda path: effects(inlined.module.get_submodule(path)), inlined.escaped)

    def _why_frozen(self, inlined: InlinedGraph, path: str) -> str | None:
        """Why the forward of the module at ``path`` cannot be rewritten, or None."""
        captured = inlined.captures[path]
        caveat = captured.caveat or ("takes optional arguments" if captured.variants else None)
        excluded = self.excluded.get(inlined.module.get_submodule(path))
        return excluded or (caveat and f"the forward around it {caveat}")

    def _why_closed(self, child: nn.Module, calls: int) -> str | None:
        """Why no part of a submodule may merge with its neighbours, or None."""
        if calls > 1 or self.references[child] > 1:
            return "it is used more than once"
        if has_hooks(child):
            return "it has hooks"
        return "it is a compiled script" if isinstance(child, jit.ScriptModule) else None

    def _why_opaque(self, inlined: InlinedGraph, call: fx.Node) -> str | None:
        """Why the called submodule as a whole may not merge with its neighbours, or None."""
        path, node = inlined.origin[call]
        child = inlined.module.get_submodule(str(call.target))
        closed = self._why_closed(child, inlined.captures[path].calls[str(node.target)])
        return closed or next((self.excluded[part] for part in child.modules() if part in self.excluded), None)

    def _record_reasons(self, module: nn.Module, regions: Regions, opaque: dict[str, str]) -> None:
        boundary = self.boundary_reasons.get(module)
        for node, reason in regions.reasons.items():
            if node.op == "call_module":
                text = f"{reason}; {boundary}" if boundary else reason
                self.plan.reasons[module.get_submodule(str(node.target))] = text
        for target, reason in opaque.items():
            self.plan.reasons[module.get_submodule(target)] = reason

    def find_conflicts(self) -> Reasons:
        """Return modules whose replacement is planned, but which other code uses as well, with the reason."""
        found: Reasons = {}
        for linear in self.plan.linear_modules:
            found |= self._excluded_in(linear.module)
        users = self._count_users()
        for scope in self.plan.scopes:
            entered = [scope.module.get_submodule(path) for path in scope.inlined.captures]
            replaced = list(scope.replaced_modules())
            found |= {part: self.excluded[part] for part in entered[1:] if part in self.excluded}
            # The scope's own forward may be rewritten, too; its entry in ``entered`` was skipped above.
            if "" in scope.rewritten_paths() and scope.module in self.excluded:
                found[scope.module] = self.excluded[scope.module]
            for part in (*entered[1:], *replaced):
                if users[part] > 1:
                    found[part] = "another forward uses it as well"
            for part in replaced:
                found |= self._excluded_in(part)
        return found

    def _excluded_in(self, module: nn.Module) -> Reasons:
        return {part: self.excluded[part] for part in module.modules() if part in self.excluded}

    def _count_users(self) -> Counter[nn.Module]:
        """Count how many captured forwards call each module, or read its tensors directly."""
        users: Counter[nn.Module] = Counter()
        for path, captured in self.plan.captured.items():
            owners = {read.rpartition(".")[0] for read in captured.reads} - {""}
            users.update(self.model.get_submodule(join(path, name)) for name in {*captured.calls, *owners})
        return users

    def drop_training_only(self) -> None:
        """Drop submodules that only a training forward calls and nothing else can reach."""
        users = self._count_users()
        for path, target in self.training_only:
            unused = self.model.get_submodule(join(path, target))
            parts = list(unused.modules())
            # References among the parts themselves do not keep them alive.
            inside = Counter(child for part in parts for child in part._modules.values())
            # Every registration of a part is inside the dropped submodule, which itself is registered once.
            exclusive = all(self.references[part] == inside[part] + (part is unused) for part in parts)
            if exclusive and not any(users[part] or part in self.excluded for part in parts):
                self.plan.dropped.append(join(path, target))


def _reads_parameters_of(captured: Capture, target: str) -> bool:
    return any(read.startswith(f"{target}.") for read in captured.reads)


def _training_only_calls(module: nn.Module, captured: Capture) -> Iterator[str]:
    """Yield submodules with parameters that the forward calls in training mode and not in eval mode."""
    used = (*captured.calls, *captured.reads)
    # Without unused parameters there is nothing to find, and the second trace can be saved.
    if all(any(is_inside(name, path) for path in used) for name, _ in module.named_parameters()):
        return
    try:
        training = capture(module, training=True)
    except Exception:  # without a trace of the training forward, nothing is known to be unused
        return
    for target in training.calls:
        # A submodule that eval mode calls in parts, or as part of another, is in use.
        related = any(is_inside(target, other) or is_inside(other, target) for other in captured.calls)
        has_parameters = any(True for _ in module.get_submodule(target).parameters())
        if not related and not _reads_parameters_of(captured, target) and has_parameters:
            yield target


def is_inside(inner: str, outer: str) -> bool:
    """Whether the path ``inner`` is ``outer`` or below it; "" is the root."""
    return inner == outer or not outer or inner.startswith(f"{outer}.")
