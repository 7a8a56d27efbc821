"""Constants and numbers in a forward: batch norms by hand, in any dtype, and numbers of any class."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from repvgg import trace
from repvgg.errors import NotLinearError
from repvgg.symbolic import IMAGES

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Whole(int):
    """An integer, as a recorder passes it."""


class Real(float):
    """A real number, as a recorder passes it."""


class Parts(nn.Module):
    def __init__(self, forward):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.weight, self.bias = (nn.Parameter(torch.randn(4, generator=g)) for _ in range(2))
        self.mean, self.var = (nn.Buffer(torch.rand(4, generator=g) + 0.5) for _ in range(2))
        self.kernel, self.point = nn.Parameter(torch.randn(4, 4, 3, 3, generator=g)), nn.Parameter(torch.randn(4, 4))
        self.combine = forward

    def forward(self, x):
        return self.combine(self, x)


def norm_by_reshape(m, x):
    weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in (m.weight, m.bias, m.mean, m.var))
    scale = weight * (var + 1e-5).rsqrt()
    return m.conv(x) * scale + (bias - mean * scale)


def norm_by_division(m, x):
    y = (m.conv(x) - m.mean[None, :, None, None]) / torch.sqrt(m.var + 1e-5)[None, :, None, None]
    return torch.addcmul(m.bias.view(4, 1, 1), y, m.weight.view(4, 1, 1))


def norm_of_rows(m, x):
    return ((m.conv(x).permute(0, 2, 3, 1) - m.mean) / m.var.sqrt() * m.weight + m.bias).permute(0, 3, 1, 2)


def in_place(m, x):
    y = m.conv(x)
    y.sub_(m.mean.view(4, 1, 1)).neg_().addcmul_(m.weight.view(4, 1, 1), m.bias.view(4, 1, 1), value=2)
    return torch.divide(torch.multiply(torch.subtract(y, x), 2), 3).negative()


# Constants of the default dtype meet weights, and the symbol, in float64.
def eye_as_kernel(m, x):
    return F.conv2d(x, torch.mm(m.point, torch.eye(4)).view(4, 4, 1, 1), torch.ones(4))


def merged_kernels(m, x):
    return F.conv2d(x, F.conv2d(m.kernel, torch.eye(4).view(4, 4, 1, 1) * 2), padding=1)


def einsum_kernel(m, x):
    return F.conv2d(x, torch.einsum("oihw,oc->cihw", m.kernel, torch.ones(4, 4)), padding=1)


def assigned_kernel(m, x):
    kernel = torch.zeros(4, 4, 3, 3, dtype=m.kernel.dtype)
    for i in range(4):
        kernel[i, i] = m.kernel[i, 0]
    return F.conv2d(x, kernel, padding=1)


def blur(m, x):
    return F.conv2d(F.pad(x, [1] * 4), torch.ones(4, 1, 3, 3) / 8, groups=4)


def scales(m, x):
    return m.conv(x) * torch.ones(1, 4, 1, 1) * torch.arange(4).view(1, -1, 1, 1) + torch.arange(4.0).view(4, 1, 1)


def norm_of_constants(m, x):
    return F.batch_norm(m.conv(x), torch.zeros(4), torch.ones(4), torch.full((4,), 0.5), torch.tensor([0.0, 1, 2, 3]))


def matrices(m, x):
    y = m.conv(x).permute(0, 2, 3, 1) @ torch.eye(4) + m.bias
    y = torch.matmul(y, m.point)
    return F.linear(y, torch.ones(4, 4) / 2).permute(0, 3, 1, 2)


def new_constants(m, x):
    return (m.conv(x) * x.new_ones(1, 4, 1, 1) + x.new_tensor(2.0)).to(m.weight.dtype).type_as(x)


FORWARDS = [
    *(norm_by_reshape, norm_by_division, norm_of_rows, in_place),
    *(eye_as_kernel, merged_kernels, einsum_kernel, assigned_kernel, blur, scales, norm_of_constants, matrices),
    new_constants,
]


@pytest.mark.parametrize("forward", FORWARDS)
def test_constants_and_norms_by_hand(forward):
    module = Parts(forward).eval()
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(x)
    conv = trace(module, 4, IMAGES)
    assert_close(conv(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


def test_frozen_norm_of_torchvision():
    ops = pytest.importorskip("torchvision.ops")
    norm = ops.FrozenBatchNorm2d(4)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm).double().eval()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert_close(trace(block)(x), block(x), **EXACT)


@pytest.mark.parametrize(
    "new",
    [
        *(lambda x: 0 + x, lambda x: x + 0.0, lambda x: False + x, lambda x: x - 0, lambda x: x * 1, lambda x: x / 1),
        *(lambda x: sum([x]), lambda x: sum([x, 0 * x]), lambda x: torch.add(torch.tensor(0.0), x), torch.clone),
        *(lambda x: torch.add(0 * x, x), lambda x: Whole(0) + x, lambda x: x * Real(1.0), lambda x: x.neg().neg()),
    ],
)
def test_a_new_tensor_may_be_modified(new):
    def forward(m, x):
        y = new(x)
        y += m.conv(x)
        return y

    module, x = Parts(forward).double().eval(), torch.randn(1, 4, 6, 5, dtype=torch.float64)
    assert_close(trace(module, 4, IMAGES)(x), module(x.clone()), **EXACT)


@pytest.mark.parametrize("same", [lambda x: +x, lambda x: x.contiguous(), lambda x: F.dropout(x, training=False)])
def test_the_input_itself_may_not(same):
    def forward(m, x):
        y = same(x)
        y += m.conv(x)
        return y

    with pytest.raises(NotLinearError, match="modified in place"):
        trace(Parts(forward).eval(), 4, IMAGES)


one, two = Whole(1), Whole(2)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.conv2d(x, m.kernel, m.bias, one, one, one, one),
        lambda m, x: F.conv2d(x, m.kernel, None, (two, one), [one, two], dilation=two),
        lambda m, x: F.avg_pool2d(F.pad(x, [one] * 4), two, one),
        lambda m, x: torch.cat(m.conv(x).split(two, one), one),
        lambda m, x: torch.cat(m.conv(x).split([one, Whole(3)], dim=one), dim=one),
        lambda m, x: torch.cat(m.conv(x).chunk(two, one)[::-1], -Whole(3)),
        lambda m, x: m.conv(x)[:, one : Whole(3), ::two].narrow(one, Whole(0), two),
        lambda m, x: torch.add(m.conv(x) * two, x, alpha=Real(0.5)) / two - one,
        lambda m, x: m.conv(x).flatten(two).unflatten(two, x.shape[2:]),
        lambda m, x: F.dropout(m.conv(x), Real(0.5), training=False),
    ],
)
def test_numbers_of_other_classes(forward):
    module, x = Parts(forward).double().eval(), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert_close(trace(module, 4, IMAGES)(x), module(x), **EXACT)
