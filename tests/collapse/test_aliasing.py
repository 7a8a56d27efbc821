"""In-place writes and views have the same effect after the collapse."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.errors import NothingFoldedWarning
from tests.collapse.models import Linear2d, assert_same_outputs, check, conv, image, module, trained


def between(self, x):
    y = self.conv(x)
    y.mul_(2)
    return self.act(self.bn(y))


def assigned(self, x):
    y = self.conv(x)
    y += 1
    return self.act(self.bn(y))


def afterwards(self, x):
    y = self.bn(self.conv(x))
    y.add_(1)
    return self.act(y)


def input_first(self, x):
    y = F.relu(x, inplace=True)
    return self.act(self.bn(self.conv(y)) + self.other(x))


def part_of_the_input(self, x):
    a, _ = x.chunk(2, 1)
    first = self.bn(self.conv(x))
    a.relu_()
    return self.act(first + self.other(x))


def part_of_the_outcome(self, x):
    y = self.bn(self.conv(x))
    part = y[:, :2]
    part.relu_()
    return self.act(y + self.other(x))


def scaled_part(self, x):
    y = self.conv(x)
    part = y[:, :2]
    part.mul_(2)
    return self.act(self.bn(y))


def perhaps_the_same(self, x):
    y = x.contiguous()
    y += self.bn(self.conv(x))
    return y + self.act(x)


def augmented(self, x):
    z = self.act(x)
    kept = z
    z += self.bn(self.conv(x))
    return z + kept


def residual(self, x):
    z = self.bn(self.conv(x))
    z += x
    return self.act(z)


def the_input(self, x):
    x.add_(1)
    return self.act(self.bn(self.conv(x)))


def counter(self, x):
    self.count.add_(0.1)
    return self.act(self.bn(self.conv(x)) + self.count)


def average(self, x):
    self.count.mul_(0.5)
    return self.act(self.bn(self.conv(x)) + self.other(x) + self.count)


CASES = {
    between: 1,
    assigned: 1,
    afterwards: 1,
    input_first: 1,
    part_of_the_input: 1,
    part_of_the_outcome: 1,
    scaled_part: 0,
    perhaps_the_same: 1,
    augmented: 1,
    residual: 1,
    the_input: 1,
    counter: 1,
    average: 1,
}


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_in_place_functions(forward):
    parts = {"conv": conv(), "bn": nn.BatchNorm2d(4), "other": conv(kernel=1), "act": nn.ReLU()}
    model = module(forward, **parts)
    model.register_buffer("count", torch.ones(4, 1, 1))
    _, report = check(trained(model), image())
    assert len(report.folded) == CASES[forward]


def test_linear_module_that_counts_its_calls_is_kept():
    model = module(average, conv=conv(), bn=nn.BatchNorm2d(4), other=conv(kernel=1), act=nn.Identity())
    model.register_buffer("count", torch.ones(4, 1, 1))
    outer = trained(nn.Sequential(model, nn.ReLU()))
    plain, _ = check(outer, image())
    torch.testing.assert_close(plain[0].count, outer[0].count, rtol=1e-12, atol=0)
    assert plain[0].count.unique().tolist() == [0.5**4]


def writes(self, x):
    x += 1
    return x.sigmoid()


def test_submodule_that_modifies_its_input_between_two_branches():
    def forward(self, x):
        x = F.relu(x)
        a = self.a(x)
        gate = self.gate(x)
        return (a + self.b(x)) * gate

    model = module(forward, gate=module(writes), a=Linear2d(), b=conv(kernel=1))
    _, report = check(trained(model), image())
    assert [entry.name for entry in report.folded] == ["a"]


def test_block_still_modifies_its_input():
    """Like blocks that start with an in-place ReLU."""

    def forward(self, x):
        out = self.relu(x)
        out = self.bn(self.conv(out))
        out += x
        return out

    block = module(forward, relu=nn.ReLU(inplace=True), conv=conv(), bn=nn.BatchNorm2d(4))
    model = module(lambda self, x: self.block(x) * 1 + x, block=block)
    _, report = check(trained(model), image())
    assert len(report.folded) == 1


def subtract(y, a, b):
    b -= a


def add_method(y, a, b):
    b.add_(a, alpha=2)


def assign(y, a, b):
    y[:, 2:] = a


def copy_from(y, a, b):
    b.copy_(a)


def out_of(y, a, b):
    torch.sub(b, a, out=b)


@pytest.mark.parametrize("write", [subtract, add_method, assign, copy_from, out_of], ids=lambda write: write.__name__)
@pytest.mark.parametrize("pieces", ["slices", "split"])
@pytest.mark.parametrize("read", ["both", "sum", "whole"])
def test_writes_between_parts_of_one_output(write, pieces, read):
    """Views share their version, so that what is read looks as if it was written to."""

    def forward(self, x):
        y = self.conv(x)
        a, b = (y[:, :2], y[:, 2:]) if pieces == "slices" else y.split([2, 2], 1)
        write(y, a, b)
        return F.relu(self.first(a) + self.second(b) if read == "both" else a + b if read == "sum" else y)

    model = trained(module(forward, conv=conv(), first=conv(2, 3, 1), second=conv(2, 3, 1)))
    with warnings.catch_warnings(action="ignore", category=NothingFoldedWarning):
        plain, _ = repvgg.reparameterize(model, prove=False)
    assert_same_outputs(model, plain, image())
