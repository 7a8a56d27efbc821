"""The rows of a report: what was replaced, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from repvgg.collapse.cost import Cost
from repvgg.collapse.emit import describe
from repvgg.collapse.placing import Region
from repvgg.collapse.proof import Proof
from repvgg.collapse.report import Folded, Part
from repvgg.collapse.values import Step
from repvgg.symbolic import SymbolicTensor


@dataclass(frozen=True, eq=False)
class Replaced:
    """A region that was replaced: the row of the report, the convolution, and the modules that it replaces."""

    row: Folded
    conv: nn.Module
    modules: list[nn.Module]


def joined(first: Sequence[Replaced], second: Sequence[Replaced]) -> list[Replaced]:
    """What was replaced in two rounds, the second on the outcome of the first: some of that is part of it."""
    absorbed: set[int] = set()
    rows: list[Replaced] = []
    for later in second:
        inside = {id(part) for module in later.modules for part in module.modules()}
        earlier = [done for done in first if id(done.conv) in inside]
        absorbed |= {id(done) for done in earlier}
        rows.append(replace(later, row=_with_parts_of(later.row, [done.row for done in earlier])))
    return [*(done for done in first if id(done) not in absorbed), *rows]


def _with_parts_of(row: Folded, earlier: Sequence[Folded]) -> Folded:
    names = {done.name for done in earlier}
    return replace(
        row,
        parts=(*(part for done in earlier for part in done.parts), *(p for p in row.parts if p.name not in names)),
        parameters_before=row.parameters_before + sum(e.parameters_before - e.parameters_after for e in earlier),
        multiply_adds_before=row.multiply_adds_before
        + sum(e.multiply_adds_before - e.multiply_adds_after for e in earlier),
    )


def entry(path: str, parts: list[Part], symbol: SymbolicTensor, owner: nn.Module, cost: Cost, proof: Proof) -> Folded:
    """The row of a region: what ``owner`` holds becomes the convolution that ``symbol`` stands for."""
    before = sum(p.numel() for p in owner.parameters())
    sizes = symbol.source.sizes
    merged = Cost.of_map(symbol.map, sizes)
    pixels = None if sizes is None else math.prod(sizes)
    counts = (before, merged.weights + symbol.map.out_channels, cost.multiply_adds, merged.multiply_adds)
    return Folded(path, tuple(parts), describe(symbol.map), *counts, proof.text, pixels)


def describe_module(module: nn.Module) -> str:
    """What a module is made of, such as ``3x3 Conv2d + BatchNorm2d``."""
    leaves = [part for part in module.modules() if not any(part.children()) and not isinstance(part, nn.Identity)]
    return " + ".join(_leaf(part) for part in leaves) or type(module).__name__


def _leaf(part: nn.Module) -> str:
    size = getattr(part, "kernel_size", None)
    prefix = f"{size[0]}x{size[1]} " if isinstance(size, tuple) and len(size) == 2 else ""
    return prefix + type(part).__name__


def parts_in(unit: nn.Module, region: Region) -> list[Part]:
    """What a region is made of; if that is one module only, what that is made of."""
    steps = [step for step in region.steps if step.effective]
    if len(steps) == 1 and steps[0].node.op == "call_module":
        return parts_of(unit.get_submodule(str(steps[0].node.target)))
    return [part_of(unit, step) for step in steps]


def part_of(unit: nn.Module, step: Step) -> Part:
    """A step of a region in words."""
    if step.node.op == "call_module":
        return Part(str(step.node.target), describe_module(unit.get_submodule(str(step.node.target))))
    return Part(step.node.name, ", ".join(step.operations))


def parts_of(module: nn.Module) -> list[Part]:
    """The children of a module, or the module itself where it has none."""
    parts = [Part(name, describe_module(child)) for name, child in module.named_children()]
    return parts or [Part("", describe_module(module))]
