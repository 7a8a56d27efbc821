"""The convolutions of all branches as one autograd function with a single gradient of their common input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.geometry import PointwiseConv2d


def is_supported(conv: nn.Conv2d) -> bool:
    """Return whether :func:`joint_convs` supports a convolution: zero padding given as numbers, and no bias."""
    simple = type(conv) in (nn.Conv2d, PointwiseConv2d) and conv.padding_mode == "zeros" and conv.bias is None
    # A parametrized weight (weight_norm) is a plain tensor that is computed at each access.
    return simple and type(conv.weight) is nn.Parameter and not isinstance(conv.padding, str)


def joint_convs(convs: Sequence[nn.Conv2d | None], x: Tensor) -> tuple[Tensor, ...]:
    """Compute ``(W_1 * x, W_2 * x, …)``, with ``x`` itself where an entry is None.

    The results and gradients are those of the modules, autocast included. It saves three kinds of memory traffic: the
    gradients of the input are accumulated in place instead of into new feature maps, each kernel gradient is written
    once in the dtype and layout of its kernel, and the gradient of a strided 1x1 convolution is added at the pixels
    that were read instead of being embedded in an image of zeros.

    Args:
        convs: convolutions for which :func:`is_supported` holds, or None for the identity.
        x: the input (N, C, H, W) on the CPU.
    """
    present = [conv for conv in convs if conv is not None]
    if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32 and present:
        # Autocast rounds the inputs of convolutions only: the identity stays in float32.
        images = iter(_apply(present, x.to(torch.get_autocast_dtype("cpu"))))
        return tuple(x if conv is None else next(images) for conv in convs)
    return _apply(convs, x)


def _apply(convs: Sequence[nn.Conv2d | None], x: Tensor) -> tuple[Tensor, ...]:
    weights = [None if conv is None else conv.weight for conv in convs]
    settings = tuple(None if conv is None else _ConvSettings.of(conv) for conv in convs)
    out: tuple[Tensor, ...] = _JointConv.apply(settings, x, *weights)
    return out


class _ConvSettings(NamedTuple):
    """The arguments of a convolution that reads every ``subsampling``-th pixel of the input."""

    subsampling: tuple[int, int]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> _ConvSettings:
        padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
        if isinstance(conv, PointwiseConv2d):
            return cls((conv.stride[0], conv.stride[1]), (1, 1), padding, conv.dilation, conv.groups)
        return cls((1, 1), conv.stride, padding, conv.dilation, conv.groups)


@final
class _JointConv(torch.autograd.Function):
    """Inputs: the settings of all branches, x, and one kernel per branch; the identity has neither."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
        # Convert kernels here, once: a convolution would convert a kernel in another layout than its input's itself.
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if is_channels_last else torch.preserve_format
        kernels = [None if w is None else w.to(x.dtype, memory_format=layout) for w in weights]
        ctx.settings, ctx.terms = settings, len(weights)
        # Save a converted kernel only if the conversion made a copy; otherwise it is the weight itself.
        ctx.save_for_backward(x, *weights, *(None if k is w else k for k, w in zip(kernels, weights, strict=True)))
        pairs = zip(kernels, settings, strict=True)
        return tuple(x if kernel is None else _convolve(x, kernel, setting) for kernel, setting in pairs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        weights, converted = saved[: ctx.terms], saved[ctx.terms :]
        if torch.is_grad_enabled():  # create_graph=True: gradients of gradients
            return (None, *_differentiable_backward(ctx.settings, gradients, x, weights))
        want_x, *want_w = ctx.needs_input_grad[1:]
        total = _InputGradient(x, want_x)
        dw: list[Tensor | None] = [None] * ctx.terms
        for k in sorted(range(ctx.terms), key=lambda k: _accumulation_order(ctx.settings[k])):
            gradient, setting, weight = gradients[k], ctx.settings[k], weights[k]
            if gradient is None or weight is None:
                total.add(gradient)
                continue
            kernel = weight if converted[k] is None else converted[k]
            subsampling, stride, padding, dilation, groups = setting
            dx, dk, _ = torch.ops.aten.convolution_backward(
                gradient,
                _subsample(x, subsampling),
                kernel,
                None,
                stride,
                padding,
                dilation,
                False,
                (0, 0),
                groups,
                [want_x, want_w[k], False],
            )
            total.add(dx, subsampling, owned=True)
            if dk is not None:
                # One write converts both dtype and layout to those of the weight, as .grad needs.
                dw[k] = torch.empty_like(weight).copy_(dk)
        return (None, total.value, *dw)


@final
class _InputGradient:
    """The gradient of the input, accumulated in place in the first tensor that nothing else references."""

    def __init__(self, x: Tensor, wanted: bool) -> None:
        self.like = x
        self.wanted = wanted
        self.owned = False
        self.value: Tensor | None = None

    def add(self, part: Tensor | None, subsampling: tuple[int, int] = (1, 1), *, owned: bool = False) -> None:
        """Add the gradient of every ``subsampling``-th pixel; ``owned`` says that ``part`` may be overwritten."""
        if part is None or not self.wanted:
            return
        if subsampling != (1, 1) and not self.owned:
            self.value = torch.zeros_like(self.like) if self.value is None else self.value.clone()
            self.owned = True
        if self.value is None:
            self.value, self.owned = part, owned
        elif self.owned:
            self.value[:, :, :: subsampling[0], :: subsampling[1]].add_(part)
        else:
            # Out of place: the incoming gradient of the identity may be shared with other functions.
            self.value, self.owned = self.value + part, True


def _accumulation_order(setting: _ConvSettings | None) -> int:
    """Order branches so that no zeros are filled in: full-size owned gradients, then the identity, then subsampled."""
    if setting is None:
        return 1
    return 0 if setting.subsampling == (1, 1) else 2


def _convolve(x: Tensor, kernel: Tensor, setting: _ConvSettings) -> Tensor:
    subsampling, stride, padding, dilation, groups = setting
    out: Tensor = F.conv2d(_subsample(x, subsampling), kernel, None, stride, padding, dilation, groups)
    return out


def _subsample(x: Tensor, steps: tuple[int, int]) -> Tensor:
    return x if steps == (1, 1) else x[:, :, :: steps[0], :: steps[1]]


def _differentiable_backward(
    settings: Sequence[_ConvSettings | None],
    gradients: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the same gradients, computed by PyTorch's functions so that they can be differentiated again."""
    outputs, given = [], []
    for setting, weight, gradient in zip(settings, weights, gradients, strict=True):
        if gradient is not None:
            given.append(gradient)
            if setting is None or weight is None:
                outputs.append(x.view_as(x))  # a new node: autograd.grad rejects an output that is an input
            else:
                outputs.append(_convolve(x, weight.to(x.dtype), setting))
    sources = [tensor for tensor in (x, *weights) if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, sources, given, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in (x, *weights)]
