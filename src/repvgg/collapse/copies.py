"""Deep copies of models, also of those that hold what cannot be copied as it is."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from repvgg.collapse.modules import join
from repvgg.errors import ReparamError
from repvgg.symbolic import things_in

Value = TypeVar("Value")


def copies_of_results(model: nn.Module) -> dict[int, Any]:
    """Copies of the tensors in attributes that were computed with gradients: a deep copy refuses to make them.

    A forward leaves such tensors behind where it keeps features or computes weights.
    """
    things = (value for part in model.modules() for value in things_in(vars(part).values()))
    return {id(v): v.detach().clone() for v in things if isinstance(v, Tensor) and not v.is_leaf}


def copied(value: Value, memo: dict[int, Any], module: nn.Module, path: str = "") -> Value:
    """A deep copy of something in ``module``, itself at ``path``, in which what ``memo`` holds is found copied already.

    Raises:
        ReparamError: an attribute cannot be copied; the text names it.
    """
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        reason = f"{_culprit(module, path)} ({type(error).__name__}: {error})"
        raise ReparamError(
            f"The model cannot be copied{reason}: take off what cannot be copied, or give its class a __deepcopy__."
        ) from error


def _culprit(module: nn.Module, path: str) -> str:
    memo = copies_of_results(module)
    for inner, part in module.named_modules():
        for name, value in vars(part).items():
            try:
                copy.deepcopy(None if name == "_modules" else value, memo)
            except Exception:
                return f", because of the attribute {name!r} of {join(path, inner) or 'the model'}"
    return ""
