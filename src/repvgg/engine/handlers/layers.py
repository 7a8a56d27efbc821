"""Layers with weights, normalizations and softmax; dropout, which does nothing at inference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from repvgg.engine import arguments
from repvgg.engine.graph import (
    C,
    Conv,
    ConvGeometry,
    Factor,
    Floats,
    GroupNorm,
    LayerNorm,
    Pad,
    Pair,
    Pointwise,
    Softmax,
    Spread,
    pair,
)
from repvgg.engine.graph_builder import GraphBuilder, by_name, on_other_axes
from repvgg.engine.recorder import Call
from repvgg.engine.views import View


def _conv(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    weight = b.floats(given["weight"])
    bias = np.zeros(len(weight), np.float32) if given.get("bias") is None else b.floats(given["bias"])
    kernel: Pair = weight.shape[2:]
    stride, dilation = pair(given.get("stride", 1)), pair(given.get("dilation", 1))
    value = b.as_map(b.view(given["input"]))
    padding = given.get("padding", 0)
    if padding == "same":
        total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        padding = (total[0] // 2, total[1] // 2)
        if any(pixels % 2 for pixels in total):
            value = b.emit(Pad((0, total[0] % 2, 0, total[1] % 2)), value)
    geometry = ConvGeometry(
        kernel, stride, (0, 0) if padding == "valid" else pair(padding), dilation, int(given.get("groups", 1))
    )
    return b.whole(b.emit(Conv(weight, bias, geometry), value))


def _conv_transpose(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    weight, groups = b.floats(given["weight"]), int(given.get("groups", 1))
    inputs, outputs, height, width = weight.shape
    bias = given.get("bias")
    stride, padding, extra, dilation = (
        pair(given.get(name, number))
        for name, number in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    frame = [step * (size - 1) - pad for size, step, pad in zip((height, width), dilation, padding, strict=True)]
    if min(frame) < 0:
        b.refuse("has more padding than its kernel has pixels")
    # The kernel of the convolution that it is the transpose of, with inputs and outputs swapped and turned around.
    parts = weight.reshape(groups, inputs // groups, outputs, height, width).transpose(0, 2, 1, 3, 4)
    turned = parts.reshape(groups * outputs, inputs // groups, height, width)[:, :, ::-1, ::-1]
    value = b.as_map(b.view(given["input"]))
    if stride != (1, 1) or extra != (0, 0):
        value = b.emit(Spread(stride, extra), value)
    geometry = ConvGeometry((height, width), (1, 1), (frame[0], frame[1]), dilation, groups)
    zeros = np.zeros(groups * outputs, np.float32)
    conv = Conv(turned, zeros if bias is None else b.floats(bias), geometry)
    return b.whole(b.emit(conv, value))


def _linear(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    bias = None if given.get("bias") is None else b.floats(given["bias"])
    return linear(b, b.view(given["input"]), b.floats(given["weight"]), bias)


def linear(b: GraphBuilder, view: View, weight: Floats, bias: Floats | None = None) -> View:
    """Multiply the last axis of a tensor by ``weight`` (outputs, inputs)."""
    view = b.as_channels_last(view)
    bias = np.zeros(len(weight), np.float32) if bias is None else bias
    value = b.emit(Conv(weight[:, :, None, None], bias, ConvGeometry((1, 1))), view.value)
    return b.with_channels(view, value)


def _batch_norm(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    if given.get("training", False) or given.get("running_mean") is None:
        b.refuse("computes the statistics of its input, as in training")
    mean, variance = (b.floats(given[name]).astype(np.float64) for name in ("running_mean", "running_var"))
    scale = 1 / np.sqrt(variance + given.get("eps", 1e-5))
    if given.get("weight") is not None:
        scale = scale * b.floats(given["weight"])
    shift = -mean * scale
    if given.get("bias") is not None:
        shift = shift + b.floats(given["bias"])
    view, channels = b.view(given["input"]), len(scale)
    if len(view.axes) == 1 + b.folded and b.batch_axis == 0:
        view = b.as_channels_last(view)
    elif len(view.axes) == 3 and (b.batch_axis, b.folded) == (0, 0):
        view = b.whole(b.as_map(view))
    else:
        b.refuse(f"is applied to a tensor of {len(view.axes) + 1} axes, not to feature maps (N, C, H, W)")
    weight = scale.astype(np.float32).reshape(channels, 1, 1, 1)
    conv = Conv(weight, shift.astype(np.float32), ConvGeometry((1, 1), groups=channels))
    return replace(view, value=b.emit(conv, view.value))


def _prelu(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    slopes = b.floats(given["weight"]).ravel()
    view = b.view(given["input"])
    value = b.as_map(view)
    channels = b.shapes[value].channels
    ones = np.ones((channels, 1, 1, 1), np.float32)
    conv = Conv(
        ones,
        np.zeros(channels, np.float32),
        ConvGeometry((1, 1), groups=channels),
        (Pointwise("prelu"),),
        np.broadcast_to(slopes, (channels,)),
    )
    return b.whole(b.emit(conv, value))


def _softmax(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    view, op = b.view(given["input"]), Softmax(call.function == "log_softmax")
    if given.get("dim") is None:
        b.refuse("mixes the images of a batch")
    axis = b.axis(given["dim"], view)
    channels = (Factor(C, view.source.channels, 1),) if view.source.channels > 1 else ()
    if not view.is_whole or view.axes[axis] != channels:
        order = [one for one in range(len(view.axes)) if one != axis]
        last = b.as_channels_last(view.permute([*order, axis]))
        value = b.emit(op, last.value)
        back = [*order, axis]
        return replace(last, value=value).permute([back.index(one) for one in range(len(back))])
    return replace(view, value=b.emit(op, view.value))


def _layer_norm(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    shape = given["normalized_shape"]
    if len(shape) != 1:
        b.refuse("normalizes several axes, but the engine does so for the last one only")
    view = b.as_channels_last(b.view(given["input"]))
    length = int(shape[0])
    weight, bias = (
        np.full(length, number, np.float32) if given.get(name) is None else b.floats(given[name])
        for name, number in (("weight", 1.0), ("bias", 0.0))
    )
    op = LayerNorm(weight, bias, float(given.get("eps", 1e-5)))
    return replace(view, value=b.emit(op, view.value))


def _group_norm(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    view = b.view(given["input"])
    return _normalize_groups(b, view, int(given["num_groups"]), given)


def _instance_norm(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    if not given.get("use_input_stats", True):
        return _batch_norm(b, call)
    view = b.view(given["input"])
    return _normalize_groups(b, view, view.shape[0], given)


def _normalize_groups(b: GraphBuilder, view: View, groups: int, given: Mapping[str, Any]) -> View:
    shape = view.shape
    weight, bias = (
        np.full(shape[0], number, np.float32) if given.get(name) is None else b.floats(given[name])
        for name, number in (("weight", 1.0), ("bias", 0.0))
    )
    op = GroupNorm(groups, weight, bias, float(given.get("eps", 1e-5)))
    if len(shape) == 3:
        return b.whole(b.emit(op, b.as_map(view)))
    channels, pixels = shape[0], math.prod(shape[1:])  # the order of the pixels does not matter
    value = b.emit(op, b.as_map(b.reshaped(view, (channels, 1, pixels))))
    return b.reshaped(b.whole(value), shape)


def _conv1d(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    weight = b.floats(given["weight"])
    bias = np.zeros(len(weight), np.float32) if given.get("bias") is None else b.floats(given["bias"])
    stride, dilation = (pair(given.get(name, 1))[0] for name in ("stride", "dilation"))
    total, padding = dilation * (weight.shape[2] - 1), given.get("padding", 0)
    if padding == "same" and total % 2:
        b.refuse("has more padding on one side than on the other")
    padding = {"valid": 0, "same": total // 2}[padding] if isinstance(padding, str) else pair(padding)[0]
    view = b.view(given["input"])
    channels, length = view.shape
    geometry = ConvGeometry((1, weight.shape[2]), (1, stride), (0, padding), (1, dilation), int(given.get("groups", 1)))
    value = b.emit(Conv(weight[:, :, None], bias, geometry), b.as_map(b.reshaped(view, (channels, 1, length))))
    return b.reshaped(b.whole(value), call.shape[1:])


def _dropout(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    if given.get("training", call.function != "dropout") is not False:
        b.refuse("drops values at random, as in training: pass training=False")
    return b.any_view(given["input"])


HANDLERS = by_name(
    (("conv2d",), _conv),
    (("conv_transpose2d",), _conv_transpose),
    (("conv1d",), _conv1d),
    (("linear",), on_other_axes(_linear)),
    (("batch_norm",), on_other_axes(_batch_norm)),
    (("layer_norm",), on_other_axes(_layer_norm)),
    (("group_norm",), _group_norm),
    (("instance_norm",), _instance_norm),
    (("softmax", "log_softmax"), on_other_axes(_softmax)),
    (("prelu",), _prelu),
    (("dropout", "dropout2d", "feature_dropout"), _dropout),
)
