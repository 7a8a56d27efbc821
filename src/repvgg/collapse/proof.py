"""Proofs: what was replaced is run before and after, side by side, where the borders count.

A region is judged on its own in float64: the nodes as they were, against the one module that takes their place. All
that may differ is one rounding of each weight to the dtype of the model, and that is bounded exactly. The model as a
whole is judged as it will run, in its own dtype.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repvgg.algebra import ConvMap
from repvgg.collapse.modules import has_hooks, hooks_of
from repvgg.collapse.report import NOT_RUN
from repvgg.errors import UsageError
from repvgg.symbolic import Layout, first_float
from repvgg.verify import UNIT_ROUNDOFF, Evidence, border_inputs, judging, verify

_SIZES = ((4, 5), (9, 11), (37, 43), (224, 224))  # the larger ones for modules that shrink the first to nothing
_UNSOUND = "its outputs are not the same twice, or not finite"
_FLOAT64 = 1e-11  # of the largest output: the algebra, and the region itself, in float64


@dataclass(frozen=True)
class Proof:
    """What came of it.

    Attributes:
        failure: why the two are not equal, or None.
        text: how equal they are, or why they could not be run.
        ran: whether they could.
    """

    failure: str | None
    text: str
    ran: bool = True


def prove_region(before: Callable[[Tensor], Tensor], conv: ConvMap, layout: Layout, after: nn.Module) -> Proof:
    """Judge the module ``after`` against what it replaces.

    Every weight w of it may be off by the rounding to its dtype, u·|w|; so, with W its kernel and b its bias, the
    outputs may differ by at most ``u · max(|W| * |x| + |b|)``, and by what float64 itself rounds.

    Args:
        before: the region as it was, on float64.
        conv: the map that both should be; only its geometry is looked at.
        layout: the shape of its input.
        after: the module, on the device that ``before`` runs on.
    """
    exact = copy.deepcopy(after).double()
    weight = next(exact.parameters())
    image = _image(conv, layout)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = before(image.to(weight.device))
            tolerance = _FLOAT64 + _rounding(after, exact, image) / max(float(outcome.abs().max()), 1e-300)
            evidence = verify(lambda _: outcome, exact, image, tolerance=tolerance)
    except Exception as error:  # an operation that has no float64 on this device, or a stranger's code
        return Proof(f"it cannot be run on its own in float64 ({_first_line(error)})", "", ran=False)
    return _verdict(evidence)


def _image(conv: ConvMap, layout: Layout) -> Tensor:
    """One small input on which every tap, every phase of the strides and every border counts."""
    if layout.rows:
        rows = border_inputs((4, conv.in_channels, 1, 1), batches=1, dtype=torch.float64)[0].flatten(1)
        return rows.view(*(1,) * ((layout.rank or 2) - 2), 4, conv.in_channels)
    sizes = [max(4, axis.reach + 2 * axis.stride - 2 * min(0, axis.before, axis.after)) for axis in conv.axes]
    sizes = [size + place for place, size in enumerate(sizes)]
    flat = border_inputs((1, conv.in_channels * math.prod(sizes[:-2]), *([1, *sizes][-2:])), batches=1)[0]
    return flat.double().view(1, conv.in_channels, *sizes)


def _rounding(after: nn.Module, exact: nn.Module, image: Tensor) -> float:
    """The largest that one rounding of each weight may do to an output."""
    dtype = next(after.parameters()).dtype
    if dtype is torch.float64:
        return 0.0
    sizes = copy.deepcopy(exact)
    for parameter in sizes.parameters():
        parameter.copy_(parameter.abs_().clamp_min_(torch.finfo(dtype).smallest_normal))
    return float(UNIT_ROUNDOFF[dtype] * sizes(image.abs().to(parameter.device)).max())


def prove_module(
    old: nn.Module, new: nn.Module, channels: Sequence[int | None], inputs: Sequence[Tensor] | None = None
) -> Proof:
    """Run both and judge the difference, as :func:`repvgg.verify.verify` does.

    Args:
        old: the module as it was; it is left as it is.
        new: what is to take its place; likewise.
        channels: of its inputs, in order; None where the forward does not tell. Images are made for them.
        inputs: what to run both on, in the place of such images.
    """
    like = first_float(old)
    dtype = torch.float32 if like is None else like.dtype
    if inputs is not None:
        return _run(old, new, _Given(inputs), [torch.zeros(1, 1, dtype=dtype)])
    if not channels or None in channels:
        return Proof(None, f"{NOT_RUN}: the forward does not tell what its inputs are", ran=False)
    sizes = [count for count in channels if count is not None]
    first: Proof | None = None
    for height, width in _SIZES:
        images = border_inputs((2, sum(sizes), height, width), batches=1, dtype=dtype)
        proof = _run(old, new, _Split(sizes), images)
        if proof.ran:
            return proof
        first = first or proof
    return first or Proof(None, NOT_RUN, ran=False)


def _run(old: nn.Module, new: nn.Module, arguments: Callable[[Tensor], Sequence[Tensor]], x: list[Tensor]) -> Proof:
    like = first_float(old)
    device = torch.device("cpu") if like is None else like.device
    reference = _OneToOne(_without_hooks(old), arguments, device)
    candidate = _OneToOne(_without_hooks(new), arguments, device)
    with judging(candidate), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evidence = verify(reference, lambda x: candidate(x.to(device)), x)
            sound = evidence.passed or _is_sound(reference, x)
        except Exception as error:  # a stranger's code, on images of a size that it may not be made for
            if _runs(reference, x):
                return Proof(f"the new one does not run ({_first_line(error)})", "")
            return Proof(None, f"{NOT_RUN} ({_first_line(error)})", ran=False)
    return _verdict(evidence) if sound else Proof(None, f"{NOT_RUN}: {_UNSOUND}", ran=False)


def _runs(reference: _OneToOne, x: list[Tensor]) -> bool:
    """Whether a module runs, beside a copy of its own, and gives something that can be judged."""
    try:
        own = copy.deepcopy(reference)
        verify(reference, lambda x: own(x), x)
    except Exception:
        return False
    return True


def _is_sound(reference: _OneToOne, x: list[Tensor]) -> bool:
    """Whether a module, beside itself in float64, gives the same numbers; one with random numbers does not."""
    own = copy.deepcopy(reference)
    return verify(reference, lambda x: own(x), x).passed


def _verdict(evidence: Evidence) -> Proof:
    text = f"relative error {evidence.relative:.1e} in {evidence.dtype}, on images made to show the border"
    return Proof(None if evidence.passed else "; ".join(evidence.reasons), text)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _without_hooks(module: nn.Module) -> nn.Module:
    """Without hooks: what those of the user collect is not for us to add to."""
    if not has_hooks(module):
        return module
    module = copy.deepcopy(module)
    for hooks in hooks_of(module):
        hooks.clear()
    return module


class _Split:
    """The inputs of a module as parts of one tensor."""

    def __init__(self, channels: Sequence[int]) -> None:
        self.channels = list(channels)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return torch.split(x, self.channels, 1)


class _Given:
    """Inputs that do not depend on the tensor that a judge passes; they follow its dtype."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return [value.to(x.device, x.dtype) if value.is_floating_point() else value for value in self.inputs]


class _OneToOne(nn.Module):
    """A module as a function of one tensor that returns one: outputs are strung together."""

    def __init__(
        self, module: nn.Module, arguments: Callable[[Tensor], Sequence[Tensor]], device: torch.device
    ) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments
        self.device = device
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        """Return all numbers that the module returns."""
        leaves = list(_numbers(self.module(*self.arguments(x.to(self.device)))))
        if not leaves:
            raise UsageError("it returns no floating-point tensor")
        return torch.cat(leaves)


def _numbers(outcome: Any) -> Iterator[Tensor]:
    return (leaf.flatten() for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor) and leaf.is_floating_point())
