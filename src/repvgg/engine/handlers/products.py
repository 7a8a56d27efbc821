"""Products of matrices: of two tensors, of a tensor and a constant, sums of products by einsum, and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repvgg.engine import arguments
from repvgg.engine.graph import C, H, MatMul, Pointwise, Softmax, W
from repvgg.engine.graph_builder import GraphBuilder, by_name, on_other_axes
from repvgg.engine.handlers.arithmetic import combine, with_constant
from repvgg.engine.handlers.layers import linear
from repvgg.engine.recorder import Call
from repvgg.engine.views import View, view_of


def _matmul(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    left, right = given["input"], given.get("other", given.get("mat2"))
    if call.function == "__rmatmul__":
        left, right = right, left
    if isinstance(right, Tensor):
        weight = b.floats(right)
        if weight.ndim != 2:
            b.refuse("multiplies by a constant that is no matrix")
        return linear(b, b.view(left), weight.T)
    if isinstance(left, Tensor):
        weight, view = b.floats(left), b.view(right)
        if weight.ndim != 2 or len(view.axes) < 2:
            b.refuse("multiplies by a constant that is no matrix")
        return _transposed(linear(b, _transposed(view), weight))
    one, other = b.view(left), b.view(right)
    if len(one.axes) != len(other.axes) or len(one.axes) < 2:
        b.refuse("multiplies tensors of different numbers of axes")
    return matmul(b, one, other)


def _transposed(view: View) -> View:
    return replace(view, axes=(*view.axes[:-2], view.axes[-1], view.axes[-2]))


def matmul(b: GraphBuilder, left: View, right: View) -> View:
    """Multiply the matrices in the last two axes of tensors with as many axes; the others are broadcast."""
    many = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (view.expand((*many, *view.shape[-2:])) for view in (left, right))
    rank = len(left.axes)
    grouping = (rank - 1,), range(rank - 2), (rank - 2,)
    op = MatMul(left.rearrangement(grouping), right.rearrangement(grouping))
    value = b.emit(op, left.value, right.value)
    return b.reshaped(view_of(value, b.shapes[value], ((H,), (W,), (C,))), (*many, left.shape[-2], right.shape[-1]))


# Attention


def _attention(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    if given.get("is_causal") or given.get("dropout_p"):
        b.refuse("has arguments that the engine does not support")
    query, key, value = (b.view(given[name]) for name in ("query", "key", "value"))
    if len({len(query.axes), len(key.axes), len(value.axes)}) > 1 or len(query.axes) < 2:
        b.refuse("multiplies tensors of different numbers of axes")
    if given.get("enable_gqa") and len(query.axes) > 2:
        key, value = (_repeated_heads(b, one, query.shape[-3]) for one in (key, value))
    return attention(b, query, key, value, given.get("scale"), given.get("attn_mask"))


def _repeated_heads(b: GraphBuilder, view: View, heads: int) -> View:
    shape = view.shape
    each = heads // shape[-3]
    split = b.reshaped(view, (*shape[:-2], 1, *shape[-2:])).expand((*shape[:-2], each, *shape[-2:]))
    return b.reshaped(split, (*shape[:-3], heads, *shape[-2:]))


def attention(b: GraphBuilder, query: View, key: View, value: View, scale: float | None, mask: Any) -> View:
    """Compute ``softmax(q · kᵀ · scale + mask) · v`` of the last two axes; ``mask`` is a tensor, a call or None."""
    products = matmul(b, query, _transposed(key))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    products = b.elementwise(products, Pointwise("affine", scale))
    if isinstance(mask, Tensor):
        if mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        products = with_constant(b, "add", products, b.floats(mask))
    elif mask is not None:
        products = combine(b, "add", products, b.view(mask))
    products = b.as_channels_last(products)
    return matmul(b, replace(products, value=b.emit(Softmax(), products.value)), value)


def _multi_head_attention(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    unsupported = ("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "use_separate_proj_weight", "is_causal")
    if any(given.get(name) is not None and given[name] is not False for name in unsupported):
        b.refuse("has arguments that the engine does not support")
    places = [b.any_view(given[name]) for name in ("query", "key", "value")]
    if any((view.batch_axis, view.folded, len(view.axes)) != (1, 0, 2) for view in places):
        b.refuse("is not applied to tensors (tokens, images, channels)")
    weight, heads, width = b.floats(given["in_proj_weight"]), int(given["num_heads"]), places[0].shape[-1]
    biases = given.get("in_proj_bias")
    bias = np.zeros(len(weight), np.float32) if biases is None else b.floats(biases)
    projected = []
    for at, view in enumerate(places):
        part = slice(at * width, (at + 1) * width)
        tokens = linear(b, view.plain(), weight[part], bias[part])
        projected.append(b.reshaped(tokens, (tokens.shape[0], heads, width // heads)).permute((1, 0, 2)))
    query, key, value = projected
    mixed = attention(b, query, key, value, None, given.get("attn_mask")).permute((1, 0, 2))
    joined = b.reshaped(mixed, (places[0].shape[0], width))
    out_bias = given.get("out_proj_bias")
    out = linear(b, joined, b.floats(given["out_proj_weight"]), None if out_bias is None else b.floats(out_bias))
    return replace(out, batch_axis=1)


# Sums of products


def _einsum(b: GraphBuilder, call: Call) -> View:
    equation, *operands = call.args
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        b.refuse("is a sum of products that the engine does not support")
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    terms, out = equation.replace(" ", "").split("->")
    names = terms.split(",")
    if len(names) != 2 or any(len(set(one)) < len(one) for one in (*names, out)):
        b.refuse("is a sum of products that the engine does not support")
    images = out[:1]
    if all(isinstance(one, Call) for one in operands):
        if any(name[:1] != images for name in names):
            b.refuse("mixes the images of a batch")
        return _sum_of_products(b, [b.view(one) for one in operands], [name[1:] for name in names], out[1:])
    at = 0 if isinstance(operands[0], Call) else 1
    view, name, weight, other = b.view(operands[at]), names[at], b.floats(operands[1 - at]), names[1 - at]
    if name[:1] != images or images in other:
        b.refuse("mixes the images of a batch")
    summed = [one for one in name[1:] if one in other]
    made = [one for one in other if one not in summed]
    if any(one in out for one in summed) or sorted(out[1:]) != sorted([*(set(name[1:]) - set(summed)), *made]):
        b.refuse("is a sum of products that the engine does not support")
    kept = [one for one in name[1:] if one not in summed]
    rows = view.permute([name[1:].index(one) for one in (*kept, *summed)])
    shape = rows.shape[: len(kept)]
    matrix = weight.transpose([other.index(one) for one in (*made, *summed)])
    lengths = matrix.shape[: len(made)]
    product = linear(
        b,
        b.reshaped(rows, (*shape, math.prod(rows.shape[len(kept) :]))),
        np.ascontiguousarray(matrix).reshape(math.prod(lengths), -1),
    )
    found = b.reshaped(product, (*shape, *lengths))
    return found.permute([[*kept, *made].index(one) for one in out[1:]])


def _sum_of_products(b: GraphBuilder, views: Sequence[View], names: Sequence[str], out: str) -> View:
    one, other = names
    both = [name for name in one if name in other]
    many, summed = [name for name in both if name in out], [name for name in both if name not in out]
    rows, columns = [name for name in one if name not in both], [name for name in other if name not in both]
    if sorted(out) != sorted([*many, *rows, *columns]):
        b.refuse("is a sum of products that the engine does not support")
    arranged = []
    for view, name, order in zip(views, names, ((many, rows, summed), (many, summed, columns)), strict=True):
        view = view.permute([name.index(each) for group in order for each in group])
        first, last = len(many), len(many) + len(order[1])
        parts = view.shape[first:last], view.shape[last:]
        arranged.append(b.reshaped(view, (*view.shape[:first], *map(math.prod, parts))))
    lengths = dict(zip(one, views[0].shape, strict=True)) | dict(zip(other, views[1].shape, strict=True))
    every = [*many, *rows, *columns]
    product = b.reshaped(matmul(b, arranged[0], arranged[1]), [lengths[name] for name in every])
    return product.permute([every.index(name) for name in out])


HANDLERS = by_name(
    (("matmul", "bmm", "__matmul__", "__rmatmul__"), on_other_axes(_matmul)),
    (("scaled_dot_product_attention",), on_other_axes(_attention)),
    (("multi_head_attention_forward",), _multi_head_attention),
    (("einsum",), _einsum),
)
