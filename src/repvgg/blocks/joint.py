"""The convolutions of all branches on one input as one function of autograd, with one gradient of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.basic import PointwiseConv2d


def is_joint(conv: nn.Conv2d) -> bool:
    """Whether :func:`joint_convs` takes a convolution: padded with zeros by a number, and without a bias."""
    simple = type(conv) in (nn.Conv2d, PointwiseConv2d) and conv.padding_mode == "zeros" and conv.bias is None
    return simple and type(conv.weight) is nn.Parameter and not isinstance(conv.padding, str)


def joint_convs(convs: Sequence[nn.Conv2d | None], x: Tensor) -> tuple[Tensor, ...]:
    """``(W_1 * x, W_2 * x, …)``, with ``x`` itself where there is no convolution.

    The function and its gradients are those of the modules, autocast included. What is spared: additions of
    feature maps into new ones, gradients of kernels that are written once in the type and layout of
    their kernel, and images of zeros around the gradients of strided 1x1 convolutions. These skip pixels first, forward
    and backward: see :class:`PointwiseConv2d`.

    Args:
        convs: each one that :func:`is_joint`, or None.
        x: the input (N, C, H, W) on the CPU.
    """
    found = [conv for conv in convs if conv is not None]
    if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32 and found:
        images = iter(_joint(found, x.to(torch.get_autocast_dtype("cpu"))))
        return tuple(x if conv is None else next(images) for conv in convs)  # autocast leaves the identity as it is
    return _joint(convs, x)


def _joint(convs: Sequence[nn.Conv2d | None], x: Tensor) -> tuple[Tensor, ...]:
    weights = [None if conv is None else conv.weight for conv in convs]
    settings = tuple(None if conv is None else _Setting.of(conv) for conv in convs)
    out: tuple[Tensor, ...] = _Joint.apply(settings, x, *weights)
    return out


@final
class _Joint(torch.autograd.Function):
    """The inputs are a setting each, x, and a kernel each; no kernel and no setting is the identity."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
        layout = _layout(x)
        kernels = [None if w is None else w.to(x.dtype, memory_format=layout) for w in weights]
        ctx.settings, ctx.terms = settings, len(weights)
        ctx.save_for_backward(x, *weights, *(None if k is w else k for k, w in zip(kernels, weights, strict=True)))
        pairs = zip(kernels, settings, strict=True)
        return tuple(x if kernel is None else _convolve(x, kernel, setting) for kernel, setting in pairs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        weights, cast = saved[: ctx.terms], saved[ctx.terms :]
        if torch.is_grad_enabled():
            return (None, *_differentiable(ctx.settings, gradients, x, weights))
        want_x, *want_w = ctx.needs_input_grad[1:]
        total = _Total(x, want_x)
        dw: list[Tensor | None] = [None] * ctx.terms
        for k in sorted(range(ctx.terms), key=lambda k: _turn(ctx.settings[k])):
            gradient, setting, weight = gradients[k], ctx.settings[k], weights[k]
            if gradient is None or weight is None:
                total.add(gradient)
                continue
            kernel = weight if cast[k] is None else cast[k]
            dx, dk = _gradients(gradient, x, kernel, setting, [want_x, want_w[k], False])
            total.add(dx, setting.skip, owned=True)
            if dk is not None:
                dw[k] = torch.empty_like(weight).copy_(dk)
        return (None, total.value, *dw)


class _Setting(NamedTuple):
    """How a convolution is called, after it has taken every ``skip``-th pixel."""

    skip: tuple[int, int]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> _Setting:
        padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
        if isinstance(conv, PointwiseConv2d):
            return cls((conv.stride[0], conv.stride[1]), (1, 1), padding, conv.dilation, conv.groups)
        return cls((1, 1), conv.stride, padding, conv.dilation, conv.groups)


@final
class _Total:
    """The gradient of the input, added up in the first tensor that is nobody else's."""

    def __init__(self, x: Tensor, wanted: bool) -> None:
        self.like = x
        self.wanted = wanted
        self.owned = False
        self.value: Tensor | None = None

    def add(self, part: Tensor | None, skip: tuple[int, int] = (1, 1), *, owned: bool = False) -> None:
        """Add a gradient of every ``skip``-th pixel."""
        if part is None or not self.wanted:
            return
        if skip != (1, 1) and not self.owned:
            self.value = torch.zeros_like(self.like) if self.value is None else self.value.clone()
            self.owned = True
        if self.value is None:
            self.value, self.owned = part, owned
        elif self.owned:
            self.value[:, :, :: skip[0], :: skip[1]].add_(part)
        else:
            self.value, self.owned = self.value + part, True


def _turn(setting: _Setting | None) -> int:
    """Which gradients are added first: whole ones that are new tensors, then those that are not, then thin ones."""
    if setting is None:
        return 1
    return 0 if setting.skip == (1, 1) else 2


def _layout(x: Tensor) -> torch.memory_format:
    rows = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if rows else torch.preserve_format


def _convolve(x: Tensor, kernel: Tensor, setting: _Setting) -> Tensor:
    skip, stride, padding, dilation, groups = setting
    out: Tensor = F.conv2d(_thin(x, skip), kernel, None, stride, padding, dilation, groups)
    return out


def _thin(x: Tensor, skip: tuple[int, int]) -> Tensor:
    return x if skip == (1, 1) else x[:, :, :: skip[0], :: skip[1]]


def _gradients(
    gradient: Tensor, x: Tensor, kernel: Tensor, setting: _Setting, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the input, as far as it is read, and of the kernel."""
    skip, stride, padding, dilation, groups = setting
    backward = torch.ops.aten.convolution_backward
    thin = _thin(x, skip)
    dx, dk, _ = backward(gradient, thin, kernel, None, stride, padding, dilation, False, (0, 0), groups, wanted)
    return dx, dk


def _differentiable(
    settings: Sequence[_Setting | None],
    gradients: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The same gradients out of PyTorch's own functions, for gradients of gradients."""
    outputs, given = [], []
    for setting, weight, gradient in zip(settings, weights, gradients, strict=True):
        if gradient is not None:
            given.append(gradient)
            if setting is None or weight is None:
                outputs.append(x.view_as(x))
            else:
                outputs.append(_convolve(x, weight.to(x.dtype), setting))
    sources = [tensor for tensor in (x, *weights) if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, sources, given, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in (x, *weights)]
