"""One module's own ``forward`` as a graph, with its submodules as single nodes."""

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


def join(*names: str) -> str:
    """A dotted path."""
    return ".".join(filter(None, names))


def hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """The hooks in ``module`` that would see, or change, what flows through it."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (vars(part)[name] for part in module.modules() for name in names if vars(part).get(name))


def has_hooks(module: nn.Module) -> bool:
    """Whether there is any such hook."""
    return any(True for _ in hooks_of(module))


def unwrap(module: nn.Module, path: str = "") -> tuple[nn.Module, str]:
    """The module inside wrappers that only change how it runs, and its path, that of the wrapper being ``path``."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(module.module, join(path, "module"))
    if type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return unwrap(module._orig_mod, join(path, "_orig_mod"))  # type: ignore[arg-type]  # torch.compile
    return module, path


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own and has no parts."""
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.")


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All batch norms of a model with their paths."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, _BatchNorm)]


_INSISTS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}  # their forward raises for any other rank


@dataclass(frozen=True, eq=False, repr=False)
class Traced:
    """What one run of a forward did.

    Attributes:
        graph: nodes in the order of execution; every submodule that is called is one node.
        root: the shadow that was traced; it holds every tensor that the graph names.
        reads: paths of the parameters and buffers that the forward reads itself.
        escaped: nodes whose tensors the forward keeps somewhere, in an attribute or a list, for others to read.
        more: what the forward does that the graph does not say, in words, or None: the graph may stand in its place.
    """

    graph: fx.Graph
    root: nn.Module
    reads: frozenset[str]
    escaped: frozenset[fx.Node]
    more: str | None


@contextmanager
def random_state_kept() -> Iterator[Callable[[], bool]]:
    """Put the random states of Python and PyTorch back; the value tells whether they were moved."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    python, cpu, gpu = random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []

    def moved() -> bool:
        return random.getstate() != python or not torch.equal(torch.get_rng_state(), cpu)

    try:
        yield moved
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(gpu)


class _Proxy(fx.Proxy):
    """A proxy that tells ``x += y`` from ``x + y``: what else holds x sees the difference.

    An input whose rank the module insists on answers for it.
    """

    def dim(self) -> Any:
        """The rank of an input, if it is known, else a node."""
        return self._rank() or self.tracer.create_proxy("call_method", "dim", (self,), {})

    @property
    def ndim(self) -> Any:
        """The same."""
        return self._rank() or self.tracer.create_proxy("call_function", getattr, (self, "ndim"), {})

    def _rank(self) -> int | None:
        return getattr(self.tracer, "rank", None) if self.node.op == "placeholder" else None


def _in_place(name: str) -> Callable[[fx.Proxy, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _ShallowTracer(fx.Tracer):
    """Stops at every submodule; tensors of the module are nodes as well, unless ``eager``.

    Attributes:
        rank: the rank that an input has, where the module takes no other.
        settings: the modes of autograd and autocast that functions were called under.
        reads: the parameters and buffers that were asked for.
    """

    def __init__(self, eager: bool, rank: int | None) -> None:
        super().__init__()
        self.eager = eager
        self.rank = rank
        self.settings = {_settings()}
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
        if self.eager:
            return attr_val
        if name not in parameter_proxy_cache:
            make = _maker(self, name, attr_val)
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)
        return parameter_proxy_cache[name]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.settings.add(_settings())
        return super().create_node(*args, **kwargs)

    def escaped(self) -> frozenset[fx.Node]:
        """The nodes whose proxies somebody still holds."""
        parts = self.root.modules()
        kept = {id(thing) for part in parts for thing in things_in(vars(part).values()) if isinstance(thing, fx.Proxy)}
        for generation in (1, 2):  # a proxy in a cycle is held by nobody; nearly all of them are young
            alive = [proxy for reference in self.proxies if (proxy := reference()) is not None]
            nodes = frozenset(proxy.node for proxy in alive)
            unexplained = any(id(proxy) not in kept for proxy in alive)
            del alive
            if not unexplained:
                return nodes
            gc.collect(generation)
        return frozenset(proxy.node for reference in self.proxies if (proxy := reference()) is not None)


def _maker(tracer: fx.Tracer, name: str, tensor: Tensor) -> Callable[[fx.Node], fx.Proxy]:
    """Proxies of parameters know their shape, as code asks for it."""
    if isinstance(tensor, nn.Parameter):
        return lambda node: ParameterProxy(tracer, node, name, tensor)
    return lambda node: _Proxy(node, tracer)


def _settings() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def run_traced(
    module: nn.Module,
    arguments: dict[str, Any],
    *,
    training: bool = False,
    eager: bool = False,
    rank: int | None = None,
) -> Traced:
    """Trace the ``forward`` of ``module`` itself, submodules being leaves, on a shadow of it.

    Args:
        module: the module.
        arguments: values of arguments; the trace holds for these only.
        training: trace as if ``module`` itself (not its submodules) were in training mode.
        rank: how many axes inputs say that they have, to code that asks.
        eager: compute with parameters and buffers instead of writing that down; the graph then holds their values.

    Raises:
        Exception: whatever torch.fx or the module's own code raises where the flow depends on values.
    """
    if "forward" in vars(module):
        raise ReparamError("its forward was replaced on the instance")
    shadow = shadow_of(module, lambda tensor: tensor, training=False)
    shadow.training = training
    before = fingerprint(shadow)
    tracer = _ShallowTracer(eager, rank or next((n for kind, n in _INSISTS.items() if isinstance(module, kind)), None))
    with random_state_kept() as moved:
        graph = tracer.trace(shadow, concrete_args=arguments or None)
        if moved():
            raise ReparamError("it draws random numbers")
    escaped = tracer.escaped()
    switched = len(tracer.settings) > 1 or "autocast" in inspect.unwrap(type(module).forward).__code__.co_names
    more = "switches autograd or autocast" if switched else None
    if escaped or before != fingerprint(shadow, but="_tensor_constant"):
        more = "keeps something in an attribute"
    if eager:
        more = "computes with the values of its parameters"
    named = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return Traced(graph, shadow, frozenset({*tracer.reads, *named}), escaped, more)


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
