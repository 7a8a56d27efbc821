"""The report of a collapse: what was folded, skipped and dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repvgg._html import table as html_table
from repvgg.algebra import ConvMap
from repvgg.collapse.cost import Cost
from repvgg.collapse.insertion import Replacement
from repvgg.collapse.modules import is_computed_attribute
from repvgg.collapse.recording import constants_of
from repvgg.collapse.region import Region, Step
from repvgg.symbolic import SymbolicTensor


@dataclass(frozen=True)
class Part:
    """A submodule or an operation that was folded, with a description."""

    name: str
    description: str


@dataclass(frozen=True)
class Folded:
    """A linear region that became one convolution.

    Attributes:
        name: path of the convolution in the plain model.
        parts: what was folded into it, in execution order.
        convolution: a description of the result.
        parameters_before: number of parameters of all parts.
        parameters_after: number of parameters of the convolution.
        multiply_adds_before: per pixel of the region's input; borders are ignored unless its size is known.
        multiply_adds_after: the same for the convolution.
        proof: error of the convolution relative to what it replaced, as text; empty without proofs.
        pixels: number of pixels of the region's input, for the given example inputs; None without these.
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
        """Multiply-adds before and after: per image if its size is known, else per pixel of the input."""
        pixels = self.pixels or 1
        return round(self.multiply_adds_before * pixels), round(self.multiply_adds_after * pixels)


@dataclass(frozen=True)
class Skipped:
    """A module that stays unchanged, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True, repr=False)
class Report:
    """Everything that a collapse folded, skipped and dropped.

    Attributes:
        folded: the regions that became convolutions.
        left: modules that might have been expected to fold, and did not.
        dropped: submodules that run in training mode only, or whose results no output depends on, and that the plain
            model does not have.
        proof: error of the plain model relative to the original, or why it could not be measured; empty without
            proofs.
        in_pieces: modules that could not be run; their children were collapsed one by one.
        guards: what the plain model checks in each call of a module, because it holds for the recorded calls only, and
            the methods that it refuses, one entry for each class.
    """

    folded: tuple[Folded, ...]
    left: tuple[Skipped, ...]
    dropped: tuple[Skipped, ...]
    proof: str = ""
    in_pieces: tuple[Skipped, ...] = ()
    guards: tuple[Skipped, ...] = ()

    @property
    def number_with_inputs(self) -> int:
        """How many parts that stay may fold if it is known how the model is called."""
        return sum("pass inputs=" in skipped.reason for skipped in self.left)

    @property
    def parameters_saved(self) -> int:
        """By how many parameters the folded regions shrank."""
        return sum(region.parameters_before - region.parameters_after for region in self.folded)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"Report({self._summary})"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        rows: list[tuple[object, ...]] = [
            (
                region.name or "(root)",
                " + ".join(part.description for part in region.parts),
                region.convolution,
                region.parameters_before,
                region.parameters_after,
            )
            for region in self.folded
        ]
        rows += [(one.name or "(root)", f"skipped: {one.reason}", "", "", "") for one in self.left]
        rows += [(one.name or "(root)", f"dropped: {one.reason}", "", "", "") for one in self.dropped]
        columns = ("region", "before", "after", "parameters before", "parameters after")
        return html_table(self._summary + (f"; {self.proof}" if self.proof else ""), columns, rows)

    @property
    def _counts(self) -> str:
        return f"{len(self.folded)} regions folded, {self.parameters_saved:,} parameters saved"

    @property
    def _summary(self) -> str:
        others = {"skipped": self.left, "dropped": self.dropped}
        return self._counts + "".join(f", {len(entries)} {what}" for what, entries in others.items() if entries)

    def _lines(self) -> Iterator[str]:
        more = f"; {self.number_with_inputs} more parts may fold with inputs=" if self.number_with_inputs else ""
        yield f"{self._counts}{more}"
        for region in self.folded:
            parts = " + ".join(f"{p.name} ({p.description})" if p.name else p.description for p in region.parts)
            yield f"  {region.name or '(root)'}: {parts} → {region.convolution}"
            macs = " → ".join(f"{count:,}" for count in region.macs)
            per = "" if region.pixels else " a pixel"
            numbers = f"{region.parameters_before:,} → {region.parameters_after:,} parameters"
            yield f"    {numbers}, {macs} multiply-adds{per}{'; ' if region.proof else ''}{region.proof}"
        groups = {"skipped": self.left, "dropped": self.dropped, "searched part by part": self.in_pieces}
        groups["guarded: holds for calls like the given inputs"] = self.guards
        for title, entries in groups.items():
            if entries:
                yield f"{len(entries)} {title}"
            for skipped in entries:
                yield f"  {skipped.name or '(root)'}: {skipped.reason}"
        if self.proof:
            yield f"the whole model: {self.proof}"


@dataclass(frozen=True, eq=False)
class Replaced:
    """A region that was replaced: its entry in the report, the convolution, and the modules that it replaces."""

    entry: Folded
    conv: nn.Module
    modules: list[nn.Module]


def join_passes(first: Sequence[Replaced], second: Sequence[Replaced]) -> list[Replaced]:
    """Combine two passes, the second over the result of the first, some of whose convolutions it folded further."""
    # A convolution of the first pass that the second one folded no longer has an entry.
    absorbed: set[int] = set()
    joined: list[Replaced] = []
    for later in second:
        inside = {part for module in later.modules for part in module.modules()}
        earlier = [done for done in first if done.conv in inside]
        absorbed |= {id(done) for done in earlier}
        joined.append(replace(later, entry=_with_parts_of(later.entry, [done.entry for done in earlier])))
    return [*(done for done in first if id(done) not in absorbed), *joined]


def _with_parts_of(entry: Folded, earlier: Sequence[Folded]) -> Folded:
    # In the list of parts, the convolution of an earlier entry is replaced by the parts of that entry.
    names = {done.name for done in earlier}
    # What the first pass saved is added to the cost before, so that the entry covers both passes.
    saved_macs = sum(e.multiply_adds_before - e.multiply_adds_after for e in earlier)
    return replace(
        entry,
        parts=(*(part for done in earlier for part in done.parts), *(p for p in entry.parts if p.name not in names)),
        parameters_before=entry.parameters_before + sum(e.parameters_before - e.parameters_after for e in earlier),
        multiply_adds_before=entry.multiply_adds_before + saved_macs,
    )


def folded_entry(
    path: str, found: Replacement, symbol: SymbolicTensor, parameters: Sequence[Tensor], proof: str
) -> Folded:
    """Return the entry of a region, which computes with ``parameters`` and becomes the convolution of ``symbol``."""
    sizes = symbol.source.sizes
    merged = Cost.of_map(symbol.map, sizes)
    count = sum(parameter.numel() for parameter in parameters)
    for more in found.absorbed:
        numbers = sum(parameter.numel() for parameter in parameters_of(more.norm))
        count += numbers * len(more.places[0]) // more.norm.value.symbol.map.out_channels
    return Folded(
        path,
        tuple(parts_of(found)),
        describe(symbol.map),
        parameters_before=count,
        parameters_after=merged.weights + symbol.map.out_channels,
        multiply_adds_before=found.region.value.cost.multiply_adds,
        multiply_adds_after=merged.multiply_adds,
        proof=proof,
        pixels=None if sizes is None else math.prod(sizes),
    )


def describe_module(module: nn.Module) -> str:
    """Return what a module consists of, such as ``3x3 Conv2d + BatchNorm2d``."""
    leaves = [part for part in module.modules() if not any(part.children()) and not isinstance(part, nn.Identity)]
    return " + ".join(_leaf(part) for part in leaves) or type(module).__name__


def _leaf(part: nn.Module) -> str:
    size = getattr(part, "kernel_size", None)
    prefix = f"{size[0]}x{size[1]} " if isinstance(size, tuple) and len(size) == 2 else ""
    return prefix + type(part).__name__


def parameters_of(region: Region, modules: Sequence[nn.Module] = ()) -> list[Tensor]:
    """Return the parameters of ``modules``, and those that the functions of a region compute with."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    model = region.recording.module
    for node in [n for step in region.steps for n in (step.node, *constants_of(step.node))]:
        path = str(node.target)
        if node.op == "call_module":
            parameters += model.get_submodule(path).parameters()
        elif node.op == "get_attr" and is_computed_attribute(model, path):
            parameters += model.get_submodule(path.rpartition(".")[0]).parameters()
        elif node.op == "get_attr" and isinstance(value := region.recording.constant(node), nn.Parameter):
            parameters.append(value)
    return list({id(parameter): parameter for parameter in parameters}.values())


def parts_of(found: Replacement) -> list[Part]:
    """Return the steps of a region and the norms that it absorbs; if it is a single module, the children of that."""
    region, model = found.region, found.region.recording.module
    steps = [step for step in region.steps if step.computes]
    if not found.absorbed and len(steps) == 1 and steps[0].node.op == "call_module":
        return parts_of_module(model.get_submodule(str(steps[0].node.target)))
    parts = [part_of_step(model, step, region.recording.owner(step.node)) for step in steps]
    for more in found.absorbed:
        part = part_of_step(model, more.norm.steps[0], more.norm.recording.owner(more.norm.exit))
        taken, channels = len(more.places[0]), more.norm.value.symbol.map.out_channels
        if taken < channels:
            part = Part(part.name, f"{part.description} of {taken} of {channels} channels")
        parts.append(part)
    return parts


def part_of_step(scope: nn.Module, step: Step, owner: str = "") -> Part:
    """Return the description of one step of a region, which the forward of the module at ``owner`` runs."""
    layer = scope.get_submodule(owner)
    if step.node.op != "call_module" and isinstance(layer, (_ConvNd, _BatchNorm, nn.Linear)):
        return Part(owner, _leaf(layer))  # a layer with a forward of its own
    if step.node.op == "call_module":
        return Part(str(step.node.target), describe_module(scope.get_submodule(str(step.node.target))))
    return Part(step.node.name, ", ".join(step.operations))


def parts_of_module(module: nn.Module) -> list[Part]:
    """Return the children of a module, or the module itself if it has none."""
    parts = [Part(name, describe_module(child)) for name, child in module.named_children()]
    return parts or [Part("", describe_module(module))]


def describe(conv: ConvMap) -> str:
    """Describe a map, such as ``3x3 conv 48→96, stride 2`` or ``linear 64→128``."""
    if conv.spatial >= 2:
        kind = "x".join(map(str, conv.kernel_size)) + " conv"
    else:
        kind = f"{conv.kernel_size[0]}-tap conv" if conv.spatial else "linear"
    parts = [f"{kind} {conv.in_channels}→{conv.out_channels}"]
    parts += [f"stride {_per_axis(conv.stride)}"] if any(step > 1 for step in conv.stride) else []
    parts += [f"dilation {_per_axis(conv.dilation)}"] if any(step > 1 for step in conv.dilation) else []
    parts += [f"{conv.groups} groups"] if conv.groups > 1 else []
    parts += [f"{conv.border} padding"] if conv.border not in (None, "zeros") else []
    return ", ".join(parts)


def _per_axis(numbers: tuple[int, ...]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else "x".join(map(str, numbers))
