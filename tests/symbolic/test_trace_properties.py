"""The traced convolution equals the module: over geometry, dtype, memory format and odd sizes."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg import equivalent_conv, trace
from repvgg.blocks import BranchSum, ConvBN, PointwiseConv2d, rep_conv

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set batch norms as after training: means, variances, scales and shifts far from 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            n = part.num_features
            part.running_mean.copy_(torch.randn(n, generator=g))
            part.running_var.copy_(torch.rand(n, generator=g) * 3 + 0.1)
            if part.affine:
                part.weight.data.copy_(torch.randn(n, generator=g) + 0.5)
                part.bias.data.copy_(torch.randn(n, generator=g))
    return module.eval()


def relative(y, wanted):
    return float((y - wanted).detach().abs().max() / wanted.detach().abs().max())


def images(channels, dtype=torch.float64, sizes=((13, 17), (16, 11))):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, channels, *size, generator=g, dtype=torch.float64).to(dtype) + 1 for size in sizes]


def branched(groups, stride, dilation, mode):
    """Return a 3x3, a 1x1 and, if shapes allow it, an identity branch in the given geometry."""
    three = nn.Conv2d(8, 8, 3, stride, dilation, dilation, groups, bias=False, padding_mode=mode)
    one = nn.Conv2d(8, 8, 1, stride, groups=groups, bias=False)
    branches = {"three": ConvBN(three), "one": ConvBN(one)}
    if stride == 1:
        branches["identity"] = nn.BatchNorm2d(8)
    return trained(BranchSum(branches))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_geometry(groups, stride, dilation, mode):
    block = branched(groups, stride, dilation, mode).double()
    conv = trace(block)
    assert (conv.groups, conv.stride, conv.dilation) == (groups, (stride, stride), (dilation, dilation))
    for x in images(8):
        assert_close(conv(x), block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (1, 2)])
def test_dtype_and_layout(dtype, layout, groups, stride):
    """The weights are cast once: their error is that of one rounding, not of arithmetic in the dtype."""
    block = trained(rep_conv(8, 8, stride, groups)).to(dtype).to(memory_format=layout)
    exact = trace(block.double().to(torch.float64))
    block = block.to(dtype)
    weight, bias = equivalent_conv(block)
    assert weight.dtype == bias.dtype == dtype
    assert_close(weight, trace(block).weight.to(dtype), rtol=0, atol=0)
    info = torch.finfo(dtype)
    assert_close(weight.double(), exact.weight, rtol=info.eps / 2, atol=info.smallest_normal * info.eps)
    for x in images(8, dtype):
        y = nn.functional.conv2d(x, weight, bias, stride, 1, 1, groups)
        assert relative(y.double(), exact(x.double())) <= TOLERANCE[dtype]


class Everything(nn.Module):
    """Nearly every function that has a handler, in one forward."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(4, 6, (2, 3), padding="same")
        self.pool = nn.AvgPool2d(3, 1)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 3.0, 0.1, 1.0]).view(6, 1, 1))
        self.mix = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x):
        y = self.norm(self.mix(self.same(x) * self.scale)) / 2
        y += 1.5
        y -= self.scale
        z = torch.cat([x[:, 1:3], -x, x.contiguous()], dim=1).narrow(1, 2, 6)
        z = z - 0.5 * self.same(self.drop(x))
        first, second = (3 - self.scale.mean() * y + z).split((2, 4), 1)
        y = torch.cat((second, first.clone()), 1).sub(z, alpha=2)
        y = torch.cat((y[..., 1:-1, 1:-1], self.pool(self.same(x)[:, ::2])), 1)
        return y[..., ::2, 1:-2]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_every_handler():
    torch.manual_seed(0)
    module = trained(Everything()).double()
    conv = trace(module)
    for x in images(4):
        assert_close(conv(x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
def test_average_pool_and_padding_modules(stride, padding):
    pool = nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.AvgPool2d((2, 3), stride, padding), nn.BatchNorm2d(4))
    pool = trained(pool).double()
    for x in images(4):
        assert_close(trace(pool)(x), pool(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pointwise_conv_is_the_strided_one(groups, stride):
    ours = PointwiseConv2d(8, 4, stride, groups).double()
    theirs = nn.Conv2d(8, 4, 1, stride, groups=groups).double()
    theirs.load_state_dict(ours.state_dict())
    for x in images(8):
        x.requires_grad_()
        assert_close(ours(x), theirs(x), rtol=1e-13, atol=1e-13)
        assert_close(trace(ours)(x), theirs(x), rtol=1e-13, atol=1e-13)
        (grad,) = torch.autograd.grad(ours(x).pow(2).sum(), x)
        (wanted,) = torch.autograd.grad(theirs(x).pow(2).sum(), x)
        assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
