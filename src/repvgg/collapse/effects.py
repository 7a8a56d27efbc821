"""The captures of one model, each made once, and what calling its modules does to memory."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from repvgg.collapse.capture import Capture, capture
from repvgg.collapse.memory import Effects, Memory
from repvgg.errors import ReparamError
from repvgg.symbolic import Source, run

_COMPUTE = ("conv", "batch_norm", "avg_pool", "scale", "shift", "add", "cat")


class Captures:
    """Remembers what was captured of each module, and what that says about memory."""

    def __init__(self) -> None:
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
        try:
            return self.memory(module).of_inputs()
        except Exception:  # a check of the input's size is enough to stop a trace
            source = Source()
        try:
            run(module, source, device="meta", strict=True)
        except ReparamError:
            # torch's own modules write to their input only where they are asked to
            return Effects(writes=not _is_standard(module) or bool(getattr(module, "inplace", False)))
        return Effects(writes=False, shares=not any(operation in _COMPUTE for operation in source.operations))


def _is_standard(module: nn.Module) -> bool:
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.modules.")
