"""Calls to record: made up for a model whose inputs are not given, and similar to a given one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import islice, product

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repvgg._calls import Call, signature_of
from repvgg.symbolic import first_float

_SIZES = (64, 224, 256, 32)  # height and width of made-up images: multiples of common strides
_VOLUMES = ((8, 32, 32), (16, 64, 64), (16, 224, 224))  # their work grows with the cube of the size
_TOKENS = 16  # of sequences of vectors
_MAX_CALLS = 48
_SMALL = 128  # pixels
_STEP = 32  # by which sizes grow in a similar call: networks that need multiples mostly need a divisor of it


def made_up_calls(model: nn.Module) -> Iterator[Call]:
    """Yield calls that the forward of a model may take, the most common first, on meta tensors.

    Each required argument, or the first one if all have defaults, is a tensor with the channels of one of the model's
    first layers.
    """
    signature = signature_of(model)
    count = 1 if signature is None else _count_inputs(signature)
    like = first_float(model)
    dtype = torch.float32 if like is None else like.dtype
    shapes = _shapes(model)
    if not count or not shapes:
        return
    # Inputs of one kind first, then combinations.
    same = ((shape,) * count for shape in shapes)
    mixed = (combination for combination in product(shapes, repeat=count) if len(set(combination)) > 1)
    for combination in islice((*same, *(mixed if count > 1 else ())), _MAX_CALLS):
        yield Call(tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in combination))


def _count_inputs(signature: inspect.Signature) -> int:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in signature.parameters.values() if p.kind in positional]
    required = [p for p in parameters if p.default is inspect.Parameter.empty]
    return len(required) or 1


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return shapes of inputs for the first layers of a model, without repeats."""
    layers = [part for part in model.modules() if isinstance(part, (_ConvNd, nn.Linear, _BatchNorm))]
    shapes = [shape for layer in layers[:8] for shape in _shapes_for(layer)]
    # Kernels that a forward uses itself.
    kernels = (p for p in model.parameters() if not nn.parameter.is_lazy(p) and p.dim() == 4)
    shapes += ((2, kernel.shape[1], size, size) for kernel in islice(kernels, 2) for size in _SIZES)
    return list(dict.fromkeys(shapes))


def _shapes_for(layer: nn.Module) -> Iterator[tuple[int, ...]]:
    if isinstance(layer, nn.Linear):
        yield from ((2, layer.in_features), (2, _TOKENS, layer.in_features), (2, 7, 7, layer.in_features))
        return
    channels = layer.in_channels if isinstance(layer, _ConvNd) else int(layer.num_features)  # type: ignore[arg-type]
    spatial = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 2
    if spatial == 3:
        yield from ((2, channels, *sizes) for sizes in _VOLUMES)
    for size in _SIZES if spatial < 3 else ():
        yield (2, channels, *(size,) * spatial)
    if isinstance(layer, nn.BatchNorm1d):
        yield from ((2, channels), (2, channels, _TOKENS))
    if isinstance(layer, nn.BatchNorm3d):
        yield from ((2, channels, *sizes) for sizes in _VOLUMES)


def similar_calls(call: Call) -> Iterator[tuple[Call, bool]]:
    """Yield calls with other sizes, and whether their images are much smaller.

    First small images and another batch, if those of the call are large; then larger ones and another batch, larger
    ones alone, another batch alone.
    """
    if any(x.dim() == 4 and min(x.shape[2:]) > _SMALL + _STEP for x in call.tensors()):
        yield call.map_tensors(_shrunk), True
    for batch, step in ((1, _STEP), (0, _STEP), (1, 0)):
        yield call.map_tensors(lambda x, batch=batch, step=step: _resized(x, batch, step)), False  # type: ignore[misc]


def cropped(call: Call) -> tuple[Call, str]:
    """Return the call with the first pixels of its images, as many as in the small images of a similar call, in words.

    The sizes are at least ``_SMALL`` pixels, with the same remainders of ``_STEP``.
    """
    found: dict[str, None] = {}

    def crop(x: Tensor) -> Tensor:
        if x.dim() != 4 or not x.is_floating_point():
            return x
        height, width = _small_sizes(x)
        found[f"{height}x{width}"] = None
        return x[..., :height, :width].clone()

    return call.map_tensors(crop), " and ".join(found)


def _shrunk(x: Tensor) -> Tensor:
    """Return a larger batch of small images."""
    if x.dim() != 4 or not x.is_floating_point():
        return x
    return torch.empty((x.shape[0] + 1, x.shape[1], *_small_sizes(x)), dtype=x.dtype, device="meta")


def _small_sizes(x: Tensor) -> list[int]:
    return [size - max(0, (size - _SMALL) // _STEP * _STEP) for size in x.shape[2:]]


def _resized(x: Tensor, batch: int, step: int) -> Tensor:
    shape = list(x.shape)
    if len(shape) < 2 or not x.is_floating_point():
        return x
    spatial = range(2, len(shape)) if len(shape) > 3 else range(len(shape) - 1, len(shape))
    for axis in spatial if len(shape) > 2 else ():
        shape[axis] += step // 4 if len(shape) == 5 else step
    if len(shape) != 3 or not step:
        shape[0] += batch
    return torch.empty(shape, dtype=x.dtype, device="meta")
