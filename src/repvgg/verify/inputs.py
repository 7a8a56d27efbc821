"""The inputs of a verification: batches from tensors, arrays, loaders or nothing, as calls of the models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from repvgg._calls import Call, bind, parameters_text, signature_of, why_unfit, with_tensors
from repvgg._structure import describe, tensors
from repvgg.errors import UsageError, first_line
from repvgg.verify.execution import border_inputs, isolated_eval, name_of

Batches = Tensor | Mapping[str, Any] | Call | Iterable[Any]

_LABELS_LEFT_OUT = "the labels in the batches were not passed to the models"
_BATCH = 2
# Tried in this order; the sizes that a model names come second: an odd size is cheap, and shows more at the far border.
_ODD_SIDES = (37, 43)
_SIDES = ((224, 224), (64, 64), (32, 32), (8, 9))
_DEPTH = 6  # of volumes
_TOKENS = 7


def calls_of(model: Callable[..., Any], inputs: Batches | np.ndarray[Any, Any]) -> tuple[list[Call], list[str]]:
    """Return one call of ``model`` for each batch, and remarks, one clause each.

    A tensor, an array or a mapping is one batch; a sequence of them, or a loader, several. A batch that is a tuple or a
    list holds the arguments in order. What the forward does not take, and class labels for an optional parameter,
    are left out; images without a batch axis are one argument, a list.

    Raises:
        UsageError: there is no batch, one is empty, or the model does not take one.
    """
    notes: dict[str, None] = {}
    calls = [_call_of(model, batch, notes) for batch in _batches(model, inputs)]
    if not calls:
        raise UsageError("There are no inputs to verify on: pass at least one batch.")
    for call in calls:
        for tensor in call.tensors():
            if tensor.numel() == 0 or (tensor.dim() == 0 and len(call.tensors()) == 1):
                raise UsageError(f"A batch must hold at least one sample, got the shape {tuple(tensor.shape)}.")
    return calls, list(notes)


def _batches(model: Callable[..., Any], inputs: Any) -> list[Any]:
    if isinstance(inputs, (Tensor, np.ndarray, Mapping, Call)) or not isinstance(inputs, Iterable):
        return [inputs]
    if isinstance(inputs, (str, bytes)):
        raise UsageError(f"Inputs must be tensors, arrays or a loader of them, got {inputs!r}.")
    batches = list(inputs)
    signature = signature_of(model)
    several_arguments = signature is not None and bool(why_unfit(signature, Call((None,))))
    flat = len(batches) > 1 and all(not isinstance(batch, (list, tuple, Mapping)) for batch in batches)
    # Two tensors are two batches, unless one alone is too few for the forward.
    if flat and several_arguments and not why_unfit(signature, Call(tuple(batches))):
        return [tuple(batches)]
    return batches


def _call_of(model: Callable[..., Any], batch: Any, notes: dict[str, None]) -> Call:
    batch = with_tensors(batch)
    if not isinstance(batch, Call) and not tensors(batch):
        raise UsageError(f"Each batch of inputs must hold a tensor, got a {type(batch).__name__}.")
    if not isinstance(batch, (list, tuple)):
        return bind(model, batch)
    signature = signature_of(model)
    one_is_enough = not why_unfit(signature, Call((batch,)))
    if one_is_enough and all(isinstance(image, Tensor) and image.dim() == 3 for image in batch) and _floating(batch):
        return Call((batch,))
    arguments = tuple(batch)
    while len(arguments) > 1:
        fewer = arguments[:-1]
        unfit, enough = why_unfit(signature, Call(arguments)), not why_unfit(signature, Call(fewer))
        if not enough or (not unfit and not _is_label(arguments[-1])) or signature is None:
            break
        arguments = fewer
        notes[_LABELS_LEFT_OUT] = None
    return bind(model, arguments)


def _floating(values: Iterable[Tensor]) -> bool:
    return all(value.is_floating_point() for value in values)


def _is_label(value: Any) -> bool:
    """Whether a value looks like the class indices or targets of a loader."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() and not value.is_complex() and value.dim() <= 1
    return isinstance(value, (int, str)) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, (int, str)) for item in value)
    )


def call_for(candidate: Callable[..., Any], call: Call, reference: Callable[..., Any]) -> Call:
    """Return ``call``, which fits ``reference``, as the candidate takes it: perhaps in order instead of by name."""
    signature = signature_of(candidate)
    if not why_unfit(signature, call) or not call.kwargs:
        return call
    order = signature_of(reference)
    names = [name for name in (order.parameters if order else call.kwargs) if name in call.kwargs]
    in_order = Call((*call.args, *(call.kwargs[name] for name in names)))
    problem = why_unfit(signature, in_order)
    if problem:
        raise UsageError(f"The candidate does not take the inputs of the reference: {problem}.")
    return in_order


def rounded(calls: Sequence[Call], dtype: torch.dtype) -> list[Call]:
    """Return the calls with floating-point tensors in ``dtype``; raise UsageError if a value is not finite then."""
    out = [call.map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x) for call in calls]
    if not all(bool(torch.isfinite(x).all()) for call in out for x in call.tensors() if x.is_floating_point()):
        raise UsageError(f"The inputs hold a NaN or an infinity when rounded to {name_of(dtype)}: pass finite ones.")
    return out


def samples_in(call: Call) -> int:
    """Return the number of samples: the length of axis 0 of the first tensor, or that of a list of images."""
    for value in (*call.args, *call.kwargs.values()):
        found = tensors(value)
        if isinstance(value, (list, tuple)) and len(found) == len(value) > 0 and found[0].dim() == 3:
            return len(value)
        if found:
            return len(found[0]) if found[0].dim() else 1
    return 1


def first_samples(call: Call, most: int) -> Call:
    """Return the call with at most that many samples, where axis 0 of its tensors counts samples."""
    number = samples_in(call)
    if number <= most:
        return call
    args, kwargs = call.args, dict(call.kwargs)
    if all(tensor.dim() == 3 for tensor in call.tensors()) and not isinstance(next(iter(args), None), Tensor):
        return call  # lists of images: other arguments may belong to them
    return Call(args, kwargs).map_tensors(lambda x: x[:most] if x.dim() and len(x) == number else x)


@dataclass(frozen=True)
class MadeUp:
    """Inputs that were made up for a model.

    Attributes:
        calls: one or more batches on which the model runs.
        text: what they are, and from what they were inferred.
    """

    calls: tuple[Call, ...]
    text: str


def make_up_inputs(model: nn.Module) -> MadeUp:
    """Make inputs for a model that takes one tensor, from the channels of its first convolution or linear layer.

    Images are those of :func:`repvgg.verify.border_inputs`, of the first size on which the model runs: an odd one, that
    which the model names (timm's ``default_cfg``, the ``config`` of transformers), 224, …; and of another odd size if
    it runs on that, too.

    Raises:
        UsageError: the forward needs several arguments, there is no layer to infer a shape from, or the model runs on
            none of these inputs.
    """
    signature = signature_of(model)
    if signature is not None and why_unfit(signature, Call((None,))):
        raise UsageError(f"The forward takes {parameters_text(signature)}: pass inputs for it.")
    problem = "no convolution, linear layer or embedding says what the model takes"
    for batches, text in _candidates(model):
        calls = [Call((batch,)) for batch in batches]
        errors = [_error_of(model, call) for call in calls]
        if errors[0] is None:
            return MadeUp(tuple(call for call, error in zip(calls, errors, strict=True) if error is None), text)
        problem = f"on {describe(batches[0])} it raises {first_line(errors[0])!r}"
    raise UsageError(f"No inputs could be made up for the model ({problem}): pass inputs.")


def _error_of(model: nn.Module, call: Call) -> Exception | None:
    try:
        with isolated_eval(model):
            call.map_tensors(torch.clone)(model)
    except Exception as error:  # user code, on inputs that it may not accept
        return error
    return None


def _candidates(model: nn.Module) -> Iterator[tuple[list[Tensor], str]]:
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for name, part in model.named_modules():
        channels_or_text = takes(part)
        if channels_or_text is None:
            continue
        origin = f"from {name!r}" if name else "from the model itself"
        if isinstance(part, nn.Embedding):
            tokens = torch.arange(_BATCH * _TOKENS).view(_BATCH, _TOKENS) % part.num_embeddings
            yield [tokens.to(first.device)], f"{_BATCH} sequences of {_TOKENS} tokens, {origin}"
            return
        for batches, text in _of_layer(model, part, first.dtype):
            yield [batch.to(first.device) for batch in batches], f"{text}, {origin}"
        return


def takes(part: nn.Module) -> str | None:
    """Return what a layer takes, as a shape in words, or None for a layer that says nothing about it."""
    if isinstance(part, (_ConvNd, _ConvTransposeNd)):
        axes = ("length",), ("height", "width"), ("depth", "height", "width")
        return f"(N, {part.in_channels}, {', '.join(axes[part.weight.dim() - 3])})"
    if isinstance(part, nn.Linear):
        return f"(…, {part.in_features})"
    return "whole numbers" if isinstance(part, nn.Embedding) else None


def first_layer(model: nn.Module) -> tuple[str, str] | None:
    """Return the path of the first layer with weights that says what it takes, and that as text."""
    found = ((name, takes(part)) for name, part in model.named_modules())
    return next(((name, text) for name, text in found if text), None)


def _of_layer(model: nn.Module, part: Any, dtype: torch.dtype) -> Iterator[tuple[list[Tensor], str]]:
    if isinstance(part, nn.Linear):
        rows = border_inputs((_BATCH, part.in_features, 1, 1), batches=1, dtype=dtype)[0].flatten(1)
        yield [rows], f"{_BATCH} rows of {part.in_features} numbers"
        # Images whose channels come last, or patches: one more attempt.
        yield (
            [rows[:, None].repeat(1, _TOKENS, 1)],
            f"{_BATCH} sequences of {_TOKENS} rows of {part.in_features} numbers",
        )
        return
    spatial, channels = part.weight.dim() - 2, part.in_channels
    for sides in dict.fromkeys((_ODD_SIDES, *_named_sizes(model), *_SIDES)):
        # One batch of images with all the values, folded into the shape.
        wanted = {1: sides[1:], 2: sides, 3: (_DEPTH, *sides)}[spatial]
        flat = border_inputs((_BATCH, channels * math.prod(wanted[:-2]), *([1, *wanted][-2:])), batches=2, dtype=dtype)
        batches = [flat[0].view(_BATCH, channels, *wanted)]
        if spatial == 2:
            batches.append(flat[1])
        yield batches, f"{_BATCH} images of {' x '.join(map(str, (channels, *wanted)))}"


def _named_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Return the sizes of images that a model names, as timm and transformers do."""
    found = []
    for owner in (getattr(model, "default_cfg", None), getattr(model, "pretrained_cfg", None)):
        size = owner.get("input_size") if isinstance(owner, Mapping) else None
        if isinstance(size, Sequence) and len(size) == 3:
            found.append((int(size[1]), int(size[2])))
    for owner in (model, getattr(model, "config", None)):
        size = getattr(owner, "image_size", None)
        if isinstance(size, int):
            found.append((size, size))
        elif isinstance(size, Sequence) and len(size) == 2:
            found.append((int(size[0]), int(size[1])))
    return found
