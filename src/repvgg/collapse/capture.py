"""One module's own ``forward`` as a graph, with its submodules as single nodes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import fx, nn

from repvgg.collapse.tracing import Traced, run_traced
from repvgg.errors import ReparamError
from repvgg.symbolic import shadow_of

_MOST_OPTIONAL = 3
_RANKS = (4, 3, 5, 2)
_ANY = object()  # in the place of the value of an argument


@dataclass(frozen=True, eq=False, repr=False)
class Capture:
    """The graph of a ``forward``, for the defaults of its optional arguments.

    Attributes:
        graph: nodes in the order of execution; every submodule that is called is one node.
        root: the shadow that was traced; it holds every tensor that the graph names.
        escaped: nodes whose tensors the forward keeps somewhere for others to read.
        calls: how often each submodule, by its path, is called at most, whatever the optional arguments are.
        reads: paths of the parameters and buffers that the forward reads itself.
        more: why the graph says less than the forward does, or None: it may stand in its place.
        by_rank: whether that is that it decides by the number of axes of its input; the graph is for one number.
        variants: graphs for other values of the optional arguments, or for other numbers of axes.
    """

    graph: fx.Graph
    root: nn.Module
    escaped: frozenset[fx.Node]
    calls: dict[str, int]
    reads: frozenset[str]
    more: str | None
    by_rank: bool
    variants: tuple[Traced, ...]


def capture(module: nn.Module, *, training: bool = False) -> Capture:
    """Trace the ``forward`` of ``module`` itself with torch.fx, submodules being leaves.

    The trace runs on a shadow, so that a forward that writes attributes does not write them on ``module``. Where the
    forward has optional arguments, it is traced for other values of them as well.

    Args:
        module: the module.
        training: trace as if ``module`` itself (not its submodules) were in training mode.

    Raises:
        Exception: whatever torch.fx or the module's own code raises where the flow depends on values.
    """
    if is_plain_sequence(module):
        return _of_sequence(module)
    defaults = _defaults(module)
    by_rank = False
    try:
        first, *others = (_run(module, values, training) for values in (defaults, *_other_values(defaults)))
    except Exception:
        first, *others = _by_rank(module, defaults, training)
        by_rank = True
    counts: dict[str, int] = {}
    for run in (first, *others):
        for path, count in calls_of(run.graph).items():
            counts[path] = max(count, counts.get(path, 0))
    reads = frozenset[str]().union(first.reads, *(run.reads for run in others))
    return Capture(first.graph, first.root, first.escaped, counts, reads, first.more, by_rank, tuple(others))


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Sequential`` and nothing more: it only calls its parts, whatever they are."""
    return type(module) is nn.Sequential and "forward" not in vars(module)


def _of_sequence(module: nn.Module) -> Capture:
    """What a trace of a sequence would find."""
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name, _ in module.named_children():
        value = graph.call_module(name, (value,))
    graph.output(value)
    root = shadow_of(module, lambda tensor: tensor, training=False)
    return Capture(graph, root, frozenset(), dict(calls_of(graph)), frozenset(), None, False, ())


def _run(module: nn.Module, arguments: dict[str, Any], training: bool) -> Traced:
    try:
        return run_traced(module, arguments, training=training)
    except ReparamError:
        raise
    except Exception:  # such as a decision on the value of a parameter: with the values it may go through
        return run_traced(module, arguments, training=training, eager=True)


def _by_rank(module: nn.Module, defaults: dict[str, Any], training: bool) -> Iterator[Traced]:
    """Traces of a forward that decides by the number of axes of its input, one for each that makes a difference.

    Raises:
        Exception: that is not what it decides by.
    """
    found: list[Traced] = []
    for rank in _RANKS:
        try:
            run = run_traced(module, defaults, training=training, rank=rank)
        except Exception:  # it takes no such input, or decides by something else
            continue
        if str(run.graph) not in [str(other.graph) for other in found]:
            found.append(replace(run, more=run.more or "decides by the number of axes of its input"))
    if not found:
        run_traced(module, defaults, training=training)
        raise ReparamError("its forward cannot be traced")
    return iter(found)


def calls_of(graph: fx.Graph) -> Counter[str]:
    """How often a graph calls each submodule."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def _defaults(module: nn.Module) -> dict[str, Any]:
    """The optional arguments of the forward and their defaults."""
    parameters = inspect.signature(type(module).forward).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _other_values(defaults: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Other values of optional arguments: switches the other way, anything in the place of None or of a default.

    An argument that is left out of the dictionary may be anything.

    Raises:
        ReparamError: there are too many to try.
    """
    if len(defaults) > _MOST_OPTIONAL:
        raise ReparamError(f"it takes {len(defaults)} optional arguments, too many to try them all")
    choices = ((False, True) if isinstance(value, bool) else (value, _ANY) for value in defaults.values())
    for values in product(*choices):
        given = dict(zip(defaults, values, strict=True))
        if given != defaults:
            yield {name: value for name, value in given.items() if value is not _ANY}
