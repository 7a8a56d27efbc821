"""Handlers for sums, differences, products and quotients, and for their in-place forms."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repvgg import algebra
from repvgg.errors import NotLinearError
from repvgg.symbolic.operands import constant, per_channel, same_source
from repvgg.symbolic.tensor import SymbolicTensor, handles

_T = torch.Tensor


def _in_place(function: Callable[..., SymbolicTensor]) -> Callable[..., SymbolicTensor]:
    """The in-place form of a handler: the first argument becomes the outcome, for all who hold it."""

    def change(target: Any, *args: Any, **kwargs: Any) -> SymbolicTensor:
        if isinstance(target, Tensor):
            raise NotLinearError("a constant is changed in place")
        if not isinstance(target, SymbolicTensor):  # a number, as in ``total = 0; total += branch(x)``
            return function(target, *args, **kwargs)
        if target.is_source or target.is_view:
            raise NotLinearError("the input, or a view of a tensor, is changed in place")
        target.map = function(target, *args, **kwargs).map
        return target

    return change


@handles(operator.add, torch.add, _T.add, _T.__add__, _T.__radd__)
def add(left: Any, right: Any, *, alpha: float = 1) -> SymbolicTensor:
    """Sum of two functions of one source, or of one and a constant per channel."""
    if alpha != 1:
        right = right * alpha
    if isinstance(left, SymbolicTensor) and isinstance(right, SymbolicTensor):
        return same_source((left, right)).like(algebra.add(left.map, right.map), "add")
    symbol, other = (left, right) if isinstance(left, SymbolicTensor) else (right, left)
    if isinstance(other, (int, float)) and other == 0:
        return symbol.like(symbol.map, "identity")
    return symbol.like(algebra.shift(symbol.map, per_channel(other, symbol)), "shift")


@handles(operator.neg, torch.neg, _T.neg, _T.__neg__)
def negate(input: SymbolicTensor) -> SymbolicTensor:  # noqa: A002
    """``−x``."""
    return multiply(input, -1)


@handles(operator.sub, torch.sub, _T.sub, _T.__sub__)
def subtract(left: Any, right: Any, *, alpha: float = 1) -> SymbolicTensor:
    """``left − alpha·right``."""
    return add(left, right * -alpha)


@handles(_T.__rsub__, torch.rsub)
def reflected_subtract(left: Any, right: Any) -> SymbolicTensor:
    """``right − left``."""
    return subtract(right, left)


@handles(operator.mul, torch.mul, _T.mul, _T.__mul__, _T.__rmul__)
def multiply(left: Any, right: Any) -> SymbolicTensor:
    """Product with a number or a constant per channel."""
    if isinstance(left, SymbolicTensor) and isinstance(right, SymbolicTensor):
        raise NotLinearError("a product of two functions of the image is not linear")
    symbol, other = (left, right) if isinstance(left, SymbolicTensor) else (right, left)
    return symbol.like(algebra.scale(symbol.map, per_channel(other, symbol)), "scale")


@handles(operator.truediv, torch.div, torch.true_divide, _T.div, _T.true_divide, _T.__truediv__)
def divide(left: Any, right: Any, *, rounding_mode: str | None = None) -> SymbolicTensor:
    """Quotient by a number or a constant per channel."""
    if isinstance(right, SymbolicTensor) or rounding_mode is not None:
        raise NotLinearError("a division by the image, or a rounded one, is not linear")
    return multiply(left, 1 / constant(right, left))


for _function, _names in {
    add: (operator.iadd, _T.add_, _T.__iadd__),
    subtract: (operator.isub, _T.sub_, _T.__isub__),
    multiply: (operator.imul, _T.mul_, _T.__imul__),
    divide: (operator.itruediv, _T.div_, _T.__itruediv__),
}.items():
    handles(*_names)(_in_place(_function))
