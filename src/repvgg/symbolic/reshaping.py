"""Permutations, reshapes and means of a tensor's axes: maps of the channels at each position stay what they are.

All of these count as the identity in the ledger: they stay in the code, and what follows may be computed before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg._arguments import per_axis
from repvgg.errors import NotLinearError
from repvgg.symbolic.handlers import require_spatial
from repvgg.symbolic.layout import Arrangement
from repvgg.symbolic.tensor import SymbolicTensor, handles

_T = torch.Tensor


def _view(symbol: SymbolicTensor, arrangement: Arrangement) -> SymbolicTensor:
    return symbol.like(symbol.map, "identity", arrangement=arrangement, view=True)


def _listed(given: tuple[Any, ...]) -> Sequence[Any]:
    """The entries of an argument that torch takes as one sequence, or as several numbers."""
    return given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


@handles(_T.contiguous)
def contiguous(input: SymbolicTensor, *_: Any, memory_format: Any = None) -> SymbolicTensor:
    """Return the same values; whether in new memory depends on the strides."""
    return _view(input, input.arrangement)


@handles(_T.clone, torch.clone)
def clone(input: SymbolicTensor, *, memory_format: Any = None) -> SymbolicTensor:
    """Return the same values in new memory."""
    return input.like(input.map, "identity")


@handles(_T.to, _T.type_as)
def to(input: SymbolicTensor, *args: Any, **kwargs: Any) -> SymbolicTensor:
    """Return the same values, if their dtype stays: on another device, or in another memory format."""
    given = [*args, *kwargs.values()]
    dtypes = [value if isinstance(value, torch.dtype) else getattr(value, "dtype", input.dtype) for value in given]
    if any(dtype != input.dtype for dtype in dtypes):
        raise NotLinearError("a cast to another dtype rounds")
    return _view(input, input.arrangement)


def _new(factory: Callable[..., Tensor], input: SymbolicTensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a constant, as ``x.new_ones(1, C, 1, 1)``, whose sizes are known."""
    return factory(*args, **{"dtype": input.dtype, "device": input.device} | kwargs)


for _name in ("ones", "zeros", "full", "tensor"):
    handles(getattr(_T, f"new_{_name}"))(partial(_new, getattr(torch, _name)))


@handles(torch.permute, _T.permute)
def permute(input: SymbolicTensor, *dims: Any) -> SymbolicTensor:
    """Reorder the axes, so that only the channels move."""
    return _view(input, input.arrangement.permuted(_listed(dims)))


@handles(*(torch.transpose, _T.transpose, torch.swapaxes, _T.swapaxes, torch.swapdims, _T.swapdims))
def transpose(input: SymbolicTensor, dim0: int, dim1: int) -> SymbolicTensor:
    """Swap two axes."""
    order = list(range(len(input.arrangement.known_axes())))
    first, second = input.arrangement.index(dim0), input.arrangement.index(dim1)
    order[first], order[second] = second, first
    return _view(input, input.arrangement.permuted(order))


@handles(torch.movedim, _T.movedim, torch.moveaxis, _T.moveaxis)
def movedim(input: SymbolicTensor, source: Any, destination: Any) -> SymbolicTensor:
    """Move axes to other places; the rest keeps its order."""
    index = input.arrangement.index
    sources, destinations = ([index(dim) for dim in _listed((dims,))] for dims in (source, destination))
    order = [axis for axis in range(len(input.arrangement.known_axes())) if axis not in sources]
    for place, axis in sorted(zip(destinations, sources, strict=True)):
        order.insert(place, axis)
    return _view(input, input.arrangement.permuted(order))


@handles(torch.flatten, _T.flatten)
def flatten(input: SymbolicTensor, start_dim: int = 0, end_dim: int = -1) -> SymbolicTensor:
    """Merge axes."""
    return _view(input, input.arrangement.flattened(start_dim, end_dim))


@handles(torch.unflatten, _T.unflatten)
def unflatten(input: SymbolicTensor, dim: int, sizes: Sequence[Any]) -> SymbolicTensor:
    """Split an axis."""
    place, shape = input.arrangement.index(dim), list(input.shape)
    return reshape(input, [*shape[:place], *sizes, *shape[place + 1 :]])


@handles(torch.reshape, _T.reshape, _T.view)
def reshape(input: SymbolicTensor, *shape: Any) -> SymbolicTensor:
    """View the tensor in a shape that keeps the channels as one of the axes."""
    sizes = _listed(shape)
    if not sizes or isinstance(sizes[0], torch.dtype):
        raise NotLinearError("a view as another dtype is not linear")
    return _view(input, input.arrangement.viewed(sizes, input.map.out_channels, input.size_of))


@handles(_T.reshape_as, _T.view_as)
def reshape_as(input: Any, other: Any) -> SymbolicTensor:
    """View the tensor in the shape of another one."""
    if not isinstance(input, SymbolicTensor):
        raise NotLinearError("a reshape of a constant to the shape of the image depends on its size")
    return reshape(input, list(other.shape))


@handles(torch.squeeze, _T.squeeze)
def squeeze(input: SymbolicTensor, dim: Any = None) -> SymbolicTensor:
    """Remove axes of size 1 that a mean left."""
    if dim is None:
        raise NotLinearError("which axes squeeze() removes depends on the size of the image: name them")
    axes, places = input.arrangement.known_axes(), {input.arrangement.index(d) for d in _listed((dim,))}
    if any(axes[place] for place in places):
        raise NotLinearError("whether squeeze() removes the axis depends on its size")
    kept = [axis for place, axis in enumerate(axes) if place not in places]
    return _view(input, Arrangement(tuple(kept), input.arrangement.averaged))


@handles(torch.unsqueeze, _T.unsqueeze)
def unsqueeze(input: SymbolicTensor, dim: int) -> SymbolicTensor:
    """Insert an axis of size 1."""
    axes = list(input.arrangement.known_axes())
    axes.insert(dim % (len(axes) + 1), ())
    return _view(input, Arrangement(tuple(axes), input.arrangement.averaged))


@handles(torch.mean, _T.mean)
def mean(input: SymbolicTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> SymbolicTensor:
    """Take the mean over other axes than the channels: ``mean(W·x + b) = W·mean(x) + b``."""
    if dim is None or dtype is not None:
        raise NotLinearError("a mean over all axes, or in another dtype, is not a convolution")
    return input.like(input.map, "identity", arrangement=input.arrangement.mean(_listed((dim,)), keepdim))


def _global_pool(spatial: int, input: SymbolicTensor, output_size: Any) -> SymbolicTensor:
    """Take the mean over all spatial axes: an adaptive average pool to one pixel."""
    require_spatial(input, spatial, f"an adaptive average pool over {spatial} axes")
    if any(size != 1 for size in per_axis(output_size, spatial)):
        raise NotLinearError("an adaptive average pool to more than one pixel depends on the size of the image")
    return mean(input, tuple(range(-spatial, 0)), keepdim=True)


adaptive_avg_pool1d = handles(F.adaptive_avg_pool1d)(partial(_global_pool, 1))
adaptive_avg_pool2d = handles(F.adaptive_avg_pool2d)(partial(_global_pool, 2))
adaptive_avg_pool3d = handles(F.adaptive_avg_pool3d)(partial(_global_pool, 3))
