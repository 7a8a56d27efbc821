"""Public methods and properties: they keep their meaning in the plain model, or are refused in one sentence."""

import copy
import pickle
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.errors import UsageError
from tests.collapse.models import assert_same_outputs, conv, image, trained


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = conv(), conv(kernel=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.a(x) + self.b(x)))


class RunByForward(Branches):
    def encode(self, x):
        return self.a(x) + self.b(x)

    def forward(self, x):
        return F.relu(self.bn(self.encode(x)))


class All(Branches):
    def encode(self, x):
        return self.bn(self.a(x) + self.b(x))


class Part(Branches):
    def encode(self, x):
        return self.a(x)


class ByAnotherMethod(Part):
    def encode(self, x):
        return self._encode(x)

    def _encode(self, x):
        return self.a(x)


class ByAnotherName(Branches):
    def encode(self, x):
        model = self
        return model.a(x) + model.b(x)


class ByText(Branches):
    def encode(self, x):
        return getattr(self, "a")(x)  # noqa: B009 - as users write it


class ByChildren(Branches):
    def encode(self, x):
        return next(iter(self.children()))(x)


class Weights(Branches):
    def encode(self, x):
        return self.a.weight.norm()


class OfForward(Branches):
    def encode(self, x):
        return 2 * self(x)

    def size(self):
        return sum(parameter.numel() for parameter in self.parameters())


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv(kernel=1)

    def forward(self, x):
        return self.a(x) + self.b(x)


class OfABody(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.bn = Body(), nn.BatchNorm2d(4)

    def encode(self, x):
        return self.body(x)

    def forward(self, x):
        return F.relu(self.bn(self.body(x)))


class InABody(OfABody):
    def encode(self, x):
        return self.body.a(x)


class WholeBody(OfABody):
    """The region is inside of the body, so that a call of the body is what it was."""

    def forward(self, x):
        return self.bn(F.relu(self.body(x)))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), Body(), nn.BatchNorm2d(4), nn.ReLU())

    def encode(self, x):
        for layer in self.layers[:4]:
            x = layer(x)
        return x

    def forward(self, x):
        return self.layers(x)


class OneLayer(Layers):
    def encode(self, x):
        return self.layers[0](x)


class WholeLayers(Layers):
    def encode(self, x):
        return self.layers(x)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(4)

    def encode(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class ChainRunByForward(Chain):
    def forward(self, x):
        return F.relu(self.encode(x))


class PartOfAChainRunByForward(Chain):
    """A forward that calls the method leaves the norm; with inputs, it gets a new forward that does not call it."""

    def encode(self, x):
        return self.conv(x)

    def forward(self, x):
        return F.relu(self.bn(self.encode(x)))


class Blocks(nn.Module):
    """The regions are inside of the blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Chain(), Branches()])

    def encode(self, x):
        return torch.cat([x := block(x) for block in self.blocks])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


REFUSED = [RunByForward, All, Part, ByAnotherMethod, ByAnotherName, ByText, ByChildren, Weights]
REFUSED += [OfABody, InABody, Layers, OneLayer, PartOfAChainRunByForward]
KEPT = [OfForward, WholeBody, WholeLayers, Chain, ChainRunByForward, Blocks]


STAY = [RunByForward, Part, ByAnotherMethod, OfABody, PartOfAChainRunByForward]  # without inputs


@pytest.mark.filterwarnings("ignore::repvgg.errors.NothingFoldedWarning")
@pytest.mark.parametrize("inputs", [None, image()], ids=["made up", "given"])
@pytest.mark.parametrize("kind", REFUSED + KEPT, ids=lambda kind: kind.__name__)
def test_methods_keep_their_meaning_or_are_refused(kind, inputs):
    model = trained(kind())
    plain, report = repvgg.reparameterize(model, inputs)
    assert_same_outputs(model, plain, image())
    assert report.folded or kind in STAY
    is_refused = any("encode()" in guard.reason for guard in report.guards)
    assert is_refused == (kind in REFUSED) or (inputs is None and kind in STAY)
    for one in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        if is_refused:
            with pytest.raises(UsageError, match=rf"{kind.__name__}\.encode\(\), which uses"):
                one.encode(image())
        else:
            torch.testing.assert_close(one.encode(image()), model.encode(image()))


class Inner(nn.Module):
    """A part that has the name of a part of its own, as in RepViT."""

    def __init__(self):
        super().__init__()
        self.body, self.other, self.bn = conv(), conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.body(x) + self.other(x)))


class SameNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Inner()

    def encode(self, x):
        return self.body(x)

    def forward(self, x):
        return self.encode(x)


def test_a_method_that_a_forward_which_stays_calls_is_kept():
    model = trained(SameNames())
    plain, report = repvgg.reparameterize(model, image())
    assert len(report.folded) == 1
    assert not report.left
    torch.testing.assert_close(plain.encode(image()), model.encode(image()))


def test_methods_that_use_no_part_are_kept():
    plain, _ = repvgg.reparameterize(trained(OfForward()))
    assert plain.size() == sum(parameter.numel() for parameter in plain.parameters())


class Properties(Branches):
    @property
    def kernel(self):
        return self.a.weight

    @property
    def channels(self):
        return self.b.out_channels

    @cached_property
    def norm(self):
        return float(self.a.weight.detach().norm())

    def __getitem__(self, place):
        return [self.a, self.b][place]

    @property
    def size(self):
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def doubled(self):
        return self._factor * 2

    @doubled.setter
    def doubled(self, value):
        self._factor = value / 2

    _factor = 1.0


class PropertiesOfAChain(Chain):
    @property
    def kernel(self):
        return self.conv.weight

    @property
    def channels(self):
        return self.conv.out_channels

    @property
    def dtype(self):
        return self.conv.weight.dtype

    def forward(self, x):
        return F.relu(self.bn(self.conv(x.to(self.dtype))))


@pytest.mark.parametrize("inputs", [None, image()], ids=["made up", "given"])
def test_properties_keep_their_meaning_or_are_refused(inputs):
    model = trained(Properties())
    plain, report = repvgg.reparameterize(model, inputs)
    assert report.folded
    assert isinstance(plain, Properties)
    refused = {"kernel", "channels", "norm", "__getitem__()"}
    texts = [guard.reason for guard in report.guards]
    assert all(any(f"Properties.{name}, which uses" in text for text in texts) for name in refused)
    for one in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert_same_outputs(model, one, image())
        for name in ("kernel", "channels", "norm"):
            with pytest.raises(UsageError, match=rf"no Properties\.{name}, which uses"):
                getattr(one, name)
            assert not hasattr(one, name)
        with pytest.raises(UsageError, match="__getitem__"):
            one[0]
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            one.nothing  # noqa: B018
        one.doubled = 6.0
        assert one.doubled == 6.0
        assert one.size == sum(parameter.numel() for parameter in one.parameters())


def test_a_cached_property_that_was_read_is_kept():
    model = trained(Properties())
    norm = model.norm
    plain, _ = repvgg.reparameterize(model)
    assert plain.norm == norm


@pytest.mark.parametrize("inputs", [None, image()], ids=["made up", "given"])
def test_properties_that_describe_a_part_are_kept(inputs):
    model = trained(PropertiesOfAChain())
    plain, report = repvgg.reparameterize(model, inputs)
    assert report.folded
    assert_same_outputs(model, plain, image())
    assert (plain.channels, plain.dtype) == (model.channels, model.dtype)
    with pytest.raises(UsageError, match=r"PropertiesOfAChain\.kernel"):
        plain.kernel  # noqa: B018


def test_refused_properties_survive_a_second_collapse():
    plain, _ = repvgg.reparameterize(trained(Properties()))
    with pytest.warns(repvgg.errors.NothingFoldedWarning):
        again, _ = repvgg.reparameterize(plain)
    with pytest.raises(UsageError, match=r"Properties\.kernel"):
        again.kernel  # noqa: B018
