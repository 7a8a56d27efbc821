"""The plain model can be copied, stored, moved, exported and trained like any other module."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.errors import ReparamError
from tests.collapse.models import Block, Branches, Linear2d, collapse, conv, image, module, storages, trained


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.branches, self.act = Linear2d(), conv(), Branches(), nn.ReLU()

    def forward(self, x):
        return self.act(self.a(x) + self.b(x)) + self.branches(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.inner, self.act = Linear2d(), Inner(), nn.ReLU()

    def forward(self, x):
        return self.act(self.a(x) + x) + self.inner(x)


def everything():
    """A chain, a whole module, a new forward, and new forwards nested three deep."""
    return nn.Sequential(Block(), Outer(), Branches(), Linear2d())


@pytest.fixture(scope="module")
def pair():
    model = trained(everything())
    return model, collapse(model)[0]


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "make",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), stored, lambda m: copy.deepcopy(copy.deepcopy(m))],
    ids=["copy", "pickle", "file", "copy of a copy"],
)
def test_copies_are_equal_and_independent(pair, make):
    model, plain = pair
    copied = make(plain)
    close(copied(image()), model(image()))
    assert not storages(copied) & storages(plain)
    assert copied.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in copied.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [part.training for part in copied.modules()] == [part.training for part in plain.modules()]
    assert copied[2].width == 4


def test_result_is_plain_and_collapsing_again_changes_nothing(pair):
    model, plain = pair
    assert repvgg.is_plain(plain)
    assert repvgg.is_plain(copy.deepcopy(plain).train())
    assert not repvgg.is_plain(model)
    assert not any(part.training for part in plain.modules())


def test_other_parameters_are_identical_copies(pair):
    model, plain = pair
    ours, theirs = plain.state_dict(), model.state_dict()
    for name in ours.keys() & theirs.keys():
        if "conv" not in name:
            assert torch.equal(ours[name], theirs[name])
    assert {"2.unused.weight", "2.temperature", "2.count"} <= ours.keys() & theirs.keys()


def test_state_dicts_of_two_results_are_compatible(pair):
    _, plain = pair
    other = trained(everything(), seed=9)
    theirs, _ = repvgg.reparameterize(other)
    copied = copy.deepcopy(plain)
    copied.load_state_dict(theirs.state_dict())
    close(copied(image()), other(image()))


def test_result_can_be_trained(pair):
    plain = copy.deepcopy(pair[1]).train()
    plain(image()).square().mean().backward()
    used = {name: p for name, p in plain.named_parameters() if "unused" not in name and "temperature" not in name}
    assert all(p.requires_grad and p.grad is not None and p.grad.abs().sum() > 0 for p in used.values())
    before = plain(image()).square().mean()
    torch.optim.SGD(used.values(), 1e-3).step()
    assert plain(image()).square().mean() < before


def test_parameters_outside_the_regions_can_be_trained():
    """A parameter that the forward computes with stays a parameter of the new graph."""
    model = module(lambda self, x: self.act(self.a(x) + self.b(x)) * self.gain.exp(), a=Linear2d(), b=conv())
    model.act, model.gain = nn.ReLU(), nn.Parameter(torch.rand(4, 1, 1))
    plain, _ = collapse(trained(model))
    plain(image()).sum().backward()
    assert plain.gain.grad.abs().min() > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_result_converts_to_other_dtypes(pair, dtype, tolerance):
    model, plain = pair
    moved = copy.deepcopy(plain).to(dtype)
    close(moved(image(dtype=dtype)).double(), model(image()), tolerance)


def test_result_exports(pair):
    model, plain = pair
    program = torch.export.export(plain, (image(),))
    close(program.module()(image()), model(image()))
    assert "batch_norm" not in str(program.graph)


def test_frozen_parameters_stay_frozen():
    model = trained(nn.Sequential(Branches(), Block())).requires_grad_(False)
    plain, _ = collapse(model)
    assert not any(p.requires_grad for p in plain.parameters())
    model[1].conv.weight.requires_grad_()
    plain, _ = collapse(model)
    assert [n for n, p in plain.named_parameters() if p.requires_grad] == ["1.conv.weight", "1.conv.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_layout_are_those_of_the_model(dtype, layout):
    model = trained(everything(), dtype).to(memory_format=layout)
    plain, report = collapse(model)
    kernels = [p for p in plain.parameters() if p.dim() == 4]
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert all(p.is_contiguous(memory_format=layout) for p in kernels)
    assert report.left == ()
    x = image(dtype=dtype).to(memory_format=layout)
    exact = copy.deepcopy(model).double()(x.double())
    allowed = 2 * (model(x).double() - exact).abs().max() + 1e-3 * exact.abs().max()
    assert (plain(x).double() - exact).abs().max() <= allowed
    assert plain(x).is_contiguous(memory_format=layout)


def test_norms_of_another_dtype_than_their_convolutions():
    model = trained(nn.Sequential(Branches(), Block()), torch.bfloat16)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.float()
    plain, _ = collapse(model)
    assert plain[0].conv.weight.dtype is plain[1].conv.weight.dtype is torch.bfloat16


def test_regions_whose_weights_overflow_are_skipped():
    model = trained(nn.Sequential(Branches(), Block()), torch.float16)
    model[1].conv.weight.data.fill_(3e4)
    model[1].bn.weight.data.fill_(100)
    plain, report = collapse(model)
    assert [entry.name for entry in report.folded] == ["0.conv"]
    assert [(entry.name, entry.reason) for entry in report.left] == [
        ("1.bn", "the merged weights do not fit into float16")
    ]
    assert torch.equal(plain[1].conv.weight, model[1].conv.weight)


def test_uncopyable_attribute_raises_reparam_error():
    model = trained(nn.Sequential(Branches()))
    model.stream = (part for part in ())
    with pytest.raises(ReparamError, match="'stream' of the model"):
        repvgg.reparameterize(model)


def number_of_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


class OfFunctions(nn.Module):
    """A convolution by a function and one by a module, scaled by a parameter, next to a layer that stays."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(4, 4, 3, 3)), nn.Parameter(torch.ones(1, 4, 1, 1))
        self.scale.data.uniform_(0.5, 1.5)
        self.conv, self.last = conv(kernel=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = F.conv2d(x, self.weight, padding=1) * self.scale + self.conv(x)
        return self.last(torch.relu(y))


class OfFunctionsOnly(OfFunctions):
    def forward(self, x):
        y = F.conv2d(x, self.weight * self.scale, padding=1) * self.scale
        return self.last(torch.relu(y)) * torch.sigmoid(self.conv(x))


@pytest.mark.parametrize("kind", [OfFunctions, OfFunctionsOnly])
def test_the_parameters_that_functions_read_count(kind):
    model = trained(kind())
    plain, report = collapse(model)
    saved = number_of_parameters(model) - number_of_parameters(plain)
    assert saved == report.parameters_saved
    assert report.parameters_saved == (4 + 16 if kind is OfFunctions else 4 - 4)  # of which 4 become a bias


@pytest.mark.parametrize("frozen", ["conv", "functions", "all"])
def test_a_convolution_is_trainable_if_anything_in_it_was(frozen):
    model = trained(OfFunctions())
    own = {"conv": model.conv.parameters(), "functions": (model.weight, model.scale), "all": model.parameters()}
    for parameter in own[frozen]:
        parameter.requires_grad_(False)
    plain, report = collapse(model)
    merged = plain.get_submodule(report.folded[0].name)
    assert [p.requires_grad for p in merged.parameters()] == [frozen != "all"] * 2
