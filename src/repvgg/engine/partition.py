"""Partition: the calls of a network that the engine supports run in compiled models, the others in PyTorch.

Calls are grouped by levels: a call is on the level of the last call that it depends on, or on the next one if the two
run in different places. The calls of a level form a part; parts run one after the other. A part without a convolution
or linear layer is left to PyTorch: it would cost more to copy its tensors than the engine saves.

What PyTorch runs is the recorded calls, on tensors of any number of images: numbers among their arguments that differ
between recordings of different batches have to be linear in the number of images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from repvgg.engine.frontend import RECORDED_BATCHES, graph_of, subject
from repvgg.engine.graph import Graph, Pair, Shape, is_same_graph
from repvgg.engine.nested import leaves, map_arguments, map_structure, tensors
from repvgg.engine.recorder import Call, Recording, copy_of, record, writes_in_place
from repvgg.engine.runtime.memory import view_input
from repvgg.engine.translate import Translator
from repvgg.engine.views import grouping_of
from repvgg.errors import UnsupportedError, UsageError

#: Records the network with a number of images.
RecordBatch: TypeAlias = Callable[[int], Recording]
#: Compiles a graph for inputs of these shapes.
CompileGraph: TypeAlias = Callable[[Graph, Sequence[Shape]], Callable[..., Any]]

_WORTHWHILE = ("conv2d", "conv_transpose2d", "linear")
_MAX_SIZES = 4  # of images, each with its code and memory


@final
@dataclass(eq=False)
class Part:
    """Calls that run in one place.

    Attributes:
        in_engine: whether the engine runs them.
        calls: in execution order.
        inputs: calls of other parts whose results they take.
        outputs: calls whose results other parts take.
        compiled: what runs them, if the engine does.
        last_reads: calls whose results no later part reads.
    """

    in_engine: bool
    calls: list[Call]
    inputs: list[Call] = field(default_factory=list)
    outputs: list[Call] = field(default_factory=list)
    compiled: Callable[..., Any] | None = None
    last_reads: list[Call] = field(default_factory=list)

    def __str__(self) -> str:
        if self.in_engine:
            return f"engine: {len(self.calls)} calls, from {subject(self.calls[0])} to {subject(self.calls[-1])}"
        kinds = Counter(call.what for call in self.calls if call.function != "item")
        return "PyTorch: " + ", ".join(f"{kind} x {count}" if count > 1 else kind for kind, count in kinds.items())


@final
@dataclass(frozen=True)
class PerImage:
    """A number among the arguments of a call: ``slope`` for each image, plus ``offset``."""

    slope: int
    offset: int


@final
class Partition:
    """A network whose calls run in several places, for images of one size.

    Args:
        record: records the network.
        compile_graph: compiles the parts of the engine.
        batch: the most frequent number of images.
        batches: the numbers of images to record; one alone is the only one that the partition holds for.

    Raises:
        UnsupportedError: the network cannot be recorded, or the engine supports no worthwhile part of it.
    """

    def __init__(
        self,
        record: RecordBatch,
        compile_graph: CompileGraph,
        batch: int,
        batches: Sequence[int] = RECORDED_BATCHES,
    ) -> None:
        recordings = [record(count) for count in batches]
        self._recording, self._batches = recordings[0], batches
        for recording in recordings:
            if recording.error is not None:
                raise UnsupportedError("The network cannot be recorded.") from recording.error
        translator = Translator(self._recording, batches[0])
        translator.translate(tolerant=True)
        needed = [call for call in self._recording.calls if translator.is_translated(call)]
        if any(call.function == "__setitem__" for call in needed):
            raise UnsupportedError("The forward assigns to a part of a tensor.")
        self._arguments = _arguments_of(recordings, needed, batches)
        refused = {id(call) for call, _ in translator.refused}
        self.parts = _parts(needed, refused, self._recording, translator.has_images_first)
        places = [{id(call): at for at, call in enumerate(recording.calls)} for recording in recordings]
        for part in self.parts:
            if part.in_engine:
                graph = self._graph(part, recordings, places)
                part.compiled = compile_graph(graph, [_map_shape((batch, *call.shape[1:])) for call in part.inputs])

    def __call__(self, *images: Tensor) -> Any:
        values: dict[int, Any] = {id(call): image for call, image in zip(self._recording.inputs, images, strict=True)}
        count = len(images[0])
        for part in self.parts:
            if part.compiled is not None:
                outputs = part.compiled(*(_as_map(values[id(call)]) for call in part.inputs))
                values.update((id(call), output) for call, output in zip(part.outputs, outputs, strict=True))
            else:
                for call in part.calls:
                    values[id(call)] = self._run(call, values, count)
            for call in part.last_reads:
                values.pop(id(call), None)
        return map_structure(lambda one: values[id(one)] if isinstance(one, Call) else one, self._recording.output)

    def _run(self, call: Call, values: Mapping[int, Any], count: int) -> Any:
        args, kwargs = self._arguments[id(call)]

        def value_of(one: Any) -> Any:
            if isinstance(one, Call):
                return values[id(one)]
            return one.slope * count + one.offset if isinstance(one, PerImage) else one

        given, more = map_arguments(value_of, args), map_arguments(value_of, kwargs)
        if call.function == "item":
            return list(tensors(given[0]))[given[1]]
        assert call.callee is not None
        if given and writes_in_place(call.function, given, more):
            given = (given[0].clone(), *given[1:])  # another part may still read it
        return call.callee(*given, **more)

    def _graph(self, part: Part, recordings: Sequence[Recording], places: Sequence[Mapping[int, int]]) -> Graph:
        """Translate a part in each recording, and check that its graphs are equal."""
        graphs = []
        for recording, batch in zip(recordings, self._batches, strict=True):
            every = (*recordings[0].inputs, *recordings[0].calls)
            own = (*recording.inputs, *recording.calls)
            same = {id(call): other for call, other in zip(every, own, strict=True)}
            inputs, calls, outputs = (
                [same[id(call)] for call in some] for some in (part.inputs, part.calls, part.outputs)
            )
            graphs.append(graph_of(Recording(tuple(inputs), calls, tuple(outputs), None, {}), batch, "a part"))
        if not all(is_same_graph(graphs[0], other) for other in graphs[1:]):
            raise UnsupportedError("A part of the network depends on the number of images.")
        return graphs[0]

    def __str__(self) -> str:
        lines = [f"{len(self.parts)} parts:", *(f"  {part}" for part in self.parts)]
        return "\n".join(lines)


@final
class PartitionedModel:
    """A network that runs partly in the engine and partly in PyTorch: ``outputs = model(images)``.

    It takes and returns what :class:`repvgg.engine.CompiledModel` does, and is no operator for PyTorch to trace. Images
    of another height or width are compiled on first use; the last few sizes are kept. ``print(model)`` says what runs
    where. What PyTorch runs reads the weights of the model itself, which the engine has copied.

    Args:
        model: the model.
        input_shapes: (N, C, H, W) of each input.
        compile_graph: compiles the parts of the engine.

    Raises:
        UnsupportedError: the network cannot be recorded, or the engine supports no worthwhile part of it.
    """

    def __init__(self, model: nn.Module, input_shapes: Sequence[Shape], compile_graph: CompileGraph) -> None:
        self.model, self.input_shapes, self._compile = model, tuple(input_shapes), compile_graph
        self._copied, self._paths = copy_of(model)
        self._partitions: dict[tuple[Pair, ...], Partition] = {}  # by height and width, the last used last
        self._lock = Lock()
        self._partition(self.input_shapes)

    def __call__(self, *inputs: Any) -> Any:
        """Compute the outputs. Raises as :meth:`repvgg.engine.CompiledModel.__call__`."""
        if len(inputs) != len(self.input_shapes):
            raise UsageError(f"This model takes {len(self.input_shapes)} inputs, got {len(inputs)}.")
        views = [view_input(x, shape[1]) for x, shape in zip(inputs, self.input_shapes, strict=True)]
        images = [x if isinstance(x, Tensor) else torch.from_numpy(x.copy()) for x in inputs]
        with torch.no_grad():
            outputs = self._partition([view.shape for view in views])(*images)
        if isinstance(inputs[0], Tensor):
            return outputs
        return map_structure(lambda one: one.numpy() if isinstance(one, Tensor) else one, outputs)

    def _partition(self, shapes: Sequence[Shape]) -> Partition:
        sizes = tuple(shape[2:] for shape in shapes)
        with self._lock:
            found = self._partitions.pop(sizes, None)
            if found is None:
                found = Partition(self._recorder(shapes), self._compile, max(1, shapes[0][0]))
            self._partitions[sizes] = found
            while len(self._partitions) > _MAX_SIZES:
                del self._partitions[next(iter(self._partitions))]
            return found

    def _recorder(self, shapes: Sequence[Shape]) -> RecordBatch:
        return lambda batch: record(
            self._copied, [(batch, *shape[1:]) for shape in shapes], self._paths, sizes_vary=False
        )

    def __str__(self) -> str:
        return f"{type(self.model).__name__} in {list(self._partitions.values())[-1]}"


# Levels


def _parts(
    calls: Sequence[Call], refused: set[int], recording: Recording, has_images_first: Callable[[Call], bool]
) -> list[Part]:
    in_torch = {id(call) for call in calls if id(call) in refused}
    for call in calls:  # parts of a tensor that PyTorch splits
        if call.function == "item" and id(call.args[0]) in in_torch:
            in_torch.add(id(call))
    while True:
        levels = _levels(calls, in_torch)
        groups: dict[int, list[Call]] = {}
        for call in calls:
            groups.setdefault(levels[id(call)], []).append(call)
        poor = [
            id(call)
            for level, group in groups.items()
            if level % 2 == 0 and not any(call.function in _WORTHWHILE for call in group)
            for call in group
        ]
        # A part takes tensors whose first axis is that of the images.
        poor += [
            id(call)
            for call in calls
            if levels[id(call)] % 2 == 0
            and any(
                levels.get(id(one)) != levels[id(call)] and not has_images_first(one)
                for one in _calls_in((call.args, call.kwargs))
            )
        ]
        if not poor:
            break
        in_torch |= set(poor)
    parts = [Part(level % 2 == 0, groups[level]) for level in sorted(groups)]
    if not any(part.in_engine for part in parts):
        raise UnsupportedError("The engine supports no convolution or linear layer of the network.")
    _link(parts, recording)
    return parts


def _levels(calls: Sequence[Call], in_torch: set[int]) -> dict[int, int]:
    """Return the level of each call: even in the engine, odd in PyTorch."""
    levels: dict[int, int] = {}
    for call in calls:
        parity = int(id(call) in in_torch)
        before = [levels[id(one)] for one in _calls_in((call.args, call.kwargs)) if id(one) in levels]
        levels[id(call)] = max([level + (level % 2 != parity) for level in before], default=parity)
    return levels


def _link(parts: Sequence[Part], recording: Recording) -> None:
    """Find the inputs and outputs of parts, and what each part is the last to read."""
    home = {id(call): part for part in parts for call in part.calls}
    last: dict[int, tuple[Call, Part]] = {}
    for part in parts:
        read = [one for call in part.calls for one in _calls_in((call.args, call.kwargs))]
        part.inputs = list({id(one): one for one in read if home.get(id(one)) is not part}.values())
        last.update((id(one), (one, part)) for one in read)
    returned = list(_calls_in(recording.output))
    wanted = {id(one): one for part in parts for one in part.inputs} | {id(one): one for one in returned}
    for call in wanted.values():
        if id(call) in home:
            home[id(call)].outputs.append(call)
    kept = {id(one) for one in returned}
    for key, (call, part) in last.items():
        if key not in kept:
            part.last_reads.append(call)


# Arguments


def _arguments_of(
    recordings: Sequence[Recording], calls: Sequence[Call], batches: Sequence[int]
) -> dict[int, tuple[Any, Any]]:
    """Return the arguments of each call, with :class:`PerImage` in place of numbers that depend on the batch."""
    if len({len(recording.calls) for recording in recordings}) > 1:
        raise UnsupportedError("The network calls other functions for other numbers of images.")
    wanted = {id(call) for call in calls}
    found = {}
    for same in zip(*(recording.calls for recording in recordings), strict=True):
        if len({call.function for call in same}) > 1:
            raise UnsupportedError("The network calls other functions for other numbers of images.")
        if id(same[0]) in wanted:
            args = _fitted([call.args for call in same], batches)
            found[id(same[0])] = args, _fitted([dict(call.kwargs) for call in same], batches)
    return found


def _fitted(values: Sequence[Any], batches: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, (tuple, list)):
        if len({len(value) for value in values}) > 1:
            raise UnsupportedError("The network passes other arguments for other numbers of images.")
        fitted = [_fitted(each, batches) for each in zip(*values, strict=True)]
        return tuple(fitted) if isinstance(first, tuple) else fitted
    if isinstance(first, dict):
        return {key: _fitted([value[key] for value in values], batches) for key in first}
    if isinstance(first, slice):
        ends = ([getattr(value, name) for value in values] for name in ("start", "stop", "step"))
        return slice(*(_fitted(each, batches) for each in ends))
    if isinstance(first, Call):
        return first
    if isinstance(first, Tensor):
        if not all(value is first or torch.equal(value, first) for value in values):
            raise UnsupportedError("The network computes with tensors that depend on the number of images.")
        return first
    if isinstance(first, int) and not isinstance(first, bool):
        return _fitted_number([int(value) for value in values], batches)
    if any(value != first for value in values):
        raise UnsupportedError("The network passes other arguments for other numbers of images.")
    return first


def _fitted_number(values: Sequence[int], batches: Sequence[int]) -> int | PerImage:
    if len(batches) == 1:
        return values[0]
    one, two = batches[:2]
    slope, rest = divmod(values[0] - values[1], one - two)
    fit = PerImage(slope, values[0] - slope * one)
    pairs = zip(values, batches, strict=True)
    if rest or any(value != fit.slope * batch + fit.offset for value, batch in pairs):
        raise UnsupportedError("The network passes numbers that are not linear in the number of images.")
    return fit if slope else values[0]


def _calls_in(value: Any) -> Iterator[Call]:
    return (one for one in leaves(value) if isinstance(one, Call))


# Inputs of parts


def _map_shape(shape: Sequence[int]) -> Shape:
    """Return the shape (N, C, H, W) of a tensor of any shape, as :func:`_as_map` arranges it."""
    lengths = []
    for group in grouping_of(len(shape) - 1):
        length = 1
        for axis in group:
            length *= shape[axis + 1]
        lengths.append(length)
    return shape[0], lengths[0], lengths[1], lengths[2]


def _as_map(x: Tensor) -> Tensor:
    """Return a tensor as (N, C, H, W): of others than maps, the last axis is that of the channels."""
    if x.ndim == 4:
        return x
    shape: Pair | tuple[int, ...] = tuple(x.shape)
    _, channels, height, width = _map_shape(shape)
    return x.reshape(len(x), height, width, channels).permute(0, 3, 1, 2)
