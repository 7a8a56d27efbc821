"""``torch.compile(model, backend="repvgg")``: the engine for plain networks at inference, PyTorch for everything else.

The graph that PyTorch passes in takes the weights as arguments, like the images. They are read when the graph first
runs, and again after they changed. Changes through ``weight.data``, and of tensors that were created in inference mode,
go unnoticed: PyTorch does not count them.

PyTorch finds the name through an entry point of the installed package. Without an installation, pass the function:
``torch.compile(model, backend=repvgg.engine.repvgg_backend)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, fx

from repvgg.engine.codegen.jit import host_isa
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.frontend import read_graph
from repvgg.engine.runtime.thread_pool import check_threads
from repvgg.errors import FallbackWarning, RepvggError, UnsupportedError, UsageError, first_line

#: Identity, address and version counter of each weight; it changes when a weight is replaced or written to.
Fingerprint: TypeAlias = tuple[tuple[int, int, int], ...]


def repvgg_backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, int] | None = None
) -> Callable[..., Any]:
    """Return a callable that runs a graph of torch.compile.

    PyTorch runs the graph, with one warning that gives the reason, where the engine cannot: for training, under
    autocast, or with an unsupported layer.

    Args:
        graph: as PyTorch passes it in.
        example_inputs: not read.
        options: of torch.compile: ``{"threads": 4}``, see :func:`repvgg.engine.compile`.

    Raises:
        UsageError: an option is unknown, or the number of threads is below one.
    """
    options = options or {}
    if set(options) - {"threads"}:
        raise UsageError(f"The only option of the engine is 'threads', not {', '.join(map(repr, options))}.")
    check_threads(options.get("threads"))
    return _CompiledGraph(graph, options.get("threads"))


@final
class _CompiledGraph:
    """A graph that is compiled on first use. Concurrent calls wait for each other."""

    def __init__(self, graph: fx.GraphModule, threads: int | None) -> None:
        self._graph, self._threads = graph, threads
        self._placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._images = _first_node(graph.graph)
        self._model: CompiledModel | None = None
        self._fingerprint: Fingerprint | None = None
        self._weights: list[Any] = []  # kept alive, so that no new tensor gets the id() of a fingerprinted one
        self._refused = False
        self._lock = Lock()

    def __call__(self, *arguments: Any) -> Any:
        with self._lock:
            model = None if self._refused else self._current_model(arguments)
            if model is not None:
                return (model(arguments[self._placeholders.index(self._images)]),)
        return self._graph(*arguments)

    def _current_model(self, arguments: Sequence[Any]) -> CompiledModel | None:
        """Return the model compiled with the current weights, or None if the engine cannot run it."""
        try:
            values = dict(zip(self._placeholders, arguments, strict=True))
            images = values.pop(self._images, None)
            weights = [*values.values(), *self._graph.parameters(), *self._graph.buffers()]
            fingerprint = _fingerprint(weights)
            if fingerprint != self._fingerprint:
                self._model = self._compile(images, values)
                self._fingerprint, self._weights = fingerprint, weights
        except (RepvggError, RuntimeError) as error:  # LLVM raises RuntimeError
            self._refused, self._model = True, None
            message = f"PyTorch runs this graph, because the engine cannot: {first_line(error)}."
            warnings.warn(message, FallbackWarning, stacklevel=2)
        return self._model

    def _compile(self, images: Any, others: Mapping[fx.Node, Any]) -> CompiledModel:
        _check_inference([images, *others.values()])
        layers = read_graph(self._graph.graph, self._graph, others)
        if images.ndim != 4 or images.dtype != torch.float32 or images.device.type != "cpu":
            raise UnsupportedError(
                "The engine needs float32 images (N, C, H, W) on the CPU, "
                f"not {images.dtype} of {images.ndim} axes on {images.device.type}: convert them with .float().cpu()."
            )
        batch, channels, height, width = images.shape
        return CompiledModel(layers, (batch, channels, height, width), host_isa(), self._threads)


def _check_inference(arguments: Sequence[Any]) -> None:
    # Checking once is enough: PyTorch compiles another graph when gradients or autocast are turned on or off.
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
        raise UnsupportedError("The engine computes no gradients: call the model under torch.inference_mode().")
    if torch.is_autocast_enabled("cpu"):
        raise UnsupportedError("The engine computes in float32: call the model without autocast.")


def _first_node(graph: fx.Graph) -> fx.Node:
    """Return the placeholder of the images, which the first input of each node leads to; the others are weights."""
    node: fx.Node = graph.output_node()
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _fingerprint(values: Iterable[Any]) -> Fingerprint:
    weights = [value for value in values if isinstance(value, Tensor)]
    # Inference tensors have no version counter.
    return tuple((id(one), one.data_ptr(), -1 if one.is_inference() else one._version) for one in weights)
