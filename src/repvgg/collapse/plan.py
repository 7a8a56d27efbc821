"""Plan what to replace in a model, from recordings of its calls, without modifying it or computing with its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg._calls import Call
from repvgg.collapse.calls import cropped, made_up_calls, similar_calls
from repvgg.collapse.cost import Policy
from repvgg.collapse.graph_builder import NeedsValuesError
from repvgg.collapse.guard import CallGuard
from repvgg.collapse.matching import runs_the_same
from repvgg.collapse.methods import RefusedMethod, refused_methods
from repvgg.collapse.modules import has_parameters, is_inside, is_leaf, is_scripted, join
from repvgg.collapse.placement import Placement
from repvgg.collapse.record import record
from repvgg.collapse.recording import Recording, is_constant
from repvgg.collapse.regions import Regions, SearchOptions, find_regions
from repvgg.collapse.removal import Removals
from repvgg.collapse.report import Skipped
from repvgg.collapse.unread import Unread
from repvgg.collapse.validity import Validity
from repvgg.collapse.variants import recorded_call
from repvgg.errors import RepvggError, UsageError, typed_line
from repvgg.symbolic import first_float
from repvgg.verify.comparison import does_not_run

Reasons: TypeAlias = dict[nn.Module, str]  # modules that must stay, and why


@dataclass(frozen=True)
class Options:
    """Options of the user.

    Attributes:
        merge_branches: whether branches may merge, or only chains.
        policy: whether a merge pays.
        call: how the model is called; None if that is not known.
    """

    merge_branches: bool
    policy: Policy
    call: Call | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Scope:
    """A module that was recorded, and the regions to replace in it.

    Attributes:
        path: of the module in the model; "" is the model.
        recording: of one call of it. Paths in it are below the module.
        call: the recorded call.
        regions: what becomes convolutions.
        placement: where they go.
        guards: what the plain model must check in each call, by the path of the module.
        unread: the modules whose results no output depends on, by their paths, each with what takes its place.
    """

    path: str
    recording: Recording
    call: Call
    regions: Regions
    placement: Placement
    guards: dict[str, CallGuard]
    unread: dict[str, Unread]

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.recording.module

    def replaced_paths(self) -> set[str]:
        """Return the paths below the module of the submodules that become parts of convolutions."""
        found = {path for done in self.regions.all for path in done.region.called_modules}
        found |= {str(done.region.source.target) for done in self.regions.scaled}
        found |= self.unread.keys()
        return found | {done.insertion.host for done in self.regions.all if done.insertion.kind == "module"}

    def refused_methods(self) -> dict[tuple[str, str], RefusedMethod]:
        """Return the methods that use merged parts, by the path of their module and their name."""
        found = ((path, method) for done in self.regions.all for path, method in refused_methods(self.recording, done))
        return {(path, method.name): method for path, method in found}

    def rewritten_paths(self) -> set[str]:
        """Return the paths below the module of the modules that get a new forward."""
        return {path for done in self.regions.all for path in done.insertion.rewritten}


@dataclass(repr=False)
class Plan:
    """Replacements, and facts about the modules that ran.

    Attributes:
        scopes: the recorded modules: the model, or parts of it if it could not be recorded as a whole.
        dropped: paths of submodules that no call in eval mode uses, with the reason.
        untraced: modules that could not be recorded; their children are planned one by one.
        reasons: why a module stays.
        called: paths of all modules that ran.
    """

    scopes: list[Scope] = field(default_factory=list)
    dropped: list[Skipped] = field(default_factory=list)
    untraced: list[Skipped] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    @property
    def known(self) -> tuple[Recording, Call] | None:
        """The recording of the whole model, and the recorded call, if it was recorded as a whole."""
        return next(((scope.recording, scope.call) for scope in self.scopes if not scope.path), None)

    def reason(self, path: str) -> str:
        """Return why a batch norm stays."""
        around = [skipped for skipped in self.untraced if is_inside(path, skipped.name)]
        outer = max(around, key=lambda skipped: len(skipped.name), default=None)
        if path not in self.called:
            return outer.reason if outer is not None else "the recorded call does not run it"
        return self.reasons.get(path, "there is no convolution next to it in one linear region")

    def rewritten_hosts(self) -> Iterator[tuple[str, Call]]:
        """Yield the paths of modules that get a new forward, with how they are called, outer ones first."""
        for scope in self.scopes:
            inlined = {path for done in scope.regions.all for path in done.insertion.inlined}
            for path in sorted(scope.rewritten_paths() - inlined):
                yield join(scope.path, path), recorded_call(scope.recording.first_calls[path])

    def cropped(self, call: Call | None) -> tuple[Call, str] | None:
        """Return a call of the model on a part of its images, if it runs the same on that, and the size in words."""
        scope = next((scope for scope in self.scopes if not scope.path), None)
        small = call is not None and scope is not None and scope.placement.validity.holds_for_small_images
        return cropped(call) if small and call is not None else None

    def first_convolutions(self) -> Iterator[str]:
        """Yield the path of the first part of everything that becomes one convolution."""
        for scope in self.scopes:
            for done in (*scope.regions.merged, *scope.regions.scaled):
                node = done.region.first_convolution
                inner = str(node.target) if node.op == "call_module" else scope.recording.owner(node)
                yield join(scope.path, done.insertion.host if done.insertion.kind == "module" else inner)

    def unread(self) -> dict[str, Unread]:
        """Return the modules whose results no output depends on, by their paths, each with what takes its place."""
        found = ((scope.path, path, new) for scope in self.scopes for path, new in scope.unread.items())
        return {join(outer, path): new for outer, path, new in found}

    def guards(self) -> Iterator[Skipped]:
        """Yield what the plain model checks in each call."""
        for scope in self.scopes:
            for path, guard in scope.guards.items():
                yield Skipped(join(scope.path, path), str(guard))
            methods = {method.name: (path, method) for (path, _), method in scope.refused_methods().items()}
            for path, method in methods.values():
                yield Skipped(join(scope.path, path), f"refused: {method}")

    def norm_functions(self) -> list[str]:
        """Return the paths of the modules whose own forwards run a batch norm as a function, on what is no constant."""
        found: dict[str, None] = {}
        for scope in self.scopes:
            for node in scope.recording.graph.nodes:
                name = getattr(node.target, "__name__", "")
                if node.op == "call_function" and "batch_norm" in name and not is_constant(node):
                    inner = scope.recording.owner(node)
                    if not isinstance(scope.module.get_submodule(inner), _BatchNorm):
                        found[join(scope.path, inner)] = None
        return list(found)

    @property
    def may_leave_more(self) -> bool:
        """Whether the plain model may contain further regions, because some were cut."""
        return any(scope.regions.were_cut for scope in self.scopes)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to replace."""
        return not any(scope.regions.all or scope.unread for scope in self.scopes)


def make_plan(
    model: nn.Module, options: Options, excluded: Reasons, known: tuple[Recording, Call] | None = None
) -> Plan:
    """Record ``model``, and plan the replacement of every linear region that is worth it.

    Args:
        model: any module.
        options: options of the user.
        excluded: modules that must stay, and why.
        known: a recording of the model, and the recorded call.
    """
    planner = _Planner(model, options, excluded)
    if known is not None:
        planner.search("", *known)
    else:
        planner.visit(model, "", options.call)
    return planner.plan


def record_call(model: nn.Module, call: Call) -> Recording:
    """Record a call, on meta tensors if the model has no values.

    Raises:
        Exception: whatever the code of the model raises.
    """
    like = first_float(model)
    return record(model, call, on_meta=like is not None and like.is_meta)


def _record_similar(recording: Recording, call: Call) -> tuple[Recording | None, bool]:
    """Record a call with inputs of other sizes, if the model takes any; return as well whether the images are small.

    Small images take less time. If the code does something else on them, larger ones decide.
    """
    for other, is_small in similar_calls(call):
        try:
            found = record_call(recording.module, other)
        except Exception:
            continue
        if not is_small or runs_the_same(recording, found):
            return found, is_small
    return None, False


class _Planner:
    """Record modules from the root on, and search each recording."""

    def __init__(self, model: nn.Module, options: Options, excluded: Reasons) -> None:
        self.plan = Plan()
        self.model = model
        self.options = options
        self.excluded = excluded

    def visit(self, module: nn.Module, path: str, call: Call | None) -> None:
        """Record a module, else its children one by one."""
        if is_leaf(module):
            return
        if path and not has_parameters(module):
            return  # such as an activation with a forward of its own
        first: Exception | None = None
        for candidate in [call] if call is not None else made_up_calls(module):
            try:
                recording = record_call(module, candidate)
            except Exception as error:
                first = first or error
                continue
            self.search(path, recording, candidate)
            return
        # A model without values may still run with some.
        if call is not None and first is not None and not isinstance(first, NeedsValuesError):
            if isinstance(first, RepvggError):
                raise first
            raise UsageError(does_not_run(module, call, "the model", first)) from first
        if any(map(nn.parameter.is_lazy, module.parameters())):
            why = "it has parameters without a shape: call it once before"
        elif is_scripted(module):
            why = "it is a compiled script: collapse the module that it was made from"
        elif first is None:
            why = "no inputs could be made up for it: pass inputs="
        else:
            why = f"it could not be run without inputs ({typed_line(first)}): pass inputs="
        self.plan.untraced.append(Skipped(path, why))
        for name, child in module.named_children():
            self.visit(child, join(path, name), None)

    def search(self, path: str, recording: Recording, call: Call) -> None:
        """Plan the replacements in a module that was recorded."""
        excluded = {
            name: self.excluded[part] for name, part in recording.module.named_modules() if part in self.excluded
        }
        validity = Validity(recording, lambda: _record_similar(recording, call), trusted=self.options.call is not None)
        removals = Removals(validity, excluded)
        placement = Placement(validity, excluded, removals.unread)
        opaque = {**recording.opaque, **placement.fixed_nodes()}
        escaped = {**recording.escaped, **placement.boundaries()}
        options = SearchOptions(
            opaque=opaque,
            escaped=escaped,
            merge_branches=self.options.merge_branches,
            fixed_sizes=self.options.call is not None,
            find_insertion=placement.find,
            why_not_absorbed=placement.why_not_absorbed,
            policy=self.options.policy,
        )
        regions = find_regions(recording, options)
        self.plan.scopes.append(Scope(path, recording, call, regions, placement, validity.guards, removals.unread))
        self.plan.called |= {join(path, inner) for inner in recording.called_paths()}
        for node, reason in {**regions.reasons, **opaque}.items():
            if node.op == "call_module":
                self.plan.reasons[join(path, str(node.target))] = reason
            elif node in recording.frame_of:  # a batch norm that is no leaf
                self.plan.reasons.setdefault(join(path, recording.owner(node)), reason)
        if self.options.call is None:  # what this call does not run, another one may
            dropped = {skipped.name for skipped in removals.unused}
            for inner in (inner for inner in removals.not_run() if inner not in dropped):
                self.visit(recording.module.get_submodule(inner), join(path, inner), None)
        self.plan.dropped += [Skipped(join(path, s.name), s.reason) for s in removals.unused]
