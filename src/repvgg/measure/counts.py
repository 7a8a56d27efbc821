"""Parameters, multiply-adds and Winograd multiplications of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from repvgg.errors import UsageError
from repvgg.measure.walk import walk


@dataclass(frozen=True)
class Counts:
    """What a model holds, and what it does for one image.

    Attributes:
        params: values in its parameters, shared ones once; buffers (the statistics of a batch norm) are none.
        macs: multiply-adds of convolutions and matrix products; the paper prints them as FLOPs, in 10⁹.
        winograd_muls: multiplications where stride-1 3x3 convolutions take 4/9 of them (paper §4.1, "Wino MULs").
        unknown: names of ops without a rule; if there are any, ``macs`` and ``winograd_muls`` are lower bounds.
    """

    params: int
    macs: int
    winograd_muls: int
    unknown: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON knows them."""
        return {**asdict(self), "unknown": list(self.unknown)}

    def __str__(self) -> str:
        counted = f"{self.params:,} parameters, {self.macs / 1e9:.3f} GMACs, {self.winograd_muls / 1e9:.3f} Wino GMULs"
        return f"{counted} (not counted: {', '.join(self.unknown)})" if self.unknown else counted


def count(model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)) -> Counts:
    """Count ``model`` in eval mode, for one image.

    A train form and its plain form are equal functions with different counts: the paper's tables show the plain form.

    Args:
        model: takes one tensor. On the meta device nothing is computed and no memory is used; elsewhere it runs once,
            where it is and in its own dtype. It is not changed.
        input_shape: (N, …) of its input. Whatever N is, the model runs on one image.

    Raises:
        UsageError: the shape has no axis beside N, or a size below 1.

    Limits: see :func:`repvgg.measure.walk`.
    """
    if len(input_shape) < 2 or min(input_shape) < 1:
        raise UsageError(f"An input has the shape (N, …) with each size at least 1, not {tuple(input_shape)}.")
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros((1, *input_shape[1:]), dtype=first.dtype, device=first.device)
    done = walk(model, image)
    params = sum(parameter.numel() for parameter in model.parameters())
    return Counts(params, done.macs, done.winograd_muls, done.unknown)
