import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg import create_model
from repvgg.engine.frontend import read
from repvgg.engine.graph import Conv, ConvGeometry, Gate, Linear, Pool
from repvgg.errors import UnsupportedError


class Net(nn.Module):
    """A function of one input, with modules to call by name."""

    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **more) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **more)


def test_a_plain_architecture_is_a_chain():
    layers = read(create_model("repvgg_t0", plain=True))
    assert [type(layer) for layer in layers] == [Conv] * 7 + [Pool, Linear]
    assert [layer.name for layer in layers[:2]] == ["stem.conv", "stages.0.0.conv"]
    assert all(layer.relu for layer in layers[:7])
    assert layers[1].geometry == ConvGeometry((3, 3), (2, 2), (1, 1))
    assert layers[1].weight.shape == (32, 16, 3, 3)


@pytest.mark.parametrize(("name", "gate_has_relu"), [("repvgg_d2se", True), ("repvggplus_l2pse", False)])
def test_gates(name, gate_has_relu):
    with torch.device("meta"):
        model = create_model(name, plain=True)
    model.to_empty(device="cpu")
    layers = read(model)
    gates = [layer for layer in layers if isinstance(layer, Gate)]
    assert len(gates) == sum(isinstance(layer, Conv) for layer in layers)
    assert all(gate.relu == gate_has_relu for gate in gates)


class Functional(nn.Module):
    """A model that holds its weights itself and calls functions."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        x = F.conv2d(x, self.kernel, self.shift, stride=2, padding="valid", groups=2)
        x = F.dropout(torch.relu(x), 0.5, self.training)
        return F.linear(x.mean((2, 3)), self.matrix)


def test_functions_with_parameters_of_the_model():
    model = Functional()
    convolution, pool, linear = read(model.train())
    assert convolution.geometry == ConvGeometry((3, 3), (2, 2), groups=2)
    assert convolution.relu
    assert isinstance(pool, Pool)
    torch.testing.assert_close(torch.from_numpy(convolution.bias), model.shift.detach(), rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(linear.weight), model.matrix.detach(), rtol=0, atol=0)
    assert not linear.bias.any()


def test_weights_are_copied_and_the_mode_is_restored():
    model = nn.Sequential(conv(bias=False), nn.Dropout(), nn.Identity()).train()
    (layer,) = read(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert layer.weight.any()
    assert not layer.bias.any()
    assert model.training
    assert model[1].training


SPELLINGS = {
    "modules": lambda net, x: net.head(torch.flatten(net.pool(net.relu(net.conv(x))), 1)),
    "functions": lambda net, x: net.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(net.conv(x)), 1), 1)),
    "methods": lambda net, x: net.head(net.conv(x).relu().mean((2, 3))),
    "negative axes": lambda net, x: net.head(net.conv(x).relu().mean(dim=(-1, -2), keepdim=True).flatten(1)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_modules_functions_and_methods_read_alike(spelling):
    layers = read(
        Net(SPELLINGS[spelling], conv=conv(), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(4, 2))
    )
    assert [type(layer) for layer in layers] == [Conv, Pool, Linear]
    assert layers[0].relu


def test_padding_given_as_a_string():
    assert read(conv(kernel=5, padding="same", dilation=2))[0].geometry.padding == (4, 4)
    assert read(conv(padding="valid"))[0].geometry.padding == (0, 0)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def hooked() -> nn.Module:
    model = nn.Sequential(conv())
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


REFUSED = {
    "a batch norm": (nn.Sequential(conv(), nn.BatchNorm2d(4)), r"'1' \(BatchNorm2d\).*repvgg.reparameterize"),
    "a max pool": (nn.Sequential(conv(), nn.MaxPool2d(2)), r"'1' \(MaxPool2d\)"),
    "another activation": (nn.Sequential(conv(), nn.SiLU()), r"'1' \(SiLU\)"),
    "a residual": (Net(lambda net, x: x + net.conv(x), conv=conv()), "has two users"),
    "a subclass": (nn.Sequential(OwnConv(4, 4, 3)), "engine"),
    "hooks": (hooked(), "'0' has forward hooks"),
    "control flow by values": (Net(lambda net, x: x if x.sum() > 0 else -x), "cannot be traced"),
    "reflected padding": (conv(padding=1, padding_mode="reflect"), "'reflect'"),
    "uneven padding": (conv(kernel=2, padding="same"), "one side"),
    "float64": (conv().double(), "float32"),
    "a transposed convolution": (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
    "no layer": (nn.Identity(), "no layer"),
    "a pool to 2x2": (nn.Sequential(conv(), nn.AdaptiveAvgPool2d(2)), "is not a global average pool"),
    "a pool that is not flattened": (nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1)), "flatten"),
    "a linear layer on columns": (nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Linear(1, 2)), "flatten"),
    "a flatten of maps": (nn.Sequential(conv(), nn.Flatten()), r"is not a flatten\(1\)"),
    "a convolution after the pool": (
        nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), conv(kernel=1)),
        "follows the global pool",
    ),
    "two outputs": (Net(lambda net, x: (net.conv(x),), conv=conv()), "one tensor"),
    "a ReLU of the input": (nn.Sequential(nn.ReLU(), conv()), "'0'"),
    "a dropout that drops": (Net(lambda net, x: F.dropout(net.conv(x)), conv=conv()), "at random"),
    "a computed kernel": (Net(lambda net, x: F.conv2d(x, net.conv.weight * 2), conv=conv()), "float32 tensors"),
    "a product with a number": (Net(lambda net, x: net.conv(x) * 2, conv=conv()), "mul"),
    "a product first": (Net(lambda net, x: net.conv(x * 2), conv=conv()), "mul"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_message_names_what_is_unsupported(name):
    model, words = REFUSED[name]
    with pytest.raises(UnsupportedError, match=words):
        read(model)
