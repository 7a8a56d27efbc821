"""Outputs of any structure: their leaves, and the error of each leaf over all batches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repvgg._structure import describe, leaves

#: The leaves of one output by name. Tensors are on the CPU and dense; a complex one has a last axis of two.
Leaves = Mapping[str, Any]

_NAMES_SHOWN = 3


def leaves_of(output: Any) -> dict[str, Any]:
    """Return the leaves of a model's output by name, detached from the model's memory.

    Arrays and floats become tensors, so that they are compared with a tolerance.
    """
    found: dict[str, Any] = {}
    for name, leaf in leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_nested:
            found |= {f"{name}[{place}]": _dense(part) for place, part in enumerate(leaf.unbind())}
        else:
            found[name] = _dense(leaf)
    return found


def _dense(leaf: Any) -> Any:
    if isinstance(leaf, (float, complex, np.number, np.ndarray)) and not isinstance(leaf, (np.integer, np.bool_)):
        leaf = torch.as_tensor(leaf if not isinstance(leaf, np.ndarray) else leaf.copy())
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    if leaf.is_quantized:
        leaf = leaf.dequantize()
    if leaf.layout is not torch.strided:
        leaf = leaf.to_dense()
    leaf = leaf.resolve_conj().resolve_neg()
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf)
    return leaf.to("cpu", copy=True)  # copy: a later forward may write to the same memory


def is_numbers(leaf: Any) -> bool:
    """Whether a leaf is compared with a tolerance."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@dataclass(frozen=True)
class LeafError:
    """The difference of one leaf, over all batches.

    Attributes:
        absolute: ``max|y - y64|``; of integers and booleans, 1 where any differs.
        relative: ``absolute / max|y64|``; of integers and booleans, the fraction that differs.
        mismatches: number of integers or booleans that differ, None for floating-point numbers.
        total: number of values.
    """

    absolute: float
    relative: float
    mismatches: int | None
    total: int


_INFINITE = LeafError(math.inf, math.inf, None, 0)


def paired(exact: Sequence[Leaves], other: Sequence[Leaves], by_order: bool) -> list[Leaves]:
    """Return ``other`` with the names of ``exact``, if the names differ and ``by_order`` is set.

    A function or a file may return the same tensors in another container. They are paired by their names, where those
    are the same but for punctuation (``output.boxes[0]``, ``output['boxes_0']``); and in order, where one side has no
    names (a tuple, a single tensor). Text and other values that a file does not hold are those of ``exact``.
    """
    out: list[Leaves] = []
    for a, b in zip(exact, other, strict=True):
        ours, theirs = ([name for name, leaf in one.items() if isinstance(leaf, Tensor)] for one in (a, b))
        is_unlike = a.keys() != b.keys() or any(b[name] is None and not isinstance(a[name], Tensor) for name in a)
        if by_order and is_unlike and (order := _places_of(ours, theirs)) is not None:
            values = {name: leaf for name, leaf in a.items() if not isinstance(leaf, Tensor)}
            out.append({**values, **{name: b[theirs[place]] for name, place in zip(ours, order, strict=True)}})
        else:
            out.append(b)
    return out


def _places_of(ours: Sequence[str], theirs: Sequence[str]) -> Sequence[int] | None:
    """Return the place in ``theirs`` of each of ``ours``, None if they cannot be paired."""
    if len(ours) != len(theirs):
        return None
    a, b = ([_identifier(name) for name in names] for names in (ours, theirs))
    if set(a) == set(b) and len(set(a)) == len(a):
        return [b.index(name) for name in a]
    nameless = any(all(not name.strip("_0123456789") for name in names) for names in (a, b))
    # Names that differ in punctuation alone are numbered in files.
    return range(len(ours)) if nameless or len(ours) == 1 or len(set(a)) < len(a) or len(set(b)) < len(b) else None


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name.removeprefix("output")).strip("_")


def problems_of(exact: Sequence[Leaves], other: Sequence[Leaves], *, same_infinities: bool = False) -> list[str]:
    """Return why two lists of outputs cannot be compared or are not the same, one clause each.

    With ``same_infinities``, values that are not finite are no problem where both have the same ones.
    """
    problems: dict[str, None] = {}
    for a, b in zip(exact, other, strict=True):
        if only := [name for name in a if name not in b]:
            problems[f"only the reference returned {_names(only)}"] = None
        if only := [name for name in b if name not in a]:
            problems[f"only the candidate returned {_names(only)}"] = None
        for name in a:
            if name in b and (problem := _why_unlike(name, a[name], b[name])):
                problems.setdefault(problem)
                break
    if not any(leaf.numel() if isinstance(leaf, Tensor) else False for a in exact for leaf in a.values()):
        problems["the reference returned no values"] = None
    pairs = [(name, a[name], b[name]) for a, b in zip(exact, other, strict=True) for name in a if name in b]
    if not (same_infinities and all(_same_non_finite(a, b) for _, a, b in pairs)):
        several = len({name for name, *_ in pairs}) > 1
        for who, place in (("reference", 1), ("candidate", 2)):
            bad = next((pair[0] for pair in pairs if not _is_finite(pair[place])), None)
            if bad is not None:
                problems[f"the {who} returned a NaN or an infinity" + (f" in {bad}" if several else "")] = None
    return list(problems)


def _names(names: Sequence[str]) -> str:
    hidden = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")


def _why_unlike(name: str, a: Any, b: Any) -> str | None:
    where = "" if name == "output" else f" in {name}"
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.is_floating_point() != b.is_floating_point():
            kinds = [str(x.dtype).removeprefix("torch.") for x in (a, b)]
            return f"the reference returned {kinds[0]} and the candidate {kinds[1]}{where}"
        if a.shape != b.shape:
            return f"the reference returned the shape {tuple(a.shape)} and the candidate {tuple(b.shape)}{where}"
        return None
    if _equal(a, b):
        return None
    return f"the reference returned {describe(a)} and the candidate {describe(b)}{where}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    compares: object = type(a).__eq__
    if type(a) is type(b) and compares is object.__eq__:  # no tensor inside, and no notion of equality
        return True
    try:
        return bool(a == b)
    except Exception:  # of a class of the user's
        return False


def _is_finite(leaf: Any) -> bool:
    return not is_numbers(leaf) or bool(torch.isfinite(leaf).all())


def _same_non_finite(a: Any, b: Any) -> bool:
    if not is_numbers(a) or not is_numbers(b) or a.shape != b.shape:
        return True
    odd = ~torch.isfinite(a)
    return bool((odd == ~torch.isfinite(b)).all()) and torch.equal(
        torch.nan_to_num(a[odd].double()), torch.nan_to_num(b[odd].double())
    )


def errors_of(
    exact: Sequence[Leaves], other: Sequence[Leaves], *, same_infinities: bool = False
) -> dict[str, LeafError]:
    """Return the error of each tensor by name, over all batches; infinite where two cannot be subtracted."""
    names = dict.fromkeys(name for a in exact for name, leaf in a.items() if isinstance(leaf, Tensor))
    return {
        name: _error([(a[name], b.get(name)) for a, b in zip(exact, other, strict=True) if name in a], same_infinities)
        for name in names
    }


def _error(pairs: Sequence[tuple[Any, Any]], same_infinities: bool) -> LeafError:
    unlike = any(not isinstance(b, Tensor) or a.shape != b.shape for a, b in pairs)
    if unlike or any(a.is_floating_point() != b.is_floating_point() for a, b in pairs):
        return _INFINITE  # before the subtraction, which would broadcast
    total = sum(a.numel() for a, _ in pairs)
    if not pairs[0][0].is_floating_point():
        mismatches = sum(int((a != b).sum()) for a, b in pairs)
        return LeafError(float(mismatches > 0), mismatches / max(total, 1), mismatches, total)
    if same_infinities:
        pairs = [(torch.nan_to_num(a, posinf=0, neginf=0), torch.nan_to_num(b, posinf=0, neginf=0)) for a, b in pairs]
    absolute = max(largest(b.double() - a.double()) for a, b in pairs)
    scale = max(largest(a) for a, _ in pairs)
    return LeafError(absolute, _relative(absolute, scale), None, total)


def _relative(absolute: float, scale: float) -> float:
    if not math.isfinite(absolute) or not math.isfinite(scale):
        return math.inf
    if absolute == 0.0:
        return 0.0
    return absolute / scale if scale else math.inf


def largest(values: Tensor) -> float:
    """Return ``max|v|``: infinite where a value is not finite, 0 for an empty tensor."""
    if values.numel() == 0:
        return 0.0
    found = float(values.abs().max())  # max propagates NaN
    return found if math.isfinite(found) else math.inf
