"""What was found out about the modules of one model, each thing once: captures, maps, and effects on memory."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn

from repvgg.algebra import ConvMap
from repvgg.collapse.capture import Capture, capture
from repvgg.collapse.cost import Cost
from repvgg.collapse.memory import Effects, Memory
from repvgg.collapse.modules import has_hooks
from repvgg.errors import ReparamError
from repvgg.symbolic import Layout, Source, SymbolicTensor, run

_COMPUTE = ("conv", "batch_norm", "avg_pool", "scale", "shift", "add", "cat")


@dataclass(frozen=True, eq=False)
class LinearModule:
    """A module that is one convolution as a whole; ``conv`` has geometry and no values."""

    conv: ConvMap
    operations: tuple[str, ...]
    cost: Cost
    layout: Layout

    @property
    def is_worth_it(self) -> bool:
        """Whether it is a convolution and at least one more thing."""
        return "conv" in self.operations and sum(operation != "identity" for operation in self.operations) >= 2


class Captures:
    """Remembers what was captured of each module, and what that says about memory."""

    def __init__(self, merge_branches: bool = True) -> None:
        self._merge_branches = merge_branches
        self._linear: dict[int, LinearModule | None] = {}
        self._captures: dict[int, Capture | Exception] = {}
        self._memories: dict[int, Memory] = {}
        self._effects: dict[Hashable, Effects] = {}

    def of(self, module: nn.Module) -> Capture:
        """The capture of ``module``.

        Raises:
            Exception: see :func:`repvgg.collapse.capture.capture`; the same one every time.
        """
        if id(module) not in self._captures:
            try:
                self._captures[id(module)] = capture(module)
            except Exception as error:
                self._captures[id(module)] = error
        found = self._captures[id(module)]
        if isinstance(found, Exception):
            raise found
        return found

    def linear(self, module: nn.Module) -> LinearModule | None:
        """The convolution that ``module`` is as a whole, if it is one, or None; with hooks it is more than that."""
        if id(module) not in self._linear and has_hooks(module):
            self._linear[id(module)] = None
        if id(module) not in self._linear:
            source = Source(self._merge_branches)
            try:
                outcome = run(module, source, device="meta", strict=True)
            except ReparamError:
                outcome = None
            found = isinstance(outcome, SymbolicTensor)
            cost, done = Cost.of_ledger(source), tuple(source.operations)
            self._linear[id(module)] = LinearModule(outcome.map, done, cost, source.layout) if found else None
        return self._linear[id(module)]

    def memory(self, module: nn.Module) -> Memory:
        """Which nodes of its graph share memory."""
        if id(module) not in self._memories:
            captured = self.of(module)
            self._memories[id(module)] = Memory(
                captured.graph, lambda path: self.effects(module.get_submodule(path)), captured.escaped
            )
        return self._memories[id(module)]

    def effects(self, module: nn.Module) -> Effects:
        """What calling ``module`` may do to its inputs; anything, where its forward cannot be traced."""
        key: Hashable = (type(module), getattr(module, "inplace", None)) if _is_standard(module) else id(module)
        if key not in self._effects:
            self._effects[key] = Effects()  # of a module that calls itself
            self._effects[key] = self._find_effects(module)
        return self._effects[key]

    def _find_effects(self, module: nn.Module) -> Effects:
        linear = self.linear(module)
        if linear is not None:  # the symbolic forward refuses to change its input
            return Effects(writes=False, shares=not any(operation in _COMPUTE for operation in linear.operations))
        try:
            return self.memory(module).of_inputs()
        except Exception:  # a check of the input's size is enough to stop a trace
            # torch's own modules write to their input only where they are asked to
            return Effects(writes=not _is_standard(module) or bool(getattr(module, "inplace", False)))


def _is_standard(module: nn.Module) -> bool:
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.modules.")
