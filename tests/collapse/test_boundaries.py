"""Module boundaries that regions may not cross, and code inside a region."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from tests.collapse.models import Block, Linear2d, check, conv, image, module, trained
from tests.collapse.test_across_modules import First, Head, Inner, Second, chain, norms_left, pair


def called_twice():
    return module(lambda self, x: self.n(self.b(F.relu(self.n(self.a(x))))), a=conv(), b=conv(), n=Inner())


def convolution_called_twice():
    return module(lambda self, x: self.n(self.a(x)) + self.a(F.relu(x)), a=conv(), n=Inner())


def hooked():
    model = module(lambda self, x: self.n(self.a(x)), a=conv(), n=Inner())
    model.n.register_forward_hook(lambda *_: None)
    return model


def held_and_called():
    model = module(lambda self, x: self.n(self.a(x)) + self.o(x), a=conv(), n=Inner())
    model.o = module(lambda self, x: F.relu(self.held(x)), held=model.n)
    return model


def held_by_another_module():
    model = module(lambda self, x: self.n(self.a(x)) + self.o(x), a=conv(), n=Inner())
    model.o = module(lambda self, x: F.relu(x), held=model.n)
    return model


def stored_by_the_convolutions_module():
    def forward(self, x):
        self.stored = self.conv(x)
        return self.stored

    return module(lambda self, x: self.n(self.k(x)), k=module(forward, conv=conv()), n=Inner())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (called_twice, "it is used more than once"),
        (convolution_called_twice, "it is used more than once"),
        (hooked, "it has hooks"),
        (held_and_called, "it is used more than once"),
        (held_by_another_module, "is used more than once"),
        (stored_by_the_convolutions_module, "its output is stored in an attribute of k"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_closed_modules_are_folded_inside_and_not_across_their_boundary(make, reason):
    plain, report = check(trained(make()), image())
    assert [entry.name for entry in report.folded] == ["n.block.conv"]
    assert norms_left(plain) == ["n.bn"]
    assert [entry.name for entry in report.left] == ["n.bn"]
    assert any(text in report.left[0].reason for text in reason.split("|"))


@pytest.mark.parametrize("make", [called_twice, hooked])
def test_closed_boundary_is_named(make):
    _, report = check(trained(make()), image())
    assert "used more than once" in report.left[0].reason or "hooks" in report.left[0].reason


@pytest.mark.parametrize("padding", [0, 1])
def test_norm_folds_into_the_convolution_of_the_next_module(padding):
    first = module(lambda self, x: self.bn(F.relu(x)), bn=nn.BatchNorm2d(4))
    second = module(lambda self, x: F.relu(self.conv(x)), conv=conv(padding=padding))
    plain, report = check(trained(nn.Sequential(first, second)), image())
    if padding:
        assert report.folded == ()
        assert "it cannot be folded into '1.conv': a bias in front of" in report.left[0].reason
    else:
        assert [entry.name for entry in report.folded] == ["1.conv"]
        assert isinstance(plain[0].bn, nn.Identity)


def untraceable(forward):
    return lambda self, x: x if x.sum() > 1e9 else forward(self, x)


def test_children_of_a_forward_that_cannot_be_traced():
    model = module(
        untraceable(lambda self, x: self.n(self.c(self.b(self.a(x))))), a=pair(), b=Block(), c=conv(), n=Second()
    )
    _, report = check(trained(model), image())
    assert [entry.name for entry in report.folded] == ["a.first.conv", "b.conv", "c"]
    assert report.left == ()


class Chain(nn.Sequential):
    pass


def called(self, x):
    return x if x.sum() > 1e9 else F.relu(self.block(x))


def iterated(self, x):
    if x.sum() < 1e9:
        for part in self.block:
            x = part(x)
    return F.relu(x)


def indexed(self, x):
    return x if x.sum() > 1e9 else F.relu(self.block[1](self.block[0](x)))


def called_and_indexed(self, x):
    return x if x.sum() > 1e9 else self.block(x) + F.relu(self.block[0](x))


@pytest.mark.parametrize("kind", [Chain, nn.Sequential])
@pytest.mark.parametrize("forward", [called, iterated, indexed, called_and_indexed])
def test_sequence_in_a_forward_that_branches_on_values(kind, forward):
    block = kind(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))
    plain, report = check(trained(module(forward, block=block)), image())
    folded = {called: ["block.0", "block.3"], iterated: ["block.0", "block.3"]}
    folded |= {indexed: ["block.0"], called_and_indexed: ["block.3"]}
    assert [entry.name for entry in report.folded] == folded[forward]
    assert type(plain.block) is kind


def reads_metadata(self, x):
    torch._assert(x.ndim == 4, f"an image has four dimensions, not {x.ndim}")
    torch._assert(x.dim() == 4, "as above")
    return F.relu(self.bn(x)).to(x.dtype).to(x.device)


def test_reading_invariant_metadata_does_not_prevent_merging():
    model = nn.Sequential(conv(), module(reads_metadata, bn=nn.BatchNorm2d(4)))
    plain, report = check(trained(model), image())
    assert [entry.name for entry in report.folded] == ["0"]
    assert isinstance(plain[1].bn, nn.Identity)
    with pytest.raises(AssertionError):
        plain(image()[0])


def test_branching_on_the_rank_does_not_prevent_merging():
    def forward(self, x):
        if x.ndim != 4:
            raise ValueError(f"an image has four dimensions, not {x.ndim}")
        return F.relu(self.bn(x))

    _, report = check(trained(nn.Sequential(conv(), module(forward, bn=nn.BatchNorm2d(4)))), image())
    assert [entry.name for entry in report.folded] == ["0"]


def flattens(self, x):
    n, c, h, w = x.shape
    return F.relu(self.bn(x)).view(n, c, h * w)


@pytest.mark.parametrize(
    "forward",
    [
        flattens,
        lambda self, x: F.relu(self.bn(x)) * x.shape[2],
        lambda self, x: F.relu(self.bn(x) * x.size(-1)),
        lambda self, x: self.bn(x) + x.shape[3],
        lambda self, x: F.interpolate(F.relu(self.bn(x)), size=x.shape[2:]),
    ],
)
@pytest.mark.parametrize("first", [{"stride": 2}, {"padding": 0}])
def test_shapes_read_inside_a_region(forward, first):
    model = trained(nn.Sequential(conv(**first), module(forward, bn=nn.BatchNorm2d(4))))
    plain, report = check(model, image())
    assert report.left or not norms_left(plain)


def test_sum_with_the_result_of_another_region():
    def forward(self, x):
        y = self.first(x)
        return self.second(y + self.branch(y)) * torch.sigmoid(y)

    branch = module(lambda self, x: self.c(x), c=Linear2d())
    model = trained(module(forward, first=Linear2d(), branch=branch, second=Second()))
    plain, report = check(model, image())
    assert len(report.folded) == 2
    assert report.left == ()
    assert isinstance(plain.first, nn.Conv2d)
    assert sum(isinstance(part, nn.Conv2d) for part in plain.modules()) == 2
    assert repvgg.is_plain(plain)


def test_chain_over_many_modules_is_one_convolution():
    ends = [module(lambda self, x: self.part(x), part=conv(kernel=1, bias=False)) for _ in range(3)]
    plain, report = check(trained(chain(First(), *ends, Second())), image())
    assert len(report.folded) == 1
    assert len(report.folded[0].parts) == 5
    assert sum(isinstance(part, nn.Conv2d) for part in plain.modules()) == 1


class Passes(First):
    """Also returns its input."""

    def forward(self, x):
        return self.conv(x), x


def test_passed_on_tensor_modified_in_place_is_no_longer_the_source():
    def forward(self, x):
        y, z = self.first(torch.tanh(x))
        y = self.bn(y)
        z += 1
        return F.relu(y + z)

    plain, report = check(trained(module(forward, first=Passes(), bn=nn.BatchNorm2d(4))), image())
    assert [entry.name for entry in report.folded] == ["first.conv"]
    assert norms_left(plain) == []


def test_source_passed_on_by_a_child():
    def forward(self, x):
        y, z = self.first(torch.tanh(x))
        return F.relu(self.bn(y) + z)

    plain, report = check(trained(module(forward, first=Passes(), bn=nn.BatchNorm2d(4))), image())
    assert [entry.name for entry in report.folded] == ["conv"]
    assert list(plain.state_dict()) == ["conv.weight", "conv.bias"]


def test_new_names_avoid_existing_ones():
    def forward(self, x):
        (a, p), (b, q) = self.conv(x), self.merged_conv(x)
        return F.relu(a - b), p * q

    plain, report = check(trained(module(forward, conv=Head(), merged_conv=Head())), image())
    assert [entry.name for entry in report.folded] == ["merged_conv2"]
    assert {"conv.other.weight", "merged_conv.other.weight"} < plain.state_dict().keys()


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_activation_in_the_module_of_the_norm(inplace):
    norm = module(lambda self, x: self.act(self.bn(x)), bn=nn.BatchNorm2d(4), act=nn.ReLU(inplace))
    model = trained(module(lambda self, x: self.n(self.c(x)), c=conv(), n=norm))
    _, report = check(model, image())
    assert [entry.name for entry in report.folded] == ["c"]
    both = trained(module(lambda self, x: (lambda y: self.n(y) + y)(self.c(x)), c=conv(), n=norm))
    _, report = check(both, image())
    assert report.left[0].reason == "its input is used elsewhere too"
