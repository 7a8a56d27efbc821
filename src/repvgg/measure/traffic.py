"""Bytes that an op moves between memory and the processor: inputs and weights that it reads, outputs that it writes.

The model is eager execution: an op reads every tensor argument once and writes every output once, in their dtypes.
Cache reuse from one op to the next is not credited, and scratch memory inside a kernel (im2col columns, Winograd tiles)
is not charged. Views move nothing. Where the traffic depends on the values of the arguments, it is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Traffic:
    """Bytes that one op reads and writes."""

    read: int
    written: int


_BATCH_NORM_TRAINING = 5  # position of the ``training`` flag among the arguments of native_batch_norm


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


#: Ops that return existing memory, or allocate it without touching it. Views are recognized without being listed.
_MOVES_NOTHING = _aten("""
    _reshape_alias _unsafe_view alias detach empty empty_like empty_strided lift_fresh new_empty new_empty_strided set_
    unsafe_split unsafe_split_with_sizes
""")

#: Ops that write their output and use their tensor argument for its shape or memory only.
_WRITES_ONLY = _aten("""
    arange bernoulli_ eye fill fill_ full full_like linspace new_full new_ones new_zeros normal_ ones ones_like rand
    rand_like randint randn randn_like random_ scalar_tensor uniform uniform_ zero_ zeros zeros_like
""")

#: Ops that overwrite their first argument without reading it.
_OVERWRITES_FIRST = _aten("copy copy_")

#: Ops that read as many values of their first argument as they return, and all of the other arguments.
_GATHERS = _aten("embedding gather index index_select")

#: Ops whose traffic depends on index values or on the previous size of their memory.
_DATA_DEPENDENT = _aten("index_copy index_copy_ index_fill index_fill_ index_put index_put_ resize_ scatter scatter_")


def op_name(func: torch._ops.OpOverload) -> str:
    """Return the name without the overload: "aten.add" for add.Tensor and add.Scalar alike."""
    return str(func.overloadpacket)


def traffic_of(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Traffic | None:
    """Return the traffic of one call; None if it depends on values, or if a tensor is not strided (sparse)."""
    name = op_name(func)
    if func.is_view or name in _MOVES_NOTHING:
        return Traffic(0, 0)
    out_names = {argument.name for argument in func._schema.arguments if argument.is_out}
    read_kwargs = {key: value for key, value in kwargs.items() if key not in out_names}  # ``out=`` is only written
    inputs, outputs = list(tensors_in((args, read_kwargs))), new_outputs(func, args, out)
    if name in _DATA_DEPENDENT or any(t.layout is not torch.strided for t in (*inputs, *outputs)):
        return None
    written = _bytes(outputs)
    if name in _WRITES_ONLY:
        return Traffic(0, written)
    if name in _GATHERS:
        return Traffic(written + _bytes(inputs[1:]), written)
    return Traffic(_bytes(inputs[1:] if name in _OVERWRITES_FIRST else inputs), written)


def new_outputs(func: torch._ops.OpOverload, args: tuple[Any, ...], out: Any) -> list[Tensor]:
    """Return the tensors that a call computed."""
    outputs = list(tensors_in(out))
    # In eval mode native_batch_norm also returns save_mean and save_invstd: empty on the CPU, with a shape on meta.
    eval_batch_norm = op_name(func) == "aten.native_batch_norm" and not args[_BATCH_NORM_TRAINING]
    return outputs[:1] if eval_batch_norm else outputs


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the memory that the tensors cover; a tensor that is passed twice counts once."""
    sizes = {
        (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()): _num_stored(t) * t.element_size()
        for t in tensors
    }
    return sum(sizes.values())


def _num_stored(tensor: Tensor) -> int:
    # An expanded axis has stride 0 and is one value wide in memory; an empty axis stays empty.
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size if stride or not size else 1 for size, stride in axes)
