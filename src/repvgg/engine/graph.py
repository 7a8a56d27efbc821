"""The graph that the frontend produces and the planner consumes: operations, the values between them, their shapes.

Operations are frozen values that hold NumPy arrays: nothing in here refers to an ``nn.Module`` or to a kernel. A value
is a feature map (C, H, W) of each image; vectors have H = W = 1. Which axes of a PyTorch tensor those are says
:mod:`repvgg.engine.views`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from repvgg.errors import UnsupportedError

Floats: TypeAlias = NDArray[np.float32]
Pair: TypeAlias = tuple[int, int]
Shape: TypeAlias = tuple[int, int, int, int]  # (N, C, H, W)

C, H, W = range(3)  # the axes of a value


def pair(value: int | Sequence[int]) -> Pair:
    """Expand a number to both axes."""
    first, second = (value, value) if isinstance(value, int) else (*value, *value)[:2]
    return int(first), int(second)


@final
@dataclass(frozen=True)
class FeatureShape:
    """The shape of a value, without the batch; vectors have the size (1, 1)."""

    channels: int
    size: Pair

    @property
    def axes(self) -> tuple[int, int, int]:
        return self.channels, *self.size


@final
@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of a convolution or of the window of a pool in pixels; pairs are (vertical, horizontal)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def output_size(self, size: Pair, *, ceil: bool = False) -> Pair:
        """Compute the height and width of the output for an input of ``size``; below 1 if there is no output.

        With ``ceil``, the last window may extend beyond the padding below and on the right, if it begins before it.
        """
        axes = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = (_windows(length, k, step, pad, dilation, ceil=ceil) for length, k, step, pad, dilation in axes)
        return height, width


def _windows(length: int, kernel: int, stride: int, padding: int, dilation: int, *, ceil: bool) -> int:
    room = length + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= length + padding else count


# Element-wise functions, which convolutions and other operations apply to their outputs


@final
@dataclass(frozen=True)
class Pointwise:
    """A function of each element: ``kind`` is a key of :data:`repvgg.engine.kernels.pointwise.EMITTERS`.

    "add" adds the value that the output replaces, in place; "prelu" multiplies negative elements by the slope of their
    channel.
    """

    kind: str
    a: float = 0.0
    b: float = 0.0


Epilogue: TypeAlias = tuple[Pointwise, ...]
RELU: Epilogue = (Pointwise("relu"),)
ADD = Pointwise("add")

# Operations


@final
@dataclass(frozen=True, eq=False)
class Conv:
    """``y = epilogue(conv(x) + bias)`` with zero padding; a linear layer is a 1x1 convolution.

    With :data:`ADD` in its epilogue it has a second input, whose memory the output replaces. ``slopes`` are those of
    "prelu" in the epilogue.
    """

    weight: Floats  # OIHW, where I is the number of channels of one group
    bias: Floats  # (O,)
    geometry: ConvGeometry
    epilogue: Epilogue = ()
    slopes: Floats | None = None  # (O,)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved separately."""
        return self.geometry.groups == len(self.weight) and self.weight.shape[1:2] == (1,)


@final
@dataclass(frozen=True)
class Elementwise:
    """``y = epilogue(x)``."""

    epilogue: Epilogue


@final
@dataclass(frozen=True, eq=False)
class Binary:
    """``y = epilogue(a ∘ b)``, where ∘ is +, -, x, /, max or min, and b is broadcast along axes of size 1.

    ``constant`` is b (C, H, W), or None if b is the second input.
    """

    kind: Literal["add", "sub", "mul", "div", "max", "min"]
    epilogue: Epilogue = ()
    constant: Floats | None = None


@final
@dataclass(frozen=True)
class WindowPool:
    """Maximum or mean of each window; a window of a mean may count the padding."""

    kind: Literal["max", "avg"]
    window: ConvGeometry
    ceil: bool = False
    counts_padding: bool = True


@final
@dataclass(frozen=True)
class AdaptivePool:
    """Maximum or mean over cells that divide the map into ``size``; None keeps the axis."""

    kind: Literal["max", "avg"]
    size: tuple[int | None, int | None]


@final
@dataclass(frozen=True)
class ChannelPool:
    """Maximum or mean over the channels of each pixel."""

    kind: Literal["max", "avg"]


@final
@dataclass(frozen=True)
class Resize:
    """Upsampling by the nearest pixel or bilinear interpolation, to ``size`` or by ``scale``."""

    kind: Literal["nearest", "bilinear"]
    size: Pair | None
    scale: tuple[float, float] | None
    align_corners: bool = False


@final
@dataclass(frozen=True)
class Softmax:
    """Softmax over the channels of each pixel, or its logarithm."""

    log: bool = False


@final
@dataclass(frozen=True, eq=False)
class LayerNorm:
    """``y = (x - mean) / sqrt(variance + epsilon) · weight + bias`` over the channels of each pixel."""

    weight: Floats  # (C,)
    bias: Floats  # (C,)
    epsilon: float


@final
@dataclass(frozen=True, eq=False)
class GroupNorm:
    """``y = (x - mean) / sqrt(variance + epsilon) · weight + bias`` over the pixels and channels of each group."""

    groups: int
    weight: Floats  # (C,)
    bias: Floats  # (C,)
    epsilon: float


class Factor(NamedTuple):
    """A loop over an axis of a value: ``extent`` steps of ``stride`` elements; an extent of 0 is the whole axis."""

    axis: int
    extent: int
    stride: int


@final
@dataclass(frozen=True)
class Rearrangement:
    """Copy of elements: each axis of the output runs through nested factors of the input, the outermost first."""

    axes: tuple[tuple[Factor, ...], tuple[Factor, ...], tuple[Factor, ...]]  # of the output's C, H and W
    offset: tuple[int, int, int] = (0, 0, 0)  # of the first element in the input's C, H and W

    def output(self, shape: FeatureShape) -> FeatureShape:
        channels, height, width = (
            math.prod(factor.extent or shape.axes[factor.axis] for factor in axis) for axis in self.axes
        )
        return FeatureShape(channels, (height, width))


IDENTITY = Rearrangement(((Factor(C, 0, 1),), (Factor(H, 0, 1),), (Factor(W, 0, 1),)))


@final
@dataclass(frozen=True)
class MatMul:
    """``y[h, m, n] = epilogue(Σ_k a[h, m, k] · b[h, k, n])`` for each image: the products of matrices of two inputs.

    ``left`` and ``right`` say where a and b are in the inputs: their axes are those of (columns, matrices h, rows), as
    the C, H and W of the output are.
    """

    left: Rearrangement
    right: Rearrangement
    epilogue: Epilogue = ()


@final
@dataclass(frozen=True)
class Concat:
    """The inputs one after the other along ``axis``, each after a rearrangement."""

    axis: int
    parts: tuple[Rearrangement, ...]


@final
@dataclass(frozen=True)
class Pad:
    """A frame of a constant: (above, below, left, right) pixels, and channels before and after."""

    pixels: tuple[int, int, int, int]
    channels: Pair = (0, 0)
    number: float = 0.0


@final
@dataclass(frozen=True)
class WrapPad:
    """A frame of pixels of the map itself: (above, below, left, right).

    "reflect" mirrors without the outermost pixel, "replicate" repeats it, "circular" continues on the other side.
    """

    mode: Literal["reflect", "replicate", "circular"]
    pixels: tuple[int, int, int, int]


@final
@dataclass(frozen=True)
class Spread:
    """Zeros between pixels: each ``stride``-th pixel is one of the input; ``extra`` rows and columns of zeros follow.

    A transposed convolution is a convolution of such a map.
    """

    stride: Pair
    extra: Pair = (0, 0)


Op: TypeAlias = (
    Conv
    | Elementwise
    | Binary
    | WindowPool
    | AdaptivePool
    | ChannelPool
    | Resize
    | Softmax
    | LayerNorm
    | GroupNorm
    | MatMul
    | Rearrangement
    | Concat
    | Pad
    | WrapPad
    | Spread
)


@final
@dataclass(frozen=True, eq=False)
class Node:
    """An operation on values."""

    name: str  # of the layer in the model, for messages and profiles
    op: Op
    inputs: tuple[int, ...]  # numbers of values


@final
@dataclass(frozen=True)
class Output:
    """A tensor that the network returns: each of its axes after the first is a product of axes of a value.

    ``shape``, if given, is what it is reshaped to, without the batch. In parts of a network, the axis of the images may
    be another one than the first, and one with others: ``batch_axis`` and ``folded`` are those of
    :class:`repvgg.engine.views.View`.
    """

    value: int
    axes: tuple[tuple[int, ...], ...] = ((C,), (H,), (W,))
    shape: tuple[int, ...] | None = None
    batch_axis: int = 0
    folded: int = 0

    def tensor_shape(self, batch: int, value: FeatureShape) -> tuple[int, ...]:
        """Return the shape of the tensor for a number of images, and the shape of its value."""
        shape, first, last = self.shape_of(value), self.batch_axis, self.batch_axis + self.folded
        return (*shape[:first], batch * math.prod(shape[first:last]), *shape[last:])

    def shape_of(self, value: FeatureShape) -> tuple[int, ...]:
        """Return the shape of the tensor without the batch, for the shape of its value."""
        if self.shape is not None:
            return self.shape
        return tuple(math.prod(value.axes[axis] for axis in group) for group in self.axes)


@final
@dataclass(frozen=True, eq=False)
class Graph:
    """A network. The inputs are values 0, 1, …; then each node has one value.

    Attributes:
        channels: of each input.
        nodes: in execution order.
        outputs: the tensors that the network returns.
        structure: what it returns, with numbers of outputs in place of tensors; 0 if it returns a tensor.
        sizes: (H, W) of each input if the graph holds for images of this size alone, else None.
    """

    channels: tuple[int, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    structure: Any = 0
    sizes: tuple[Pair, ...] | None = None

    def value_of(self, node: int) -> int:
        """Return the number of the value of the node with this index."""
        return len(self.channels) + node

    def users(self) -> list[list[int]]:
        """Return the indices of the nodes that read each value, in execution order."""
        users: list[list[int]] = [[] for _ in range(len(self.channels) + len(self.nodes))]
        for index, node in enumerate(self.nodes):
            for value in dict.fromkeys(node.inputs):
                users[value].append(index)
        return users


def chain(ops: Sequence[Op], channels: int, *, flat: bool = False, names: Sequence[str] = ()) -> Graph:
    """Return a graph in which each operation reads the value of the one before.

    Args:
        ops: the operations.
        channels: of the input.
        flat: whether the output is (N, C) and not (N, C, H, W).
        names: of the nodes; by default their numbers.
    """
    names = names or [str(index) for index in range(len(ops))]
    nodes = tuple(Node(name, op, (index,)) for index, (name, op) in enumerate(zip(names, ops, strict=True)))
    return Graph((channels,), nodes, (Output(len(nodes), ((C,),) if flat else ((C,), (H,), (W,))),))


def is_same_graph(graph: Graph, other: Graph) -> bool:
    """Whether two graphs are equal but for ``sizes``; arrays are compared by value."""
    if (graph.channels, graph.outputs, len(graph.nodes)) != (other.channels, other.outputs, len(other.nodes)):
        return False
    return all(
        (node.name, node.inputs) == (one.name, one.inputs) and _is_same(node.op, one.op)
        for node, one in zip(graph.nodes, other.nodes, strict=True)
    )


def _is_same(op: Op, other: Op) -> bool:
    if type(op) is not type(other):
        return False
    return all(_is_same_field(getattr(op, each.name), getattr(other, each.name)) for each in fields(op))


def _is_same_field(one: Any, two: Any) -> bool:
    if not isinstance(one, np.ndarray) or not isinstance(two, np.ndarray):
        return bool(not isinstance(one, np.ndarray) and not isinstance(two, np.ndarray) and one == two)
    same_memory = (one.ctypes.data, one.shape, one.strides) == (two.ctypes.data, two.shape, two.strides)
    return same_memory or np.array_equal(one, two, equal_nan=True)


def with_own_memory(graph: Graph) -> Graph:
    """Copy the arrays of a graph, which are those of the model until then."""
    nodes = []
    for node in graph.nodes:
        values: dict[str, Any] = {each.name: getattr(node.op, each.name) for each in fields(node.op)}
        arrays: dict[str, Any] = {
            name: np.array(one, np.float32, order="C") for name, one in values.items() if isinstance(one, np.ndarray)
        }
        nodes.append(replace(node, op=replace(node.op, **arrays)))
    return replace(graph, nodes=tuple(nodes))


# Shapes


def infer_shapes(graph: Graph, sizes: Sequence[Pair]) -> tuple[FeatureShape, ...]:
    """Compute the shape of every value, for images of these sizes, one for each input.

    Raises:
        UnsupportedError: the channels of an operation do not match its input, or it has no output; the message names
            it.
    """
    if graph.sizes is not None and tuple(sizes) != graph.sizes:
        read, given = (" and ".join(f"{height}x{width}" for height, width in each) for each in (graph.sizes, sizes))
        raise UnsupportedError(
            f"The network depends on the size of its images and was read for {read}, not {given}: "
            "compile the model once more for that size."
        )
    shapes = [FeatureShape(channels, size) for channels, size in zip(graph.channels, sizes, strict=True)]
    for node in graph.nodes:
        shape = output_shape(node, [shapes[value] for value in node.inputs])
        if min(shape.size) < 1:
            height, width = shapes[node.inputs[0]].size
            raise UnsupportedError(
                f"{node.name!r} has no output for feature maps of {height}x{width}: pass larger images."
            )
        shapes.append(shape)
    return tuple(shapes)


def output_shape(node: Node, shapes: Sequence[FeatureShape]) -> FeatureShape:
    """Compute the shape of the value of a node from those of its inputs. Raises as :func:`infer_shapes`."""
    shape = shapes[0]
    match op := node.op:
        case Conv():
            _check_channels(node.name, op.weight.shape[1] * op.geometry.groups, shape)
            return FeatureShape(op.weight.shape[0], op.geometry.output_size(shape.size))
        case Binary():
            other = FeatureShape(op.constant.shape[0], op.constant.shape[1:]) if op.constant is not None else shapes[1]
            channels, height, width = (
                _broadcast(node.name, *ends) for ends in zip(shape.axes, other.axes, strict=True)
            )
            return FeatureShape(channels, (height, width))
        case WindowPool():
            return FeatureShape(shape.channels, op.window.output_size(shape.size, ceil=op.ceil))
        case AdaptivePool():
            height, width = (old if new is None else new for old, new in zip(shape.size, op.size, strict=True))
            return FeatureShape(shape.channels, (height, width))
        case ChannelPool():
            return FeatureShape(1, shape.size)
        case Resize():
            return FeatureShape(shape.channels, _resized(op, shape.size))
        case LayerNorm() | GroupNorm():
            _check_channels(node.name, len(op.weight), shape)
            return shape
        case Rearrangement():
            return op.output(shape)
        case Concat():
            outputs = [part.output(each) for part, each in zip(op.parts, shapes, strict=True)]
            axes = list(outputs[0].axes)
            axes[op.axis] = sum(each.axes[op.axis] for each in outputs)
            return FeatureShape(axes[0], (axes[1], axes[2]))
        case MatMul():
            left, right = op.left.output(shapes[0]), op.right.output(shapes[1])
            if (left.channels, left.size[0]) != (right.size[1], right.size[0]):
                raise UnsupportedError(
                    f"{node.name!r} multiplies {left.size[0]} matrices of {left.size[1]}x{left.channels} by "
                    f"{right.size[0]} of {right.size[1]}x{right.channels}: pass images that fit the network."
                )
            return FeatureShape(right.channels, left.size)
        case Pad() | WrapPad():
            above, below, left_pixels, right_pixels = op.pixels
            size = shape.size[0] + above + below, shape.size[1] + left_pixels + right_pixels
            return FeatureShape(shape.channels + (sum(op.channels) if isinstance(op, Pad) else 0), size)
        case Spread():
            height, width = (
                (length - 1) * stride + 1 + more
                for length, stride, more in zip(shape.size, op.stride, op.extra, strict=True)
            )
            return FeatureShape(shape.channels, (height, width))
        case Elementwise() | Softmax():
            return shape


def _resized(op: Resize, size: Pair) -> Pair:
    if op.size is not None:
        return op.size
    assert op.scale is not None
    return int(size[0] * op.scale[0]), int(size[1] * op.scale[1])


def _broadcast(name: str, one: int, two: int) -> int:
    if one != two and 1 not in (one, two):
        raise UnsupportedError(f"{name!r} combines axes of {one} and {two} elements: pass images that fit the network.")
    return max(one, two)


def _check_channels(name: str, channels: int, shape: FeatureShape) -> None:
    if channels != shape.channels:
        raise UnsupportedError(
            f"{name!r} expects {channels} channels but receives {shape.channels}: "
            "pass an input_shape (N, C, H, W) whose C is that of the network."
        )
