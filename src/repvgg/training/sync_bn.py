"""Batch norms over the global batch of several devices, on a CPU too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Sum(torch.autograd.Function):
    """The sum over all processes, and the same of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


@final
class SyncBatchNorm(_BatchNorm):
    """PyTorch's ``SyncBatchNorm`` for the CPU, which that one refuses.

    In training ``y = γ (x − μ) / √(σ² + ε) + β`` with μ and σ² over the images of all processes; the running variance
    takes ``σ² n / (n − 1)``, n being all pixels of all processes. On one process, and in eval mode, it is plain batch
    norm.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        """Normalize ``input`` (N, C, …)."""
        return self._together(input) if self.training and _several() else super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.ndim < 2:
            raise ValueError(f"batch norm takes (N, C, …), not {input.ndim} axes")

    def _together(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        wide = x if x.dtype == torch.float64 else x.float()
        pixels = torch.tensor(float(x.numel() // x.shape[1]), dtype=wide.dtype)
        dist.all_reduce(pixels)
        mean = _Sum.apply(wide.sum(axes)) / pixels
        centred = wide - _per_channel(mean, x)
        var = _Sum.apply(centred.square().sum(axes)) / pixels
        self._remember(mean.detach(), (var * pixels / (pixels - 1)).detach())
        y = centred * _per_channel((var + self.eps).rsqrt(), x)
        if self.affine:
            y = y * _per_channel(self.weight, x) + _per_channel(self.bias, x)
        return y.to(x.dtype)

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_(var.to(self.running_var.dtype), share)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


@contextmanager
def synchronized(model: nn.Module, wanted: bool = True, *, on_cpu: bool = True) -> Iterator[None]:
    """Let the batch norms of ``model`` take the statistics of all processes, inside; outside they are what they were.

    Parameters, buffers and names stay the same objects, so that an optimizer or a checkpoint sees no difference.

    Args:
        model: whose batch norms.
        wanted: do it at all.
        on_cpu: that is where it computes; elsewhere PyTorch's own module does it.
    """
    kind = SyncBatchNorm if on_cpu else nn.SyncBatchNorm
    swapped: dict[_BatchNorm, _BatchNorm] = {}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # one that is used twice has two names
        if wanted and isinstance(child, _BatchNorm) and not isinstance(child, (SyncBatchNorm, nn.SyncBatchNorm))
    ]
    for parent, name, child in places:
        swapped.setdefault(child, _synchronized(child, kind))
        setattr(parent, name, swapped[child])
    try:
        yield
    finally:
        for parent, name, child in places:
            _hand_over(swapped[child], child)
            setattr(parent, name, child)


def _synchronized(bn: _BatchNorm, kind: type[SyncBatchNorm] | type[nn.SyncBatchNorm]) -> _BatchNorm:
    sync = kind(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
    _hand_over(bn, sync)
    return sync


def _hand_over(old: nn.Module, new: nn.Module) -> None:
    """Give the tensors and the mode of one to the other: a move to another device has made new ones of the buffers."""
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    new.training = old.training
