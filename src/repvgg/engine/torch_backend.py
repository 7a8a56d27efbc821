"""``torch.compile(model, backend="repvgg")``: the engine for a plain network at inference, and PyTorch for the rest.

The graph that PyTorch hands over takes the weights as arguments, beside the images; they are read when the graph runs
for the first time, and again when they were changed; PyTorch does not tell of a change through ``weight.data``, though,
nor of one to a tensor that was made in inference mode.

PyTorch finds the name by an entry point of the installed package. Where it is not installed, or under another name,
``torch.compile(model, backend=repvgg.engine.repvgg_backend)`` is the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, fx

from repvgg.engine.codegen.jit import host_isa
from repvgg.engine.compiled_model import Network
from repvgg.engine.frontend import read_graph
from repvgg.engine.runtime.thread_pool import check_threads
from repvgg.errors import FallbackWarning, RepvggError, UnsupportedError, UsageError, first_line

Stamp: TypeAlias = tuple[tuple[int, int, int], ...]


def repvgg_backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, int] | None = None
) -> Callable[..., Any]:
    """What runs a graph of torch.compile.

    Where the engine cannot run it, for training, autocast, or a layer that it does not know, a warning says why and
    PyTorch runs the graph as it is.

    Args:
        graph: as PyTorch hands it over.
        example_inputs: likewise; nothing is read from them.
        options: of torch.compile: ``{"threads": 4}`` as in :func:`repvgg.engine.compile`.

    Raises:
        UsageError: there is no such option, or no such number of threads.
    """
    options = options or {}
    if set(options) - {"threads"}:
        raise UsageError(f"The engine's only option is 'threads', not {', '.join(map(repr, options))}.")
    check_threads(options.get("threads"))
    return _Graph(graph, options.get("threads"))


@final
class _Graph:
    """One graph, compiled when it runs first; callers wait for each other.

    Args:
        graph: of torch.compile.
        threads: see :func:`repvgg.engine.compile`.
    """

    def __init__(self, graph: fx.GraphModule, threads: int | None) -> None:
        self._graph, self._threads = graph, threads
        self._placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._images = _first(graph.graph)
        self._network: Network | None = None
        self._stamp: Stamp | None = None
        self._weights: list[Any] = []  # kept, so that no other gets the identity of one
        self._refused = False
        self._lock = Lock()

    def __call__(self, *arguments: Any) -> Any:
        with self._lock:
            network = None if self._refused else self._current(arguments)
            if network is not None:
                return (network(arguments[self._placeholders.index(self._images)]),)
        return self._graph(*arguments)

    def _current(self, arguments: Sequence[Any]) -> Network | None:
        """The network with the weights as they are now; None if there is none."""
        try:
            given = dict(zip(self._placeholders, arguments, strict=True))
            images = given.pop(self._images, None)
            weights = [*given.values(), *self._graph.parameters(), *self._graph.buffers()]
            stamp = _stamp(weights)
            if stamp != self._stamp:
                self._network = self._compiled(images, given)
                self._stamp, self._weights = stamp, weights
        except (RepvggError, RuntimeError) as error:  # the latter by LLVM
            self._refused, self._network = True, None
            text = f"PyTorch runs this graph in the engine's place: {first_line(error)}."
            warnings.warn(text, FallbackWarning, stacklevel=2)
        return self._network

    def _compiled(self, images: Any, others: Mapping[fx.Node, Any]) -> Network:
        _check_inference([images, *others.values()])
        layers = read_graph(self._graph.graph, self._graph, others)
        if images.ndim != 4 or images.dtype != torch.float32 or images.device.type != "cpu":
            raise UnsupportedError(
                f"The engine takes float32 images (N, C, H, W) on the CPU, not {images.dtype} on {images.device.type}."
            )
        batch, channels, height, width = images.shape
        return Network(layers, (batch, channels, height, width), host_isa(), self._threads)


def _check_inference(arguments: Sequence[Any]) -> None:
    """PyTorch makes another graph where gradients or autocast are turned on or off, so once is enough."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
        raise UnsupportedError("The engine computes no gradients: call the model under torch.inference_mode().")
    if torch.is_autocast_enabled("cpu"):
        raise UnsupportedError("The engine computes in float32: call the model without autocast.")


def _first(graph: fx.Graph) -> fx.Node:
    """Where the chain begins that ends in the output: there the images come in, and weights elsewhere."""
    node: fx.Node = graph.output_node()
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _stamp(values: Iterable[Any]) -> Stamp:
    """Changes when a weight is written to or replaced."""
    weights = [value for value in values if isinstance(value, Tensor)]
    return tuple((id(one), one.data_ptr(), -1 if one.is_inference() else one._version) for one in weights)
