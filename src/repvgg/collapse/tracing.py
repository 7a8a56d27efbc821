"""One run of a ``forward`` under torch.fx, and everything that a graph does not say about it."""

from __future__ import annotations

import gc
import inspect
import operator
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy

from repvgg.errors import ReparamError
from repvgg.symbolic import fingerprint, shadow_of, things_in

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
