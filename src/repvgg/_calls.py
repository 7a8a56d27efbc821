"""How the inputs that a user gives are passed to a forward: :func:`bind` makes a :class:`Call` of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from repvgg import _structure
from repvgg._arguments import check_initialized
from repvgg.errors import UsageError, did_you_mean

#: A tensor, a sequence of arguments in order, or a mapping of arguments by name.
Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]

_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of a forward. Values may be nested; tensors inside them are found and mapped."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: Callable[..., Any]) -> Any:
        """Return ``model(*args, **kwargs)``."""
        return model(*self.args, **self.kwargs)

    def map_tensors(self, function: Callable[[Tensor], Any]) -> Call:
        """Return the call with ``function`` applied to each tensor."""
        return Call(*_structure.map_tensors(function, (self.args, dict(self.kwargs))))

    def tensors(self) -> list[Tensor]:
        """Return all tensors among the arguments, in order."""
        return _structure.tensors((self.args, dict(self.kwargs)))

    def leaves(self) -> list[tuple[str, Any]]:
        """Return each leaf of the arguments with its name, such as ``inputs[0]`` or ``mask['left']``."""
        named = [(f"inputs[{place}]", value) for place, value in enumerate(self.args)] + list(self.kwargs.items())
        return [leaf for name, value in named for leaf in _structure.leaves(value, name)]

    def __repr__(self) -> str:
        return ", ".join(f"{name}: {_structure.describe(leaf)}" for name, leaf in self.leaves()) or "no arguments"


def bind(model: Callable[..., Any], inputs: Inputs | Call) -> Call:
    """Return the call of ``model`` that ``inputs`` mean.

    - A tensor is the first argument, whether or not it has a default.
    - A list or a tuple holds the arguments in order: ``[a, b]`` is ``model(a, b)``, and ``[[a, b]]`` is
      ``model([a, b])``, one argument that is a list.
    - A mapping holds the arguments by name where the forward has parameters of these names. Otherwise it is itself the
      only argument, of a forward that takes a dictionary.
    - Anything else that holds a tensor, such as a dataclass, is the first argument.

    NumPy arrays become tensors that share their memory.

    Raises:
        UsageError: the forward does not take these arguments; the text names its parameters. Or there is no tensor.
    """
    if isinstance(inputs, Call):
        return inputs
    inputs = with_tensors(inputs)
    if isinstance(inputs, (str, bytes)) or not _structure.tensors(inputs):
        raise UsageError(
            f"Inputs must be a tensor, or a sequence or a mapping with tensors in it, got {_kind(inputs)}."
        )
    signature = signature_of(model)
    if isinstance(inputs, Mapping):
        return _bind_mapping(signature, inputs)
    call = Call(tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,))
    problem = signature and why_unfit(signature, call)
    if problem:
        hint = ""
        if isinstance(inputs, (list, tuple)) and len(inputs) > 1 and not why_unfit(signature, Call((inputs,))):
            hint = "; for one argument that is a list, put it into a list of its own"
        raise UsageError(f"{problem}: give its arguments in order, or by name in a dictionary{hint}.")
    return call


def check_model(model: object, who: str) -> None:
    """Raise UsageError, mostly a sentence that begins with ``who``, unless ``model`` is a usable module or function."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise UsageError(f"{who} is the class {model.__name__}, not a model: call it, {model.__name__}(…).")
    if isinstance(model, (str, bytes, os.PathLike)):
        raise UsageError(
            f"{who} is a path, {os.fspath(model)!r}, not a model: read it first, for example with repvgg.load(path)."
        )
    if isinstance(model, Mapping) and any(isinstance(value, Tensor) for value in model.values()):
        raise UsageError(f"{who} is a state dict, not a model: pass the model after model.load_state_dict(…).")
    if not callable(model):
        raise UsageError(f"{who} must be an nn.Module or a function, got a {type(model).__name__}.")
    if isinstance(model, nn.Module):
        check_initialized(model)


def with_tensors(value: Any) -> Any:
    """Return ``value`` with each NumPy array in it replaced by a tensor that shares its memory.

    Raises:
        UsageError: an array of a type that PyTorch does not have.
    """
    return _structure.map_leaves(lambda leaf: _tensor_of(leaf) if isinstance(leaf, np.ndarray) else leaf, value)


def _tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):  # PyTorch warns, or refuses
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UsageError(
            f"PyTorch has no tensors of NumPy's type {array.dtype}: convert the array to numbers."
        ) from error


def signature_of(model: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a model's ``forward``, without ``self``, or of a function; None where it has none.

    Wrappers of ``torch.compile`` and of data parallelism, which take anything, are looked through.
    """
    while isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None
        )
        if not isinstance(inner, nn.Module):
            break
        model = inner
    try:
        return inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # built-in functions and compiled scripts
        return None


def parameters_text(signature: inspect.Signature) -> str:
    """Return the parameters with the defaults that tell what they are: ``(x, mask=None, *, scale)``."""
    bare = [
        parameter.replace(
            annotation=Parameter.empty,
            default=parameter.default if parameter.default is Parameter.empty else _Text(parameter.default),
        )
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(bare))


@dataclass(frozen=True, eq=False)
class _Text:
    """A default as it is printed: that of a tensor would fill a page."""

    value: Any

    def __repr__(self) -> str:
        return _structure.describe(self.value)


def why_unfit(signature: inspect.Signature | None, call: Call) -> str | None:
    """Return why a forward of this signature cannot be called so, a clause that names its parameters, or None."""
    if signature is None:
        return None
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        given = f"{len(call.args) + len(call.kwargs)} given"
        return f"The forward takes {parameters_text(signature)} and these inputs do not fit, {given} ({error})"
    return None


def _bind_mapping(signature: inspect.Signature | None, inputs: Mapping[Any, Any]) -> Call:
    alone = Call((inputs,))
    named = all(isinstance(key, str) for key in inputs)
    if signature is None:
        return Call((), dict(inputs)) if named else alone
    if named and not why_unfit(signature, Call((), dict(inputs))):
        only_star = all(name not in signature.parameters for name in inputs) and _takes_one(signature)
        return alone if only_star else Call((), dict(inputs))
    by_name = [p.name for p in signature.parameters.values() if p.kind in _BY_NAME]
    # A forward that takes a dictionary has one parameter that must be given; none of its keys is the name of another.
    if _takes_one(signature) and not any(key in by_name for key in inputs) and not why_unfit(signature, alone):
        return alone
    unknown = next((key for key in inputs if key not in by_name), None)
    if unknown is None:
        missing = [name for name in _required(signature) if name not in inputs]
        problem = f"{missing[0]!r} is missing" if missing else "not by name"
    else:
        close = did_you_mean(str(unknown), by_name).rstrip("?")
        problem = f"it has no {unknown!r}" + (f", {close}" if close else "")
    raise UsageError(
        f"The forward takes {parameters_text(signature)}; {problem}: give its arguments by these names, or put the "
        "dictionary into a list if it is one argument."
    )


def _takes_one(signature: inspect.Signature) -> bool:
    """Whether a single positional argument is what a caller must give, or all that can be given."""
    required = list(_required(signature))
    positional = [p for p in signature.parameters.values() if p.kind in (*_POSITIONAL, Parameter.VAR_POSITIONAL)]
    return len(required) == 1 or (not required and len(positional) == 1)


def _required(signature: inspect.Signature) -> Iterator[str]:
    for parameter in signature.parameters.values():
        if parameter.kind in (*_POSITIONAL, Parameter.KEYWORD_ONLY) and parameter.default is Parameter.empty:
            yield parameter.name


def _kind(inputs: Any) -> str:
    if isinstance(inputs, (list, tuple, Mapping)) and not inputs:
        return f"an empty {type(inputs).__name__}"
    return f"a {type(inputs).__name__}" if isinstance(inputs, (str, bytes)) else f"{_structure.describe(inputs)}"
