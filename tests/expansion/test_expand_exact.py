"""The expanded model computes the same: over geometry, networks, dtypes; and a collapse reverts it."""

import pytest
import torch
import torchvision
from torch import nn

import repvgg
from repvgg.blocks import BranchSum, rep_conv
from tests.expansion.models import assert_same_outputs, image, module, trained, untouched, vgg

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}

GEOMETRIES = {
    "3x3": nn.Conv2d(4, 4, 3, padding=1),
    "no bias": nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "stride": nn.Conv2d(4, 4, 3, 2, padding=1),
    "two strides": nn.Conv2d(4, 4, 3, (1, 2), padding=1),
    "groups": nn.Conv2d(4, 8, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depthwise with multiplier": nn.Conv2d(4, 8, 5, padding=2, groups=4),
    "dilation": nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    "dilation and stride": nn.Conv2d(4, 4, 3, 2, padding=3, dilation=3, groups=2),
    "5x5": nn.Conv2d(4, 4, 5, padding=2),
    "7x7 stem": nn.Conv2d(3, 8, 7, 2, padding=3, bias=False),
    "1x5": nn.Conv2d(4, 4, (1, 5), padding=(0, 4), dilation=(3, 2)),
    "same": nn.Conv2d(4, 4, 3, padding="same", dilation=2),
    "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 4, 5, 2, padding=2, padding_mode="replicate"),
    "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "one channel": nn.Conv2d(1, 1, 3, padding=1),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name, dtype):
    conv = trained(nn.Sequential(GEOMETRIES[name]), dtype)
    if dtype is torch.float16 and GEOMETRIES[name].padding_mode == "replicate":
        pytest.skip("no such padding in half precision on a CPU")
    expanded, report = untouched(repvgg.expand, conv)
    assert [entry.name for entry in report.expanded] == ["0"]
    assert report.left == ()
    assert report.expanded[0].error < TOLERANCE[dtype]
    assert isinstance(expanded[0], BranchSum)
    assert all(tensor.dtype in (dtype, torch.int64) for tensor in expanded.state_dict().values())
    channels = GEOMETRIES[name].in_channels
    images = [image(channels, dtype=dtype), image(channels, 16, 11, dtype=dtype)]
    assert_same_outputs(conv, expanded, *images, tolerance=TOLERANCE[dtype])


def test_by_hand():
    conv = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)).double().eval()
    with torch.no_grad():
        conv[0].weight.copy_(torch.arange(1.0, 10.0).view(1, 1, 3, 3))
        conv[0].bias.fill_(0.5)
    expanded, _ = repvgg.expand(conv)
    block, root = expanded[0], (1 + 1e-5) ** 0.5  # of a new batch norm
    wanted = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 1, 3, 3) * root
    wanted[0, 0, 1, 1] -= block["pointwise"].conv.weight.item() + 1
    torch.testing.assert_close(block["dense"].conv.weight.detach(), wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(block["dense"].bn.bias.item(), 0.5, rtol=1e-13, atol=0)
    assert block["pointwise"].conv.weight.item() != 0


def networks():
    torch.manual_seed(0)
    plain = repvgg.create_model("repvgg_t0", num_classes=10, plain=True)
    return {
        "vgg": (vgg(), 3),
        "resnet10": (torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7), 12),
        "repvgg": (plain, len([part for part in plain.modules() if isinstance(part, nn.Conv2d)])),
        "a convolution alone": (nn.Conv2d(3, 3, 3, padding=1), 1),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["vgg", "resnet10", "repvgg", "a convolution alone"])
def test_networks(name, dtype):
    model, count = networks()[name]
    model = trained(model, dtype)
    expanded, report = untouched(repvgg.expand, model)
    assert len(report.expanded) + len(report.left) == count
    assert all("1x1" in entry.reason for entry in report.left)
    assert report.parameters_added == sum(p.numel() for p in expanded.parameters()) - sum(
        p.numel() for p in model.parameters()
    )
    assert_same_outputs(model, expanded, image(3, 32, 32, dtype=dtype), tolerance=TOLERANCE[dtype])
    evidence = repvgg.verify(model, expanded, image(3, 32, 32, dtype=dtype))
    assert evidence.passed, evidence


def test_torchvision_vgg():
    model = torchvision.models.VGG(
        torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"]), num_classes=3, init_weights=False
    )
    model.classifier = nn.Linear(16 * 49, 3)
    model = trained(model)
    expanded, report = untouched(repvgg.expand, model)
    assert [entry.name for entry in report.expanded] == ["features.0", "features.3", "features.6", "features.8"]
    assert_same_outputs(model, expanded, image(3, 32, 32), image(3, 41, 37))


def test_expand_then_collapse_gives_the_kernels():
    model = trained(vgg())
    expanded, _ = repvgg.expand(model)
    plain, _ = repvgg.reparameterize(expanded)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[key], value, rtol=0, atol=1e-10 * float(value.abs().max()))
    assert repvgg.is_plain(plain)


def test_a_collapsed_model_is_expanded_and_collapsed_again():
    torch.manual_seed(0)
    model = trained(repvgg.create_model("repvgg_t0", num_classes=10))
    plain, _ = repvgg.reparameterize(model)
    expanded, report = untouched(repvgg.expand, plain)
    assert report.left == ()
    assert expanded.state_dict().keys() == model.state_dict().keys()
    again, _ = repvgg.reparameterize(expanded)
    assert_same_outputs(plain, again, image(3, 32, 32))


def test_every_branch_trains_and_the_model_still_collapses():
    torch.manual_seed(0)
    expanded, _ = repvgg.expand(trained(vgg(), torch.float32), data=image(dtype=torch.float32))
    before = {key: value.detach().clone() for key, value in expanded.named_parameters()}
    expanded.train()
    optimizer = torch.optim.SGD(expanded.parameters(), 0.05)
    for seed in range(4):
        optimizer.zero_grad()
        expanded(image(batch=4, seed=seed, dtype=torch.float32)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in expanded.named_parameters())
    expanded = expanded.double().eval()
    plain, report = repvgg.reparameterize(expanded)
    assert len(report.folded) == 3
    assert_same_outputs(expanded, plain, image())


def test_a_shared_convolution_becomes_one_shared_block():
    def forward(self, x):
        return self.b(self.a(x).relu()) + self.more[0](x)

    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = trained(module(forward, a=conv, b=conv, more=nn.ModuleList([conv])))
    expanded, report = untouched(repvgg.expand, model)
    assert [(entry.name, entry.also) for entry in report.expanded] == [("a", ("b", "more.0"))]
    assert expanded.a is expanded.b is expanded.more[0]
    assert "a (also b, more.0): Conv2d(4, 4" in str(report)
    assert_same_outputs(model, expanded, image(4))


def test_mode_layout_and_frozen_parameters_are_those_of_the_convolution():
    model = trained(vgg()).to(memory_format=torch.channels_last)
    model.train()
    model[2].eval().requires_grad_(False)
    expanded, _ = untouched(repvgg.expand, model)
    assert all(part.training for part in expanded[0].modules())
    assert not any(part.training for part in expanded[2].modules())
    assert not any(parameter.requires_grad for parameter in expanded[2].parameters())
    assert all(parameter.requires_grad for parameter in expanded[0].parameters())
    assert expanded[0]["dense"].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_outputs(model, expanded, image())


def test_graphs_and_wrappers():
    model = trained(vgg())
    for other in (torch.fx.symbolic_trace(model), nn.DataParallel(model)):
        expanded, report = untouched(repvgg.expand, other)
        assert len(report.expanded) == 3
        assert_same_outputs(model, expanded, image())


def test_hooks_and_attributes_are_copied():
    calls = []
    model = trained(vgg())
    model.note = {"a": [1]}
    model[1].register_forward_hook(lambda *_: calls.append(1))
    expanded, _ = untouched(repvgg.expand, model)
    assert calls == []
    assert expanded.note == model.note
    assert_same_outputs(model, expanded, image())
    assert len(calls) == 2


def test_branches_depend_on_the_seed():
    kernels = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        kernels.append(repvgg.expand(trained(vgg()))[0][0]["pointwise"].conv.weight)
    assert torch.equal(kernels[0], kernels[1])
    assert not torch.equal(kernels[0], kernels[2])


def test_rep_conv_in_other_geometries_is_one_convolution():
    block = trained(rep_conv(4, 4, kernel_size=(5, 3), dilation=(1, 2), groups=2, padding_mode="reflect"))
    conv = repvgg.trace(block)
    assert (conv.kernel_size, conv.dilation, conv.padding, conv.border) == ((5, 3), (1, 2), (2, 2, 2, 2), "reflect")
    with pytest.raises(repvgg.errors.UsageError, match="4x4 kernel has no centre"):
        rep_conv(4, 4, kernel_size=4)
