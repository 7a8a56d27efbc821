"""What was found out about the modules of one model, each thing once: captures, maps, and effects on memory."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from repvgg.collapse.capture import Capture, capture
from repvgg.collapse.cost import Cost
from repvgg.collapse.memory import Effects, Memory
from repvgg.collapse.modules import has_hooks
from repvgg.collapse.values import LinearModule
from repvgg.errors import ReparamError
from repvgg.symbolic import Source, SymbolicTensor, run

_ACTIVATIONS = nn.ReLU.__module__
_COMPUTE = ("conv", "batch_norm", "avg_pool", "scale", "shift", "add", "cat")


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
        if id(module) not in self._linear and (_activates(module) or has_hooks(module)):
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

    def known_linear(self, module: nn.Module) -> LinearModule | None:
        """The same, if it was asked for before, else None."""
        return self._linear.get(id(module))

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


def _activates(module: nn.Module) -> bool:
    """Whether there is one of torch's own activations in it. If nothing calls that it may be linear yet, in parts."""
    return any(type(part).__module__ == _ACTIVATIONS for part in module.modules())


def _is_standard(module: nn.Module) -> bool:
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.modules.")
