"""A plan carried out: a new model with the regions replaced, everything else copied, the original untouched."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from repvgg.algebra import ConvMap
from repvgg.collapse.cost import Cost
from repvgg.collapse.emit import describe, to_conv2d
from repvgg.collapse.graft import Graft
from repvgg.collapse.plan import Plan, Rewrite, Whole, join
from repvgg.collapse.regions import Region
from repvgg.collapse.report import Folded, Part
from repvgg.collapse.values import Evaluator, Step
from repvgg.errors import ReparamError
from repvgg.symbolic import Source, SymbolicTensor, algebra_device, first_float, run

Module = TypeVar("Module", bound=nn.Module)
_PLAIN = (bool, int, float, str, tuple, list, type(None))


def carry_out(model: nn.Module, plan: Plan) -> tuple[nn.Module, list[Folded]]:
    """Build the plain model and say what was folded.

    Copying is one deep copy in which every replaced module is found already copied, as what replaces it.
    """
    memo: dict[int, Any] = {}
    for path in plan.dropped:
        memo[id(model.get_submodule(path))] = nn.Identity()
    folded: list[Folded] = []
    with torch.no_grad():
        for whole in plan.wholes:
            memo[id(whole.module)] = _replace_whole(whole, folded)
        for rewrite in plan.rewrites:
            _replace_regions(rewrite, memo, folded)
    plain: nn.Module = copy.deepcopy(model, memo)
    for path in plan.dropped:
        _detach(plain, path)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return plain, sorted(folded, key=lambda region: order.get(region.name, len(order)))


def _replace_whole(whole: Whole, folded: list[Folded]) -> nn.Conv2d:
    like = _like(whole.module)
    symbol = run(whole.module, Source(), whole.conv.in_channels, device=algebra_device(like))
    parts = [Part(name, describe_module(child)) for name, child in whole.module.named_children()]
    parts = parts or [Part("", describe_module(whole.module))]
    parameters = sum(p.numel() for p in whole.module.parameters())
    conv = _in_place_of(whole.module, _emit(symbol.map, whole.module))
    folded.append(_entry(whole.path, parts, symbol.map, conv, parameters, whole.cost))
    return conv


def _emit(conv: ConvMap, owner: nn.Module) -> nn.Conv2d:
    """The convolution, in the mode of ``owner``; it is trainable iff anything in its place was."""
    parameters = list(owner.parameters())
    trainable = not parameters or any(p.requires_grad for p in parameters)
    module = to_conv2d(conv, _like(owner), requires_grad=trainable)
    return module.train(owner.training)


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


def _entry(path: str, parts: list[Part], conv: ConvMap, module: nn.Conv2d, parameters: int, cost: Cost) -> Folded:
    after = sum(p.numel() for p in module.parameters())
    merged = Cost.of_map(conv).multiply_adds
    return Folded(path, tuple(parts), describe(conv), parameters, after, cost.multiply_adds, merged)


def describe_module(module: nn.Module) -> str:
    """What a module is made of, such as ``3x3 Conv2d + BatchNorm2d``."""
    leaves = [part for part in module.modules() if not any(part.children()) and not isinstance(part, nn.Identity)]
    return " + ".join(_leaf(part) for part in leaves) or type(module).__name__


def _leaf(part: nn.Module) -> str:
    size = getattr(part, "kernel_size", None)
    prefix = f"{size[0]}x{size[1]} " if isinstance(size, tuple) and len(size) == 2 else ""
    return prefix + type(part).__name__


def _replace_regions(rewrite: Rewrite, memo: dict[int, Any], folded: list[Folded]) -> None:
    """Put the regions of one module in the memo: chains in their own place, others in a new graph of the module."""
    others = [region for region in rewrite.regions.found if not region.is_chain]
    for region in rewrite.regions.found:
        if region.is_chain:
            _replace_chain(rewrite, region, memo, folded)
    if others:
        graft = Graft(rewrite, memo)
        folded.extend([_replace_branches(rewrite, region, graft) for region in others])
        memo[id(rewrite.module)] = graft.finish()


def _replace_branches(rewrite: Rewrite, region: Region, graft: Graft) -> Folded:
    merged = _solve(rewrite.captured.root, region)
    owner = nn.ModuleList(region.modules(rewrite.module))
    owner.training = rewrite.module.training
    conv = _emit(merged, owner if any(True for _ in owner.parameters()) else rewrite.module)
    parameters = sum(p.numel() for p in owner.parameters())
    path = join(rewrite.path, graft.replace(region, conv))
    return _entry(path, _parts(rewrite.module, region), merged, conv, parameters, region.value.cost)


def _replace_chain(rewrite: Rewrite, region: Region, memo: dict[int, Any], folded: list[Folded]) -> None:
    """The first convolution of the chain becomes the merged one, the others an identity: the forward stays as it is."""
    place = next(step for step in region.steps if "conv" in step.operations)
    merged = _solve(rewrite.captured.root, region)
    modules = region.modules(rewrite.module)
    owner = nn.ModuleList(modules)
    owner.training = rewrite.module.get_submodule(str(place.node.target)).training
    conv = _emit(merged, owner)
    for step, module in zip(region.steps, modules, strict=True):
        memo[id(module)] = _in_place_of(module, conv if step is place else nn.Identity())
    path = join(rewrite.path, str(place.node.target))
    parameters = sum(p.numel() for p in owner.parameters())
    folded.append(_entry(path, _parts(rewrite.module, region), merged, conv, parameters, region.value.cost))


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
    values: dict[fx.Node, Any] = {region.source: SymbolicTensor.of(Source(), channels, device=device)}

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
