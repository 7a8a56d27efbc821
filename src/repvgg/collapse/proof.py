"""Prove that a replacement is equal to the original, by running both on inputs that exercise the borders.

A region is checked on its own in float64: the original nodes against the one module that replaces them. Only the
rounding of each weight to the dtype of the model may differ, and its effect is bounded exactly. The model as a whole is
checked as it will run, in its own dtype. The code around a replacement is checked by tracing it again: it must not
branch on what it calls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repvgg._calls import Call, Inputs, bind
from repvgg.algebra import ConvMap
from repvgg.collapse.modules import hooks_of, is_torch_utility
from repvgg.errors import UsageError, typed_line
from repvgg.symbolic import Layout, algebra_device, first_float
from repvgg.verify import UNIT_ROUNDOFF, border_inputs, isolated_eval
from repvgg.verify.comparison import FLOORS, Comparison, tolerance_for
from repvgg.verify.execution import name_of, structural_copy
from repvgg.verify.float64 import Float64Mode
from repvgg.verify.inputs import make_up_inputs
from repvgg.verify.outputs import largest

# The first size that runs is used, at the end the recorded one: some networks reduce a small image to no pixels.
_IMAGE_SIZES = ((4, 5), (9, 11), (37, 43), None)
_DEPTH = 6  # of synthetic volumes
_NOT_RUN = "not run on its own"
_CHAOTIC = 1e-2  # relative; above it a comparison says nothing
_CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FLOAT64_TOLERANCE = 1e-11  # relative to the largest output: rounding of the algebra and of the region itself


@dataclass(frozen=True)
class Proof:
    """The result of a comparison.

    Attributes:
        failure: why the two are not equal, or None.
        text: how equal they are, or why they could not be run.
        ran: whether they could be run.
    """

    failure: str | None
    text: str
    ran: bool = True


NOT_PROVEN = Proof(None, "", ran=False)


def prove_region(before: Callable[[Tensor], Tensor], image: Tensor, after: nn.Module) -> Proof:
    """Compare ``after`` with ``before``, the region that it replaces, on a float64 ``image``.

    Each weight w of it may be off by the rounding to its dtype, u·|w|; with kernel W and bias b, outputs may therefore
    differ by at most ``u · max(|W| * |x| + |b|)``, and by the rounding of float64 itself.
    """
    weight = next(after.parameters())
    device = algebra_device(weight)
    try:
        with torch.no_grad():
            expected = before(image).to(device)
            del before  # and its float64 weights
            # Not every device has float64.
            found = run_in_float64(after if device == weight.device else copy.deepcopy(after).to(device), image)
            if expected.shape != found.shape:
                return Proof(f"the shape {tuple(found.shape)} is not {tuple(expected.shape)}", "")
            change, scale = found.sub_(expected), largest(expected)
            difference, allowed = largest(change), _FLOAT64_TOLERANCE * scale
            if difference > allowed:  # of a float32 model: always, but by much less than the bound
                # The bound of the channel that differs most is no larger than that of all, and cheaper.
                one = _channel_of(after, change)
                own = 0.0 if one is None else _rounding_bound(one, image)
                allowed += own if difference <= allowed + own else _rounding_bound(after, image)
    except Exception as error:  # an operation without float64 on this device, or user code
        return Proof(f"it cannot be run on its own in float64 ({typed_line(error)})", "", ran=False)
    text = f"relative error {difference / max(scale, 1e-300):.1e} in float64, on border-exposing images"
    if math.isfinite(scale) and math.isfinite(difference) and difference <= allowed:
        return Proof(None, text)
    return Proof(f"{text}, where rounding the weights explains {allowed / max(scale, 1e-300):.1e}", text)


def run_in_float64(module: nn.Module, image: Tensor) -> Tensor:
    """Return ``module(image)`` in float64; its weights are not copied."""
    weight = next(module.parameters())
    with Float64Mode(weight.dtype):
        out: Tensor = module(image.to(weight.device))
    return out


def _channel_of(conv: nn.Module, change: Tensor) -> nn.Module | None:
    """Return the output channel of a convolution at which ``change`` is largest, None if there are groups."""
    weight: Any = conv._parameters.get("weight")
    if type(conv) not in _CONVOLUTIONS or getattr(conv, "groups", 1) > 1 or not math.isfinite(largest(change)):
        return None
    by_channel = change.abs().movedim(1 - weight.dim(), 0).flatten(1).amax(1)
    place = int(by_channel.argmax())
    own = {
        name: parameter if parameter is None else nn.Parameter(parameter[place : place + 1].detach().clone(), False)
        for name, parameter in conv._parameters.items()
    }
    channel = copy.copy(conv)
    channel.__dict__ = {**vars(conv), "_parameters": own}  # copy.copy shares the dictionary of parameters
    return channel


def _rounding_bound(after: nn.Module, image: Tensor) -> float:
    """A little less than ``u · max(|W| * |x| + |b|)``, computed in the dtype of the weights."""
    dtype = next(after.parameters()).dtype
    if dtype is torch.float64:
        return 0.0
    smallest = torch.finfo(dtype).smallest_normal  # below it the rounding error no longer shrinks with the weight
    absolute = copy.deepcopy(after)
    for weight in absolute.parameters():  # of submodules too: a chain holds its convolution in one
        weight.abs_().clamp_min_(smallest)
    x = image.abs().to(next(after.parameters()).device)
    total = run_in_float64(absolute, x) if dtype is not torch.float32 else absolute(x.float())
    # All terms are positive, so that even products in bfloat16 are right to 0.4 %.
    return 0.99 * UNIT_ROUNDOFF[dtype] * largest(total)


def image_for(conv: ConvMap, layout: Layout, shape: Sequence[int] | None = None) -> Tensor:
    """Return one small input on which every tap, every phase of the strides and every border counts.

    With ``shape``, it has that shape, as code that reshapes to numbers requires it.
    """
    if shape is None and layout.rows:
        shape = (*(1,) * ((layout.rank or 2) - 2), 4, conv.in_channels)
    if shape is None:
        sizes = [max(4, axis.reach + 2 * axis.stride - 2 * min(0, axis.before, axis.after)) for axis in conv.axes]
        # Different sizes, so that swapped axes show.
        shape = (1, conv.in_channels, *(size + place for place, size in enumerate(sizes)))
    return _border_tensor(shape, layout.spatial)


def _border_tensor(shape: Sequence[int], spatial: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a tensor of images as those of :func:`repvgg.verify.border_inputs`; the last axes are spatial."""
    if 0 in shape:  # an empty cache of keys, for example
        return torch.zeros(tuple(shape), dtype=dtype)
    height, width = [1, 1, *shape[max(0, len(shape) - max(spatial, 1)) :]][-2:]
    count = math.prod(shape) // (height * width)
    return border_inputs((1, count, height, width), batches=1, dtype=dtype)[0].view(*shape)


def image_for_transposed(transposed: nn.Module) -> Tensor:
    """Return one small input of a transposed convolution."""
    weight: Any = transposed.weight
    return _border_tensor((1, len(weight), *(4 + place for place in range(weight.dim() - 2))), weight.dim() - 2)


def prove_module(
    old: nn.Module, new: nn.Module, inputs: Inputs | Call | None, crop: tuple[Call, str] | None = None
) -> Proof:
    """Run both modules and compare all tensors that they return, as :func:`repvgg.verify.verify` does.

    Args:
        old: the original; it is left untouched.
        new: its replacement; it is left untouched.
        inputs: how it is called; None if that is not known. Tensors without values are made up, of the smallest sizes
            on which the original runs.
        crop: a call with parts of the images in ``inputs``, and their size in words, to use if both run on it.
    """
    if crop is not None:
        proof = _compare(old, new, crop[0], f"on {crop[1]} pixels of the given inputs")
        if proof.ran:
            return proof
    if inputs is None:
        try:
            made_up = make_up_inputs(_without_hooks(old) or old)
        except UsageError:
            return Proof(None, f"{_NOT_RUN}: the forward does not determine its inputs", ran=False)
        return _compare(old, new, made_up.calls[0], f"on inputs that were made up, {made_up.text}")
    call = bind(old, inputs)
    if not any(tensor.is_meta for tensor in call.tensors()):
        return _compare(old, new, call, "on the given inputs")
    first: Proof | None = None
    zeros = any(tensor.is_meta and _is_integer(tensor) for tensor in call.tensors())
    where = "on border-exposing images" + ", integers being 0" * zeros
    for sizes in _IMAGE_SIZES:
        proof = _compare(old, new, call.map_tensors(partial(_made_up, sizes=sizes)), where)
        if proof.ran:
            return proof
        first = first or proof
    return first or Proof(None, _NOT_RUN, ran=False)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _made_up(like: Tensor, sizes: tuple[int, int] | None) -> Tensor:
    """Return a tensor like one without values, of other spatial sizes if there may be any."""
    if not like.is_meta:
        return like
    if like.dtype is torch.bool:
        return (torch.arange(like.numel()) % 2 == 0).view(like.shape)
    if _is_integer(like):
        return torch.zeros(like.shape, dtype=like.dtype)  # it may be an index, of which 0 is valid
    shape, spatial = tuple(like.shape), max(0, like.dim() - 2)
    if sizes is not None and spatial:
        shape = (*shape[:2], *(_DEPTH,) * (spatial - 2), *sizes[-spatial:])
    if like.is_complex():
        real, imaginary = _border_tensor((2, *shape), spatial, like.real.dtype)
        return torch.complex(real, imaginary)
    return _border_tensor(shape, spatial, like.dtype)


def _dtype_of(module: nn.Module) -> torch.dtype:
    like = first_float(module)
    return torch.float32 if like is None else like.dtype


def _compare(old: nn.Module, new: nn.Module, call: Call, where: str) -> Proof:
    # Copies that share the parameters: neither what a forward stores nor the test images reach the models. The
    # comparison makes one of the reference.
    reference, candidate = old if not _has_hooks(old) else _without_hooks(old), _without_hooks(new)
    if reference is None or candidate is None:
        return Proof(None, f"{_NOT_RUN}: it has hooks and cannot be copied", ran=False)
    comparison = Comparison(reference, candidate, [call], dtype=_dtype_of(old), same_infinities=True)
    with isolated_eval(*comparison.models):
        try:
            _ = comparison.exact
        except Exception as error:  # user code, on images of a size that it may not accept
            return Proof(None, f"{_NOT_RUN} ({_cause(error)})", ran=False)
        try:
            _ = comparison.actual
        except Exception as error:
            return Proof(f"the new one does not run ({_cause(error)})", "")
        return _conclude(comparison, where)


def _conclude(comparison: Comparison, where: str) -> Proof:
    """Compare the outputs; what does not pass may be explained by rounding, or by outputs that vary."""
    problems, errors = comparison.problems(), comparison.errors()
    worst = max(error.relative for error in errors.values())
    text = f"relative error {worst:.1e} in {name_of(comparison.dtype)}, {where}"
    failing = {name for name, error in errors.items() if error.relative > FLOORS[comparison.dtype]}
    if not failing and not problems:
        return Proof(None, text)
    # Only now, as most models need no second run.
    own = comparison.own_errors()
    allowed = {name: tolerance_for(comparison.dtype, error.relative)[0] for name, error in own.items()}
    failing = {name for name in failing if name not in own or errors[name].relative > allowed[name]}
    if not failing and not problems:
        return Proof(None, text)
    if comparison.varies():
        return Proof(None, f"{_NOT_RUN}: its outputs vary between runs, or are not finite", ran=False)
    change = comparison.sensitivity()
    if any(change[name].relative > _CHAOTIC for name in failing or change):
        most = max(change[name].relative for name in failing or change)
        return Proof(None, f"{_NOT_RUN}: rounding its input changes its output by {most:.1e}", ran=False)
    if not problems and all(errors[name].relative <= change[name].relative for name in failing):
        return Proof(None, f"{text}: no more than rounding of its input explains")
    name = max(failing, key=lambda name: errors[name].relative, default="")
    reason = f"the relative error of {name} is {errors[name].relative:.1e}, more than rounding explains" if name else ""
    return Proof("; ".join(filter(None, (*problems, reason))), text)


def _cause(error: Exception) -> str:
    """Return what the user's code raised, in a line."""
    return typed_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)


def _has_hooks(module: nn.Module) -> bool:
    return any(not is_torch_utility(hook) for hooks in hooks_of(module) for hook in hooks.values())


def _without_hooks(module: nn.Module) -> nn.Module | None:
    # What the user's hooks collect must not contain our test images.
    copied = structural_copy(module)
    if copied is not module:
        for hooks in list(hooks_of(copied)):
            for key in [key for key, hook in hooks.items() if not is_torch_utility(hook)]:
                del hooks[key]
        return copied
    return None if _has_hooks(copied) else copied
