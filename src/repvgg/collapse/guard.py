"""A check in the plain model: what is known from recorded calls holds for calls like them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from repvgg import _structure
from repvgg._calls import signature_of
from repvgg.collapse.recording import Frame
from repvgg.collapse.settings import Setting
from repvgg.errors import UsageError


@dataclass(frozen=True)
class CallGuard:
    """A forward pre-hook that refuses calls which differ from the recorded one.

    Attributes:
        path: of the module in the plain model.
        expected: for each argument by name, its structures and leaves as the recorded call had them: a value, or what
            is known of a tensor.
        settings: attributes, and variables around its code, that its forward branches on.
    """

    path: str
    expected: Mapping[str, tuple[Any, ...]]
    settings: tuple[Setting, ...] = ()
    only_checks: ClassVar[bool] = True  # a mark for the engine's recorder and others: tensors pass unchanged

    @classmethod
    def of(cls, path: str, frame: Frame, module: nn.Module, *, sizes: bool) -> CallGuard:
        """Return the guard for the call of a frame; with ``sizes``, tensors must have the recorded shapes as well."""
        bound = _bound(module, frame.args, frame.kwargs)
        return cls(path, {name: tuple(_expected(leaf, sizes) for leaf in _leaves(v)) for name, v in bound.items()})

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare a call with the recorded one.

        Raises:
            UsageError: it differs.
        """
        name = self.path or type(module).__name__
        for setting in self.settings:
            if setting.differs(module):
                raise UsageError(f"{name} was collapsed for {setting}: collapse the model with the other value.")
        if not self.expected:
            return
        values = _bound(module, args, kwargs)
        for argument in dict.fromkeys((*values, *self.expected)) if values else ():
            given = _leaves(values[argument]) if argument in values else []
            expected = self.expected.get(argument, ())
            if len(given) != len(expected) or not all(map(_fits, expected, given)):
                called = f"with {argument}={_describe(values[argument])}" if given else f"without {argument}"
                raise UsageError(
                    f"{name} was collapsed for {self._text()}, and is called {called}: call "
                    "repvgg.reparameterize with inputs= like this call for another plain model."
                )

    def for_convolution(self, conv: nn.Module) -> CallGuard:
        """Return the guard for a convolution in place of the module, whose only argument has another name."""
        signature = signature_of(conv)
        names = () if signature is None else signature.parameters
        return replace(self, expected=dict(zip(names, self.expected.values(), strict=False)))

    def __str__(self) -> str:
        return ", ".join(filter(None, [self._text(), *map(str, self.settings)]))

    def _text(self) -> str:
        return ", ".join(f"{name}={', '.join(map(_shown, known))}" for name, known in self.expected.items())


@dataclass(frozen=True)
class AnyTensor:
    """A tensor in a recorded call; ``shape`` is None if it does not matter."""

    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Structure:
    """A list, a tuple or a dictionary in a call, which its items follow."""

    kind: type
    keys: tuple[Any, ...]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        own = Structure(type(value), tuple(range(len(value))))
        return [own, *(leaf for item in value for leaf in _leaves(item))]
    if isinstance(value, dict):
        return [Structure(type(value), tuple(value)), *(leaf for item in value.values() for leaf in _leaves(item))]
    return [value]


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = signature_of(module)
    if signature is None:
        return {str(place): value for place, value in enumerate(args)} | dict(kwargs)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # the forward itself raises the error that a caller expects
        return {}
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if not _is_empty(signature, name, value)}


def _is_empty(signature: inspect.Signature, name: str, value: Any) -> bool:
    kind = signature.parameters[name].kind
    return kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) and not value


def _expected(leaf: Any, sizes: bool) -> Any:
    if isinstance(leaf, fx.Node):
        if "shape" in leaf.meta:
            return AnyTensor(leaf.meta["shape"] if sizes else None)
        return leaf.meta.get("value")
    return leaf


def _fits(expected: Any, given: Any) -> bool:
    if isinstance(expected, AnyTensor):
        return isinstance(given, Tensor) and expected.shape in (None, tuple(given.shape))
    if isinstance(given, Tensor) or type(expected) is not type(given):
        return False
    return bool(expected == given) or expected is given


def _shown(expected: Any) -> str:
    if isinstance(expected, AnyTensor):
        return "a tensor" if expected.shape is None else f"a tensor {expected.shape}"
    if isinstance(expected, Structure):
        return f"a {expected.kind.__name__} of {len(expected.keys)}"
    return repr(expected)


def _describe(value: Any) -> str:
    return ", ".join(_structure.describe(leaf) for _, leaf in _structure.leaves(value)) or repr(value)
