"""A sum of batch norms and a ReLU as one function of autograd, computed by the compiled passes."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_double, c_void_p
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.native import build

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
MOST_TERMS = 3


def norm_sum(terms: Sequence[tuple[nn.BatchNorm2d, Tensor]], relu: bool, own: Sequence[bool]) -> Tensor:
    """``act(Σ_k BN_k(y_k))`` with the statistics of the batch, in two passes over memory; running statistics move.

    The same function of the same batch norms as PyTorch's, momentum and counters included; means and variances are
    summed in a wider type, and the outcome is rounded once where PyTorch rounds each term.

    Args:
        terms: 1 to 3 batch norms in training mode, each with its input (N, C, H, W); all inputs of one shape and of one
            dtype out of ``TYPES``, on the CPU, with more than one number a channel.
        relu: whether a ReLU follows.
        own: which inputs nobody else has: their memory takes their gradients, unless the graph is retained.

    Returns:
        A tensor (N, C, H, W) in the layout of the first input.
    """
    norms = [norm for norm, _ in terms]
    rows, inputs = _one_layout([image for _, image in terms])
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    running = [_running(norm, wide) for norm in norms]
    momentum = [_count(norm) for norm in norms]
    gammas, betas = [norm.weight for norm in norms], [norm.bias for norm in norms]
    setting = (relu, rows, running, momentum, [norm.eps for norm in norms], tuple(own))
    out: Tensor = _NormSum.apply(setting, *inputs, *gammas, *betas)
    for norm, (mean, variance) in zip(norms, running, strict=True):
        _keep(norm.running_mean, mean)
        _keep(norm.running_var, variance)
    return out


@final
class _NormSum(torch.autograd.Function):
    """The inputs are the setting, then K each of y, gamma and beta; gamma and beta may be None."""

    @staticmethod
    def forward(ctx: Any, setting: tuple[Any, ...], *tensors: Any) -> Tensor:
        relu, rows, running, momentum, eps, own = setting
        terms = len(tensors) // 3
        y, gammas, betas = tensors[:terms], tensors[terms : 2 * terms], tensors[2 * terms :]
        first = y[0]
        out = torch.empty_like(first)
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        saved = torch.empty(2 * terms, first.shape[1], dtype=wide)
        means, variances = zip(*running, strict=True)
        scales = [_wide(gamma, wide) for gamma in gammas]
        shifts = [_wide(beta, wide) for beta in betas]
        nothing = [None] * (3 * terms)
        _call(
            rows, relu, [*y, *scales, *shifts, *means, *variances, *nothing, out, saved, None], (*momentum, *eps), first
        )
        ctx.save_for_backward(*y, *gammas, saved, out if relu else None)
        ctx.rows, ctx.eps, ctx.own = rows, eps, own
        ctx.betas = [None if beta is None else beta.dtype for beta in betas]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, saved, out = ctx.saved_tensors
        terms = len(tensors) // 2
        y, gammas = tensors[:terms], tensors[terms:]
        if torch.is_grad_enabled():
            return (None, *_differentiable(gradient, y, gammas, ctx.betas, ctx.eps, out))
        needed = ctx.needs_input_grad[1:]
        first = y[0]
        layout = torch.channels_last if ctx.rows else torch.contiguous_format
        gradient = gradient.to(first.dtype).contiguous(memory_format=layout)
        spent = not torch._C._autograd._get_current_graph_task_keep_graph()
        dy = [
            None if not want else image.detach() if own and spent else torch.empty_like(image)
            for image, want, own in zip(y, needed[:terms], ctx.own, strict=True)
        ]
        small = [first.new_empty(first.shape[1], dtype=saved.dtype) if want else None for want in needed[terms:]]
        scales = [_wide(gamma, saved.dtype) for gamma in gammas]
        nothing = [None] * (3 * terms)
        _call(
            ctx.rows,
            out is not None,
            [*y, *scales, *nothing, *dy, *small, out, saved, gradient],
            (0.0,) * 2 * terms,
            first,
        )
        kinds = [*(None if gamma is None else gamma.dtype for gamma in gammas), *ctx.betas]
        return (None, *dy, *(None if v is None else v.to(kind) for v, kind in zip(small, kinds, strict=True)))


def _call(rows: bool, relu: bool, tensors: Sequence[Tensor | None], numbers: Sequence[float], like: Tensor) -> None:
    """Run a pass; the order of tensors and numbers stands in ``normsum.cpp``."""
    count, channels, height, width = like.shape
    outer, inner = (count * height * width, 1) if rows else (count * channels, height * width)
    pointers = (c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
    terms = len(numbers) // 2
    status = build().function(
        TYPES[like.dtype],
        terms,
        relu,
        rows,
        outer,
        channels,
        inner,
        torch.get_num_threads(),
        pointers,
        (c_double * len(numbers))(*numbers),
    )
    assert status == 0, "there is no code for these terms"


def _one_layout(inputs: Sequence[Tensor]) -> tuple[bool, list[Tensor]]:
    """Whether the images are stored as rows (channels_last), and all of them stored like that."""
    first = inputs[0]
    planes = first.is_contiguous() and (first.shape[2:].numel() > 1 or first.shape[1] == 1)
    layout = torch.contiguous_format if planes or not _is_rows(first) else torch.channels_last
    return layout == torch.channels_last, [image.contiguous(memory_format=layout) for image in inputs]


def _is_rows(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last)


def _running(norm: nn.BatchNorm2d, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics, or wide copies of them."""
    return _wide(norm.running_mean, wide), _wide(norm.running_var, wide)


def _keep(kept: Tensor | None, moved: Tensor | None) -> None:
    """Write a wide copy back, if it is one."""
    if kept is not None and moved is not None and kept is not moved:
        kept.copy_(moved)


def _wide(tensor: Tensor | None, wide: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(wide).contiguous()


def _count(norm: nn.BatchNorm2d) -> float:
    """Count the batch, as ``nn.BatchNorm2d`` does; the share of it in the running statistics."""
    if norm.num_batches_tracked is not None and norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def _differentiable(
    gradient: Tensor,
    y: Sequence[Tensor],
    gammas: Sequence[Tensor | None],
    betas: Sequence[torch.dtype | None],
    eps: Sequence[float],
    out: Tensor | None,
) -> list[Tensor | None]:
    """The same gradients by PyTorch's own batch norm, for gradients of gradients."""
    g = gradient if out is None else gradient * (out > 0)
    terms = zip(y, gammas, eps, strict=True)
    total = sum(F.batch_norm(image, None, None, gamma, None, True, 0.0, e) for image, gamma, e in terms)
    sources = [tensor for tensor in (*y, *gammas) if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(total, sources, g, create_graph=True) if sources else ())  # type: ignore[arg-type]
    through = [next(found) if t is not None and t.requires_grad else None for t in (*y, *gammas)]
    return [*through, *(None if dtype is None else g.sum((0, 2, 3)).to(dtype) for dtype in betas)]
