"""``torch.compile(model, backend="repvgg")``: the engine at inference, PyTorch for what it does not support.

Where the engine supports some calls of a graph only, it runs the largest parts of it, and PyTorch the others; the
warning says what runs where.

The graph that PyTorch passes in takes the weights as arguments, like the images. They are read when the graph first
runs, and again after they changed. Changes through ``weight.data``, and of tensors that were created in inference mode,
go unnoticed: PyTorch does not count them.

PyTorch finds the name through an entry point of the installed package. Without an installation, pass the function:
``torch.compile(model, backend=repvgg.engine.repvgg_backend)``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from types import FrameType
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, fx, nn

from repvgg.engine.codegen.jit import host_isa
from repvgg.engine.compiled_model import MAX_INPUT_SIZES, CompiledModel, compile_part
from repvgg.engine.frontend import read_graph
from repvgg.engine.partition import Partition
from repvgg.engine.recorder import record
from repvgg.engine.runtime.thread_pool import check_threads
from repvgg.errors import FallbackWarning, RepvggError, UnsupportedError, UsageError, first_line

#: Identity, address and version counter of each weight; it changes when a weight is replaced or written to.
Fingerprint: TypeAlias = tuple[tuple[int, int, int], ...]


def repvgg_backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, int] | None = None
) -> Callable[..., Any]:
    """Return a callable that runs a graph of torch.compile.

    PyTorch runs the graph, with one warning that gives the reason, where the engine cannot: for training or under
    autocast. Of a graph with unsupported calls, it runs these, and the engine the parts between them.

    Args:
        graph: as PyTorch passes it in.
        example_inputs: weights among them are told from images by their class.
        options: of torch.compile: ``{"threads": 4}``, see :func:`repvgg.engine.compile`.

    Raises:
        UsageError: an option is unknown, or the number of threads is below one.
    """
    options = options or {}
    if set(options) - {"threads"}:
        raise UsageError(f"The only option of the engine is 'threads', not {', '.join(map(repr, options))}.")
    check_threads(options.get("threads"))
    return _CompiledGraph(graph, example_inputs, options.get("threads"))


@final
class _CompiledGraph:
    """A graph that is compiled on first use. Concurrent calls wait for each other."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any], threads: int | None) -> None:
        self._graph, self._threads = graph, threads
        self._images = _index_of_images(graph.graph, example_inputs)
        # By height and width of the images; a partition is for their number, too.
        self._models: dict[tuple[int, ...], CompiledModel | Partition] = {}
        self._fingerprint: Fingerprint | None = None
        self._weights: list[Any] = []  # kept alive, so that no new tensor gets the id() of a fingerprinted one
        self._refused = self._warned = False
        self._lock = Lock()

    def __call__(self, *arguments: Any) -> Any:
        with self._lock:
            try:
                model = None if self._refused else self._current_model(arguments)
                if model is not None:
                    return model(arguments[self._images])
            except (RepvggError, RuntimeError) as error:  # LLVM raises RuntimeError
                self._refused, self._models, self._weights = True, {}, []
                message = f"PyTorch runs this graph, because the engine cannot: {first_line(error)}."
                warnings.warn(message, FallbackWarning, stacklevel=_stacklevel_of_caller())
        return self._graph(*arguments)

    def _current_model(self, arguments: Sequence[Any]) -> CompiledModel | Partition:
        """Return the model compiled with the current weights."""
        others = [value for index, value in enumerate(arguments) if index != self._images]
        weights = [*others, *self._graph.parameters(), *self._graph.buffers()]
        fingerprint = _fingerprint(weights)
        if fingerprint != self._fingerprint:
            self._models.clear()
        shape = _shape_of(arguments[self._images]) if self._images < len(arguments) else ()
        model = self._models.get(shape[2:]) or self._models.get(shape)
        if model is None:
            _check_inference([*arguments, *weights])
            model = self._compile(arguments)
            self._fingerprint, self._weights = fingerprint, weights
            self._models[shape if isinstance(model, Partition) else shape[2:]] = model
            while len(self._models) > MAX_INPUT_SIZES:
                del self._models[next(iter(self._models))]
        return model

    def _compile(self, arguments: Sequence[Any]) -> CompiledModel | Partition:
        images = arguments[self._images] if self._images < len(arguments) else None
        if not isinstance(images, Tensor):
            raise UnsupportedError("The engine needs a network of images: pass them as a tensor.")
        if images.ndim != 4 or images.dtype != torch.float32 or images.device.type != "cpu":
            raise UnsupportedError(
                "The engine needs float32 images (N, C, H, W) on the CPU, "
                f"not {images.dtype} of {images.ndim} axes on {images.device.type}: convert them with .float().cpu()."
            )
        batch, channels, height, width = images.shape
        try:
            network = read_graph(self._graph, arguments, self._images)
        except UnsupportedError as error:
            return self._partition(arguments, error)
        return CompiledModel(network, [(max(batch, 1), channels, height, width)], host_isa(), self._threads)

    def _partition(self, arguments: Sequence[Any], reason: UnsupportedError) -> Partition:
        """Return the graph in parts, for this number of images, with one warning that says what runs where."""
        images = arguments[self._images]

        def forward(x: Tensor) -> Any:
            return self._graph(*arguments[: self._images], x, *arguments[self._images + 1 :])

        try:
            found = Partition(
                lambda batch: record(forward, [(batch, *images.shape[1:])], sizes_vary=False),
                partial(compile_part, threads=self._threads, precision="high", search=False),
                max(1, len(images)),
                [len(images)],
            )
        except UnsupportedError:
            raise reason from None
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"PyTorch runs parts of this graph, because the engine cannot: {first_line(reason)}. It has {found}",
                FallbackWarning,
                stacklevel=_stacklevel_of_caller(),
            )
        return found


def _shape_of(images: Any) -> tuple[int, ...]:
    return tuple(images.shape) if isinstance(images, Tensor) else ()


def _check_inference(values: Iterable[Any]) -> None:
    # Checking once is enough: PyTorch compiles another graph when gradients or autocast are turned on or off.
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise UnsupportedError(
            "The engine computes no gradients: call the model under torch.inference_mode() or torch.no_grad(), "
            "or set model.requires_grad_(False)."
        )
    if torch.is_autocast_enabled("cpu"):
        raise UnsupportedError("The engine computes in float32: call the model without autocast.")


def _stacklevel_of_caller() -> int:
    """Return the level, for the function that calls this one, of the line that called the compiled model.

    That is the first frame outside of PyTorch around the wrapper of torch.compile; else around this module.
    """
    folder = torch.__path__[0] + os.sep  # not torchvision, whose path begins alike
    levels = list(enumerate(_frames(), 1))[1:]  # without the frame of this function
    outside = [level for level, frame in levels if not frame.f_code.co_filename.startswith((folder, __file__))]
    wrapper = next((level for level, frame in levels if frame.f_code.co_name == "compile_wrapper"), 0)
    return next((level - 1 for level in outside if level > wrapper), 1)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _index_of_images(graph: fx.Graph, examples: Sequence[Any]) -> int:
    """Return which argument the images are: one past the last if it is not known."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = _first_node(graph)
    index = placeholders.index(first) if first in placeholders else len(placeholders)
    if index < len(examples) and isinstance(examples[index], nn.Parameter):  # as in ``weight * images``
        others = [at for at, one in enumerate(examples) if isinstance(one, Tensor) and one.ndim == 4]
        others = [at for at in others if not isinstance(examples[at], nn.Parameter)]
        index = others[0] if len(others) == 1 else index
    return index


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
