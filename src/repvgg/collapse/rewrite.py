"""Apply a plan: build a new model with the regions replaced and all else copied; the original stays untouched."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx, nn

from repvgg.algebra import over_axes
from repvgg.collapse.graph_rewriter import (
    ForwardRewriter,
    copies_of_computed_tensors,
    deep_copy,
    refuse_attributes,
    rewriters_for,
)
from repvgg.collapse.insertion import Replacement, own_kernel
from repvgg.collapse.modules import has_parameters, join, submodule_or_none
from repvgg.collapse.plain_conv import reference_tensor, scale_transposed, to_module
from repvgg.collapse.plan import Plan, Reasons, Scope
from repvgg.collapse.proof import NOT_PROVEN, Proof, image_for, image_for_transposed, prove_region
from repvgg.collapse.report import (
    Folded,
    Part,
    Replaced,
    describe_module,
    folded_entry,
    parameters_of,
    part_of_step,
)
from repvgg.collapse.solution import (
    MergedChain,
    module_in_float64,
    original_in_float64,
    region_in_float64,
    solve,
    solve_region,
)
from repvgg.errors import ReparamError
from repvgg.symbolic import algebra_device

Module = TypeVar("Module", bound=nn.Module)
_PLAIN_DATA = (bool, int, float, str, tuple, list, type(None))


@dataclass(frozen=True, eq=False)
class Applied:
    """The result of applying a plan.

    Attributes:
        plain: the new model.
        replaced: what was folded, in the order of the model.
        failed: modules that cannot be replaced after all, and why.
    """

    plain: nn.Module
    replaced: tuple[Replaced, ...]
    failed: Reasons


def apply_plan(model: nn.Module, plan: Plan, *, prove: bool, take_tensors: bool = False) -> Applied:
    """Build the plain model; with ``prove``, compare each convolution with what it replaces.

    With ``take_tensors``, what stays is shared with ``model``, the result of an earlier pass, in place of a copy.

    Raises ReparamError if an attribute of the model cannot be copied.
    """
    applier = _PlanApplier(model, prove)
    if take_tensors:
        applier.memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for skipped in plan.dropped:
        applier.substitute(model.get_submodule(skipped.name), nn.Identity())
    for path, stand_in in plan.unread().items():
        applier.substitute(model.get_submodule(path), stand_in)
    with torch.no_grad():
        for scope in plan.scopes:
            applier.replace_regions(scope)
        applier.fill_kernel_owners()
        plain = deep_copy(model, applier.memo, model)
    for skipped in plan.dropped:
        _detach(plain, skipped.name)
    for scope in plan.scopes:
        for path, guard in scope.guards.items():
            guarded = submodule_or_none(plain, join(scope.path, path))
            if guarded is not None:
                if not isinstance(guarded, type(scope.module.get_submodule(path))):
                    guard = guard.for_convolution(guarded)
                guarded.register_forward_pre_hook(guard, with_kwargs=True)
        for (path, _), method in scope.refused_methods().items():
            part = submodule_or_none(plain, join(scope.path, path))
            name = method.name.rpartition(".")[2]
            if not isinstance(part, type(scope.module.get_submodule(path))):
                continue
            if not method.is_of_class:
                vars(part)[name] = method
            elif name not in vars(part):  # a cached property that was read is the same in the copy
                refuse_attributes(part, {name: method})
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}

    def position(done: Replaced) -> int:
        name = done.entry.name  # a convolution with a new name is sorted by its owner
        return order.get(name, order.get(name.rpartition(".")[0], len(order)))

    replaced = tuple(sorted(applier.done, key=position))
    return Applied(plain, replaced, applier.failed | applier.find_lost(plain))


class _PlanApplier:
    """Collect what replaces each module, and the report entries for it.

    The model is then copied by one ``deepcopy`` whose memo contains the replacements as if they were copied already.

    Attributes:
        memo: the replacement or copy of each object, by object id.
        done: what was replaced.
        failed: see :class:`Applied`.
    """

    def __init__(self, model: nn.Module, prove: bool) -> None:
        self.prove = prove
        self.memo: dict[int, Any] = copies_of_computed_tensors(model)
        self.done: list[Replaced] = []
        self._kernel_owners: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        self.failed: Reasons = {}

    def substitute(self, old: nn.Module, new: nn.Module) -> None:
        """Let ``new`` be the copy of ``old``."""
        self.memo[id(old)] = new

    def replace_regions(self, scope: Scope) -> None:
        """Replace the regions of one scope: modules, chains in place, or by a call in a new forward."""
        rewriters = rewriters_for(scope.recording, [found.insertion for found in scope.regions.all])
        distinct = list({id(rewriter): rewriter for rewriter in rewriters.values()}.values())
        for rewriter in distinct:
            for old, new in rewriter.copies().items():
                self.substitute(old, new)
        absorbed: list[nn.Module] = []
        for found in scope.regions.merged:
            self._replace_region(scope, found, rewriters, absorbed)
        for found in scope.regions.scaled:
            self._scale_transposed(scope, found, rewriters)
        for found in scope.regions.absorbed:
            self._remove(scope, found.region.exit, found.region.source, rewriters)
        # While the rewriters copy their state, absorbed modules count as copied, or their weights would be copied.
        # Afterwards the entries go: another owner of the same module needs a real copy.
        for part in absorbed:
            self.substitute(part, nn.Identity())
        for rewriter in distinct:
            rewriter.copy_state(self.memo, scope.path)
            rewriter.finish()
        for part in absorbed:
            self.memo.pop(id(part), None)

    def _replace_region(
        self, scope: Scope, found: Replacement, rewriters: dict[str, ForwardRewriter], absorbed: list[nn.Module]
    ) -> None:
        region, point, get = found.region, found.insertion, scope.module.get_submodule
        host = get(point.host)
        modules = [host] if point.kind == "module" else [get(path) for path in region.called_modules]
        replaced = modules or [host]  # a region of functions only calls no module
        parameters = parameters_of(region, modules)
        # Frozen only if everything that it replaces was frozen.
        trainable = not parameters or any(p.requires_grad for p in parameters)
        owner = nn.ModuleList(replaced)
        stays = point.kind == "chain" or region.read_by_convolution is not region.source
        try:
            symbol = solve(found)
            layout = (region.layout_in_place if stays else None) or symbol.source.layout
            like = reference_tensor(owner if has_parameters(owner) else host)
            conv = to_module(over_axes(symbol.map, layout.spatial), like, layout, requires_grad=trainable)
        except ReparamError as error:  # with values, more is known than with shapes; or a weight overflows the dtype
            self.failed |= dict.fromkeys(replaced, str(error))
            return
        same_axes = symbol.has_axes_of_source and layout == symbol.layout
        # Code that reshapes to recorded sizes only runs on a tensor of the recorded shape.
        shape = symbol.source.shape if region.reads_sizes or not same_axes else None
        proof = NOT_PROVEN
        if self.prove:
            image = image_for(symbol.map, symbol.source.layout, shape)
            proof = prove_region(original_in_float64(found), image, conv if same_axes else MergedChain(region, conv))
        if proof.failure:
            self._fail(replaced, proof)
            return
        # A convolution is the same function in both modes, but code may read the flag.
        conv.train(host.training)
        new: nn.Module = conv
        if point.kind == "module" and point.host not in rewriters:
            name = point.host
            self.substitute(host, _with_attributes_of(host, conv))
        elif point.kind == "chain":
            name, new = self._insert_in_place(scope, found, conv, rewriters)
        else:
            rewriter = rewriters[point.host]
            name = rewriter.insert_call(conv, region.source, region.replaced)
            for node, remaining in region.removed:
                rewriter.remove(node, remaining)
            # A module that other code calls or reads needs a real copy.
            kept = scope.placement.used_elsewhere(region)
            absorbed += [part for part in modules if part not in kept]
        entry = folded_entry(join(scope.path, name), found, symbol, parameters, proof.text)
        norms = [get(path) for more in found.absorbed for path in more.norm.called_modules]
        self.done.append(Replaced(entry, new, [*replaced, *norms]))

    def _scale_transposed(self, scope: Scope, found: Replacement, rewriters: dict[str, ForwardRewriter]) -> None:
        """Fold a region into the transposed convolution that is its source."""
        region = found.region
        path = str(region.source.target)
        old: Any = scope.module.get_submodule(path)
        modules = [old, *map(scope.module.get_submodule, region.called_modules)]
        try:
            new: Any = scale_transposed(old, solve_region(region).map)
        except ReparamError as error:
            self.failed |= dict.fromkeys(modules, str(error))
            return
        proof = NOT_PROVEN
        if self.prove:
            transposed, scaling = module_in_float64(old, algebra_device(old.weight)), region_in_float64(region)
            chain = MergedChain(region, new)
            proof = prove_region(lambda x: scaling(transposed(x)), image_for_transposed(old), chain)
        if proof.failure:
            self._fail(modules, proof)
            return
        self._insert_in_place(scope, found, new, rewriters)
        steps = [part_of_step(scope.module, step) for step in region.steps if step.computes]
        # Per input pixel, every weight of a transposed convolution is used once, whatever its stride.
        macs = float(old.weight.numel())
        entry = Folded(
            join(scope.path, path),
            (Part(path, describe_module(old)), *steps),
            describe_module(new),
            parameters_before=sum(p.numel() for p in parameters_of(region, modules)),
            parameters_after=sum(p.numel() for p in new.parameters()),
            multiply_adds_before=macs,
            multiply_adds_after=macs,
            proof=proof.text,
        )
        self.done.append(Replaced(entry, new, modules))

    def _insert_in_place(
        self, scope: Scope, found: Replacement, conv: nn.Module, rewriters: dict[str, ForwardRewriter]
    ) -> tuple[str, nn.Module]:
        """Put the convolution where the first one was, and identities where the others were.

        Return its path, and the module there: another one, if a module keeps its forward and gets the new kernel.
        """
        region, whole = found.region, found.insertion.whole
        target, before, name, new = region.first_convolution, region.source, "", conv
        nodes = [(step.node, step.computes) for step in region.steps]
        for node, computes in [(target, True), *nodes] if target is before else nodes:
            if node.op == "call_module" and node is target:
                name = str(node.target)
                module = scope.module.get_submodule(name)
                self.substitute(module, _with_attributes_of(module, conv))
            elif node is target and whole:
                name, old = whole, scope.module.get_submodule(whole)
                self.substitute(old, _with_attributes_of(old, conv))
            elif computes and node is target and own_kernel(region, scope.recording) is not None:
                name = scope.recording.owner(node)
                old = scope.module.get_submodule(name)
                new = object.__new__(type(old))
                self.substitute(old, new)
                self._kernel_owners.append((old, new, conv))
            elif computes and node is target:
                name = rewriters[scope.recording.owner(node)].insert_call(conv, before, node)
            elif computes:  # what only reshapes or averages stays: Region.run_in_place proves the chain with it
                self._remove(scope, node, before, rewriters)
            before = node
        return name, new

    def _remove(self, scope: Scope, node: fx.Node, before: fx.Node, rewriters: dict[str, ForwardRewriter]) -> None:
        """Let a node that returned a function of ``before`` return that as it is."""
        if node.op == "call_module":
            module = scope.module.get_submodule(str(node.target))
            self.substitute(module, _with_attributes_of(module, nn.Identity()))
        else:
            rewriters[scope.recording.owner(node)].remove(node, before)

    def _fail(self, modules: list[nn.Module], proof: Proof) -> None:
        reason = f"its merged form is not equal to it: {proof.failure}"
        self.failed |= {part: reason for module in modules for part in module.modules()}

    def fill_kernel_owners(self) -> None:
        """Copy the modules that keep their forward, with the new kernels, once all that is inside them is known."""
        for old, new, conv in self._kernel_owners:
            state = {
                name: value for name, value in vars(old).items() if name not in ("_parameters", "_compiled_call_impl")
            }
            vars(new).update(deep_copy(state, self.memo, old))
            others = {name: value for name, value in old._parameters.items() if name not in ("weight", "bias")}
            vars(new)["_parameters"] = {**deep_copy(others, self.memo, old), **conv._parameters}

    def find_lost(self, plain: nn.Module) -> Reasons:
        """Return modules whose convolution is missing in the copy, because a ``__deepcopy__`` ignored the memo."""
        inside = set(plain.modules())
        lost = [done.modules for done in self.done if done.conv not in inside]
        return {part: "the module around it has its own __deepcopy__" for modules in lost for part in modules}


def _with_attributes_of(old: nn.Module, new: Module) -> Module:
    """Set ``new`` to the mode of ``old``, and copy plain attributes of ``old`` that other code may read."""
    for name, value in vars(old).items():
        if isinstance(value, _PLAIN_DATA) and not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, copy.copy(value))
    new.training = old.training
    return new


def _detach(plain: nn.Module, path: str) -> None:
    """Remove a dropped submodule from the copy."""
    owner_path, _, name = path.rpartition(".")
    try:
        owner = plain.get_submodule(owner_path)
    except AttributeError:  # the owner itself was replaced
        return
    if isinstance(owner, nn.ModuleDict):
        del owner[name]
    elif not isinstance(owner, (nn.Sequential, nn.ModuleList)):  # these would renumber what follows
        setattr(owner, name, None)
