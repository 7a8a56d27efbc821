"""Linear regions that span several modules are folded."""

import copy
import io

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from tests.collapse.models import Block, assert_same_outputs, check, collapse, conv, image, module, trained


class First(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.conv = conv(**kwargs)

    def forward(self, x):
        return self.conv(F.relu(x))


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.silu(self.bn(x))


class Inner(Second):
    """A norm at the module boundary, and a chain inside."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(F.relu(self.bn(x)))


class Head(nn.Module):
    """One branch of a region, and another operation."""

    pack = staticmethod(lambda a, b: (a, b))

    def __init__(self):
        super().__init__()
        self.conv, self.other = conv(), conv(kernel=1)

    def forward(self, x):
        return self.pack(self.conv(x), F.relu(self.other(x)))


class ListHead(Head):
    pack = staticmethod(lambda a, b: [a, b])


class DictHead(Head):
    pack = staticmethod(lambda a, b: {0: a, 1: b})


def chain(*parts, forward=None):
    def run(self, x):
        for part in self.layers:
            x = part(x)
        return x

    return module(forward or run, layers=nn.ModuleList(parts))


def pair():
    return module(lambda self, x: self.second(self.first(x)), first=First(), second=Second())


def of_dict():
    def forward(self, x):
        return self.layers["b"](self.layers["a"](x))

    return module(forward, layers=nn.ModuleDict({"b": Second(), "a": First()}))


def three_deep():
    for_all = module(lambda self, x: self.d(x) - 1, d=module(lambda self, x: self.d(x) + 1, d=Second()))
    return module(lambda self, x: self.d(self.c(x)), c=First(), d=for_all)


def with_keywords():
    n = module(lambda self, x, gate: F.relu(self.bn(x)) * gate, bn=nn.BatchNorm2d(4))
    return module(lambda self, x: self.n(x=self.c(x), gate=torch.sigmoid(x)), c=conv(), n=n)


def norms_left(plain):
    return [name for name, part in plain.named_modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("make", "convolutions", "norms"),
    [
        (pair, ["first.conv"], ["second.bn"]),
        (of_dict, ["layers.a.conv"], ["layers.b.bn"]),
        (three_deep, ["c.conv"], ["d.d.d.bn"]),
        (with_keywords, ["c"], ["n.bn"]),
        (lambda: chain(First(), Second(), First(), Second()), ["layers.0.conv", "layers.2.conv"], ["layers.1.bn"]),
        (lambda: nn.Sequential(pair(), pair()), ["0.first.conv", "1.first.conv"], ["0.second.bn", "1.second.bn"]),
    ],
    ids=["pair", "dict", "deep", "keywords", "list", "twice"],
)
def test_norm_folds_into_the_convolution_of_the_previous_module(make, convolutions, norms):
    model = trained(make())
    plain, report = check(model, image())
    assert [entry.name for entry in report.folded] == convolutions
    assert (report.left, norms_left(plain)) == ((), [])
    for name in norms:
        assert isinstance(plain.get_submodule(name), nn.Identity)
    kept = {name: type(part) for name, part in model.named_modules() if not isinstance(part, nn.BatchNorm2d)}
    assert kept == {name: type(part) for name, part in plain.named_modules() if not isinstance(part, nn.Identity)}
    weights = {key for key in model.state_dict() if ".bn." not in key}
    assert weights == plain.state_dict().keys()
    assert repvgg.is_plain(plain)


def test_result_of_a_cross_module_merge_can_be_copied_and_trained():
    model, x = trained(nn.Sequential(First(), Second())), image()
    plain, _ = collapse(model)
    assert_same_outputs(plain, copy.deepcopy(plain), x, tolerance=0)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    assert_same_outputs(plain, torch.load(file, weights_only=False), x, tolerance=0)
    assert_same_outputs(plain, torch.export.export(plain, (x,)).module(), x)
    single = copy.deepcopy(plain).float()
    torch.testing.assert_close(single(x.float()), model(x).float(), rtol=1e-4, atol=1e-5)
    plain.train()(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in plain.parameters())


class NormAct(nn.BatchNorm2d):
    """A norm that also runs an activation, as in timm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(y)


class NormThenAct(NormAct):
    def forward(self, x):
        return self.act(nn.BatchNorm2d.forward(self, x))


@pytest.mark.parametrize("kind", [NormAct, timm.layers.BatchNormAct2d, NormThenAct])
def test_norm_with_an_activation_keeps_the_activation(kind):
    model = trained(nn.Sequential(conv(), kind(4), conv(groups=2), kind(4)))
    plain, report = check(model, image())
    assert [entry.name for entry in report.folded] == ["0", "2"]
    assert report.left == ()
    assert type(plain[1].act) is type(model[1].act)
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def heads(kind):
    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return F.relu(a[0] + b[0]), a[1] * b[1]

    return module(forward, a=kind(), b=kind())


@pytest.mark.parametrize("kind", [Head, ListHead, DictHead])
def test_branches_joined_outside_their_modules(kind):
    inner = heads(kind)
    model = trained(module(lambda self, x: torch.stack(self.inner(self.stem(x))), stem=conv(), inner=inner))
    plain, report = check(model, image())
    assert [entry.name for entry in report.folded] == ["inner.conv"]
    assert type(plain) is type(model)
    names = ("stem", "inner.a.other", "inner.b.other", "inner.conv")
    assert plain.state_dict().keys() == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    torch.testing.assert_close(plain.inner.a.other.weight, model.inner.a.other.weight, rtol=0, atol=0)


def test_branches_joined_outside_their_modules_with_unknown_input():
    model = trained(module(lambda self, x: torch.stack(self.inner(F.relu(x))), inner=heads(Head)))
    _, report = check(model, image())
    assert [entry.name for entry in report.folded] == ["inner.conv"]


def test_branches_of_different_sources_are_not_merged():
    def ends():
        return module(lambda self, x: self.two(F.relu(self.one(x))), one=conv(), two=conv())

    model = trained(module(lambda self, x: F.relu(self.a(x) + self.b(x)), a=ends(), b=ends()))
    plain, report = check(model, image())
    assert report.folded == ()
    assert plain.state_dict().keys() == model.state_dict().keys()


class Scaled(Inner):
    def forward(self, x, scale=None):
        x = self.bn(x) if scale is None else self.bn(x) * scale
        return self.block(F.relu(x))


@pytest.mark.parametrize("arguments", [{}, {"scale": 2.0}])
def test_optional_arguments_only_prevent_merging_across_their_module(arguments):
    model = trained(module(lambda self, x: self.n(self.c(x), **arguments), c=conv(), n=Scaled()))
    plain, report = check(model, image())
    if arguments:  # without the scale, the norm and the convolution would no longer be what the caller multiplies
        assert [entry.name for entry in report.folded] == ["n.block.conv"]
        assert "pass inputs=" in report.left[0].reason
    else:  # the norm and the convolution are the same with a scale
        assert norms_left(plain) == []
        assert_same_outputs(model, plain, image())
        torch.testing.assert_close(plain.n(image(), 2.0), plain.n(image(), torch.tensor(2.0)), rtol=0, atol=0)


def test_keyword_arguments_in_another_order():
    n = module(lambda self, x, gate: self.block(F.relu(x * gate)), block=Block())
    model = module(lambda self, x: self.n(gate=torch.sigmoid(x), x=self.c(x)), c=conv(), n=n)
    plain, report = check(trained(model), image())
    assert "n.block.conv" in [entry.name for entry in report.folded]
    assert norms_left(plain) == []


class ConvNormAct(nn.Conv2d):
    """A convolution by a function, and what its forward does after it, as detectron2 has it."""

    def __init__(self, *parts, bias=True):
        super().__init__(4, 4, 3, padding=1, bias=bias)
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_that_runs_what_follows_it(bias):
    # The second region is inside of the module that keeps its forward and gets the kernel of the first.
    inner = nn.Sequential(conv(kernel=1), nn.BatchNorm2d(4))
    layers = [ConvNormAct(nn.BatchNorm2d(4), nn.ReLU(), inner, bias=bias), ConvNormAct(nn.BatchNorm2d(4), bias=bias)]
    plain, report = check(trained(nn.Sequential(*layers)), image())
    assert [entry.name for entry in report.folded] == ["0", "0.parts.2", "1"]
    assert type(plain[0]) is ConvNormAct
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
