"""The frontend: reads a module or an FX graph into a graph of operations, or names every call that is not supported.

The model's own ``forward`` is recorded in eval mode; see :mod:`repvgg.engine.recorder`. It is recorded at several
sizes. If it does the same at all of them, the graph holds for images of any size; else it is recorded once more for the
size that was asked for, with several batches, and the graph holds for that size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import fx, nn

from repvgg.engine.fusion import fuse
from repvgg.engine.graph import Graph, Shape, is_same_graph, with_own_memory
from repvgg.engine.recorder import Call, Recording, copy_of, record, runs_code_of_torch
from repvgg.engine.translate import Translator
from repvgg.errors import UnsupportedError, typed_line

#: Batch, height and width of the recordings: prime numbers, so that a shape tells its axes apart; even and odd ones;
#: and a single image, which some functions treat differently. Large enough for networks of any stride.
RECORDED_SIZES = ((7919, 4099, 4111), (2, 4096, 6144), (1, 4098, 2999))
RECORDED_BATCHES = (23, 2, 1)  # for images of one size
_MAX_NAMED = 12  # calls of an error message


def read(model: nn.Module, shapes: Sequence[Shape] | None = None) -> Graph:
    """Read a network, with copies of its weights.

    Args:
        model: what it computes must not depend on the values of its images. It is read in eval mode, and not changed.
        shapes: (N, C, H, W) of each input; by default one, of any size, with the channels of the first convolution.

    Raises:
        UnsupportedError: a part of the model is not supported; the message names all such parts.
    """
    if runs_code_of_torch(model) and not isinstance(model, nn.Sequential):
        model = nn.Sequential(model)  # messages name the layers inside of a model
    copied, paths = copy_of(model)
    name = type(model).__name__
    if shapes is None:
        convs = (one.in_channels for one in model.modules() if isinstance(one, nn.Conv2d))
        channels: Sequence[int] = [next(convs, 3)]
    else:
        channels = [shape[1] for shape in shapes]

    def graph_at(batch: int, sizes: Sequence[tuple[int, int]], *, sizes_vary: bool) -> Graph:
        given = [(batch, count, *size) for count, size in zip(channels, sizes, strict=True)]
        return graph_of(record(copied, given, paths, sizes_vary=sizes_vary), batch, name)

    try:
        graph = _same(
            lambda batch, height, width: graph_at(batch, [(height, width)] * len(channels), sizes_vary=True),
            RECORDED_SIZES,
            name,
        )
    except UnsupportedError:
        if shapes is None:
            raise
        sizes = tuple(shape[2:] for shape in shapes)
        graph = _same(
            lambda batch: graph_at(batch, sizes, sizes_vary=False), [(one,) for one in RECORDED_BATCHES], name
        )
        graph = replace(graph, sizes=sizes)
    return with_own_memory(fuse(graph, graph.sizes or [RECORDED_SIZES[0][1:]] * len(channels)))


def read_graph(graph: fx.GraphModule, arguments: Sequence[Any], images: int) -> Graph:
    """Read a graph of torch.compile, which returns a tuple of tensors, for images of the size that it is called with.

    Args:
        graph: calls torch functions on its arguments.
        arguments: of a call.
        images: index of the images among them; the others are weights and sizes.

    Raises:
        UnsupportedError: see :func:`read`.
    """

    def forward(x: Any) -> Any:
        return graph(*arguments[:images], x, *arguments[images + 1 :])

    batch, channels, height, width = arguments[images].shape
    recording = record(forward, [(batch, channels, height, width)], sizes_vary=False)
    read = replace(graph_of(recording, batch, "the graph"), sizes=((height, width),))
    return with_own_memory(fuse(read, [(height, width)]))


def _same(graph_at: Callable[..., Graph], settings: Sequence[Sequence[int]], model: str) -> Graph:
    """Return the graph at all settings, or refuse it if they differ."""
    first, *others = (graph_at(*each) for each in settings)
    if not all(is_same_graph(first, other) for other in others):
        raise UnsupportedError(
            f"{model} computes something else for images of another number or size: remove what depends on their shape."
        )
    return first


def graph_of(recording: Recording, batch: int, model: str) -> Graph:
    """Translate a recording of ``batch`` images; ``model`` is its name for messages.

    Raises:
        UnsupportedError: see :func:`read`.
    """
    if isinstance(recording.error, UnsupportedError):
        raise recording.error
    translator = Translator(recording, batch)
    translator.translate()
    if translator.refused:
        _refuse(translator.refused)
    if recording.error is not None:
        raise UnsupportedError(
            f"The forward of {model} cannot be traced ({typed_line(recording.error)}): "
            "remove control flow that depends on values."
        ) from recording.error
    graph = translator.graph()
    if not graph.outputs:
        raise UnsupportedError(f"{model} returns no tensor that depends on its images: there is nothing to compile.")
    if not graph.nodes:
        raise UnsupportedError("The network has no layer: there is nothing to compile.")
    return graph


def _refuse(refused: Sequence[tuple[Call, str]]) -> NoReturn:
    """Raise an error that names each kind of call once, with the number of others like it."""
    kinds = Counter((call.what, reason) for call, reason in refused)
    clauses, named = [], set()
    for call, reason in refused:
        kind = call.what, reason
        if kind not in named:
            more = f" and {kinds[kind] - 1} more" if kinds[kind] > 1 else ""
            clauses.append(f"{subject(call)}{more} {reason}")
            named.add(kind)
    text = "; ".join(clauses[:_MAX_NAMED])
    text += f"; and {len(clauses) - _MAX_NAMED} other kinds" if len(clauses) > _MAX_NAMED else ""
    raise UnsupportedError(f"{text[0].upper()}{text[1:]}.")


def subject(call: Call) -> str:
    """Return what a message calls a call."""
    return "the input" if call.function == "input" else f"{call.name!r} ({call.what})"
