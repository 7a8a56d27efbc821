"""How many bytes an op moves between memory and the processor: what it reads of its inputs and weights, what it writes.

Each op on its own, as an eager run goes: it reads every tensor among its arguments once, and writes every output once,
each in its own dtype. What stays in a cache from one op to the next is not credited, and what a kernel keeps for itself
(the columns of an im2col, the tiles of a Winograd transform) is not charged. Views move nothing. An op whose traffic
hangs on the values of its arguments, or that no rule knows, has none of it counted and is listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repvgg.measure.rules import is_known, name_of


@dataclass(frozen=True)
class Traffic:
    """What one op moves, in bytes."""

    read: int
    written: int

    @property
    def moved(self) -> int:
        """Both ways."""
        return self.read + self.written


_STILL = Traffic(0, 0)
_TRAINING = 5  # the place of this flag among the arguments of native_batch_norm


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


#: Ops that hand on memory, or take some without touching it. Views need no row.
_MOVES_NOTHING = _names("""
    _reshape_alias _unsafe_view alias detach empty empty_like empty_strided lift_fresh new_empty new_empty_strided set_
    unsafe_split unsafe_split_with_sizes
""")

#: Ops that write all of their output and read none of the tensor that it has its shape or its memory from.
_WRITES_ONLY = _names("""
    arange bernoulli_ eye fill fill_ full full_like linspace new_full new_ones new_zeros normal_ ones ones_like rand
    rand_like randint randn randn_like random_ scalar_tensor uniform uniform_ zero_ zeros zeros_like
""")

#: Ops that overwrite their first argument without reading it.
_OVERWRITES = _names("copy copy_")

#: Ops that read as many values as they give, out of their first argument, and all of the others.
_PICKS = _names("embedding gather index index_select")

#: Ops that touch a part of their memory which only values, or what was there before, can tell.
_UNTOLD = _names("index_copy index_copy_ index_fill index_fill_ index_put index_put_ resize_ scatter scatter_")


def traffic_of(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Traffic | None:
    """What one call moves, or None where no rule knows it, or a tensor of it is sparse or otherwise has no strides."""
    name = name_of(func)
    if func.is_view or name in _MOVES_NOTHING:
        return _STILL
    inputs, outputs = list(tensors_in((args, _without_outs(func, kwargs)))), made_by(func, args, out)
    if name in _UNTOLD or not is_known(func) or any(t.layout is not torch.strided for t in (*inputs, *outputs)):
        return None
    written = _bytes(outputs)
    if name in _WRITES_ONLY:
        return Traffic(0, written)
    if name in _PICKS:
        return Traffic(written + _bytes(inputs[1:]), written)
    return Traffic(_bytes(inputs[1:] if name in _OVERWRITES else inputs), written)


def made_by(func: torch._ops.OpOverload, args: tuple[Any, ...], out: Any) -> list[Tensor]:
    """The tensors that a call made.

    A batch norm that is given its statistics returns two more: they are empty on the CPU, and have a shape on meta.
    """
    outputs = list(tensors_in(out))
    given = name_of(func) == "aten.native_batch_norm" and not args[_TRAINING]
    return outputs[:1] if given else outputs


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def _without_outs(func: torch._ops.OpOverload, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments without the tensors that are given to be written to."""
    outs = {argument.name for argument in func._schema.arguments if argument.is_out}
    return {name: value for name, value in kwargs.items() if name not in outs}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors; one that is given twice is read once, and an expanded axis is one value wide."""
    places = {
        (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()): _values(t) * t.element_size()
        for t in tensors
    }
    return sum(places.values())


def _values(tensor: Tensor) -> int:
    """Values in memory that a tensor shows."""
    number = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= size if stride or not size else 1
    return number
