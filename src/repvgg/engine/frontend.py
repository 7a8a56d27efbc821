"""The frontend: reads a module or an FX graph into a list of layers, or names the first call that is not supported.

The model's own ``forward`` is recorded in eval mode; see :mod:`repvgg.engine.recorder`. It is recorded at several
sizes, and must do the same at all of them, because the layers are used for all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, fx, nn

from repvgg.engine.graph import Conv, ConvGeometry, Floats, Gate, Layer, Linear, Pair, Pool, pair
from repvgg.engine.recorder import ARGUMENTS, Call, ImageSize, Recording, copy_of, record, runs_code_of_torch
from repvgg.engine.runtime.memory import why_unreadable
from repvgg.errors import UnsupportedError, typed_line

Axes: TypeAlias = tuple[str, ...]

# Names of functions, see repvgg.engine.recorder.
RELU = ("relu", "relu_")
SIGMOID = ("sigmoid", "sigmoid_")
MUL = ("mul", "mul_", "multiply", "multiply_")
POOL = ("adaptive_avg_pool2d", "avg_pool2d", "mean")
RESHAPE = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "view_as", "reshape_as", "__getitem__")
NO_OPS = ("contiguous", "to", "cpu", "float", "type_as", "detach", "clone", "alias")  # if dtype and shape stay

# What the axes of a value are.
MAPS: Axes = ("N", "C", "H", "W")
VECTORS: Axes = ("N", "C")

_ONE_OUTPUT = "The engine needs a network that returns one tensor: return it alone."

#: Batch, height and width of the recordings: prime numbers, so that a shape tells its axes apart; even and odd ones;
#: and a single image, which some functions treat differently. Large enough for networks of any stride.
RECORDED_SIZES = ((7919, 4099, 4111), (2, 4096, 6144), (1, 4098, 2999))


def read(model: nn.Module, channels: int | None = None) -> list[Layer]:
    """Read the layers of a plain network in execution order, with copies of their weights.

    Args:
        model: convolutions, ReLUs and squeeze-and-excitation gates in a chain, then optionally a global average pool
            and linear layers. It is read in eval mode, and not changed.
        channels: of the images; by default those that the first convolution takes.

    Raises:
        UnsupportedError: a part of the model is not supported; the message names it.
    """
    if runs_code_of_torch(model) and not isinstance(model, nn.Sequential):
        model = nn.Sequential(model)  # messages name the layers inside of a model
    copied, paths = copy_of(model)
    if channels is None:
        channels = next((one.in_channels for one in model.modules() if isinstance(one, nn.Conv2d)), 3)
    found: list[Layer] | None = None
    for batch, height, width in RECORDED_SIZES:
        recording = record(copied, (batch, channels, height, width), paths)
        layers = _Reader(recording, type(model).__name__).layers()
        if found is not None and not _are_same(found, layers):
            raise UnsupportedError(
                f"{type(model).__name__} computes something else for images of another number or size: "
                "remove what depends on their shape."
            )
        found = layers
    assert found is not None
    return [_with_own_memory(layer) for layer in found]


def read_graph(graph: fx.GraphModule, arguments: Sequence[Any], images: int) -> list[Layer]:
    """Read the layers of a graph of torch.compile, which returns a tuple of one tensor.

    Args:
        graph: calls torch functions on its arguments.
        arguments: of a call. The graph is read for images of this shape.
        images: index of the images among them; the others are weights and sizes.

    Raises:
        UnsupportedError: see :func:`read`.
    """

    def forward(x: Tensor) -> Any:
        return graph(*arguments[:images], x, *arguments[images + 1 :])

    batch, channels, height, width = arguments[images].shape
    recording = record(forward, (batch, channels, height, width))
    layers = _Reader(recording, "the graph", returns_tuple=True).layers()
    return [_with_own_memory(layer) for layer in layers]


def _are_same(layers: Sequence[Layer], others: Sequence[Layer]) -> bool:
    return len(layers) == len(others) and all(map(_is_same, layers, others))


def _is_same(layer: Layer, other: Layer) -> bool:
    if type(layer) is not type(other):
        return False
    return all(
        _is_same_array(one, two) if isinstance(one, np.ndarray) else one == two
        for one, two in ((getattr(layer, each.name), getattr(other, each.name)) for each in fields(layer))
    )


def _is_same_array(one: Floats, two: Floats) -> bool:
    same_memory = (one.ctypes.data, one.shape, one.strides) == (two.ctypes.data, two.shape, two.strides)
    return same_memory or np.array_equal(one, two, equal_nan=True)


def _with_own_memory(layer: Layer) -> Layer:
    """Copy the arrays of a layer, which are those of the model until then."""
    values: dict[str, Any] = {each.name: getattr(layer, each.name) for each in fields(layer)}
    arrays: dict[str, Any] = {name: np.array(one, order="C") for name, one in values.items() if _is_array(one)}
    return replace(layer, **arrays)


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)


@final
@dataclass(frozen=True, eq=False)
class _WeightedCall:
    """The arguments of a convolution or of a linear layer, as the model passes them."""

    weight: Any
    bias: Any = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


@final
class _Reader:
    """Follows the chain of calls from the images to the output."""

    def __init__(self, recording: Recording, model: str, *, returns_tuple: bool = False) -> None:
        self._recording, self._model, self._returns_tuple = recording, model, returns_tuple
        self._layers: list[Layer] = []
        self._axes = MAPS
        handlers: list[tuple[Sequence[str], Callable[[Call], None]]] = [
            (("conv2d",), self._conv),
            (("pad",), self._refuse_padding),
            (RELU, self._relu),
            (("dropout", "dropout2d"), self._dropout),
            (POOL, self._pool),
            (RESHAPE, self._reshape),
            (NO_OPS, self._check_no_op),
            (("linear",), self._linear),
        ]
        self._handlers = {function: handler for functions, handler in handlers for function in functions}

    def layers(self) -> list[Layer]:
        if isinstance(self._recording.error, UnsupportedError):
            raise self._recording.error
        call = self._recording.images
        while (users := self._users(call)) and users[0].function != "output":
            if len(users) > 1 and self._has_batch_norm():
                self._refuse_train_form("branches", call, f"is used {len(users)} times")
            if len(users) > 1 and users[-1].function == "output" and self._recording.output is not call:
                raise UnsupportedError(_ONE_OUTPUT)
            if len(users) == 2:
                call = self._gate(call, users)
                continue
            if len(users) != 1:
                self._refuse(call, f"is used {len(users)} times, but the engine needs a chain")
            call = users[0]
            self._read(call)
        output = self._recording.output
        if self._returns_tuple and isinstance(output, (tuple, list)) and len(output) == 1:
            output = output[0]
        if output is not call:
            raise UnsupportedError(_ONE_OUTPUT)
        if not self._layers:
            raise UnsupportedError("The network has no layer: there is nothing to compile.")
        if self._pooled() and self._axes != VECTORS:
            raise UnsupportedError("The network ends with a pool of four axes: add a flatten(1) after it.")
        if self._axes not in (MAPS, VECTORS):
            self._refuse(call, "returns neither feature maps nor vectors")
        return self._layers

    def _users(self, call: Call) -> list[Call]:
        error = self._recording.error
        if error is not None and not call.users:  # everything up to the failure is supported
            raise UnsupportedError(
                f"The forward of {self._model} cannot be traced ({typed_line(error)}): "
                "remove control flow that depends on values."
            ) from error
        return call.users

    def _read(self, call: Call) -> None:
        handler = self._handlers.get(call.function)
        if _is_batch_norm(call):
            self._refuse_train_form("batch norms", call, "is one")
        if handler is None:
            self._refuse(call, "is not supported by the engine")
        self._check_dtype(call)
        handler(call)

    def _check_dtype(self, call: Call) -> None:
        if call.dtype is not torch.float32:
            kind = str(call.dtype).removeprefix("torch.") if call.dtype else "something else than a tensor"
            self._refuse(call, f"returns {kind}, but the engine computes in float32 only")

    # Layers

    def _conv(self, call: Call) -> None:
        self._check_maps(call)
        self._layers.append(self._read_conv(call))

    def _check_maps(self, call: Call) -> None:
        if self._axes != MAPS:
            self._refuse(call, "follows the global pool, where the engine supports linear layers only")

    def _read_conv(self, call: Call) -> Conv:
        given = self._weighted_call(call)
        weight, bias = self._floats(call, given.weight), self._bias(call, given.weight, given.bias)
        kernel: Pair = weight.shape[2:]
        stride, dilation = pair(given.stride), pair(given.dilation)
        padding = self._padding(call, given.padding, kernel, dilation)
        return Conv(call.name, weight, bias, ConvGeometry(kernel, stride, padding, dilation, int(given.groups)))

    def _padding(self, call: Call, padding: Any, kernel: Pair, dilation: Pair) -> Pair:
        if padding == "valid":
            return 0, 0
        if not isinstance(padding, str):
            return pair(padding)
        total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        if any(pixels % 2 for pixels in total):
            self._refuse(call, "pads one side more than the other: use a kernel of odd size")
        return total[0] // 2, total[1] // 2

    def _refuse_padding(self, call: Call) -> None:
        mode = call.given("input", "pad", "mode").get("mode", "constant")
        if mode == "constant":
            self._refuse(call, "pads feature maps by itself: use the padding of the convolution")
        self._refuse(call, f"has the padding mode {mode!r}, but the engine supports 'zeros' only")

    def _relu(self, call: Call) -> None:
        before = self._layers[-1] if self._layers else None
        if before is None or isinstance(before, Pool) or self._axes not in (MAPS, VECTORS):
            self._refuse(call, "does not follow a layer that the engine can fuse it into")
        self._layers[-1] = replace(before, relu=True)

    def _dropout(self, call: Call) -> None:
        given = call.given("input", "p", "training")
        if given.get("training", True) is not False:
            self._refuse(call, "drops values at random, as in training: pass training=False")

    def _linear(self, call: Call) -> None:
        if self._axes != VECTORS:
            self._refuse(call, "does not follow a global average pool and a flatten(1)")
        self._layers.append(self._read_linear(call))

    def _read_linear(self, call: Call) -> Linear:
        given = self._weighted_call(call)
        return Linear(call.name, self._floats(call, given.weight), self._bias(call, given.weight, given.bias))

    # Pooling and axes

    def _pooled(self) -> bool:
        return not {"H", "W", "HW"} & {*self._axes}

    def _pool(self, call: Call) -> None:
        if self._pooled():
            self._check_maps(call)
        self._axes = self._axes_after_pool(call, self._axes)
        if self._pooled():
            self._layers.append(Pool(call.name))

    def _axes_after_pool(self, call: Call, axes: Axes) -> Axes:
        """Return the axes of what a pool returns; refuse it if it computes anything but the mean over whole axes."""
        if call.function == "mean":
            places = self._reduced(call, len(axes))
            known = places and all(axes[place] in ("H", "W", "HW", "1") for place in places)
        else:
            places = (2, 3)
            known = axes == MAPS and call.shape[2:] == (1, 1) and self._covers_all(call)
        if not known:
            self._refuse(call, "is not a global average pool, the only pooling that the engine supports")
        kept = ["1" if place in places else axis for place, axis in enumerate(axes)]
        return tuple(axis for place, axis in enumerate(kept) if len(call.shape) == len(axes) or place not in places)

    @staticmethod
    def _reduced(call: Call, rank: int) -> tuple[int, ...]:
        """Return the axes that a mean reduces; none if they are not given as numbers."""
        given = call.given("input", "dim")
        found = given.get("dim", given.get("axis"))
        axes: Sequence[Any] = found if isinstance(found, (tuple, list)) else [found]
        return tuple(axis % rank for axis in axes) if all(isinstance(axis, int) for axis in axes) else ()

    @staticmethod
    def _covers_all(call: Call) -> bool:
        """Whether the window of a pool is the whole map at every size."""
        if call.function == "adaptive_avg_pool2d":
            return True
        # avg_pool2d(x, x.shape[2:]): a window of constant size covers the maps of one size of images only.
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        given = call.given(*names)
        window = given["kernel_size"]
        whole = isinstance(window, (tuple, list)) and [*map(type, window)] == [ImageSize] * 2
        return (
            whole
            and tuple(map(int, window)) == given["input"].shape[2:]
            and _is_zero(given.get("padding", 0))
            and given.get("divisor_override") is None
        )

    def _reshape(self, call: Call) -> None:
        self._axes = self._axes_after_reshape(call, self._axes)

    def _axes_after_reshape(self, call: Call, axes: Axes) -> Axes:
        """Return the axes after a function that keeps the order of the elements; refuse it unless these are known."""
        before, after = call.args[0].shape, call.shape
        found: Axes | None = None
        if call.function == "__getitem__" and not _selects_all(call.args[1]):
            pass
        elif after == before:
            found = axes
        elif axes == MAPS and after == (*before[:2], before[2] * before[3]):
            found = "N", "C", "HW"
        elif not {"H", "W", "HW"} & {*axes} and after[:2] == before[:2] and {*after[2:]} <= {1}:
            found = *VECTORS, *["1"] * (len(after) - 2)
        if found is None:
            self._refuse(call, "is not a flatten(1) right after a global average pool")
        return found

    def _check_no_op(self, call: Call) -> None:
        if call.shape != call.args[0].shape:
            self._refuse(call, "is not supported by the engine")

    # Squeeze-and-excitation: x * sigmoid(conv(relu(conv(pool(x)))))

    def _gate(self, call: Call, users: list[Call]) -> Call:
        """Read the gate that begins at ``call``, and return the multiplication that ends it."""
        first, product = sorted(users, key=lambda user: user.function in MUL)
        if product.function not in MUL or first.function in MUL or not self._layers:
            self._refuse(
                call,
                "has two users that do not form a squeeze-and-excitation gate: merge branches first, "
                "with repvgg.reparameterize",
            )
        if first.function in POOL:
            self._check_maps(first)
        steps: list[Any] = []
        axes, before, following = self._axes, call, first
        while following is not product:
            self._check_dtype(following)
            if following.function in POOL:
                axes = self._axes_after_pool(following, axes)
            elif following.function in RESHAPE:
                axes = self._axes_after_reshape(following, axes)
            elif following.function in NO_OPS:
                self._check_no_op(following)
            else:
                steps.append(self._step_of_gate(following, axes))
            users = self._users(following)
            if len(users) != 1:
                self._refuse(following, f"is used {len(users)} times inside of a gate")
            before, following = following, users[0]
        kinds = [one if isinstance(one, str) else "matrix" for one in steps]
        if kinds != ["matrix", "relu", "matrix", "sigmoid"] or before.shape != (*call.shape[:2], 1, 1):
            what = "convolution, ReLU, convolution and sigmoid"
            self._refuse(first, f"does not begin a squeeze-and-excitation gate of pool, {what}")
        self._check_dtype(product)
        down, _, up, _ = steps
        self._layers.append(Gate(down.name, down.weight, down.bias, up.weight, up.bias))
        return product

    def _step_of_gate(self, call: Call, axes: Axes) -> Linear | str:
        if call.function in RELU:
            return "relu"
        if call.function in SIGMOID:
            return "sigmoid"
        if call.function == "linear" and axes == VECTORS:
            return self._read_linear(call)
        if call.function != "conv2d" or axes != (*VECTORS, "1", "1"):
            self._refuse(call, "is not a convolution of a single pixel, which the engine expects in a gate")
        conv = self._read_conv(call)
        if conv.geometry != ConvGeometry((1, 1)):
            self._refuse(call, "is not a 1x1 convolution without groups, as the engine expects in a gate")
        return Linear(conv.name, conv.weight[:, :, 0, 0], conv.bias)

    # Weights

    def _weighted_call(self, call: Call) -> _WeightedCall:
        given = call.given(*ARGUMENTS)
        return _WeightedCall(**{name: value for name, value in given.items() if name != "input"})

    def _bias(self, call: Call, weight: Any, bias: Any) -> Floats:
        return np.zeros(len(weight), np.float32) if bias is None else self._floats(call, bias)

    def _floats(self, call: Call, tensor: Any) -> Floats:
        if not isinstance(tensor, Tensor) or id(tensor) in self._recording.computed:
            self._refuse(call, "has weights that its forward computes: the engine needs float32 tensors of the model")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            self._refuse(call, "has weights that are not float32 tensors on the CPU: call model.float().cpu() first")
        reason = why_unreadable(tensor)
        if reason is not None:
            self._refuse(call, f"has weights that the engine cannot read ({reason})")
        values: Floats = tensor.detach().resolve_neg().numpy()
        return values

    def _refuse(self, call: Call, reason: str) -> NoReturn:
        text = f"{_subject(call)} {reason}."
        raise UnsupportedError(text[0].upper() + text[1:])

    def _has_batch_norm(self) -> bool:
        seen, waiting = set(), [self._recording.images]
        while waiting:
            call = waiting.pop()
            if _is_batch_norm(call):
                return True
            if id(call) not in seen:
                seen.add(id(call))
                waiting += call.users
        return False

    def _refuse_train_form(self, what: str, call: Call, reason: str) -> NoReturn:
        raise UnsupportedError(
            f"This model still has {what}: call repvgg.reparameterize first ({_subject(call)} {reason})."
        )


def _subject(call: Call) -> str:
    return "the input" if call.function == "input" else f"{call.name!r} ({call.what})"


def _is_batch_norm(call: Call) -> bool:
    return call.function == "batch_norm" or "BatchNorm" in call.what


def _selects_all(index: Any) -> bool:
    """Whether an index selects all elements of its axes, or the first or last, which may be the only one."""
    index = index if isinstance(index, tuple) else (index,)
    return all(
        one is Ellipsis
        or one is None
        or (type(one) is int and one in (0, -1))
        or (type(one) is slice and one.start in (None, 0) and one.step in (None, 1))
        for one in index
    )


def _is_zero(value: Any) -> bool:
    return value == 0 or (isinstance(value, (tuple, list)) and all(one == 0 for one in value))
