"""Dilated layers on phase images: exact at any size, and what stays as it is."""

import pytest
import torch
from torch import nn

import repvgg
from repvgg.errors import TrainingModeError
from repvgg.models import PhaseImages, create_model
from tests.bn_statistics import trained_like


def conv(channels=6, dilation=2, kernel=3, **more):
    return nn.Conv2d(channels, channels, kernel, padding=dilation * (kernel - 1) // 2, dilation=dilation, **more)


def block(dilation=2, **more):
    return nn.Sequential(conv(dilation=dilation, **more), nn.ReLU())


class Layer(nn.Module):
    """Layers in sequence, in a module that is no nn.Sequential."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def phased(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).double().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result, report = repvgg.dilate_by_phases(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    return model, result, report


def assert_same(model, result, size, batch=2, channels=6):
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(result(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())


# Divisible by d or not, per side; fewer pixels than phases.
@pytest.mark.parametrize("size", [(12, 8), (13, 9), (12, 11), (3, 2), (1, 7), (2, 2)])
@pytest.mark.parametrize("dilation", [2, 3, 4])
@pytest.mark.parametrize("more", [{}, {"groups": 3}, {"kernel": 5}, {"kernel": 1}])
def test_runs_are_exact(size, dilation, more):
    layers = [block(dilation), block(dilation, **more) if more.get("kernel") != 1 else block(1, kernel=1)]
    model, result, report = phased(*layers, block(dilation))
    assert sum(isinstance(module, PhaseImages) for module in result) == (2 if more.get("kernel") == 1 else 1)
    assert report.skipped == {}
    assert not any(part.dilation != (1, 1) for part in result.modules() if isinstance(part, nn.Conv2d))
    assert_same(model, result, size)


def test_a_residual_block_is_one_layer():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = conv(), conv()

        def forward(self, x):
            return (x + self.two(self.one(x).relu())).relu()

    model, result, report = phased(Residual(), Residual(), block())
    assert report.runs == ("0 to 2: 3 layers of dilation 2",)
    assert_same(model, result, (11, 14))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Layer(conv(), conv(dilation=1)), "undilated kernel as well"),
        (Layer(conv(), conv(dilation=4)), "several dilations"),
        (nn.Conv2d(6, 6, 3, padding=1, dilation=2), "keep the size"),
        (nn.Conv2d(6, 6, 3, padding=2, dilation=2, stride=2), "keep the size"),
        (conv(padding_mode="reflect"), "zero padding"),
        (Layer(conv(), nn.BatchNorm2d(6)), "call repvgg.reparameterize first"),
        (Layer(conv(), nn.AvgPool2d(3, 1, 1)), "different phases depend"),
    ],
)
def test_what_stays(layer, reason):
    model, result, report = phased(block(), layer, block())
    assert list(report.skipped) == ["1"]
    assert reason in report.skipped["1"]
    assert len(report.runs) == 2
    assert_same(model, result, (13, 12))


def test_inside_a_sequence_that_stays_its_parts_are_tried():
    model, result, report = phased(block(), nn.Sequential(conv(), nn.AvgPool2d(3, 1, 1)))
    assert report.runs == ("0 to 0: 1 layers of dilation 2", "1.0 to 1.0: 1 layers of dilation 2")
    assert report.skipped == {}
    assert_same(model, result, (13, 12))


def test_a_squeeze_excite_gate_stays():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = conv(), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            x = self.conv(x)
            return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()

    _, _, report = phased(Gated())
    assert "different phases depend" in report.skipped["0"]


def test_a_dilated_convolution_outside_of_sequences_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return self.conv(x)

    _, report = repvgg.dilate_by_phases(Net().eval())
    assert report.skipped == {"conv": "it is in no nn.Sequential"}
    assert "conv: stays, because it is in no nn.Sequential" in str(report)


def test_training_mode_is_refused():
    with pytest.raises(TrainingModeError, match=r"model\.eval"):
        repvgg.dilate_by_phases(nn.Sequential(conv()))


@pytest.mark.parametrize("name", ["pspnet_repvgg_a0", "pspnet_resnet18"])
def test_pspnet_runs_on_phases(name):
    torch.manual_seed(0)
    plain = trained_like(create_model(name, 5, plain=True)).double()
    result, report = repvgg.dilate_by_phases(plain)
    assert len(report.runs) == 2
    assert report.skipped == {}
    for size in ((41, 33), (64, 72)):
        assert_same(plain, result, size, batch=1, channels=3)
