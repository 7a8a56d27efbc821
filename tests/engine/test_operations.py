"""Every operation alone against PyTorch in float64: element-wise functions, pools, views, arithmetic, normalization."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg.engine
from repvgg.engine.frontend import read
from tests.engine.emulation import compile_for
from tests.engine.helpers import isa_params
from tests.rounding import UNIT_ROUNDOFF

CHANNELS = 20
torch.manual_seed(0)
VECTOR, MATRIX = torch.randn(CHANNELS), torch.randn(6, CHANNELS) / math.sqrt(CHANNELS)
KERNEL = torch.randn(CHANNELS, 6, 3, 2) / math.sqrt(6 * CHANNELS)
DEPTHWISE, SQUARE = torch.randn(CHANNELS, 1, 3, 3) / 3, torch.randn(CHANNELS, CHANNELS, 3, 3) / math.sqrt(9 * CHANNELS)
NORM = nn.LayerNorm(CHANNELS)
NORM.weight.data.uniform_(0.5, 1.5)
NORM.bias.data.normal_()


TRIPLE = torch.randn(3 * 60, CHANNELS) / math.sqrt(CHANNELS)
BIAS = torch.randn(5, 63, 63)
ENCODER = nn.TransformerEncoderLayer(CHANNELS, 4, 32, batch_first=True, activation="gelu").eval()


def tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def qkv(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of 5 heads of 12 channels, as most transformers compute them."""
    every = F.linear(tokens(x), TRIPLE.to(x.dtype)).reshape(len(x), -1, 3, 5, 12).permute(2, 0, 3, 1, 4)
    return every[0], every[1], every[2]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def windows(x: torch.Tensor) -> torch.Tensor:
    """Attention within windows of 3x3 pixels that are shifted by one, as in Swin."""
    y = torch.roll(x[..., :6].permute(0, 2, 3, 1), (-1, -1), (1, 2))
    y = y.view(len(x), 3, 3, 2, 3, CHANNELS).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, CHANNELS)
    q, k, v = F.linear(y, TRIPLE.to(x.dtype)).view(-1, 9, 3, 5, 12).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) + BIAS[:, :9, :9].to(x.dtype).unsqueeze(0)).softmax(-1)
    y = (weights @ v).transpose(1, 2).reshape(-1, 9, 60)
    return y.view(len(x), 3, 2, 3, 3, 60).permute(0, 1, 3, 2, 4, 5).reshape(len(x), 9, 6, 60)


def encoder(dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(ENCODER).to(dtype) if dtype is torch.float64 else ENCODER


class Function(nn.Module):
    """A function of images."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def flat(leaf) -> list:
    if isinstance(leaf, dict):
        leaf = list(leaf.values())
    return [one for each in leaf for one in flat(each)] if isinstance(leaf, (tuple, list)) else [leaf]


def check(function, *inputs: torch.Tensor, ulps: float, isa=None) -> None:
    """Compare with float64; ``ulps`` bounds the error, in units of the roundoff of the largest value in play."""
    model = Function(function)
    shapes = [tuple(x.shape) for x in inputs]
    compiled = compile_for(read(model, shapes), shapes, isa)
    with torch.no_grad():
        wanted = flat(function(*(x.double() for x in inputs)))
    found = flat(compiled(*inputs))
    assert [one.shape for one in found] == [one.shape for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        scale = max(1.0, other.abs().max().item(), *(x.abs().max().item() for x in inputs))
        torch.testing.assert_close(one.double(), other, rtol=0, atol=ulps * UNIT_ROUNDOFF * scale)


# Element-wise functions: (function, error in ulp)

POINTWISE = {
    "relu": (F.relu, 0),
    "relu6": (F.relu6, 0),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 2), 0),
    "clamp from below": (lambda x: x.clamp(min=-0.25), 0),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), 2),
    "prelu": (lambda x: F.prelu(x, VECTOR.to(x.dtype)), 2),
    "prelu of one slope": (lambda x: F.prelu(x, VECTOR[:1].to(x.dtype)), 2),
    "hardswish": (F.hardswish, 8),
    "hardsigmoid": (F.hardsigmoid, 8),
    "sigmoid": (torch.sigmoid, 8),
    "silu": (F.silu, 8),
    "gelu": (F.gelu, 8),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), 12),
    "tanh": (torch.tanh, 6),
    "elu": (lambda x: F.elu(x, 0.7), 8),
    "mobile sigmoid": (lambda x: F.relu6(x + 3) / 6, 8),
    "abs": (torch.abs, 0),
    "square": (lambda x: x**2, 4),
    "negation": (lambda x: 1.5 - x, 4),
    "division": (lambda x: 2 / (x.abs() + 1), 8),
    "roots": (lambda x: (x.abs() + 1).sqrt() + (x.abs() + 1).rsqrt(), 8),
    "cube": (lambda x: x**3, 4),
    "logarithm": (lambda x: (x.abs() + 0.01).log(), 8),
    "erf": (torch.erf, 8),
    "softplus": (F.softplus, 8),
    "softplus of a slope": (lambda x: F.softplus(x, 2.5), 8),
    "logsigmoid": (F.logsigmoid, 8),
    "mish": (F.mish, 12),
    "softsign": (F.softsign, 8),
    "selu": (F.selu, 8),
    "celu": (lambda x: F.celu(x, 0.7), 8),
    "threshold": (lambda x: F.threshold(x, 0.3, -2.0), 0),
    "in place": (lambda x: (x * 2).relu_().add_(1).mul_(3), 4),
}


@pytest.mark.parametrize("isa", isa_params())
def test_elementwise_functions(isa):
    """All of them at once, of numbers in and far out of the range where they vary."""
    x = torch.cat([torch.linspace(-8, 8, 2 * 7 * CHANNELS), torch.randn(2 * 7 * CHANNELS) * 40])
    x = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))].reshape(2, CHANNELS, 2, 7)
    shapes = [tuple(x.shape)]
    functions = {name: function for name, (function, _) in POINTWISE.items()}
    model = Function(lambda x: {name: function(x) for name, function in functions.items()})
    found = compile_for(read(model, shapes), shapes, isa)(x)
    for name, (function, ulps) in POINTWISE.items():
        wanted = function(x.double())
        # Relative to the larger of argument and result, or absolute for functions of about 1.
        bound = ulps * UNIT_ROUNDOFF * torch.maximum(wanted.abs(), x.double().abs()).clamp_min(1)
        worst = ((found[name].double() - wanted).abs() - bound).max().item()
        assert worst <= 0, (name, worst)


def test_nan_and_infinities():
    """Functions pass NaN on, and saturate at infinity as PyTorch's do."""
    x = torch.tensor([math.nan, math.inf, -math.inf, 100.0, -100.0, 0.0, -0.0, 1e-30]).reshape(1, 8, 1, 1)
    functions = [
        F.relu,
        F.relu6,
        torch.sigmoid,
        torch.tanh,
        lambda x: x.clamp(-1, 1),
        lambda x: torch.maximum(x, x * 0),
    ]
    functions += [torch.exp, F.hardsigmoid, lambda x: F.leaky_relu(x, 0.5)]
    model = Function(lambda x: [function(x) for function in functions])
    found = repvgg.engine.compile(model, x.shape, 1)(x)
    for one, function in zip(found, functions, strict=True):
        torch.testing.assert_close(one, function(x), rtol=1e-6, atol=1e-37, equal_nan=True)


# Operations on maps

UP = {"scale_factor": 2}
OPERATIONS = {
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool, ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max pool of an even window": lambda x: F.max_pool2d(x, (2, 3), (1, 2), (1, 1)),
    "max pool of -1": lambda x: F.max_pool2d(-x.abs() - 1, 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average pool without padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average pool, ceil": lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
    "average pool, padding and ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "global pool": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "global pool with axes": lambda x: F.adaptive_avg_pool2d(x, 1),
    "global max pool": lambda x: F.adaptive_max_pool2d(x, 1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "adaptive pool of columns": lambda x: F.adaptive_avg_pool2d(x, (None, 1)),
    "pool of a window of constant size": lambda x: F.avg_pool2d(x, (9, 7)),
    "mean of rows": lambda x: x.mean(2),
    "mean of channels": lambda x: x.mean(1, keepdim=True),
    "maximum of channels": lambda x: x.amax(1),
    "mean of each axis": lambda x: x.mean(3).mean(2),
    "mean of channels and rows": lambda x: x.mean((1, 2)),
    "nearest": lambda x: F.interpolate(x, **UP),
    "nearest to a size": lambda x: F.interpolate(x, (13, 20)),
    "nearest by a fraction": lambda x: F.interpolate(x, scale_factor=1.7),
    "bilinear": lambda x: F.interpolate(x, mode="bilinear", **UP),
    "bilinear with corners": lambda x: F.interpolate(x, mode="bilinear", align_corners=True, **UP),
    "bilinear to a size": lambda x: F.interpolate(x, (5, 17), mode="bilinear"),
    "bilinear to one pixel": lambda x: F.interpolate(x, (1, 1), mode="bilinear", align_corners=True),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x[:, :, :8, :6], 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 4),
    "channel shuffle by views": lambda x: x.view(len(x), 4, 5, 9, 7).transpose(1, 2).reshape(len(x), 20, 9, 7),
    "focus": lambda x: torch.cat([x[..., ::2, 1::2], x[..., ::2, :-1:2]], 1),
    "concatenation": lambda x: torch.cat([x, x[:, 3:8] * 2, x[:, :1]], 1),
    "concatenation of rows": lambda x: torch.cat([x, x[:, :, 2:4]], 2),
    "concatenation of columns": lambda x: torch.cat([x[..., 5:], x, x], -1),
    "concatenation of vectors": lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1),
    "stack": lambda x: torch.stack([x.mean(2), x.amax(2)], 2),
    "chunks": lambda x: x.chunk(3, 1),
    "split": lambda x: x.split([5, 13, 2], dim=1),
    "split evenly, some unused": lambda x: x.split(8, 1)[1:],
    "unbind": lambda x: x[:, :, :3].unbind(2),
    "slices": lambda x: (x[:, 2:-2, ::3], x[:, 5], x[..., -1], x[:, None, :4, 0]),
    "narrow": lambda x: x.narrow(1, 3, 10),
    "permutation": lambda x: (x * 2).permute(0, 2, 3, 1),
    "permutation to rows last": lambda x: (x * 2).transpose(1, 2).contiguous(),
    "flatten": lambda x: (x * 2).flatten(1),
    "flatten after a permutation": lambda x: (x * 2).permute(0, 2, 3, 1).flatten(1),
    "tokens": lambda x: (x * 2).flatten(2).transpose(1, 2),
    "five axes": lambda x: x.view(len(x), 2, 10, 9, 7).permute(0, 1, 3, 4, 2),
    "reshape across axes": lambda x: x.reshape(len(x), 18, 70),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3), value=1.5),
    "pad with channels and crop": lambda x: F.pad(x, (-1, 2, 0, -3, 2, 1)),
    "sum": lambda x: x + 2 * x,
    "difference of channels": lambda x: x.mean((2, 3), keepdim=True) - x,
    "quotient of pixels": lambda x: x / (x.amax(1, keepdim=True).abs() + 1),
    "quotient of a mean": lambda x: x.mean((2, 3), keepdim=True) / (x.abs() + 1),
    "product of rows and columns": lambda x: x.mean(2, keepdim=True) * x.mean(3, keepdim=True),
    "maximum": lambda x: torch.maximum(x, -x) + torch.minimum(x, x * 0.5),
    "alpha": lambda x: torch.sub(x, x.abs(), alpha=0.5),
    "product with a view": lambda x: x * x.mean(2).unsqueeze(2),
    "sum of tokens and maps": lambda x: (x.flatten(2) + x.view(len(x), CHANNELS, -1) * 2).view_as(x),
    "sum across orders": lambda x: x[:, :7, :7] + x[:, :7, :7].transpose(2, 3),
    "vector of constants": lambda x: x.mean((2, 3)) * VECTOR.to(x.dtype) - 1,
    "constants of channels": lambda x: VECTOR.to(x.dtype).view(1, -1, 1, 1) - x,
    "constants of columns": lambda x: x / (VECTOR[:7].to(x.dtype).abs() + 1),
    "constants of maps": lambda x: x + torch.arange(63, dtype=x.dtype).view(9, 7) / 63,
    "transposed convolution": lambda x: F.conv_transpose2d(x, KERNEL.to(x.dtype), VECTOR[:6].to(x.dtype), 2, 1, 1),
    "transposed convolution in groups": lambda x: F.conv_transpose2d(
        x, KERNEL[:, :3].to(x.dtype), None, (1, 3), (2, 0), groups=5, dilation=(2, 1)
    ),
    "transposed convolution of stride 1": lambda x: F.conv_transpose2d(x, KERNEL.to(x.dtype)),
    "depthwise": lambda x: F.conv2d(x, DEPTHWISE.to(x.dtype), VECTOR.to(x.dtype), padding=1, groups=CHANNELS).relu(),
    "depthwise, stride 2 and dilated": lambda x: F.conv2d(
        x, DEPTHWISE.to(x.dtype), None, (2, 1), (1, 2), (1, 2), CHANNELS
    ),
    "convolution by Winograd": lambda x: F.conv2d(x, SQUARE.to(x.dtype), VECTOR.to(x.dtype), padding=1).relu(),
    "convolution of stride 2": lambda x: F.conv2d(x, SQUARE.to(x.dtype), None, 2, 1),
    "linear": lambda x: F.linear(x.mean((2, 3)), MATRIX.to(x.dtype)),
    "linear of pixels": lambda x: F.linear(x.permute(0, 2, 3, 1), MATRIX.to(x.dtype)),
    "linear of tokens": lambda x: F.linear(x.flatten(2).transpose(1, 2), MATRIX.to(x.dtype)),
    "linear of columns": lambda x: F.linear(x, MATRIX[:, :7].to(x.dtype)),
    "softmax of channels": lambda x: x.softmax(1),
    "softmax of columns": lambda x: (x * 10).softmax(-1),
    "softmax of pixels": lambda x: x.flatten(2).softmax(-1),
    "softmax of vectors": lambda x: F.softmax(x.mean((2, 3)), 1),
    "layer norm": lambda x: F.layer_norm(
        x.permute(0, 2, 3, 1), (CHANNELS,), *(p.to(x.dtype) for p in NORM.parameters())
    ),
    "layer norm of columns": lambda x: F.layer_norm(x, (7,)),
    "batch norm": lambda x: F.batch_norm(
        x, VECTOR.to(x.dtype), VECTOR.to(x.dtype).abs() + 1, VECTOR.to(x.dtype) * 2, VECTOR.to(x.dtype)
    ),
    "batch norm of vectors": lambda x: F.batch_norm(x.mean((2, 3)), VECTOR.to(x.dtype), VECTOR.to(x.dtype).abs() + 1),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 4) + 1,
    "batch norm of tokens": lambda x: F.batch_norm(
        tokens(x).flatten(0, 1), VECTOR.to(x.dtype), VECTOR.to(x.dtype).abs() + 1
    ).view(len(x), 63, CHANNELS),
    "group norm": lambda x: F.group_norm(x, 4, VECTOR.to(x.dtype), VECTOR.to(x.dtype) + 1),
    "group norm of one group": lambda x: F.group_norm(x, 1),
    "group norm of tokens": lambda x: F.group_norm(x.flatten(2), 10),
    "instance norm": lambda x: F.instance_norm(x, weight=VECTOR.to(x.dtype), bias=VECTOR.to(x.dtype)),
    "instance norm in eval mode": lambda x: F.instance_norm(
        x, VECTOR.to(x.dtype), VECTOR.to(x.dtype).abs() + 1, use_input_stats=False
    ),
    "log softmax": lambda x: (F.log_softmax(x, 1), (x * 10).log_softmax(-1)),
    "normalize": lambda x: (F.normalize(x), F.normalize(x, dim=-1)),
    "norms": lambda x: (x.norm(dim=1), torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)),
    "sums": lambda x: (x.sum(1), x.sum((2, 3)), x.sum(-1, keepdim=True)),
    "extrema": lambda x: (x.amin(1), x.max(1)[0], x.min(dim=2, keepdim=True).values, x.max(x * x)),
    "reflected pixels": lambda x: F.pad(x, (2, 1, 3, 0), mode="reflect"),
    "replicated pixels": lambda x: F.pad(x, (2, 1, 11, 0), mode="replicate"),
    "circular pixels": lambda x: F.pad(x, (2, 7, 3, 0), mode="circular"),
    "circular pixels and crop": lambda x: F.pad(x, (-2, 3, 3, -3), mode="circular"),
    "roll": lambda x: torch.roll(x, (2, -3, 1), (2, 3, 1)),
    "repeat": lambda x: x[:, :3].repeat(1, 2, 1, 3) + 1,
    "convolution of tokens": lambda x: F.conv1d(x.flatten(2), TRIPLE[:6].to(x.dtype).unsqueeze(2).repeat(1, 1, 3)),
    "convolution of channels": lambda x: F.conv1d(
        x.mean((2, 3))[:, None], VECTOR[:3].view(1, 1, 3).to(x.dtype), padding=1
    ),
    # Products of matrices
    "product of maps": lambda x: (x @ x.mT, x.mT @ x, torch.matmul(x[:, :1], x.transpose(2, 3))),
    "product of tokens": lambda x: x.flatten(2) @ tokens(x),
    "product with a constant": lambda x: (x @ MATRIX[:, :7].T.to(x.dtype), MATRIX[:, :9].to(x.dtype) @ x),
    "product with functions": lambda x: F.relu(x @ x.mT * 0.5 - 1),
    "products of a batch of heads": lambda x: torch.bmm(
        x.reshape(len(x) * CHANNELS, 9, 7), x.reshape(-1, 9, 7).transpose(1, 2)
    ).view(len(x), CHANNELS, 9, 9),
    "deep product": lambda x: x.flatten(1).view(len(x), 4, 315) @ x.flatten(1).view(len(x), 315, 4),
    "attention": lambda x: attention(*qkv(x)),
    "attention by unbind": lambda x: attention(
        *F.linear(tokens(x), TRIPLE.to(x.dtype)).view(len(x), -1, 3, 5, 12).permute(2, 0, 3, 1, 4).unbind(0)
    ),
    "attention with a scale": lambda x: F.scaled_dot_product_attention(*qkv(x), scale=0.3),
    "attention with a bias": lambda x: F.scaled_dot_product_attention(*qkv(x), attn_mask=BIAS.to(x.dtype)),
    "attention with a mask": lambda x: F.scaled_dot_product_attention(*qkv(x), attn_mask=BIAS > -1),
    "attention with a bias of images": lambda x: F.scaled_dot_product_attention(
        *qkv(x), attn_mask=x.mean(1).flatten(1)[:, None, None]
    ),
    "attention of fewer heads": lambda x: F.scaled_dot_product_attention(
        qkv(x)[0][:, :4], *(one[:, :2] for one in qkv(x)[1:]), enable_gqa=True
    ),
    "attention of windows": windows,
    "class tokens": lambda x: torch.cat([VECTOR.to(x.dtype).expand(len(x), 1, -1), tokens(x)], 1),
    "constant channels": lambda x: torch.cat([x, BIAS[:2, :9, :7].to(x.dtype).expand(len(x), -1, -1, -1)], 1),
    "product and sum": lambda x: torch.addcmul(VECTOR[:7].to(x.dtype), VECTOR[7:14].to(x.dtype), x * 2, value=0.5),
    "attention of a module": lambda x: encoder(x.dtype)(tokens(x)),
    "sum of products": lambda x: (
        torch.einsum("bchw,bkhw->bck", x, x),
        torch.einsum("bchw,bcvw->bvhc", x, x * 2),
        torch.einsum("bhqd,bhkd->bhqk", *qkv(x)[:2]),
        torch.einsum("bchw,kc->bkhw", x, MATRIX.to(x.dtype)),
        torch.einsum("bchw,chk->bwk", x, VECTOR.to(x.dtype).view(20, 1, 1).expand(20, 9, 2)),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    check(OPERATIONS[name], torch.randn(3, CHANNELS, 9, 7), ulps=40)


@pytest.mark.slow
@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_each_instruction_set(name, isa):
    check(OPERATIONS[name], torch.randn(2, CHANNELS, 9, 7), ulps=40, isa=isa)


def test_several_inputs_and_outputs():
    def function(x, y):
        return {"sum": x + F.interpolate(y, scale_factor=2), "rest": [y.mean((2, 3)), (x * 2,)]}

    x, y = torch.randn(3, 5, 8, 6), torch.randn(3, 5, 4, 3)
    check(function, x, y, ulps=40)
    compiled = repvgg.engine.compile(Function(function), [x.shape, y.shape], 1)
    found = compiled(x[:2].numpy(), y[:2].numpy())
    np.testing.assert_allclose(found["rest"][1][0], 2 * x[:2].numpy())
    assert compiled(x[:0], y[:0])["rest"][0].shape == (0, 5)
    with pytest.raises(repvgg.errors.UsageError, match="takes 2 inputs, got 1"):
        compiled(x)
    with pytest.raises(repvgg.errors.UsageError, match="the same number of images"):
        compiled(x, y[:1])
