"""Deep copies of models, also of those that hold what cannot be copied as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from repvgg.errors import ReparamError

Value = TypeVar("Value")


def copies_of_results(model: nn.Module) -> dict[int, Any]:
    """Copies of the tensors in attributes that were computed with gradients: a deep copy refuses to make them.

    A forward leaves such tensors behind where it keeps features or computes weights.
    """
    tensors = (value for part in model.modules() for value in _tensors(list(vars(part).values())))
    return {id(value): value.detach().clone() for value in tensors if not value.is_leaf}


def _tensors(values: Any, depth: int = 3) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, dict):
            yield from _tensors(value.values(), depth - 1)
        elif depth and isinstance(value, (list, tuple)):
            yield from _tensors(value, depth - 1)


def copied(value: Value, memo: dict[int, Any], model: nn.Module) -> Value:
    """A deep copy of something in ``model``, in which what ``memo`` holds is found already copied.

    Raises:
        ReparamError: an attribute cannot be copied; the text names it.
    """
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise ReparamError(
            f"The model cannot be copied{_culprit(model)} ({type(error).__name__}: {error}): take off what cannot be "
            "copied, or give its class a __deepcopy__."
        ) from error


def _culprit(model: nn.Module) -> str:
    memo = copies_of_results(model)
    for path, part in model.named_modules():
        for name, value in vars(part).items():
            try:
                copy.deepcopy(None if name == "_modules" else value, memo)
            except Exception:
                return f", because of the attribute {name!r} of {path or 'the model'}"
    return ""
