"""A plan carried out: a new model with the regions replaced, everything else copied, the original untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from repvgg.algebra import ConvMap
from repvgg.collapse.copies import copied, copies_of_results
from repvgg.collapse.emit import Plain, to_module
from repvgg.collapse.evaluator import Evaluator
from repvgg.collapse.graft import Graft, grafts_of
from repvgg.collapse.modules import join
from repvgg.collapse.placing import Placing, Region
from repvgg.collapse.planned import Plan, Unit, Whole
from repvgg.collapse.proof import Proof, image_for, prove_region, small_input
from repvgg.collapse.report import Folded, Part
from repvgg.collapse.rows import Replaced, describe_module, entry, part_of, parts_in, parts_of
from repvgg.collapse.transposed import scaled
from repvgg.errors import ReparamError
from repvgg.symbolic import Layout, Source, SymbolicTensor, algebra_device, first_float, run, shadow_of

Module = TypeVar("Module", bound=nn.Module)
_PLAIN = (bool, int, float, str, tuple, list, type(None))


@dataclass(frozen=True, eq=False)
class Outcome:
    """A plan carried out.

    Attributes:
        plain: the new model.
        replaced: what was folded, in the order of the model.
        refused: modules, by their identity, that cannot be replaced after all, and why: the plan has to do without.
    """

    plain: nn.Module
    replaced: tuple[Replaced, ...]
    refused: dict[int, str]


def carry_out(model: nn.Module, plan: Plan, *, prove: bool) -> Outcome:
    """Build the plain model and say what was folded; if asked to ``prove``, judge each convolution as it is made.

    Copying is one deep copy in which every replaced module is found already copied, as what replaces it.

    Raises:
        ReparamError: something in the model cannot be copied; the text names it.
    """
    builder = _Builder(model, prove)
    builder.memo.update({id(model.get_submodule(path)): nn.Identity() for path in plan.dropped})
    with torch.no_grad():
        for whole in plan.wholes:
            builder.replace_whole(whole)
        for unit in plan.units:
            builder.replace_unit(unit)
        plain = copied(model, builder.memo, model)
    for path in plan.dropped:
        _detach(plain, path)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}

    def place(done: Replaced) -> int:
        name = done.row.name
        return order.get(name, order.get(name.rpartition(".")[0], len(order)))

    return Outcome(plain, tuple(sorted(builder.done, key=place)), builder.refused | builder.misplaced(plain))


class _Builder:
    """Fills the memo of the deep copy with convolutions, and keeps account of them.

    Attributes:
        memo: what stands in the copy for each module, by its identity.
        done: what was replaced.
        refused: see :class:`Outcome`.
    """

    def __init__(self, model: nn.Module, prove: bool) -> None:
        self.prove = prove
        self.memo: dict[int, Any] = copies_of_results(model)
        self.done: list[Replaced] = []
        self.refused: dict[int, str] = {}

    def replace_whole(self, whole: Whole) -> None:
        """Put one convolution in the place of a module."""
        device = algebra_device(_like(whole.module))
        symbol = run(whole.module, Source(), whole.conv.in_channels, device=device, layout=whole.layout)
        conv = self._emit(symbol.map, symbol.layout, whole.module, [whole.module])
        if conv is None:
            return
        proof = self._prove(lambda: _module_in_float64(whole.module, device), symbol, conv)
        if proof.failure:
            self._refuse([whole.module], proof)
            return
        self.memo[id(whole.module)] = _in_place_of(whole.module, conv)
        row = entry(whole.path, parts_of(whole.module), symbol, whole.module, whole.cost, proof)
        self.done.append(Replaced(row, conv, list(whole.module.modules())))

    def _prove(self, before: Callable[[], Callable[[Tensor], Tensor]], symbol: SymbolicTensor, after: Plain) -> Proof:
        """Judge a convolution against what ``before`` makes; this makes it only if it is asked to prove."""
        if not self.prove:
            return Proof(None, "", ran=False)
        return prove_region(before(), image_for(symbol.map, symbol.source.layout), after)

    def _refuse(self, modules: list[nn.Module], proof: Proof) -> None:
        reason = f"its merged form does not prove equal to it: {proof.failure}"
        self.refused |= {id(part): reason for module in modules for part in module.modules()}

    def replace_unit(self, unit: Unit) -> None:
        """Replace the regions of one unit: paths in their own places, others by a call in a new forward."""
        grafts = grafts_of(unit.flat, unit.placings())
        distinct = list({id(graft): graft for graft in grafts.values()}.values())
        for graft in distinct:
            self.memo |= graft.copies()
        gone: list[nn.Module] = []
        for region, placing in unit.regions.found:
            self._replace(unit, region, placing, grafts, gone)
        for region, _ in unit.regions.scaled:
            self._scale(unit, region, grafts)
        self.memo |= {id(part): nn.Identity() for part in gone}
        for graft in distinct:
            graft.copy_state(self.memo, unit.path)
            graft.finish()
        for part in gone:
            del self.memo[id(part)]

    def _replace(
        self, unit: Unit, region: Region, placing: Placing, grafts: dict[str, Graft], gone: list[nn.Module]
    ) -> None:
        """Replace one region; modules that its merged convolution leaves nothing of are added to ``gone``."""
        symbol = solve(region)
        merged = symbol.map
        modules = [unit.module.get_submodule(path) for path in region.called]
        host = unit.module.get_submodule(placing.host)
        owner = nn.ModuleList(modules) if modules else host
        of_dtype = owner if any(True for _ in owner.parameters()) else host
        conv = self._emit(merged, symbol.layout, of_dtype, modules or [host])
        if conv is None:
            return
        proof = self._prove(lambda: _in_float64(region), symbol, conv)
        if proof.failure:
            self._refuse(modules or [host], proof)
            return
        conv.train(host.training)
        if placing.in_place:
            name = self._in_place(unit, region, conv, grafts)
        else:
            graft = grafts[placing.host]
            name = graft.call(conv, region.source, region.exit)
            for step in reversed(region.steps[:-1]):
                graft.take_out(step.node, region.source)
            gone += modules
        row = entry(join(unit.path, name), parts_in(unit.module, region), symbol, owner, region.value.cost, proof)
        self.done.append(Replaced(row, conv, modules or [host]))

    def _scale(self, unit: Unit, region: Region, grafts: dict[str, Graft]) -> None:
        """Fold a region into the transposed convolution that is its source."""
        path = str(region.source.target)
        old: Any = unit.module.get_submodule(path)
        modules = [old, *map(unit.module.get_submodule, region.called)]
        try:
            new: Any = scaled(old, solve(region).map)
        except ReparamError as error:
            self.refused |= {id(module): str(error) for module in modules}
            return
        proof = Proof(None, "", ran=False)
        if self.prove:
            first, then = _module_in_float64(old, algebra_device(old.weight)), _in_float64(region)
            proof = prove_region(lambda x: then(first(x)), small_input(old), new)
        if proof.failure:
            self._refuse(modules, proof)
            return
        self._in_place(unit, region, new, grafts)
        parts = [Part(path, describe_module(old)), *(part_of(unit.module, s) for s in region.steps if s.effective)]
        before, after = (sum(p.numel() for p in part.parameters()) for part in (nn.ModuleList(modules), new))
        adds = float(old.weight.numel())
        row = Folded(join(unit.path, path), tuple(parts), describe_module(new), before, after, adds, adds, proof.text)
        self.done.append(Replaced(row, new, modules))

    def _in_place(self, unit: Unit, region: Region, conv: nn.Module, grafts: dict[str, Graft]) -> str:
        """Put the convolution where the first one was, and nothing where the others were; the outcome is its path."""
        place, before, name = region.first_convolution, region.source, ""
        nodes = [(step.node, step.effective) for step in region.steps]
        for node, effective in [(place, True), *nodes] if place is before else nodes:
            if node.op == "call_module":
                module = unit.module.get_submodule(str(node.target))
                self.memo[id(module)] = _in_place_of(module, conv if node is place else nn.Identity())
                name = str(node.target) if node is place else name
            elif effective:
                graft = grafts[unit.flat.owner(node)]
                if node is place:
                    name = graft.call(conv, before, node)
                else:
                    graft.take_out(node, before)
            before = node
        return name

    def _emit(self, conv: ConvMap, layout: Layout, owner: nn.Module, replaced: list[nn.Module]) -> Plain | None:
        """The convolution, trainable iff anything in its place was; None if its numbers do not fit the dtype."""
        parameters = list(owner.parameters())
        trainable = not parameters or any(p.requires_grad for p in parameters)
        try:
            return to_module(conv, _like(owner), layout, requires_grad=trainable)
        except ReparamError as error:
            self.refused |= {id(module): str(error) for module in replaced}
            return None

    def misplaced(self, plain: nn.Module) -> dict[int, str]:
        """Modules whose convolution is not in the copy, because something copies itself in a way of its own."""
        inside = {id(part) for part in plain.modules()}
        lost = [done.modules for done in self.done if id(done.conv) not in inside]
        return {id(part): "what it is in has a __deepcopy__ of its own" for modules in lost for part in modules}


def _in_place_of(old: nn.Module, new: Module) -> Module:
    """``new`` in the mode of ``old``, with the plain attributes of ``old`` that others may read."""
    for name, value in vars(old).items():
        if isinstance(value, _PLAIN) and not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, copy.copy(value))
    new.training = old.training
    return new


def _like(module: nn.Module) -> Tensor:
    """The tensor that tells dtype, device and memory format: the largest kernel, else the first number."""
    kernels = [p for p in module.parameters() if p.dim() == 4]
    like = max(kernels, key=Tensor.numel) if kernels else first_float(module)
    if like is None:
        raise ReparamError("a module without any floating-point tensor cannot become a convolution")
    return like


def _float64_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device=device, dtype=torch.float64)


def _module_in_float64(module: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A module as it is, a function on float64."""
    shadow = shadow_of(module, _float64_on(device), training=False)
    return lambda x: shadow(x.to(device))


def _in_float64(region: Region) -> Callable[[Tensor], Tensor]:
    """The region as it is, a function on float64."""
    device = algebra_device(first_float(region.flat.module))
    evaluator = Evaluator(region.flat, _float64_on(device), keep_kernels=False)
    return lambda x: evaluator.outcome(region.source, x.to(device), [step.node for step in region.steps])


def solve(region: Region) -> SymbolicTensor:
    """The region's convolution, with its values, in float64."""
    device = algebra_device(first_float(region.flat.module))
    evaluator = Evaluator(region.flat, _float64_on(device))
    layout = region.value.symbol.source.layout
    source = SymbolicTensor.of(Source(), region.value.symbol.map.in_channels, device=device, layout=layout)
    source.source.sizes = region.value.symbol.source.sizes
    outcome: SymbolicTensor = evaluator.outcome(region.source, source, [step.node for step in region.steps])
    return outcome


def _detach(plain: nn.Module, path: str) -> None:
    """Take a dropped submodule out of the copy."""
    owner_path, _, name = path.rpartition(".")
    try:
        owner = plain.get_submodule(owner_path)
    except AttributeError:  # the owner itself was replaced
        return
    if isinstance(owner, nn.ModuleDict):
        del owner[name]
    elif not isinstance(owner, (nn.Sequential, nn.ModuleList)):
        setattr(owner, name, None)
