"""One module's own ``forward`` as a graph, with its submodules as single nodes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from repvgg.symbolic import shadow_of


@dataclass(frozen=True, eq=False)
class Capture:
    """The graph of a ``forward``.

    Attributes:
        graph: nodes in the order of execution; every submodule that is called is one node.
        calls: how often each submodule, by its path, is called.
        reads: paths of the parameters and buffers that the forward reads itself.
        root: the shadow that was traced; it holds every tensor that the graph names.
        simple: whether the forward takes nothing but positional inputs without defaults.
    """

    graph: fx.Graph
    calls: dict[str, int]
    reads: frozenset[str]
    root: nn.Module
    simple: bool


class _ShallowTracer(fx.Tracer):
    """Stops at every submodule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def capture(module: nn.Module, *, training: bool = False) -> Capture:
    """Trace the ``forward`` of ``module`` itself with torch.fx, submodules being leaves.

    The trace runs on a shadow, so that a forward that writes attributes does not write them on ``module``.

    Args:
        module: the module.
        training: trace as if ``module`` itself (not its submodules) were in training mode.

    Raises:
        Exception: whatever torch.fx or the module's own code raises where the flow depends on values.
    """
    shadow = shadow_of(module, lambda tensor: tensor)
    shadow.training = training
    defaults = _defaults(module)
    graph = _ShallowTracer().trace(shadow, concrete_args=defaults or None)
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    reads = frozenset(str(node.target) for node in graph.nodes if node.op == "get_attr")
    return Capture(graph, calls, reads, shadow, simple=not defaults)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """The optional arguments of the forward and their defaults: the trace holds for these values only."""
    parameters = inspect.signature(type(module).forward).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
