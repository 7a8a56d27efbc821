"""A plan carried out: a new model with the regions replaced, everything else copied, the original untouched."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from repvgg.algebra import ConvMap
from repvgg.collapse.copies import copied, copies_of_results
from repvgg.collapse.cost import Cost
from repvgg.collapse.emit import Plain, describe, to_module
from repvgg.collapse.graft import Graft
from repvgg.collapse.modules import join
from repvgg.collapse.plan import Plan, Rewrite, Whole
from repvgg.collapse.proof import prove
from repvgg.collapse.regions import Region
from repvgg.collapse.report import Folded, Part
from repvgg.collapse.values import Evaluator, Step
from repvgg.errors import ReparamError
from repvgg.symbolic import Layout, Source, SymbolicTensor, algebra_device, first_float, run

Module = TypeVar("Module", bound=nn.Module)
_PLAIN = (bool, int, float, str, tuple, list, type(None))


@dataclass(frozen=True, eq=False)
class Outcome:
    """A plan carried out.

    Attributes:
        plain: the new model.
        folded: what was folded.
        refused: modules, by their identity, that cannot be replaced after all, and why: the plan has to do without.
    """

    plain: nn.Module
    folded: tuple[Folded, ...]
    refused: dict[int, str]


def carry_out(model: nn.Module, plan: Plan) -> Outcome:
    """Build the plain model and say what was folded.

    Copying is one deep copy in which every replaced module is found already copied, as what replaces it.

    Raises:
        ReparamError: something in the model cannot be copied; the text names it.
    """
    builder = _Builder(model)
    builder.memo.update({id(model.get_submodule(path)): nn.Identity() for path in plan.dropped})
    with torch.no_grad():
        for whole in plan.wholes:
            builder.replace_whole(whole)
        for rewrite in plan.rewrites:
            builder.replace_regions(rewrite)
        plain = copied(model, builder.memo, model)
    for path in plan.dropped:
        _detach(plain, path)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    owners = {row.name: order.get(row.name.rpartition(".")[0], len(order)) for row, _, _ in builder.rows}
    rows = sorted((row for row, _, _ in builder.rows), key=lambda row: order.get(row.name, owners[row.name]))
    return Outcome(plain, tuple(rows), builder.refused | builder.misplaced(plain))


class _Builder:
    """Fills the memo of the deep copy with convolutions, and keeps account of them.

    Attributes:
        memo: what stands in the copy for each module, by its identity.
        rows: what was folded, the convolution, and the modules that it replaces.
        refused: see :class:`Outcome`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.memo: dict[int, Any] = copies_of_results(model)
        self.rows: list[tuple[Folded, Plain, list[nn.Module]]] = []
        self.refused: dict[int, str] = {}

    def replace_whole(self, whole: Whole) -> None:
        """Put one convolution in the place of a module."""
        like = _like(whole.module)
        symbol = run(whole.module, Source(), whole.conv.in_channels, device=algebra_device(like))
        parts = [Part(name, describe_module(child)) for name, child in whole.module.named_children()]
        parts = parts or [Part("", describe_module(whole.module))]
        conv = self._emit(symbol.map, symbol.layout, whole.module, [whole.module])
        if conv is not None:
            self.memo[id(whole.module)] = _in_place_of(whole.module, conv)
            row = _entry(whole.path, parts, symbol.map, whole.module, whole.cost)
            self.rows.append((row, conv, list(whole.module.modules())))

    def replace_regions(self, rewrite: Rewrite) -> None:
        """Replace the regions of one module: chains in their own place, others in a new graph of the module."""
        others = [region for region in rewrite.regions.found if not region.is_chain]
        for region in rewrite.regions.found:
            if region.is_chain:
                self._replace_chain(rewrite, region)
        if others:
            self._replace_branches(rewrite, others)

    def _replace_chain(self, rewrite: Rewrite, region: Region) -> None:
        """The first convolution becomes the merged one, the others an identity: the forward stays as it is."""
        place = next(step for step in region.steps if "conv" in step.operations)
        merged = _solve(rewrite.captured.root, region)
        modules = region.modules(rewrite.module)
        owner = nn.ModuleList(modules)
        conv = self._emit(merged, region.value.symbol.layout, owner, modules)
        if conv is None:
            return
        for step, module in zip(region.steps, modules, strict=True):
            self.memo[id(module)] = _in_place_of(module, conv if step is place else nn.Identity())
        path = join(rewrite.path, str(place.node.target))
        row = _entry(path, _parts(rewrite.module, region), merged, owner, region.value.cost)
        self.rows.append((row, conv, modules))

    def _replace_branches(self, rewrite: Rewrite, regions: list[Region]) -> None:
        """All or nothing: the module gets a new forward, and that has to prove itself."""
        module = rewrite.module
        graft = Graft(rewrite, self.memo)
        rows = []
        for region in regions:
            merged = _solve(rewrite.captured.root, region)
            owner = nn.ModuleList(region.modules(module))
            owner_of_dtype = owner if any(True for _ in owner.parameters()) else module
            conv = self._emit(merged, region.value.symbol.layout, owner_of_dtype, [module])
            if conv is None:
                break
            path = join(rewrite.path, graft.replace(region, conv.train(module.training)))
            row = _entry(path, _parts(module, region), merged, owner, region.value.cost)
            rows.append((row, conv, [module]))
        else:
            new = graft.finish()
            proof = prove(module, new, rewrite.regions.channels)
            if proof.failure is None:
                self.rows += [(replace(row, proof=proof.text), conv, modules) for row, conv, modules in rows]
                return
            self.refused[id(module)] = f"its merged form does not prove equal to it: {proof.failure}"
        del self.memo[id(module)]

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
        lost = [modules for _, conv, modules in self.rows if id(conv) not in inside]
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


def _entry(path: str, parts: list[Part], conv: ConvMap, owner: nn.Module, cost: Cost) -> Folded:
    before = sum(p.numel() for p in owner.parameters())
    merged = Cost.of_map(conv)
    after = merged.weights + conv.out_channels
    return Folded(path, tuple(parts), describe(conv), before, after, cost.multiply_adds, merged.multiply_adds)


def describe_module(module: nn.Module) -> str:
    """What a module is made of, such as ``3x3 Conv2d + BatchNorm2d``."""
    leaves = [part for part in module.modules() if not any(part.children()) and not isinstance(part, nn.Identity)]
    return " + ".join(_leaf(part) for part in leaves) or type(module).__name__


def _leaf(part: nn.Module) -> str:
    size = getattr(part, "kernel_size", None)
    prefix = f"{size[0]}x{size[1]} " if isinstance(size, tuple) and len(size) == 2 else ""
    return prefix + type(part).__name__


def _parts(module: nn.Module, region: Region) -> list[Part]:
    return [_part(module, step) for step in region.steps if step.effective]


def _part(module: nn.Module, step: Step) -> Part:
    if step.node.op == "call_module":
        return Part(str(step.node.target), describe_module(module.get_submodule(str(step.node.target))))
    return Part(step.node.name, ", ".join(step.operations))


def _solve(root: nn.Module, region: Region) -> ConvMap:
    """The region's convolution, with its values, in float64."""
    device = algebra_device(first_float(root))
    evaluator = Evaluator(root, lambda tensor: tensor.to(device=device, dtype=torch.float64))
    channels = region.value.symbol.map.in_channels
    start = SymbolicTensor.of(Source(), channels, device=device, layout=region.value.symbol.source.layout)
    values: dict[fx.Node, Any] = {region.source: start}

    def value_of(node: fx.Node) -> Any:
        if node not in values:  # a constant, perhaps computed from others
            is_attribute = node.op == "get_attr"
            values[node] = evaluator.constant(str(node.target)) if is_attribute else evaluator.run(node, value_of)
        return values[node]

    for step in region.steps:
        value_of(step.node)
    outcome: ConvMap = values[region.exit].map
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
