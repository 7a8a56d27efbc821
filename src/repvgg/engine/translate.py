"""From recorded calls of torch functions to the nodes of a graph.

Every call has a handler, which appends nodes and returns the view of their result. Calls without a handler, and those
that a handler refuses, are collected: the error names all of them at once.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from repvgg.engine import arguments
from repvgg.engine.graph import (
    AdaptivePool,
    Binary,
    C,
    ChannelPool,
    Concat,
    Conv,
    ConvGeometry,
    Elementwise,
    Factor,
    FeatureShape,
    Floats,
    Graph,
    H,
    LayerNorm,
    Node,
    Op,
    Output,
    Pad,
    Pair,
    Pointwise,
    Resize,
    Softmax,
    Spread,
    W,
    WindowPool,
    output_shape,
    pair,
)
from repvgg.engine.recorder import Call, ImageSize, Recording
from repvgg.engine.runtime.memory import why_unreadable
from repvgg.engine.views import View, grouping_of, view_of

Handler: TypeAlias = Callable[[Call], View]

#: Functions that keep the order of the elements.
RESHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "view_as", "reshape_as", "unflatten")
NO_OPS = ("contiguous", "to", "cpu", "float", "type_as", "detach", "clone", "alias")  # if dtype and shape stay
SCALED = ("add", "sub", "mul", "div")


class Refusal(Exception):  # noqa: N818 - it ends the translation of a call, not of the network
    """Why a call is not supported: a clause whose subject is the call."""


class _Unknown(Exception):  # noqa: N818
    """An argument is the result of a call that is not supported."""


@final
class Translator:
    """Appends the nodes of a recording.

    Args:
        recording: of a network.
        batch: the number of images of the recording.
    """

    def __init__(self, recording: Recording, batch: int) -> None:
        self._recording, self._batch = recording, batch
        self._views: dict[int, View | None] = {}  # by id() of the call; None if it is not supported
        self._nodes: list[Node] = []
        self._shapes: list[FeatureShape] = []
        self._call = recording.inputs[0]
        self.refused: list[tuple[Call, str]] = []
        self._handlers = self._table()
        for call in recording.inputs:
            self._views[id(call)] = self._input(call)

    def _input(self, call: Call) -> View:
        """Return the view of a tensor that is computed elsewhere, in a new value."""
        shape = call.shape[1:]
        channels, height, width = (math.prod(shape[axis] for axis in group) for group in grouping_of(len(shape)))
        self._shapes.append(FeatureShape(channels, (height, width)))
        return self._canonical(len(self._shapes) - 1, shape)

    def translate(self, *, tolerant: bool = False) -> None:
        """Translate all calls that the outputs depend on.

        With ``tolerant``, the results of calls that are not supported are taken as given, to find all that are.
        """
        needed = _needed(self._recording)
        for call in self._recording.calls:
            if id(call) not in needed:
                continue
            self._call = call
            try:
                self._views[id(call)] = self._handle(call)
            except Refusal as refusal:
                self.refused.append((call, str(refusal)))
                self._views[id(call)] = self._taken_as_given(call) if tolerant else None
            except _Unknown:
                if tolerant:
                    self.refused.append((call, "depends on what is no tensor of float32"))
                self._views[id(call)] = self._taken_as_given(call) if tolerant else None

    def _taken_as_given(self, call: Call) -> View | None:
        is_given = call.dtype is torch.float32 and call.shape[:1] == (self._batch,)
        return self._input(call) if is_given else None

    def is_translated(self, call: Call) -> bool:
        """Whether a call is one that the outputs depend on."""
        return id(call) in self._views

    def graph(self) -> Graph:
        """Return the graph; all calls have been translated."""
        found: list[Output] = []

        def place(value: Any) -> Any:
            if not isinstance(value, Call):
                return value
            found.append(self._output(value))
            return len(found) - 1

        structure = map_structure(place, self._recording.output)
        channels = tuple(shape.channels for shape in self._shapes[: len(self._recording.inputs)])
        return Graph(channels, tuple(self._nodes), tuple(found), structure)

    def _output(self, call: Call) -> Output:
        self._call = call
        view = self._views[id(call)]
        assert view is not None
        if view.whole_axes() is None:
            view = self._materialize(view)
        axes = view.whole_axes()
        if axes is None:  # several axes of the tensor are one in memory
            return Output(view.value, ((H,), (W,), (C,)), view.shape)
        return Output(view.value, axes)

    # Calls

    def _handle(self, call: Call) -> View:
        handler = self._handlers.get(call.function)
        if handler is None or _writes_elsewhere(call):
            # Arguments that are not supported themselves do not hide that this function is not.
            self._refuse("is not supported by the engine")
        if call.dtype is not torch.float32:
            kind = str(call.dtype).removeprefix("torch.") if call.dtype else "something else than a tensor"
            if call.function not in ("chunk", "split", "unbind", "tensor_split", "max", "min"):
                self._refuse(f"returns {kind}, but the engine computes in float32 only")
        elif not call.shape or call.shape[0] != self._batch:
            self._refuse("mixes the images of a batch")
        return handler(call)

    def _refuse(self, reason: str) -> NoReturn:
        raise Refusal(reason)

    def _view(self, value: Any) -> View:
        """Return the view of an argument."""
        if not isinstance(value, Call):
            self._refuse("is not applied to feature maps")
        view = self._views[id(value)]
        if view is None:
            raise _Unknown
        return view

    def _emit(self, op: Op, *inputs: int, name: str = "") -> int:
        node = Node(name or self._call.name, op, inputs)
        self._shapes.append(output_shape(node, [self._shapes[value] for value in inputs]))
        self._nodes.append(node)
        return len(self._shapes) - 1

    def _whole(self, value: int) -> View:
        return view_of(value, self._shapes[value])

    def _materialize(self, view: View) -> View:
        """Copy the elements of a view to a value of their own, in which the view is canonical."""
        return self._canonical(self._emit(view.rearrangement(grouping_of(len(view.axes))), view.value), view.shape)

    def _canonical(self, value: int, shape: Sequence[int]) -> View:
        """Return the view of a value whose axes are those of :func:`repvgg.engine.views.grouping_of`."""
        rank = len(shape)
        if rank == 3:
            return self._whole(value)
        groups = {0: (), 1: ((C,),), 2: ((W,), (C,))}.get(rank, ((H,), (W,), (C,)))
        reshaped = view_of(value, self._shapes[value], groups).reshape(shape)
        assert reshaped is not None
        return reshaped

    def _as_map(self, view: View) -> int:
        """Return the value of a tensor (N, C, H, W), which is copied if it has another order."""
        if len(view.axes) != 3:
            self._refuse(f"is applied to a tensor of {len(view.axes) + 1} axes, not to feature maps (N, C, H, W)")
        if replace(view, value=0) == replace(self._whole(view.value), value=0):
            return view.value
        return self._emit(view.rearrangement(((0,), (1,), (2,))), view.value)

    def _as_channels_last(self, view: View) -> View:
        """Return a view whose last axis is the channels of a value, and whose other axes are its pixels."""
        source = view.source
        wanted = tuple(Factor(axis, source.axes[axis], 1) for axis in (H, W) if source.axes[axis] > 1)
        pixels = tuple(factor for axis in view.axes[:-1] for factor in axis)
        channels = (Factor(C, source.channels, 1),) if source.channels > 1 else ()
        if view.offset == (0, 0, 0) and pixels == wanted and view.axes[-1] == channels:
            return view
        if len(view.axes) == 3:  # not the canonical order of three axes, which is that of maps
            value = self._emit(view.rearrangement(((2,), (0,), (1,))), view.value)
            return view_of(value, self._shapes[value], ((H,), (W,), (C,)))
        return self._materialize(view)

    def _with_channels(self, view: View, value: int) -> View:
        """Return the view of a value that has other channels than that of ``view``, in the last axis."""
        source = self._shapes[value]
        channels = (Factor(C, source.channels, 1),) if source.channels > 1 else ()
        return View(value, source, (*view.axes[:-1], channels))

    # Element-wise functions

    def _elementwise(self, view: View, *functions: Pointwise) -> View:
        if not view.is_whole:
            view = self._materialize(view)
        return replace(view, value=self._emit(Elementwise(functions), view.value))

    def _activation(self, *functions: Pointwise) -> Handler:
        return lambda call: self._elementwise(self._view(arguments.of(call)["input"]), *functions)

    def _parametric(self, call: Call) -> View:
        """Translate a function whose parameters are numbers."""
        given = arguments.of(call)
        functions = arguments.pointwise(call.function, given)
        if functions is None:
            self._refuse("has arguments that the engine does not support")
        return self._elementwise(self._view(given["input"]), *functions)

    def _prelu(self, call: Call) -> View:
        given = arguments.of(call)
        slopes = self._floats(given["weight"]).ravel()
        view = self._view(given["input"])
        value = self._as_map(view)
        channels = self._shapes[value].channels
        ones = np.ones((channels, 1, 1, 1), np.float32)
        conv = Conv(
            ones,
            np.zeros(channels, np.float32),
            ConvGeometry((1, 1), groups=channels),
            (Pointwise("prelu"),),
            np.broadcast_to(slopes, (channels,)),
        )
        return self._whole(self._emit(conv, value))

    def _arithmetic(self, call: Call) -> View:
        given = arguments.of(call)
        kind = arguments.ARITHMETIC[call.function]
        left, right = given["input"], given["other"]
        if given.get("rounding_mode") is not None:
            self._refuse("rounds its quotient")
        if call.function in ("__rsub__", "rsub", "__rdiv__", "__rtruediv__"):
            left, right = right, left
        scale = given.get("alpha", 1)
        if scale != 1:
            right = self._elementwise(self._view(right), Pointwise("affine", float(scale)))
            return self._combine(kind, self._view(left), right)
        one, other = (self._operand(each) for each in (left, right))
        if isinstance(one, float) and isinstance(other, View):
            return self._with_number(kind, other, one, number_first=True)
        if isinstance(other, float) and isinstance(one, View):
            return self._with_number(kind, one, other, number_first=False)
        if isinstance(one, np.ndarray) and isinstance(other, View):
            if kind == "sub":
                other, kind = self._elementwise(other, Pointwise("affine", -1.0)), "add"
            elif kind == "div":
                other, kind = self._elementwise(other, Pointwise("reciprocal")), "mul"
            return self._with_constant(kind, other, one)
        if isinstance(other, np.ndarray) and isinstance(one, View):
            return self._with_constant(kind, one, other)
        assert isinstance(one, View)
        assert isinstance(other, View)
        return self._combine(kind, one, other)

    def _operand(self, value: Any) -> View | Floats | float:
        if isinstance(value, (bool, ImageSize)) and not isinstance(value, bool):
            self._refuse("computes with the number or the size of its images")
        if isinstance(value, numbers.Real):
            return float(value)
        if isinstance(value, Tensor):
            constant = self._floats(value)
            return float(constant.item()) if constant.size == 1 and constant.ndim <= 1 else constant
        return self._view(value)

    def _with_number(self, kind: str, view: View, number: float, *, number_first: bool) -> View:
        reciprocal = Pointwise("reciprocal")
        match kind:
            case "add":
                return self._elementwise(view, Pointwise("affine", 1.0, number))
            case "sub":
                scale, shift = (-1.0, number) if number_first else (1.0, -number)
                return self._elementwise(view, Pointwise("affine", scale, shift))
            case "mul":
                return self._elementwise(view, Pointwise("affine", number))
            case "div" if number_first:
                return self._elementwise(view, reciprocal, Pointwise("affine", number))
            case "div":
                return self._elementwise(view, Pointwise("affine", 1 / number))
            case "max":
                return self._elementwise(view, Pointwise("clamp", number, math.inf))
            case _:
                return self._elementwise(view, Pointwise("clamp", -math.inf, number))

    def _with_constant(self, kind: str, view: View, constant: Floats) -> View:
        """Combine a tensor with one that does not depend on the images."""
        if constant.ndim > len(view.axes):
            if constant.ndim > len(view.axes) + 1 or constant.shape[0] != 1:
                self._refuse("combines images with a tensor that has a batch of its own")
            constant = constant[0]
        constant = constant.reshape(*[1] * (len(view.axes) - constant.ndim), *constant.shape)
        if any(length not in (1, axis) for length, axis in zip(constant.shape, view.shape, strict=True)):
            view = self._materialize(view.expand(np.broadcast_shapes(constant.shape, view.shape)))
        axes = view.whole_axes()
        if axes is None:
            view = self._materialize(view)
            axes = view.whole_axes()
        if axes is None:
            self._refuse("combines tensors whose axes do not fit the engine's memory")
        arranged = _constant_map(constant, axes, view.source)
        if arranged is None:
            self._refuse("combines tensors whose axes do not fit the engine's memory")
        value = self._emit(Binary(kind, (), arranged), view.value)  # type: ignore[arg-type]
        return replace(view, value=value)

    def _combine(self, kind: str, one: View, other: View) -> View:
        """Combine two tensors, either of which may be broadcast."""
        rank = max(len(one.axes), len(other.axes))
        one, other = (
            view.expand((*[1] * (rank - len(view.axes)), *view.shape)) if len(view.axes) < rank else view
            for view in (one, other)
        )
        shape = np.broadcast_shapes(one.shape, other.shape)
        if one.shape != shape and other.shape == shape:
            if kind == "sub":
                return self._combine("add", self._elementwise(other, Pointwise("affine", -1.0)), one)
            if kind == "div":
                return self._combine("mul", self._elementwise(other, Pointwise("reciprocal")), one)
            return self._combine(kind, other, one)
        if one.shape != shape:
            one = self._materialize(one.expand(shape))
        if one.whole_axes() is None or not _fits(other, one):
            canonical = rank == 3 and one == self._whole(one.value)
            if not canonical:
                one = self._materialize(one)
            if one.whole_axes() is None:
                self._refuse("combines tensors whose axes do not fit the engine's memory")
            other = self._materialize(other if _keeps_axes(one) else other.expand(shape))
            if not _fits(other, one):
                self._refuse("combines tensors whose axes do not fit the engine's memory")
        return replace(one, value=self._emit(Binary(kind, ()), one.value, other.value))  # type: ignore[arg-type]

    # Convolutions and linear layers

    def _conv(self, call: Call) -> View:
        given = arguments.of(call)
        weight = self._floats(given["weight"])
        bias = np.zeros(len(weight), np.float32) if given.get("bias") is None else self._floats(given["bias"])
        kernel: Pair = weight.shape[2:]
        stride, dilation = pair(given.get("stride", 1)), pair(given.get("dilation", 1))
        value = self._as_map(self._view(given["input"]))
        padding = given.get("padding", 0)
        if padding == "same":
            total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
            padding = (total[0] // 2, total[1] // 2)
            if any(pixels % 2 for pixels in total):
                value = self._emit(Pad((0, total[0] % 2, 0, total[1] % 2)), value)
        geometry = ConvGeometry(
            kernel, stride, (0, 0) if padding == "valid" else pair(padding), dilation, int(given.get("groups", 1))
        )
        return self._whole(self._emit(Conv(weight, bias, geometry), value))

    def _conv_transpose(self, call: Call) -> View:
        given = arguments.of(call)
        weight, groups = self._floats(given["weight"]), int(given.get("groups", 1))
        inputs, outputs, height, width = weight.shape
        bias = given.get("bias")
        stride, padding, extra, dilation = (
            pair(given.get(name, number))
            for name, number in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
        )
        frame = [step * (size - 1) - pad for size, step, pad in zip((height, width), dilation, padding, strict=True)]
        if min(frame) < 0:
            self._refuse("has more padding than its kernel has pixels")
        # The kernel of the convolution that it is the transpose of, with inputs and outputs swapped and turned around.
        parts = weight.reshape(groups, inputs // groups, outputs, height, width).transpose(0, 2, 1, 3, 4)
        turned = parts.reshape(groups * outputs, inputs // groups, height, width)[:, :, ::-1, ::-1]
        value = self._as_map(self._view(given["input"]))
        if stride != (1, 1) or extra != (0, 0):
            value = self._emit(Spread(stride, extra), value)
        geometry = ConvGeometry((height, width), (1, 1), (frame[0], frame[1]), dilation, groups)
        zeros = np.zeros(groups * outputs, np.float32)
        conv = Conv(turned, zeros if bias is None else self._floats(bias), geometry)
        return self._whole(self._emit(conv, value))

    def _linear(self, call: Call) -> View:
        given = arguments.of(call)
        weight = self._floats(given["weight"])
        bias = np.zeros(len(weight), np.float32) if given.get("bias") is None else self._floats(given["bias"])
        view = self._as_channels_last(self._view(given["input"]))
        value = self._emit(Conv(weight[:, :, None, None], bias, ConvGeometry((1, 1))), view.value)
        return self._with_channels(view, value)

    def _batch_norm(self, call: Call) -> View:
        given = arguments.of(call)
        if given.get("training", False) or given.get("running_mean") is None:
            self._refuse("computes the statistics of its input, as in training")
        mean, variance = (self._floats(given[name]).astype(np.float64) for name in ("running_mean", "running_var"))
        scale = 1 / np.sqrt(variance + given.get("eps", 1e-5))
        if given.get("weight") is not None:
            scale = scale * self._floats(given["weight"])
        shift = -mean * scale
        if given.get("bias") is not None:
            shift = shift + self._floats(given["bias"])
        view, channels = self._view(given["input"]), len(scale)
        if len(view.axes) == 1:
            view = self._as_channels_last(view)
        elif len(view.axes) == 3:
            view = self._whole(self._as_map(view))
        else:
            self._refuse(f"is applied to a tensor of {len(view.axes) + 1} axes, not to feature maps (N, C, H, W)")
        weight = scale.astype(np.float32).reshape(channels, 1, 1, 1)
        conv = Conv(weight, shift.astype(np.float32), ConvGeometry((1, 1), groups=channels))
        return replace(view, value=self._emit(conv, view.value))

    # Pools

    def _window_pool(self, call: Call) -> View:
        given = arguments.of(call)
        if given.get("divisor_override") is not None or given.get("return_indices"):
            self._refuse("has arguments that the engine does not support")
        if pair(given.get("dilation", 1)) != (1, 1):
            self._refuse("is a dilated pool, which the engine does not support")
        value = self._as_map(self._view(given["input"]))
        size = self._shapes[value].size
        kernel = given["kernel_size"]
        kind: Any = "avg" if call.function == "avg_pool2d" else "max"
        padding = pair(given.get("padding", 0))
        varies = isinstance(kernel, (tuple, list)) and [*map(type, kernel)] == [ImageSize] * 2
        if varies and tuple(map(int, kernel)) == size and padding == (0, 0):  # avg_pool2d(x, x.shape[2:])
            return self._whole(self._emit(AdaptivePool(kind, (1, 1)), value))
        kernel = pair(kernel)
        stride = given.get("stride")
        stride = kernel if stride is None or stride == [] else pair(stride)
        window = ConvGeometry(kernel, stride, padding)
        op = WindowPool(kind, window, bool(given.get("ceil_mode")), bool(given.get("count_include_pad", True)))
        return self._whole(self._emit(op, value))

    def _adaptive_pool(self, call: Call) -> View:
        given = arguments.of(call)
        value = self._as_map(self._view(given["input"]))
        size = given["output_size"]
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        kind: Any = "avg" if call.function == "adaptive_avg_pool2d" else "max"
        if given.get("return_indices"):
            self._refuse("has arguments that the engine does not support")
        cells = [None if one is None else int(one) for one in (height, width)]
        return self._whole(self._emit(AdaptivePool(kind, (cells[0], cells[1])), value))

    def _reduce(self, call: Call) -> View:
        """Translate a mean or a maximum over some axes."""
        given = arguments.of(call)
        view, kind = self._view(given["input"]), "avg" if call.function == "mean" else "max"
        reduced = given.get("dim", given.get("axis"))
        rank = len(view.axes) + 1
        places = [
            one % rank for one in (reduced if isinstance(reduced, (tuple, list)) else [reduced]) if one is not None
        ]
        if not places or 0 in places:
            self._refuse("mixes the images of a batch")
        known = view.whole_axes()
        if known is None or not self._are_reducible(known, places):
            view = self._materialize(view)
            known = view.whole_axes()
        if known is None or not self._are_reducible(known, places):
            self._refuse("reduces axes that the engine does not reduce together")
        axes = {axis for place in places for axis in known[place - 1]}
        value, op_kind = view.value, kind
        if axes & {H, W}:
            size = (1 if H in axes else None, 1 if W in axes else None)
            value = self._emit(AdaptivePool(op_kind, size), value)  # type: ignore[arg-type]
        if C in axes:
            value = self._emit(ChannelPool(op_kind), value)  # type: ignore[arg-type]
        kept = [() if place in places else axis for place, axis in enumerate(view.axes, 1)]
        if not given.get("keepdim", False):
            kept = [axis for place, axis in enumerate(kept, 1) if place not in places]
        return View(value, self._shapes[value], tuple(kept))

    @staticmethod
    def _are_reducible(axes: Sequence[Sequence[int]], places: Iterable[int]) -> bool:
        return all(place <= len(axes) for place in places)

    # The order of elements

    def _reshape(self, call: Call) -> View:
        return self._reshaped(self._view(call.args[0] if call.args else call.kwargs["input"]), call.shape[1:])

    def _reshaped(self, view: View, shape: Sequence[int]) -> View:
        found = view.reshape(shape)
        if found is None:  # factors do not divide: one axis in memory does
            value = self._emit(view.rearrangement((range(len(view.axes)), (), ())), view.value)
            found = view_of(value, self._shapes[value], ((C,),)).reshape(shape)
        assert found is not None
        return found

    def _no_op(self, call: Call) -> View:
        view = self._view(call.args[0] if call.args else call.kwargs["input"])
        if tuple(call.shape[1:]) != view.shape:
            self._refuse("is not supported by the engine")
        return view

    def _dropout(self, call: Call) -> View:
        given = arguments.of(call)
        if given.get("training", call.function != "dropout") is not False:
            self._refuse("drops values at random, as in training: pass training=False")
        return self._view(given["input"])

    def _permute(self, call: Call) -> View:
        view = self._view(call.args[0] if call.args else call.kwargs["input"])
        order = arguments.order_of(call, len(view.axes) + 1)
        if order is None or order[0] != 0:
            self._refuse("mixes the images of a batch")
        return view.permute([axis - 1 for axis in order[1:]])

    def _index(self, call: Call) -> View:
        view = self._view(call.args[0])
        slices = arguments.slices_of(call.args[1], len(view.axes) + 1)
        if slices is None:
            self._refuse("is an index that the engine does not support: use slices and whole numbers")
        for axis, one in enumerate(slices):
            if one is None or one == slice(None):
                continue
            if axis == 0:
                if isinstance(one, int) or one.indices(self._batch) != (0, self._batch, 1):
                    self._refuse("selects images of a batch")
                continue
            length = view.shape[axis - 1]
            begin, end, step = (one, one + 1, 1) if isinstance(one, int) else one.indices(length)
            if isinstance(one, int) and one < 0:
                begin, end = one + length, one + length + 1
            if step < 1:
                self._refuse("reverses an axis")
            view = self._sliced(view, axis - 1, begin, len(range(begin, end, step)), step)
        return self._reshaped(view, call.shape[1:])

    def _sliced(self, view: View, axis: int, start: int, length: int, step: int = 1) -> View:
        if length < 1:
            self._refuse("selects no elements")
        found = view.slice(axis, start, length, step)
        if found is None:
            found = self._materialize(view).slice(axis, start, length, step)
        if found is None:
            self._refuse("is a slice that the engine does not support")
        return found

    def _narrow(self, call: Call) -> View:
        view = self._view(call.args[0])
        axis, start, length = call.args[1:4]
        return self._sliced(view, axis % (len(view.axes) + 1) - 1, int(start), int(length))

    def _parts(self, call: Call) -> View:
        """Check the tensor that is split; its parts are handled by :meth:`_item`."""
        return self._view(call.args[0] if call.args else call.kwargs.get("input", call.kwargs.get("tensor")))

    def _item(self, call: Call) -> View:
        whole, index = call.args
        view = self._view(whole)
        given = arguments.of(whole)
        if whole.function in ("max", "min"):
            self._refuse("is not supported by the engine")
        axis = int(given.get("dim", given.get("axis", 0))) % (len(view.axes) + 1) - 1
        if axis < 0:
            self._refuse("splits a batch")
        if whole.function == "unbind":
            return self._reshaped(self._sliced(view, axis, index, 1), call.shape[1:])
        total = view.shape[axis]
        if whole.function == "chunk":
            size = -(-total // int(given["chunks"]))
            start = size * index
        else:
            sizes: Any = given.get("split_size_or_sections", given.get("split_size"))
            start = sum(map(int, sizes[:index])) if isinstance(sizes, (tuple, list)) else int(sizes) * index
        return self._sliced(view, axis, start, call.shape[axis + 1])

    def _concat(self, call: Call) -> View:
        given = arguments.of(call)
        tensors = given.get("tensors", given.get("input"))
        if not isinstance(tensors, (tuple, list)):
            self._refuse("is not applied to a list of tensors")
        views = [self._view(each) for each in tensors]
        rank = len(views[0].axes) + 1
        axis = int(given.get("dim", given.get("axis", 0)))
        if call.function == "stack":
            axis %= rank + 1
            views = [self._reshaped(view, (*view.shape[: axis - 1], 1, *view.shape[axis - 1 :])) for view in views]
            rank += 1
        axis = axis % rank - 1
        if axis < 0:
            self._refuse("mixes the images of a batch")
        grouping: Sequence[Sequence[int]] = grouping_of(rank - 1)
        groups = {1: ((C,),), 2: ((W,), (C,)), 3: ((C,), (H,), (W,))}.get(rank - 1, ((H,), (W,), (C,)))
        if rank > 4:  # that axis alone, and those before and after it
            grouping = range(axis + 1, rank - 1), range(axis), (axis,)
        place = next(at for at, group in enumerate(grouping) if axis in group)
        parts = tuple(view.rearrangement(grouping) for view in views)
        value = self._emit(Concat(place, parts), *(view.value for view in views))
        return self._reshaped(view_of(value, self._shapes[value], groups), call.shape[1:])

    def _pixel_shuffle(self, call: Call) -> View:
        view, factor = self._view(call.args[0]), int(arguments.of(call)["upscale_factor"])
        channels, height, width = view.shape
        split = self._reshaped(view, (channels // factor**2, factor, factor, height, width))
        return self._reshaped(split.permute((0, 3, 1, 4, 2)), call.shape[1:])

    def _pixel_unshuffle(self, call: Call) -> View:
        view, factor = self._view(call.args[0]), int(arguments.of(call)["downscale_factor"])
        channels, height, width = view.shape
        split = self._reshaped(view, (channels, height // factor, factor, width // factor, factor))
        return self._reshaped(split.permute((0, 2, 4, 1, 3)), call.shape[1:])

    def _channel_shuffle(self, call: Call) -> View:
        view, groups = self._view(call.args[0]), int(arguments.of(call)["groups"])
        channels, height, width = view.shape
        split = self._reshaped(view, (groups, channels // groups, height, width))
        return self._reshaped(split.permute((1, 0, 2, 3)), call.shape[1:])

    def _expand(self, call: Call) -> View:
        return self._view(call.args[0]).expand(call.shape[1:])

    # Others

    def _pad(self, call: Call) -> View:
        given = arguments.of(call)
        mode = given.get("mode", "constant")
        if mode != "constant":
            self._refuse(f"has the padding mode {mode!r}, but the engine supports 'zeros' only")
        view = self._view(given["input"])
        sizes = [int(one) for one in given["pad"]]
        sizes += [0] * (6 - len(sizes))
        if len(view.axes) != 3 or len(sizes) > 6:
            self._refuse("pads other axes than those of feature maps")
        value = self._as_map(view)
        for axis, (before, after) in enumerate((sizes[4:6], sizes[2:4], sizes[0:2])):
            if min(before, after) < 0:  # a negative padding crops
                length = self._shapes[value].axes[axis] + min(before, 0) + min(after, 0)
                value = self._as_map(self._sliced(self._whole(value), axis, max(0, -before), length))
        left, right, above, below, first, last = (max(0, size) for size in sizes)
        op = Pad((above, below, left, right), (first, last), float(given.get("value") or 0))
        return self._whole(self._emit(op, value))

    def _interpolate(self, call: Call) -> View:
        given = arguments.of(call)
        mode, align = given.get("mode", "nearest"), bool(given.get("align_corners"))
        if mode not in ("nearest", "bilinear") or given.get("antialias"):
            self._refuse(f"interpolates by {mode!r}, but the engine does so by 'nearest' and 'bilinear' only")
        value = self._as_map(self._view(given["input"]))
        size, scale = given.get("size"), given.get("scale_factor")
        if scale is not None and not given.get("recompute_scale_factor"):
            first, second = scale if isinstance(scale, (tuple, list)) else (scale, scale)
            op = Resize(mode, None, (float(first), float(second)), align)
        else:
            op = Resize(mode, pair(call.shape[2:]) if size is None else pair(size), None, align)
        return self._whole(self._emit(op, value))

    def _softmax(self, call: Call) -> View:
        given = arguments.of(call)
        view = self._view(given["input"])
        axis = given.get("dim")
        if axis is None or axis % (len(view.axes) + 1) == 0:
            self._refuse("mixes the images of a batch")
        axis = axis % (len(view.axes) + 1) - 1
        channels = (Factor(C, view.source.channels, 1),) if view.source.channels > 1 else ()
        if not view.is_whole or view.axes[axis] != channels:
            order = [one for one in range(len(view.axes)) if one != axis]
            last = self._as_channels_last(view.permute([*order, axis]))
            value = self._emit(Softmax(), last.value)
            back = [*order, axis]
            return replace(last, value=value).permute([back.index(one) for one in range(len(back))])
        return replace(view, value=self._emit(Softmax(), view.value))

    def _layer_norm(self, call: Call) -> View:
        given = arguments.of(call)
        shape = given["normalized_shape"]
        if len(shape) != 1:
            self._refuse("normalizes several axes, but the engine does so for the last one only")
        view = self._as_channels_last(self._view(given["input"]))
        length = int(shape[0])
        weight, bias = (
            np.full(length, number, np.float32) if given.get(name) is None else self._floats(given[name])
            for name, number in (("weight", 1.0), ("bias", 0.0))
        )
        op = LayerNorm(weight, bias, float(given.get("eps", 1e-5)))
        return replace(view, value=self._emit(op, view.value))

    # Weights

    def _floats(self, tensor: Any) -> Floats:
        if not isinstance(tensor, Tensor):
            self._refuse("has weights that depend on the images")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            self._refuse("has weights that are not float32 tensors on the CPU: call model.float().cpu() first")
        reason = why_unreadable(tensor)
        if reason is not None:
            self._refuse(f"has weights that the engine cannot read ({reason})")
        values: Floats = tensor.detach().resolve_neg().numpy()
        return values

    def _table(self) -> dict[str, Handler]:
        table: list[tuple[Iterable[str], Handler]] = [
            (("conv2d",), self._conv),
            (("conv_transpose2d",), self._conv_transpose),
            (("linear",), self._linear),
            (("batch_norm",), self._batch_norm),
            (("prelu",), self._prelu),
            (arguments.PARAMETRIC, self._parametric),
            (arguments.ARITHMETIC, self._arithmetic),
            (("max_pool2d", "avg_pool2d"), self._window_pool),
            (("adaptive_avg_pool2d", "adaptive_max_pool2d"), self._adaptive_pool),
            (("mean", "amax"), self._reduce),
            (RESHAPES, self._reshape),
            (NO_OPS, self._no_op),
            (("dropout", "dropout2d", "feature_dropout"), self._dropout),
            (("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"), self._permute),
            (("__getitem__",), self._index),
            (("narrow",), self._narrow),
            (("chunk", "split", "unbind"), self._parts),
            (("item",), self._item),
            (("cat", "concat", "concatenate", "stack"), self._concat),
            (("pixel_shuffle",), self._pixel_shuffle),
            (("pixel_unshuffle",), self._pixel_unshuffle),
            (("channel_shuffle", "native_channel_shuffle"), self._channel_shuffle),
            (("expand", "expand_as", "broadcast_to"), self._expand),
            (("pad",), self._pad),
            (("interpolate",), self._interpolate),
            (("softmax",), self._softmax),
            (("layer_norm",), self._layer_norm),
        ]
        return {name: handler for names, handler in table for name in names}


def _needed(recording: Recording) -> set[int]:
    """Return the ids of the calls that the output depends on."""
    waiting: list[Any] = [recording.output] if recording.error is None else list(recording.calls)
    waiting += (call for call in recording.calls if _writes_elsewhere(call))
    found: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Call):
            if id(value) not in found:
                found.add(id(value))
                waiting += [value.args, value.kwargs]
        elif isinstance(value, (tuple, list)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
    return found


def _writes_elsewhere(call: Call) -> bool:
    """Whether a call changes a tensor that it does not return."""
    return call.function == "__setitem__" or call.kwargs.get("out") is not None


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the leaves of nested tuples, lists and dictionaries."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_structure(function, one) for one in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_structure(function, one) for one in value)
    if isinstance(value, dict):
        return type(value)((key, map_structure(function, one)) for key, one in value.items())
    return function(value)


def _keeps_axes(view: View) -> bool:
    """Whether each axis of a tensor is at most one axis of its value."""
    return all(len(axis) <= 1 for axis in view.axes)


def _fits(other: View, view: View) -> bool:
    """Whether ``other`` is broadcast along whole axes of the value of ``view``, and is in the same order else."""
    if not other.is_whole:
        return False
    seen: set[int] = set()
    for axis, wanted in zip(other.axes, view.axes, strict=True):
        if axis and axis != wanted:
            return False
        seen |= {factor.axis for factor in axis}
    return all(other.source.axes[axis] == 1 for axis in (C, H, W) if axis not in seen)


def _constant_map(constant: Floats, axes: Sequence[Sequence[int]], source: FeatureShape) -> Floats | None:
    """Return a constant as (C, H, W), with ones where it is broadcast; ``axes`` are those of ``View.whole_axes``."""
    lengths: list[int] = []
    order: list[int] = []
    for length, group in zip(constant.shape, axes, strict=True):
        if length > 1 and length != math.prod(source.axes[axis] for axis in group):
            return None
        lengths += [source.axes[axis] if length > 1 else 1 for axis in group]
        order += group
    arranged = constant.reshape(lengths)
    missing = [axis for axis in (C, H, W) if axis not in order]
    arranged = arranged.reshape(*lengths, *[1] * len(missing))
    return arranged.transpose([[*order, *missing].index(axis) for axis in (C, H, W)])
