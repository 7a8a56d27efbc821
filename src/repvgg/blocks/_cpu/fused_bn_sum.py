"""``act(Σ_k BN_k(y_k))`` in training mode as one autograd function, computed by the compiled passes."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_double, c_void_p
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks._cpu.build import build

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # as in fused_bn_sum.cpp
MAX_TERMS = 3


class _Settings(NamedTuple):
    """What the autograd function needs besides its differentiable inputs."""

    relu: bool
    channels_last: bool
    running: list[tuple[Tensor | None, Tensor | None]]  # mean and variance of each term, in the accumulation dtype
    momentum: list[float]
    eps: list[float]
    owned: tuple[bool, ...]


def fused_bn_sum(terms: Sequence[tuple[nn.BatchNorm2d, Tensor]], relu: bool, owned: Sequence[bool]) -> Tensor:
    """Compute ``act(Σ_k BN_k(y_k))`` with batch statistics in two passes over memory, and update running statistics.

    It computes the same function of the same batch norms as PyTorch, momentum and counters included. Means and
    variances are summed in a wider type, and the result is rounded once where PyTorch rounds each term.

    Args:
        terms: 1 to 3 batch norms in training mode, each with its input (N, C, H, W). All inputs are on the CPU, have
            the same shape and the same dtype out of ``DTYPE_CODES``, and more than one value per channel.
        relu: whether a ReLU follows.
        owned: which inputs are referenced by nothing else. Their memory is reused for their gradients, unless the
            graph is retained.

    Returns:
        A tensor (N, C, H, W) in the layout of the first input.
    """
    norms = [norm for norm, _ in terms]
    channels_last, inputs = _to_common_layout([image for _, image in terms])
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    running = [(_as_vector(norm.running_mean, dtype), _as_vector(norm.running_var, dtype)) for norm in norms]
    momentum = [_count_batch(norm) for norm in norms]
    gammas, betas = [norm.weight for norm in norms], [norm.bias for norm in norms]
    settings = _Settings(relu, channels_last, running, momentum, [norm.eps for norm in norms], tuple(owned))
    # Gammas and betas are separate inputs so that autograd sees which of them need gradients.
    out: Tensor = _FusedBnSum.apply(settings, *inputs, *gammas, *betas)
    for norm, updated in zip(norms, running, strict=True):
        for target, value in zip((norm.running_mean, norm.running_var), updated, strict=True):
            if target is not None and value is not None and target is not value:  # else updated in place
                target.copy_(value)
    return out


@final
class _FusedBnSum(torch.autograd.Function):
    """Inputs: the settings, then K each of y, gamma and beta; gamma and beta may be None."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *tensors: Any) -> Tensor:
        terms = len(tensors) // 3
        y, gammas, betas = tensors[:terms], tensors[terms : 2 * terms], tensors[2 * terms :]
        first = y[0]
        out = torch.empty_like(first)
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        saved = torch.empty(2 * terms, first.shape[1], dtype=dtype)  # means, then 1 / sqrt(var + eps)
        means, variances = zip(*settings.running, strict=True)
        scales = [_as_vector(gamma, dtype) for gamma in gammas]
        shifts = [_as_vector(beta, dtype) for beta in betas]
        no_gradients = [None] * (3 * terms)
        _call(
            settings.channels_last,
            settings.relu,
            [*y, *scales, *shifts, *means, *variances, *no_gradients, out, saved, None],
            (*settings.momentum, *settings.eps),
            first,
        )
        # The output, not its mask: it exists anyway, and its sign is the mask of the ReLU.
        ctx.save_for_backward(*y, *gammas, saved, out if settings.relu else None)
        ctx.channels_last, ctx.eps, ctx.owned = settings.channels_last, settings.eps, settings.owned
        ctx.beta_dtypes = [None if beta is None else beta.dtype for beta in betas]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, saved, out = ctx.saved_tensors
        terms = len(tensors) // 2
        y, gammas = tensors[:terms], tensors[terms:]
        if torch.is_grad_enabled():  # create_graph=True: gradients of gradients
            return (None, *_differentiable_backward(gradient, y, gammas, ctx.beta_dtypes, ctx.eps, out))
        needed = ctx.needs_input_grad[1:]
        first = y[0]
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        gradient = gradient.to(first.dtype).contiguous(memory_format=layout)
        # With retain_graph=True the inputs are needed again: their memory cannot take the gradients then.
        graph_is_freed = not torch._C._autograd._get_current_graph_task_keep_graph()
        dy = [
            None if not want else image.detach() if owned and graph_is_freed else torch.empty_like(image)
            for image, want, owned in zip(y, needed[:terms], ctx.owned, strict=True)
        ]
        per_channel = [first.new_empty(first.shape[1], dtype=saved.dtype) if want else None for want in needed[terms:]]
        scales = [_as_vector(gamma, saved.dtype) for gamma in gammas]
        unused = [None] * (3 * terms)
        pointers = [*y, *scales, *unused, *dy, *per_channel, out, saved, gradient]
        _call(ctx.channels_last, out is not None, pointers, (0.0,) * 2 * terms, first)
        dtypes = [*(None if gamma is None else gamma.dtype for gamma in gammas), *ctx.beta_dtypes]
        return (None, *dy, *(None if v is None else v.to(kind) for v, kind in zip(per_channel, dtypes, strict=True)))


def _call(
    channels_last: bool, relu: bool, tensors: Sequence[Tensor | None], numbers: Sequence[float], like: Tensor
) -> None:
    """Run a pass; ``fused_bn_sum.cpp`` documents the order of tensors and numbers."""
    count, channels, height, width = like.shape
    outer, inner = (count * height * width, 1) if channels_last else (count * channels, height * width)
    pointers = (c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
    status = build().function(
        DTYPE_CODES[like.dtype],
        len(numbers) // 2,
        relu,
        channels_last,
        outer,
        channels,
        inner,
        torch.get_num_threads(),
        pointers,
        (c_double * len(numbers))(*numbers),
    )
    assert status == 0, "the library has no code for this dtype or number of terms"


def _to_common_layout(inputs: Sequence[Tensor]) -> tuple[bool, list[Tensor]]:
    """Return whether the first image is stored as channels_last, and all images in that layout."""
    first = inputs[0]
    # A 1x1 image with several channels is contiguous in both formats: take it as channels_last, whose rows are longer.
    is_planar = first.is_contiguous() and (first.shape[2:].numel() > 1 or first.shape[1] == 1)
    channels_last = not is_planar and first.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return channels_last, [image.contiguous(memory_format=layout) for image in inputs]


def _as_vector(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _count_batch(norm: nn.BatchNorm2d) -> float:
    """Increment the batch counter as ``nn.BatchNorm2d`` does; return the weight of this batch in the statistics."""
    if norm.num_batches_tracked is not None and norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # cumulative average
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def _differentiable_backward(
    gradient: Tensor,
    y: Sequence[Tensor],
    gammas: Sequence[Tensor | None],
    beta_dtypes: Sequence[torch.dtype | None],
    eps: Sequence[float],
    out: Tensor | None,
) -> list[Tensor | None]:
    """Return the same gradients, computed by PyTorch's batch norm so that they can be differentiated again."""
    g = gradient if out is None else gradient * (out > 0)
    terms = zip(y, gammas, eps, strict=True)
    total = sum(F.batch_norm(image, None, None, gamma, None, True, 0.0, e) for image, gamma, e in terms)
    sources = [tensor for tensor in (*y, *gammas) if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(total, sources, g, create_graph=True) if sources else ())  # type: ignore[arg-type]
    by_source = [next(found) if t is not None and t.requires_grad else None for t in (*y, *gammas)]
    return [*by_source, *(None if dtype is None else g.sum((0, 2, 3)).to(dtype) for dtype in beta_dtypes)]
