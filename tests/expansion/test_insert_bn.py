"""A batch norm after each convolution leaves outputs unchanged."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

import repvgg
from repvgg.blocks import ConvBN
from repvgg.errors import NothingExpandedWarning
from tests.expansion.models import assert_same_outputs, image, module, trained, untouched, vgg

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_are_unchanged_in_both_modes(dtype):
    model, x = trained(vgg(), dtype), image(batch=6, dtype=dtype)
    normed, report = untouched(repvgg.insert_bn, model, x)
    assert [entry.name for entry in report.expanded] == ["0", "2", "5"]
    assert report.parameters_added == 2 * (8 + 8 + 16)
    assert all(entry.error < TOLERANCE[dtype] for entry in report.expanded)
    assert_same_outputs(model, normed, x, image(3, 16, 11, dtype=dtype), tolerance=TOLERANCE[dtype])
    scale = float(model(x).detach().abs().max())
    torch.testing.assert_close(normed.train()(x), model(x), rtol=0, atol=2 * TOLERANCE[dtype] * scale)


def test_convolutions_keep_their_parameters_and_norms_get_statistics():
    model, x = trained(vgg()), image(batch=6)
    normed, _ = repvgg.insert_bn(model, [x[:2], x[2:]])
    assert isinstance(normed[2], ConvBN)
    torch.testing.assert_close(normed[2].conv.state_dict(), model[2].state_dict(), rtol=0, atol=0)
    seen = model[:3](x).detach()
    torch.testing.assert_close(normed[2].bn.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(normed[2].bn.running_var, seen.var((0, 2, 3), correction=0))


def test_collapse_restores_the_convolutions():
    model = trained(vgg())
    normed, _ = repvgg.insert_bn(model, image())
    plain, report = repvgg.reparameterize(normed)
    assert len(report.folded) == 3
    ours, theirs = plain.state_dict(), model.state_dict()
    assert [value.shape for value in ours.values()] == [value.shape for value in theirs.values()]
    for ours_, theirs_ in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-10, atol=1e-10)
    assert_same_outputs(model, plain, image())


def test_collapsed_model_trains_and_collapses_again():
    torch.manual_seed(0)
    plain, _ = repvgg.reparameterize(trained(repvgg.create_model("repvgg_t0", num_classes=5), torch.float32))
    normed, report = untouched(repvgg.insert_bn, plain, image(3, 32, 32, batch=4, dtype=torch.float32))
    assert report.left == ()
    normed.train()
    optimizer = torch.optim.SGD(normed.parameters(), 0.01)
    for seed in range(2):
        normed(image(3, 32, 32, batch=4, seed=seed, dtype=torch.float32)).square().mean().backward()
        optimizer.step()
    normed = normed.double().eval()
    again, _ = repvgg.reparameterize(normed)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert_same_outputs(normed, again, image(3, 32, 32))


def test_dead_channels():
    model = trained(vgg())
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, -1
    normed, _ = repvgg.insert_bn(model, image(batch=4))
    assert float(normed[0].bn.running_var[1]) < 1e-20
    assert_same_outputs(model, normed, image())


def test_1x1_and_unusual_geometries():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 2, padding=0, groups=2)))
    normed, report = untouched(repvgg.insert_bn, model, image())
    assert len(report.expanded) == 2
    assert_same_outputs(model, normed, image(), image(3, 16, 11))


def test_a_shared_convolution_gets_one_norm():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = trained(nn.Sequential(conv, nn.ReLU(), conv))
    normed, report = untouched(repvgg.insert_bn, model, image(4))
    assert report.expanded[0].also == ("2",)
    assert normed[0] is normed[2]
    assert_same_outputs(model, normed, image(4))


def test_parametrizations_and_hooks_are_kept():
    calls = []
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(4, 4, 3))))
    model[0].register_forward_hook(lambda *_: calls.append(1))
    normed, report = untouched(repvgg.insert_bn, model, image())
    assert len(report.expanded) == 2
    assert len(calls) == 1  # from the run on the data
    assert_same_outputs(model, normed, image())


def test_convolutions_followed_by_a_norm_are_skipped():
    model = trained(torchvision.models.resnet18(num_classes=3))
    with pytest.warns(NothingExpandedWarning, match="a batch norm follows it already"):
        _, report = untouched(repvgg.insert_bn, model, image(3, 32, 32))
    assert {entry.reason for entry in report.left} == {"a batch norm follows it already"}


def read():
    return module(lambda self, x: F.conv2d(x, self.a.weight) + self.a(x), a=nn.Conv2d(3, 4, 3))


LEFT = {
    "read": (read, "read from outside"),
    "never called": (lambda: module(lambda self, x: x, a=nn.Conv2d(3, 4, 3)), "the data never reaches it"),
    "no batch": (lambda: module(lambda self, x: self.a(x[0]), a=nn.Conv2d(3, 4, 3)), "its output is not images"),
    "not selected": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "where= leaves it out"),
}


@pytest.mark.parametrize("name", LEFT)
def test_skipped_with_a_reason(name):
    make, reason = LEFT[name]
    where = (lambda *_: False) if name == "not selected" else None
    with pytest.warns(NothingExpandedWarning):
        _, report = untouched(repvgg.insert_bn, trained(make()), image(), where=where)
    assert reason in report.left[0].reason


def test_numbers_that_do_not_fit_into_half_precision():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.float16)
    with pytest.warns(NothingExpandedWarning, match="does not fit into torch.float16"):
        untouched(repvgg.insert_bn, model, image(dtype=torch.float16) * 1e3)


def test_modes_and_frozen_parameters_are_those_of_the_convolution():
    model = trained(vgg()).train()
    model[2].eval().requires_grad_(False)
    normed, _ = untouched(repvgg.insert_bn, model, image())
    assert [normed[i].training for i in (0, 2)] == [normed[i].bn.training for i in (0, 2)] == [True, False]
    assert [normed[i].bn.weight.requires_grad for i in (0, 2)] == [True, False]
