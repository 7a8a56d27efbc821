"""What a collapse did, and what it left alone and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from repvgg.algebra import ConvMap
from repvgg.collapse.cost import Cost
from repvgg.collapse.regions import Region
from repvgg.collapse.symbolic_eval import Step
from repvgg.symbolic import SymbolicTensor


@dataclass(frozen=True)
class Part:
    """Something that was folded: a submodule or an operation, and what it is made of."""

    name: str
    description: str


@dataclass(frozen=True)
class Folded:
    """A linear region that became one convolution.

    Attributes:
        name: path of the convolution in the plain model.
        parts: what was folded into it, in the order of execution.
        convolution: the outcome, in words.
        parameters_before: number of parameters of all parts.
        parameters_after: number of parameters of the convolution.
        multiply_adds_before: per pixel of the region's input; borders aside, where its size is not known.
        multiply_adds_after: the same for the convolution.
        proof: how equal the convolution is to what it replaced; empty if nobody asked.
        pixels: of the region's input, one image of the inputs that were given; None without inputs.
    """

    name: str
    parts: tuple[Part, ...]
    convolution: str
    parameters_before: int
    parameters_after: int
    multiply_adds_before: float
    multiply_adds_after: float
    proof: str = ""
    pixels: int | None = None

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds before and after: for one image if its size is known, else for one pixel of the input."""
        pixels = self.pixels or 1
        return round(self.multiply_adds_before * pixels), round(self.multiply_adds_after * pixels)


@dataclass(frozen=True)
class LeftAlone:
    """Something that stays as it was, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """All that a collapse folded, left alone and dropped.

    Attributes:
        folded: the regions that became convolutions.
        left: what might have been expected to fold, and did not.
        dropped: submodules that run in training mode only; the plain model does without them.
        proof: how equal the plain model is to the model as a whole, or why that could not be found out; empty if nobody
            asked.
        in_pieces: modules whose forward cannot be traced: what is in them was looked at piece by piece.
    """

    folded: tuple[Folded, ...]
    left: tuple[LeftAlone, ...]
    dropped: tuple[LeftAlone, ...]
    proof: str = ""
    in_pieces: tuple[LeftAlone, ...] = ()

    @property
    def parameters_saved(self) -> int:
        """How many parameters fewer the folded regions have."""
        return sum(region.parameters_before - region.parameters_after for region in self.folded)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{len(self.folded)} regions folded, {self.parameters_saved:,} parameters saved"
        for region in self.folded:
            parts = " + ".join(_named(part) for part in region.parts)
            yield f"  {region.name or '(root)'}: {parts} → {region.convolution}"
            macs = " → ".join(f"{count:,}" for count in region.macs)
            per = "" if region.pixels else " a pixel"
            numbers = f"{region.parameters_before:,} → {region.parameters_after:,} parameters"
            yield f"    {numbers}, {macs} multiply-adds{per}{'; ' if region.proof else ''}{region.proof}"
        groups = {"left alone": self.left, "dropped": self.dropped, "looked at in pieces": self.in_pieces}
        for title, rows in groups.items():
            if rows:
                yield f"{len(rows)} {title}"
            for row in rows:
                yield f"  {row.name or '(root)'}: {row.reason}"
        if self.proof:
            yield f"the whole model: {self.proof}"


def _named(part: Part) -> str:
    return f"{part.name} ({part.description})" if part.name else part.description


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


def entry(path: str, parts: list[Part], symbol: SymbolicTensor, owner: nn.Module, cost: Cost, proof: str) -> Folded:
    """The row of a region: what ``owner`` holds becomes the convolution that ``symbol`` stands for."""
    before = sum(p.numel() for p in owner.parameters())
    sizes = symbol.source.sizes
    merged = Cost.of_map(symbol.map, sizes)
    pixels = None if sizes is None else math.prod(sizes)
    counts = (before, merged.weights + symbol.map.out_channels, cost.multiply_adds, merged.multiply_adds)
    return Folded(path, tuple(parts), describe(symbol.map), *counts, proof, pixels)


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


def describe(conv: ConvMap) -> str:
    """A map in words, such as ``3x3 conv 48→96, stride 2`` or ``linear 64→128``."""
    parts = [f"{_kind(conv)} {conv.in_channels}→{conv.out_channels}"]
    parts += [f"stride {_joined(conv.stride)}"] if any(step > 1 for step in conv.stride) else []
    parts += [f"dilation {_joined(conv.dilation)}"] if any(step > 1 for step in conv.dilation) else []
    parts += [f"{conv.groups} groups"] if conv.groups > 1 else []
    parts += [f"{conv.border} padding"] if conv.border not in (None, "zeros") else []
    return ", ".join(parts)


def _kind(conv: ConvMap) -> str:
    if conv.spatial < 2:
        return f"{conv.kernel_size[0]}-tap conv" if conv.spatial else "linear"
    return "x".join(map(str, conv.kernel_size)) + " conv"


def _joined(numbers: tuple[int, ...]) -> str:
    """One number for all axes, if it is the same."""
    return str(numbers[0]) if len(set(numbers)) == 1 else "x".join(map(str, numbers))
