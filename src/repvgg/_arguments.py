"""Arguments that many functions share: checks of models, shapes and ranks; geometry as torch takes it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from repvgg.errors import UsageError


def check_model(model: Any, function: str, *, lazy: bool = False) -> None:
    """Check that ``model`` is an ``nn.Module``.

    Args:
        model: the argument.
        function: what was called, for the message: ``reparameterize``.
        lazy: accept lazy layers that no call has given a shape; the function reports them.

    Raises:
        UsageError: it is something else, and the text says how to get a model from what it is; or it has such layers
            and ``lazy`` is not set.
    """
    if isinstance(model, nn.Module):
        if not lazy:
            check_initialized(model)
        return
    if isinstance(model, (str, os.PathLike)):
        what, advice = f"the path {os.fspath(model)!r}", "load it first, with repvgg.load(PATH).model"
    elif isinstance(model, type):
        what, advice = f"the class {model.__name__}", f"make a model of it first, {model.__name__}(…)"
    elif isinstance(model, Mapping):
        what, advice = "a state dict", "load it into a model first, with model.load_state_dict"
    elif isinstance(getattr(model, "model", None), nn.Module):
        what, advice = f"a {type(model).__name__}", "pass its .model"
    elif callable(model):
        what, advice = f"a function ({getattr(model, '__name__', type(model).__name__)})", "wrap it in an nn.Module"
    else:
        what, advice = f"a value of type {type(model).__name__}", "pass an nn.Module"
    raise UsageError(f"{function} takes a model, not {what}: {advice}.")


def check_initialized(model: nn.Module) -> None:
    """Raise UsageError, which names it, if a lazy layer has no shape yet."""
    for name, part in model.named_modules():
        tensors = (*part._parameters.values(), *part._buffers.values())
        if any(map(is_lazy, tensors)):
            raise UsageError(f"{name!r} ({type(part).__name__}) has no shape yet: call the model on an image first.")


def check_shape(shape: Any, axes: str, name: str = "input_shape") -> tuple[int, ...]:
    """Return ``shape`` as a tuple of positive integers, one for each of ``axes``.

    Args:
        shape: the argument.
        axes: their names: ``(N, C, H, W)``.
        name: of the argument, for the message.

    Raises:
        UsageError: another number of axes, or an entry that is no positive integer.
    """
    count = axes.count(",") + 1
    given = tuple(shape.shape) if isinstance(shape, Tensor) else shape
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == count:
        numbers = tuple(given)
        if all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers):
            return numbers
    what = f"a tensor of shape {given}" if isinstance(shape, Tensor) else repr(shape)
    raise UsageError(f"{name} must be {axes}, {count} positive integers, got {what}.")


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """Return an integer for each axis, from what torch takes as one number for all axes, or one per axis."""
    if isinstance(value, int):
        return (int(value),) * axes
    given = tuple([int(number) for number in value])
    return given * axes if len(given) == 1 else given
