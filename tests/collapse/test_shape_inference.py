"""Recordings without the values of convolutions, and with them where the code depends on one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg._calls import Call
from repvgg.collapse.record import record
from repvgg.collapse.shape_inference import function_of, output_without_values

LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3), (2, 4, 9, 11)),
    "padded": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 11)),
    "strided": (nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(0, 2)), (2, 4, 9, 11)),
    "dilated": (nn.Conv2d(4, 8, 3, dilation=(1, 2), padding=2, groups=2, bias=False), (1, 4, 9, 11)),
    "sequence": (nn.Conv1d(4, 6, 4, stride=2, padding=1), (2, 4, 15)),
    "volume": (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (1, 2, 5, 6, 7)),
    "half": (nn.Conv2d(4, 6, 1).bfloat16(), (2, 4, 5, 5)),
    "vectors": (nn.Linear(4, 3), (2, 4)),
    "rows": (nn.Linear(4, 3), (2, 5, 4)),
    "norm": (nn.BatchNorm2d(4).eval(), (2, 4, 5, 7)),
}
COMPUTED = {
    "other channels": (nn.Conv2d(4, 6, 3), torch.ones(1, 3, 9, 9)),
    "too small": (nn.Conv2d(4, 6, 3), torch.ones(1, 4, 2, 9)),
    "without a batch": (nn.Conv2d(4, 6, 3), torch.ones(4, 9, 9)),
    "padded by name": (nn.Conv2d(4, 6, 3, padding="same"), torch.ones(1, 4, 9, 9)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), torch.ones(1, 4, 9, 9)),
    "another format": (nn.Conv2d(4, 6, 3), torch.ones(1, 4, 9, 9).contiguous(memory_format=torch.channels_last)),
    "another dtype": (nn.Conv2d(4, 6, 3), torch.ones(1, 4, 9, 9, dtype=torch.float64)),
    "of batch statistics": (nn.BatchNorm2d(4), torch.ones(1, 4, 9, 9)),
    "another layer": (nn.Softmax(1), torch.ones(1, 4, 9, 9)),
}
FUNCTIONS = {
    "padding": (F.pad, ((1, 0, 2, 3),), {}),
    "cropping": (F.pad, ((-1, 0, 0, -2), "constant", 1.0), {}),
    "convolution": (F.conv2d, (torch.ones(6, 2, 3, 1),), {"stride": (2, 1), "padding": 1, "groups": 2}),
    "linear": (F.linear, (torch.ones(3, 7),), {}),
    "mean": (torch.mean, (), {"dim": (2, -1)}),
    "mean that keeps axes": (torch.mean, (3,), {"keepdim": True}),
    "number": (torch.add, (2,), {}),
    "row": (torch.mul, (torch.ones(4, 1, 1),), {}),
}
COMPUTED_FUNCTIONS = {
    "reflection": (F.pad, ((1, 1, 1, 1), "reflect"), {}),
    "by name": (F.conv2d, (torch.ones(6, 4, 3, 3),), {"padding": "same"}),
    "mean of all": (torch.mean, (), {}),
    "sum that grows": (torch.add, (torch.ones(3, 1, 4, 5, 7),), {}),
    "other dtype": (torch.add, (torch.ones(4, 1, 1).double(),), {}),
    "scaled": (torch.add, (torch.ones(4, 1, 1),), {"alpha": 2}),
}


def assert_alike(found, expected):
    assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_output_without_values_is_like_the_output(layer, shape):
    x = torch.ones(shape, dtype=layer.weight.dtype)
    assert_alike(output_without_values(*function_of(layer, x)), layer(x))


@pytest.mark.parametrize(("layer", "x"), COMPUTED.values(), ids=COMPUTED)
def test_what_is_not_known_to_be_like_it_is_computed(layer, x):
    found = function_of(layer, x)
    assert found is None or output_without_values(*found) is None


@pytest.mark.parametrize(("function", "args", "kwargs"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_result_without_values_is_like_the_result(function, args, kwargs):
    x = torch.ones(2, 4, 5, 7)
    assert_alike(output_without_values(function.__name__, (x, *args), kwargs), function(x, *args, **kwargs))


@pytest.mark.parametrize(("function", "args", "kwargs"), COMPUTED_FUNCTIONS.values(), ids=COMPUTED_FUNCTIONS)
def test_results_of_other_arguments_are_computed(function, args, kwargs):
    x = torch.ones(2, 4, 5, 7)
    function(x, *args, **kwargs)  # it runs
    assert output_without_values(function.__name__, (x, *args), kwargs) is None


class Positive(nn.Module):
    """A convolution whose outputs are all positive, with the other layer called where code sees that."""

    def __init__(self, sees):
        super().__init__()
        self.conv, self.other, self.sees = nn.Conv2d(3, 4, 1), nn.ReLU(), sees
        nn.init.zeros_(self.conv.weight)
        nn.init.ones_(self.conv.bias)

    def forward(self, x):
        y = self.conv(x)
        return self.other(y) if self.sees(y.mul(2)) else y


def swallowed(y):
    try:
        return bool(y.sum() > 0)
    except Exception:
        return False


SEEN = {
    "element": lambda y: y.mean() > 0.5,
    "item": lambda y: y.max().item() > 0.5,
    "list": lambda y: y.tolist()[0][0][0][0] > 0.5,
    "array": lambda y: y.numpy().sum() > 0.5,
    "shape": lambda y: y.nonzero().shape[0] > 0,
    "mask": lambda y: len(y[y > 0]) > 0,
    "answer": lambda y: not torch.equal(y, torch.zeros_like(y)),
    "caught": swallowed,
}


@pytest.mark.parametrize("sees", SEEN.values(), ids=SEEN)
def test_code_that_depends_on_values_gets_them(sees):
    recording = record(Positive(sees).eval(), Call((torch.zeros(1, 3, 4, 4),)))
    assert "other" in recording.called_paths()


class Folding(nn.Module):
    """A forward that computes a kernel by a layer, and passes it to the function ``kept``."""

    def __init__(self, kept):
        super().__init__()
        self.conv, self.mix, self.kernel, self.kept = (
            nn.Conv2d(3, 4, 1),
            nn.Linear(3, 5),
            nn.Parameter(torch.ones(2, 3)),
            kept,
        )

    def forward(self, x):
        y = self.conv(x)
        self.kept(self.mix(self.kernel))
        return y


def test_what_is_computed_from_parameters_has_values():
    kept = []
    model = Folding(kept.append).eval()
    record(model, Call((torch.zeros(1, 3, 4, 4),)))
    torch.testing.assert_close(kept[-1], model.mix(model.kernel).detach())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_functions_without_values_are_like_their_results(device):
    x, y = torch.ones(2, 4, 5, 6, device=device), torch.ones(4, 1, 1, device=device)
    mean, variance = torch.zeros(4, device=device), torch.ones(4, device=device)
    calls = [
        (F.batch_norm, "batch_norm", (x, mean, variance), {}),
        (F.batch_norm, "batch_norm", (x,), {"running_mean": mean, "running_var": variance, "training": False}),
        (F.relu, "relu", (x,), {}),
        (torch.mul, "mul", (x, y), {}),
    ]
    for function, name, args, kwargs in calls:
        found, wanted = output_without_values(name, args, kwargs), function(*args, **kwargs)
        assert found is not None, name
        assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype), name
        with torch.autocast("cpu", torch.bfloat16):
            assert output_without_values(name, args, kwargs) is None, name


def test_batch_norms_that_pytorch_refuses_or_that_train_are_left_to_it():
    x, mean, variance = torch.ones(2, 4, 5, 6, device="meta"), torch.zeros(4), torch.ones(4)
    refused = [(x,), (x, mean), (x, mean[:3], variance[:3]), (x, None, None), (x, mean, variance, None, None, True)]
    assert [output_without_values("batch_norm", args, {}) for args in refused] == [None] * 5
