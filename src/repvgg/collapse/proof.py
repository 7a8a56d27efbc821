"""Prove that a replacement is equal to the original, by running both on inputs that exercise the borders.

A region is checked on its own in float64: the original nodes against the one module that replaces them. Only the
rounding of each weight to the dtype of the model may differ, and its effect is bounded exactly. The model as a whole is
checked as it will run, in its own dtype. The code around a replacement is checked by tracing it again: it must not
branch on what it calls.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repvgg.algebra import ConvMap
from repvgg.collapse.modules import has_hooks, hooks_of
from repvgg.errors import UsageError, typed_line
from repvgg.symbolic import InputSpec, Layout, algebra_device, first_float
from repvgg.verify import UNIT_ROUNDOFF, Evidence, border_inputs, isolated_eval, verify

# The first size that runs is used: some networks reduce a small image to no pixels.
_IMAGE_SIZES = ((4, 5), (9, 11), (37, 43), (224, 224))
_DEPTH = 6  # of synthetic volumes
_NOT_RUN = "not run on its own"
# Rounding happens in each layer and not only at the input, so a sensitive network is allowed this many times the
# difference that rounding its input makes.
_SENSITIVITY_FACTOR = 64.0
_CHAOTIC = 1e-2  # relative; above it a comparison says nothing
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
    exact = copy.deepcopy(after)
    exact = exact.to(algebra_device(first_float(exact))).double()  # not every device has float64
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = before(image)
            bound = _rounding_bound(after, exact, image)
            tolerance = _FLOAT64_TOLERANCE + bound / max(float(expected.abs().max()), 1e-300)
            evidence = verify(lambda _: expected, exact, image, tolerance=tolerance)
    except Exception as error:  # an operation without float64 on this device, or user code
        return Proof(f"it cannot be run on its own in float64 ({typed_line(error)})", "", ran=False)
    return _proof_of(evidence)


def _rounding_bound(after: nn.Module, exact: nn.Module, image: Tensor) -> float:
    """``u · max(|W| * |x| + |b|)`` in absolute terms."""
    dtype = next(after.parameters()).dtype
    if dtype is torch.float64:
        return 0.0
    absolute = copy.deepcopy(exact)
    for parameter in absolute.parameters():
        # Below the smallest normal number the rounding error no longer shrinks with the weight.
        parameter.copy_(parameter.abs_().clamp_min_(torch.finfo(dtype).smallest_normal))
    return float(UNIT_ROUNDOFF[dtype] * absolute(image.abs().to(parameter.device)).max())


def image_for(conv: ConvMap, layout: Layout, shape: Sequence[int] | None = None) -> Tensor:
    """Return one small input on which every tap, every phase of the strides and every border counts.

    With ``shape``, it has that shape, as code that reshapes to numbers requires it.
    """
    if shape is not None:
        flat = border_inputs((1, 1, math.prod(shape[:-1]), shape[-1]), batches=1, dtype=torch.float64)[0]
        return flat.view(*shape)
    if layout.rows:
        rows = border_inputs((4, conv.in_channels, 1, 1), batches=1, dtype=torch.float64)[0].flatten(1)
        return rows.view(*(1,) * ((layout.rank or 2) - 2), 4, conv.in_channels)
    sizes = [max(4, axis.reach + 2 * axis.stride - 2 * min(0, axis.before, axis.after)) for axis in conv.axes]
    sizes = [size + place for place, size in enumerate(sizes)]  # different sizes, so that swapped axes show
    flat = border_inputs((1, conv.in_channels * math.prod(sizes[:-2]), *([1, *sizes][-2:])), batches=1)[0]
    return flat.double().view(1, conv.in_channels, *sizes)


def image_for_transposed(transposed: nn.Module) -> Tensor:
    """Return one small input of a transposed convolution."""
    weight: Any = transposed.weight
    sizes = [4 + place for place in range(weight.dim() - 2)]
    return image_for(ConvMap.identity(len(weight), spatial=len(sizes)), Layout(weight.dim())).reshape(1, -1, *sizes)


def prove_module(
    old: nn.Module, new: nn.Module, specs: Sequence[InputSpec | None], inputs: Sequence[Tensor] | None = None
) -> Proof:
    """Run both modules and compare their outputs as :func:`repvgg.verify.verify` does.

    Args:
        old: the original; it is left untouched.
        new: its replacement; it is left untouched.
        specs: channels and layout of the inputs, in order, None where unknown; they determine synthetic inputs.
        inputs: inputs to use instead.
    """
    like = first_float(old)
    dtype = torch.float32 if like is None else like.dtype
    if inputs is not None:
        return _compare(old, new, _given_inputs(inputs), [torch.ones(1, 1, dtype=dtype)])
    known = [spec for spec in specs if spec is not None and spec.layout.rank is not None]
    if not known or len(known) < len(specs):
        return Proof(None, f"{_NOT_RUN}: the forward does not determine its inputs", ran=False)
    # One batch of images serves all inputs: each gets some of the channels.
    widths = [spec.channels * (_DEPTH if spec.layout.rank == 5 else 1) for spec in known]

    def split(x: Tensor) -> list[Tensor]:
        parts = torch.split(x, widths, 1)
        return [_to_layout(part, spec.layout) for part, spec in zip(parts, known, strict=True)]

    first: Proof | None = None
    for height, width in _IMAGE_SIZES:
        proof = _compare(old, new, split, border_inputs((2, sum(widths), height, width), batches=1, dtype=dtype))
        if proof.ran:
            return proof
        first = first or proof
    return first or Proof(None, _NOT_RUN, ran=False)


def _compare(old: nn.Module, new: nn.Module, arguments: Callable[[Tensor], Sequence[Tensor]], x: list[Tensor]) -> Proof:
    like = first_float(old)
    device = torch.device("cpu") if like is None else like.device
    reference = _SingleTensorModule(_without_hooks(old), arguments, device)
    candidate = _SingleTensorModule(_without_hooks(new), arguments, device)
    with isolated_eval(candidate), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evidence = verify(reference, lambda x: candidate(x.to(device)), x)
            return _proof_of(evidence) if evidence.passed else _excuse_sensitivity(evidence, reference, x)
        except Exception as error:  # user code, on images of a size that it may not accept
            if _self_consistency(reference, x) is not None:
                return Proof(f"the new one does not run ({typed_line(error)})", "")
            return Proof(None, f"{_NOT_RUN} ({typed_line(error)})", ran=False)


def _excuse_sensitivity(evidence: Evidence, reference: _SingleTensorModule, x: list[Tensor]) -> Proof:
    """Check whether two modules differ by no more than rounding its input changes the output of the original."""
    own = _self_consistency(reference, x)
    if own is None or not own.passed:
        return Proof(None, f"{_NOT_RUN}: its outputs vary between runs, or are not finite", ran=False)
    perturbed = _self_consistency(reference, x, 1 + 2 * UNIT_ROUNDOFF[x[0].dtype])
    allowed = 0.0 if perturbed is None else _SENSITIVITY_FACTOR * perturbed.relative
    if allowed > _CHAOTIC:
        change = f"rounding its input changes its output by {perturbed and perturbed.relative:.1e}"
        return Proof(None, f"{_NOT_RUN}: {change}", ran=False)
    if evidence.relative <= allowed and not evidence.problems:
        return Proof(None, f"{_proof_of(evidence).text}: no more than rounding of its input explains")
    return _proof_of(evidence)


def _self_consistency(reference: _SingleTensorModule, x: list[Tensor], factor: float = 1.0) -> Evidence | None:
    """Compare a module with its own copy, whose input is multiplied by ``factor``; None if it does not run."""
    try:
        own = copy.deepcopy(reference)
        return verify(reference, lambda x: own(x * factor if x.is_floating_point() else x), x)
    except Exception:
        return None


def _proof_of(evidence: Evidence) -> Proof:
    text = f"relative error {evidence.relative:.1e} in {evidence.dtype}, on border-exposing images"
    return Proof(None if evidence.passed else "; ".join(evidence.reasons), text)


def _without_hooks(module: nn.Module) -> nn.Module:
    # What the user's hooks collect must not contain our test images.
    if not has_hooks(module):
        return module
    module = copy.deepcopy(module)
    for hooks in hooks_of(module):
        hooks.clear()
    return module


def _to_layout(x_NCHW: Tensor, layout: Layout) -> Tensor:
    if layout.rank == 5 and not layout.rows:
        return x_NCHW.reshape(len(x_NCHW), -1, _DEPTH, *x_NCHW.shape[2:])
    if layout.rank == 2:
        return x_NCHW[:, :, 0, 0]
    x = x_NCHW.flatten(2) if layout.rank == 3 else x_NCHW
    return x.movedim(1, -1) if layout.rows else x


def _given_inputs(inputs: Sequence[Tensor]) -> Callable[[Tensor], list[Tensor]]:
    # ``verify`` passes a tensor of ones, which sets the dtype of the user's inputs and scales them.
    return lambda x: [
        value.to(x.device, x.dtype) * x[0, 0] if value.is_floating_point() else value.clone() for value in inputs
    ]


class _SingleTensorModule(nn.Module):
    """A module as a function from one tensor to one: inputs are made from it, outputs are concatenated."""

    def __init__(
        self, module: nn.Module, arguments: Callable[[Tensor], Sequence[Tensor]], device: torch.device
    ) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments
        self.device = device
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        """Return all numbers that the module returns, as one vector."""
        leaves = tree_leaves(self.module(*self.arguments(x.to(self.device))))
        numbers = [leaf.flatten() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not numbers:
            raise UsageError("it returns no floating-point tensor")
        return torch.cat(numbers)
