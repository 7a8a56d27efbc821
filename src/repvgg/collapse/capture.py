"""One module's own ``forward`` as a torch.fx graph in which every submodule call is a single node."""

from __future__ import annotations

import gc
import inspect
import operator
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.errors import ReparamError
from repvgg.symbolic import fingerprint, shadow_of, things_in

_REQUIRED_RANK = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}  # their forward raises for any other rank
_MAX_OPTIONAL_ARGUMENTS = 3  # each doubles the number of traces
_RANKS = (4, 3, 5, 2)
_ANY = object()  # stands for an argument that stays symbolic


def join(*names: str) -> str:
    """Join the non-empty parts of a dotted path."""
    return ".".join(filter(None, names))


def hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """Yield the hook dictionaries in ``module`` that could observe or change activations or gradients."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (vars(part)[name] for part in module.modules() for name in names if vars(part).get(name))


def has_hooks(module: nn.Module) -> bool:
    """Whether there is any such hook."""
    return any(True for _ in hooks_of(module))


def unwrap(module: nn.Module, path: str = "") -> tuple[nn.Module, str]:
    """Return the module inside wrappers that only change how it runs, and its path; the wrapper is at ``path``."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(module.module, join(path, "module"))
    # torch.compile; matched by name because importing torch._dynamo takes seconds
    if type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return unwrap(module._orig_mod, join(path, "_orig_mod"))  # type: ignore[arg-type]
    return module, path


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own and has no children."""
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.")


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return all batch norms of a model with their paths."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, _BatchNorm)]


@contextmanager
def preserved_random_state() -> Iterator[Callable[[], bool]]:
    """Restore the random states of Python and PyTorch on exit; yield a function that checks for changes."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    python, cpu, gpu = random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []

    def changed() -> bool:
        return random.getstate() != python or not torch.equal(torch.get_rng_state(), cpu)

    try:
        yield changed
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(gpu)


@dataclass(frozen=True, eq=False, repr=False)
class Traced:
    """One run of a ``forward`` under torch.fx.

    Attributes:
        graph: nodes in execution order; every submodule call is one node.
        root: the shadow that was traced; it holds every tensor that the graph names.
        reads: paths of the parameters and buffers that the forward reads itself.
        escaped: nodes whose tensors the forward stores, in an attribute or a list, where other code can read them.
        caveat: an effect of the forward that the graph does not show, in words; None if the graph can replace it.
    """

    graph: fx.Graph
    root: nn.Module
    reads: frozenset[str]
    escaped: frozenset[fx.Node]
    caveat: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Capture:
    """The graph of a ``forward`` for the defaults of its optional arguments.

    Attributes:
        graph: nodes in execution order; every submodule call is one node.
        root: the shadow that was traced; it holds every tensor that the graph names.
        escaped: nodes whose tensors the forward stores where other code can read them.
        calls: the largest number of calls of each submodule, by path, over all values of the optional arguments.
        reads: paths of the parameters and buffers that the forward reads itself.
        caveat: why the graph cannot replace the forward, or None.
        by_rank: whether the caveat is that the forward branches on the rank of its input; ``graph`` is for one rank.
        variants: graphs for other values of the optional arguments, or for other ranks.
    """

    graph: fx.Graph
    root: nn.Module
    escaped: frozenset[fx.Node]
    calls: dict[str, int]
    reads: frozenset[str]
    caveat: str | None
    by_rank: bool
    variants: tuple[Traced, ...]


def capture(module: nn.Module, *, training: bool = False) -> Capture:
    """Trace the ``forward`` of ``module`` itself with torch.fx; submodules are leaves.

    A forward with optional arguments is traced for other values of them as well.

    Args:
        module: the module.
        training: trace as if ``module`` itself (not its submodules) were in training mode.

    Raises:
        Exception: whatever torch.fx or the module's own code raises where control flow depends on values.
    """
    if is_plain_sequential(module):
        return _capture_sequential(module)
    defaults = _defaults(module)
    by_rank = False
    try:
        first, *others = (_trace(module, values, training) for values in (defaults, *_other_values(defaults)))
    except Exception:
        first, *others = _trace_by_rank(module, defaults, training)
        by_rank = True
    counts: dict[str, int] = {}
    for traced in (first, *others):
        for path, count in count_calls(traced.graph).items():
            counts[path] = max(count, counts.get(path, 0))
    reads = frozenset[str]().union(first.reads, *(traced.reads for traced in others))
    return Capture(first.graph, first.root, first.escaped, counts, reads, first.caveat, by_rank, tuple(others))


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module is exactly an ``nn.Sequential``: it calls its children in order, whatever they are."""
    return type(module) is nn.Sequential and "forward" not in vars(module)


def _capture_sequential(module: nn.Module) -> Capture:
    # The graph is known without a trace, and networks consist mostly of these.
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name, _ in module.named_children():
        value = graph.call_module(name, (value,))
    graph.output(value)
    root = shadow_of(module, lambda tensor: tensor, training=False)
    return Capture(graph, root, frozenset(), dict(count_calls(graph)), frozenset(), None, False, ())


def count_calls(graph: fx.Graph) -> Counter[str]:
    """Count how often a graph calls each submodule."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def _trace(module: nn.Module, arguments: dict[str, Any], training: bool) -> Traced:
    try:
        return trace_forward(module, arguments, training=training)
    except ReparamError:
        raise
    except Exception:  # for example a branch on the value of a parameter: it may succeed with concrete values
        return trace_forward(module, arguments, training=training, concrete_parameters=True)


def _trace_by_rank(module: nn.Module, defaults: dict[str, Any], training: bool) -> Iterator[Traced]:
    """Trace a forward that branches on the rank of its input, once for each rank that makes a difference.

    Raises:
        Exception: it does not branch on the rank.
    """
    found: list[Traced] = []
    for rank in _RANKS:
        try:
            traced = trace_forward(module, defaults, training=training, rank=rank)
        except Exception:  # it takes no such input, or branches on something else
            continue
        if str(traced.graph) not in [str(other.graph) for other in found]:
            found.append(replace(traced, caveat=traced.caveat or "branches on the rank of its input"))
    if not found:
        trace_forward(module, defaults, training=training)  # raises the error that a user expects to see
        raise ReparamError("its forward cannot be traced")
    return iter(found)


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(module).forward).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _other_values(defaults: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield other values of the optional arguments: booleans negated, anything else left symbolic.

    An argument that is missing from the dictionary stays symbolic.

    Raises:
        ReparamError: there are too many to try.
    """
    if len(defaults) > _MAX_OPTIONAL_ARGUMENTS:
        raise ReparamError(f"it takes {len(defaults)} optional arguments, too many to try them all")
    choices = ((False, True) if isinstance(value, bool) else (value, _ANY) for value in defaults.values())
    for values in product(*choices):
        given = dict(zip(defaults, values, strict=True))
        if given != defaults:
            yield {name: value for name, value in given.items() if value is not _ANY}


def trace_forward(
    module: nn.Module,
    arguments: dict[str, Any],
    *,
    training: bool = False,
    concrete_parameters: bool = False,
    rank: int | None = None,
) -> Traced:
    """Trace the ``forward`` of ``module`` once, on a shadow of it; submodules are leaves.

    Args:
        module: the module.
        arguments: values of arguments; the graph holds for these only.
        training: trace as if ``module`` itself (not its submodules) were in training mode.
        concrete_parameters: compute with parameters and buffers instead of recording their use; the graph then
            contains their values as constants.
        rank: the rank that inputs report when code reads it.

    Raises:
        Exception: whatever torch.fx or the module's own code raises where control flow depends on values.
    """
    if "forward" in vars(module):
        raise ReparamError("its forward was replaced on the instance")
    # A forward that writes attributes must write them on a copy.
    shadow = shadow_of(module, lambda tensor: tensor, training=False)
    shadow.training = training
    before = fingerprint(shadow)
    if rank is None:
        rank = next((n for kind, n in _REQUIRED_RANK.items() if isinstance(module, kind)), None)
    tracer = _ShallowTracer(concrete_parameters, rank)
    with preserved_random_state() as changed:
        graph = tracer.trace(shadow, concrete_args=arguments or None)
        if changed():
            raise ReparamError("it draws random numbers")
    escaped = tracer.escaped()
    # fx records no node for a mode switch without a call inside, hence the look at the names in the code.
    switched = len(tracer.modes) > 1 or "autocast" in inspect.unwrap(type(module).forward).__code__.co_names
    caveat = "switches autograd or autocast" if switched else None
    if escaped or before != fingerprint(shadow, but="_tensor_constant"):
        caveat = "stores something in an attribute"
    if concrete_parameters:
        caveat = "computes with the values of its parameters"
    named = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return Traced(graph, shadow, frozenset({*tracer.reads, *named}), escaped, caveat)


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as in-place, which matters to aliases of x, and reports a known rank."""

    def dim(self) -> Any:
        return self._rank() or self.tracer.create_proxy("call_method", "dim", (self,), {})

    @property
    def ndim(self) -> Any:
        return self._rank() or self.tracer.create_proxy("call_function", getattr, (self, "ndim"), {})

    def _rank(self) -> int | None:
        return getattr(self.tracer, "rank", None) if self.node.op == "placeholder" else None


def _in_place(name: str) -> Callable[[fx.Proxy, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _ShallowTracer(fx.Tracer):
    """Stop at every submodule; record tensors of the module as nodes, unless ``concrete_parameters``.

    Attributes:
        rank: the rank of the inputs, where the module accepts no other.
        modes: the autograd and autocast modes under which functions were called.
        reads: the parameters and buffers that the forward read.
    """

    def __init__(self, concrete_parameters: bool, rank: int | None) -> None:
        super().__init__()
        self.concrete_parameters = concrete_parameters
        self.rank = rank
        self.modes = {_grad_modes()}
        self.reads: set[str] = set()
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if not isinstance(attr_val, Tensor):
            return attr_val
        tensors = (*self.root.named_parameters(), *self.root.named_buffers())
        name = next((name for name, tensor in tensors if tensor is attr_val), None)
        if name is None:
            return attr_val
        self.reads.add(name)
        if self.concrete_parameters:
            return attr_val
        if name not in parameter_proxy_cache:
            make = _proxy_factory(self, name, attr_val)
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)
        return parameter_proxy_cache[name]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.modes.add(_grad_modes())
        return super().create_node(*args, **kwargs)

    def escaped(self) -> frozenset[fx.Node]:
        """Return the nodes whose proxies are still referenced after the trace."""
        parts = self.root.modules()
        stored = {
            id(thing) for part in parts for thing in things_in(vars(part).values()) if isinstance(thing, fx.Proxy)
        }
        for generation in (1, 2):  # a proxy in a reference cycle is garbage; nearly all of them are young
            alive = [proxy for reference in self.proxies if (proxy := reference()) is not None]
            nodes = frozenset(proxy.node for proxy in alive)
            unexplained = any(id(proxy) not in stored for proxy in alive)
            del alive
            if not unexplained:
                return nodes
            gc.collect(generation)
        return frozenset(proxy.node for reference in self.proxies if (proxy := reference()) is not None)


def _proxy_factory(tracer: fx.Tracer, name: str, tensor: Tensor) -> Callable[[fx.Node], fx.Proxy]:
    # A ParameterProxy answers questions about its shape, which forwards ask of parameters.
    if isinstance(tensor, nn.Parameter):
        return lambda node: ParameterProxy(tracer, node, name, tensor)
    return lambda node: _Proxy(node, tracer)


def _grad_modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)
