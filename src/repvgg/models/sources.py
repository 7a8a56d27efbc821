"""Where a model comes from, in one string: a row of our table, timm, torchvision, or a Python file of the user's own.

Nothing here downloads: models by name come with random weights, and trained ones come out of a file.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from repvgg.errors import SourceError, UnknownModelError, UsageError, first_line, require
from repvgg.models.builder import create_model, list_models
from repvgg.models.spec import spec_of
from repvgg.models.user_file import model_from_file
from repvgg.models.weights import load_weights

Shape = tuple[int, int, int]
_DEFAULT_SHAPE: Shape = (3, 224, 224)
_NO_VALUES = "none: it has shapes alone"
_FORMS = "timm:NAME, torchvision:NAME, repvgg:NAME or PATH.py:FACTORY"


@dataclass(frozen=True, eq=False)
class Sourced:
    """A model that was built from a source, in eval mode.

    Attributes:
        source: the string that it was asked for with.
        model: it; nobody else has it.
        input_shape: (C, H, W) of the image that it is made for, as far as it tells.
        weights: where its weights come from, in words; "random" where nobody gave any.
    """

    source: str
    model: nn.Module
    input_shape: Shape
    weights: str


def resolve(
    source: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    values: bool = True,
) -> Sourced:
    """Build the model that ``source`` names, on the CPU and in eval mode.

    Args:
        source: ``timm:NAME`` (the extra ``timm``), ``torchvision:NAME``, ``repvgg:NAME``, or ``PATH.py:FACTORY``: the
            file is imported, which runs it, and FACTORY is called without arguments.
        weights: a file to load; see :func:`repvgg.models.load_weights`.
        num_classes: logits of a model by name; None takes its own number.
        in_channels: channels of the images for ``timm:`` and ``repvgg:``; None takes the model's own.
        values: False builds it on the meta device, for counting: it has shapes and takes no memory. Where a
            constructor computes with values, and out of a file, it is built with them first.

    Raises:
        SourceError: the string is none of these forms, the file or its factory fails, or the model cannot be used.
        UnknownModelError: no model of that name; the text tells the nearest.
        UsageError: ``num_classes`` below 1, or for a model that was not asked for by name; weights without values.
        CheckpointError: the weights cannot be read, or do not fit.
        MissingDependencyError: timm is not installed.
    """
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"A model needs at least one class, not {num_classes}.")
    if weights is not None and not values:
        raise UsageError("A model on the meta device has no values: build it with them to load weights.")
    model, shape, origin = (_built if values else _built_on_meta)(source, num_classes, in_channels)
    if weights is not None:
        load_weights(model, weights, source)
        origin = f"from {Path(weights).name}"
    return Sourced(source, model.eval(), (in_channels or shape[0], *shape[1:]), origin)


def _built_on_meta(source: str, num_classes: int | None, in_channels: int | None) -> tuple[nn.Module, Shape, str]:
    """As :func:`_built`, without values: of a model by name none are made, where its constructor can do without."""
    zoo, _, name = source.partition(":")
    if zoo in _ZOOS and name:
        try:
            with torch.device("meta"):
                model, shape = _ZOOS[zoo](name, num_classes, in_channels)
            return model.to("meta"), shape, _NO_VALUES
        except SourceError:  # it may want values only; what else is wrong comes up again below
            pass
    model, shape, _ = _built(source, num_classes, in_channels)
    return model.to("meta"), shape, _NO_VALUES


def _built(source: str, num_classes: int | None, in_channels: int | None) -> tuple[nn.Module, Shape, str]:
    """Model on the CPU, shape of an image, and what its weights are."""
    model, shape, origin = _made_as_asked(source, num_classes, in_channels)
    _check_materialized(model, source)
    return model.cpu(), shape, origin


def _made_as_asked(source: str, num_classes: int | None, in_channels: int | None) -> tuple[nn.Module, Shape, str]:
    zoo, _, name = source.partition(":")
    if zoo in _ZOOS and name:
        return *_ZOOS[zoo](name, num_classes, in_channels), "random"
    path, _, factory = source.rpartition(":")
    if not path or not factory.isidentifier():
        raise SourceError(f"{source!r} does not say where the model comes from: {_FORMS}{_advice(source)}.")
    if not path.endswith(".py"):
        raise SourceError(f"{path!r} is neither a Python file nor a collection of models: {_FORMS}.")
    if num_classes is not None:
        raise UsageError(f"The number of classes is that of the model which {factory}() returns: it takes no other.")
    return model_from_file(path, factory), _DEFAULT_SHAPE, f"those that {factory}() gave, random unless it loads some"


def _advice(source: str) -> str:
    if source.endswith(".py"):
        return f"; name the function in the file, as in {source}:make_model"
    return f"; did you mean repvgg:{source}?" if source in list_models() else ""


def _repvgg(name: str, num_classes: int | None, in_channels: int | None) -> tuple[nn.Module, Shape]:
    from repvgg.models.comparisons import COMPARISONS, create_comparison  # here, as it needs this module

    if name in COMPARISONS:
        size = COMPARISONS[name].input_size
        return create_comparison(name, num_classes or 1000, in_channels or 3), (3, size, size)
    size = spec_of(name).input_size
    return create_model(name, num_classes or 1000, in_channels or 3), (3, size, size)


def _timm(name: str, num_classes: int | None, in_channels: int | None) -> tuple[nn.Module, Shape]:
    timm = require("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    more = {"num_classes": num_classes, "in_chans": in_channels}
    asked = {key: value for key, value in more.items() if value is not None}
    model = _made(f"timm:{name}", timm.create_model, name, pretrained=False, **asked)
    config = getattr(model, "pretrained_cfg", None) or {}
    shape = tuple(config.get("input_size") or _DEFAULT_SHAPE)
    return model, shape if len(shape) == 3 else _DEFAULT_SHAPE


def _torchvision(name: str, num_classes: int | None, in_channels: int | None) -> tuple[nn.Module, Shape]:
    models = require("torchvision").models
    if name not in (known := models.list_models()):
        raise _unknown("torchvision", name, known)
    asked: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        asked["weights_backbone"] = None  # or it is downloaded
    model = _made(f"torchvision:{name}", models.get_model, name, weights=None, **asked)
    return model, _DEFAULT_SHAPE


_ZOOS: dict[str, Callable[[str, int | None, int | None], tuple[nn.Module, Shape]]] = {
    "repvgg": _repvgg,
    "timm": _timm,
    "torchvision": _torchvision,
}


def _made(what: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    """A model of somebody else's collection; it may refuse an argument in any way."""
    try:
        model = make(*args, **kwargs)
    except Exception as error:
        raise SourceError(f"{what} cannot be built: {first_line(error)}.") from error
    assert isinstance(model, nn.Module)
    return model


def _unknown(zoo: str, name: str, known: Iterable[str]) -> UnknownModelError:
    close = difflib.get_close_matches(name.partition(".")[0], list(known), n=3)
    advice = f"did you mean {' or '.join(close)}?" if close else f"its models are listed by {zoo}'s list_models()."
    return UnknownModelError(f"{zoo} has no model {name!r}: {advice}")


def _check_materialized(model: nn.Module, source: str) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise SourceError(f"{source} has no values in {name!r} yet: run the model once where it is made.")
