"""What is going to be replaced in a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from repvgg.algebra import ConvMap
from repvgg.collapse.capture import Capture
from repvgg.collapse.cost import Cost
from repvgg.collapse.flat import Flat
from repvgg.collapse.modules import join
from repvgg.collapse.placing import Placing
from repvgg.collapse.regions import Regions
from repvgg.collapse.report import LeftAlone
from repvgg.collapse.values import Expected
from repvgg.symbolic import Layout


@dataclass(frozen=True, eq=False, repr=False)
class Whole:
    """A module that is one convolution as a whole."""

    path: str
    module: nn.Module
    conv: ConvMap
    cost: Cost
    layout: Layout


@dataclass(frozen=True, eq=False, repr=False)
class Unit:
    """A module whose own forward, and those written out in it, hold linear regions."""

    path: str
    module: nn.Module
    flat: Flat
    regions: Regions

    def replaced(self) -> Iterator[nn.Module]:
        """The submodules that become parts of convolutions."""
        return (self.module.get_submodule(path) for path in self._called())

    def _called(self) -> Iterator[str]:
        for region, _ in (*self.regions.found, *self.regions.scaled):
            yield from region.called
        yield from (str(region.source.target) for region, _ in self.regions.scaled)

    def inputs(self, path: str) -> tuple[Expected | None, ...]:
        """What the module takes at ``path`` below the unit, None where nothing tells."""
        inputs = (node for node in self.flat.captures[path].graph.nodes if node.op == "placeholder")
        nodes = (self.flat.value[path, node] for node in inputs)
        return tuple(self.regions.expected(n) if isinstance(n, fx.Node) else None for n in nodes)

    def placings(self) -> list[Placing]:
        """How the regions are replaced."""
        return [placing for _, placing in (*self.regions.found, *self.regions.scaled)]

    def rewritten(self) -> set[str]:
        """The paths, below the unit, of modules that get a new forward."""
        return {path for placing in self.placings() for path in placing.rewritten}

    def changed(self) -> Iterator[str]:
        """The paths, in the model, of everything that is replaced."""
        inner = {*self._called(), *self.rewritten()}
        return (join(self.path, path) for path in inner)


@dataclass(repr=False)
class Plan:
    """Replacements, inner ones first; what is dropped; and for modules that stay, why.

    ``captured`` are the modules whose own code keeps running over what is replaced in them, with their paths;
    ``called`` is what these call.
    """

    wholes: list[Whole] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
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

    def hosts(self) -> Iterator[tuple[str, tuple[Expected | None, ...]]]:
        """The paths of modules that get a new forward, with what it takes, outer ones first."""
        for unit in reversed(self.units):
            written_out = {path for placing in unit.placings() for path in placing.inlined}
            for path in sorted(unit.rewritten() - written_out):
                yield join(unit.path, path), unit.inputs(path)

    def inputs(self) -> tuple[Expected | None, ...]:
        """What the model takes, as far as that is known."""
        return next((unit.inputs("") for unit in self.units if not unit.path), ())

    @property
    def may_leave_more(self) -> bool:
        """Whether there may be something to replace in the outcome, too."""
        return any(unit.regions.were_cut for unit in self.units)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to replace."""
        return not self.wholes and not self.units
