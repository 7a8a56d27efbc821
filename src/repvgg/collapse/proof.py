"""The proof of a rewritten forward: the module before and after, run side by side where the borders count."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repvgg.collapse.modules import has_hooks, hooks_of
from repvgg.collapse.report import NOT_RUN
from repvgg.symbolic import first_float
from repvgg.verify import Evidence, border_inputs, judging, verify

_SIZES = ((4, 5), (9, 11), (37, 43))  # the larger ones for modules that shrink the first to nothing


@dataclass(frozen=True)
class Proof:
    """What came of it.

    Attributes:
        failure: why the two are not equal, or None.
        text: how equal they are, or why they could not be run on their own.
    """

    failure: str | None
    text: str


def prove(old: nn.Module, new: nn.Module, channels: Sequence[int | None]) -> Proof:
    """Run both on small images and judge the difference, as :func:`repvgg.verify.verify` does.

    Args:
        old: the module as it was; it is left as it is.
        new: what is to take its place; likewise.
        channels: of its inputs, in order; None where the forward does not tell.
    """
    if not channels or None in channels:
        return Proof(None, f"{NOT_RUN}: the forward does not tell what its inputs are")
    sizes = [count for count in channels if count is not None]
    like = first_float(old)
    dtype = torch.float32 if like is None else like.dtype
    problem = ""
    for height, width in _SIZES:
        images = border_inputs((1, sum(sizes), height, width), batches=1, dtype=dtype)
        try:
            evidence = _judge(_OneToOne(old, sizes), _OneToOne(new, sizes), images, like)
        except Exception as error:  # a stranger's code, on images of a size that it may not be made for
            problem = problem or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        return _verdict(evidence)
    return Proof(None, f"{NOT_RUN} ({problem})")


def _verdict(evidence: Evidence) -> Proof:
    text = f"relative error {evidence.relative:.1e} in {evidence.dtype}, on images made to show the border"
    return Proof(None if evidence.passed else "; ".join(evidence.reasons), text)


def _judge(old: nn.Module, new: nn.Module, images: list[Tensor], like: Tensor | None) -> Evidence:
    """The evidence; both run on copies, those of the reference made by the judge."""
    reference = _without_hooks(copy.deepcopy(old)) if has_hooks(old) else old
    candidate = _without_hooks(copy.deepcopy(new))
    device = torch.device("cpu") if like is None else like.device
    with judging(candidate):
        return verify(reference, lambda x: candidate(x.to(device)), images)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Without hooks: what those of the user collect is not for us to add to."""
    for hooks in hooks_of(module):
        hooks.clear()
    return module


class _OneToOne(nn.Module):
    """A module as a function of one tensor that returns one: inputs are parts of it, outputs are strung together."""

    def __init__(self, module: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.module = module
        self.channels = list(channels)
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        """Return all numbers that the module returns."""
        leaves: list[Any] = tree_leaves(self.module(*torch.split(x, self.channels, 1)))
        return torch.cat([leaf.flatten() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()])
