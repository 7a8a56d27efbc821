"""Models run in float64 without a copy, under a mode that is local to the thread."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg._calls import Call
from repvgg.errors import UsageError
from repvgg.verify import border_inputs, float64, isolated_eval, verify
from repvgg.verify.float64 import Float64Mode, Float64Runner
from tests.verify.models import net, trained_like

IMAGES = border_inputs((2, 3, 9, 10), batches=1)


def exact(model, *inputs):
    with isolated_eval(model):
        runner = Float64Runner(model, "the model")
        out = runner(Call(inputs).map_tensors(lambda x: x.double() if x.is_floating_point() else x))
        return out, runner.copy is not None


class Blur(nn.Module):
    """Makes a kernel in the default dtype in each forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.conv2d(self.bn(self.conv(x)), torch.ones(4, 1, 3, 3) / 9, groups=4)


class Casting(nn.Module):
    """Asks for float32 in all the ways that there are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x):
        y = x.float() + x.to(torch.float32) + x.to(self.weight) + x.to(dtype=self.weight.dtype) + x.type_as(self.weight)
        y = y + x.type(torch.float32) + x.type(self.weight.type()) + torch.tensor(0.1)
        y = F.softmax(y, 1, dtype=torch.float32) + y.sum(1, keepdim=True, dtype=torch.float32)
        return y * self.weight


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 1))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += x.abs().max()
        out = x.new_zeros(x.shape)
        out[:, :2] = x[:, :2] * self.scale[:2]
        out[:, 2:].copy_(x[:, 2:])
        out.mul_(self.scale)
        return out.sub_(torch.ones(3, 1, 1))


class NumPy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1))
        self.table = torch.arange(3.0).view(3, 1, 1)  # no buffer: .double() does not find it

    def forward(self, x):
        return torch.stack([x * self.weight, x + self.table]).flatten(0, 1) + torch.from_numpy(self.table.numpy())


@pytest.mark.parametrize("make", [Blur, Casting, Writing, NumPy, net])
def test_float64_without_a_copy_equals_a_model_in_float64(make):
    torch.manual_seed(0)
    model = trained_like(make()).eval()
    found, was_copied = exact(model, IMAGES[0])
    assert not was_copied
    assert found.dtype is torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    wide = make().eval()
    wide.load_state_dict(model.state_dict())
    wide = wide.double()
    if isinstance(model, NumPy):
        wide.table = wide.table.double()
    # Constants without a dtype then get the one of the weights; those of the forwards are the same in both.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), Float64Mode(torch.float32) if isinstance(model, Casting) else torch.no_grad():
            expected = wide(IMAGES[0].double())
    finally:
        torch.set_default_dtype(before)
    # 1/9 and 0.1 are those of float32 in the model, and are so in float64, too.
    torch.testing.assert_close(found, expected, rtol=1e-7 if isinstance(model, (Blur, Casting)) else 1e-14, atol=1e-14)
    own = model(IMAGES[0]).detach()
    torch.testing.assert_close(found.float(), own, rtol=1e-5, atol=1e-5)


def test_constants_of_a_float64_model_are_float64():
    model = trained_like(Blur()).double().eval()
    found, _ = exact(model, IMAGES[0])
    kernel = torch.ones(4, 1, 3, 3, dtype=torch.float64) / 9
    expected = F.conv2d(model.bn(model.conv(IMAGES[0].double())), kernel, groups=4)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert verify(model, model, IMAGES).passed is True


class OnAGrid(nn.Module):
    """Rounds its weights to a grid; they lie half way between two steps, where float64 rounds the other way."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randint(-40, 41, (8, 3, 3, 3), generator=generator).float() * 0.05)
        self.step = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return F.conv2d(x, torch.round(self.weight / self.step).clamp(-128, 127) * self.step, padding=1)


def test_weights_that_a_forward_rounds_are_those_of_the_model():
    model = OnAGrid()
    in_float32 = torch.round(model.weight / model.step).clamp(-128, 127) * model.step
    wide = model.weight.double(), model.step.double()
    in_float64 = torch.round(wide[0] / wide[1]).clamp(-128, 127) * wide[1]
    assert (in_float32 - in_float64).abs().max() > 0.09, "the example must be at the edge"
    right, wrong = (nn.Conv2d(3, 8, 3, padding=1, bias=False) for _ in range(2))
    with torch.no_grad():
        right.weight.copy_(in_float32)
        wrong.weight.copy_(in_float64)
    assert verify(model, right, IMAGES).passed
    evidence = verify(model, wrong, IMAGES)
    assert not evidence.passed
    assert evidence.relative > 1e-3


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize(
    "make", [lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), lambda: Lstm()]
)
def test_a_model_whose_operations_cannot_be_seen_is_copied(make):
    model = make().eval()
    found, was_copied = exact(model, IMAGES[0])
    assert was_copied
    assert found.dtype is torch.float64
    torch.testing.assert_close(found.float(), model(IMAGES[0]).detach(), rtol=1e-5, atol=1e-5)


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(10, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, 0])[0]


def test_what_a_model_raises_on_wrong_inputs_is_not_blamed_on_float64():
    with isolated_eval(net()), pytest.raises(RuntimeError, match="channels"):
        Float64Runner(net(), "the model")(Call((torch.ones(1, 5, 9, 9, dtype=torch.float64),)))

    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.float64:
                raise ValueError("never")
            return x

    with pytest.raises(UsageError, match=r"^The model cannot run in float64 on these inputs \(never\): wrap it"):
        Float64Runner(Picky(), "the model")(Call((torch.ones(1, dtype=torch.float64),)))


def test_the_mode_is_local_to_the_thread():
    found = []
    with Float64Mode(torch.float64):
        thread = threading.Thread(
            target=lambda: found.append((torch.ones(1).dtype, torch.ones(1).double().float().dtype))
        )
        thread.start()
        thread.join()
        assert torch.ones(1).dtype is torch.float64
        assert torch.arange(3).dtype is torch.int64
    assert found == [(torch.float32, torch.float32)]
    assert torch.ones(1).dtype is torch.float32


@pytest.mark.parametrize("how", ["part", "whole", "in place"])
def test_compiled_parts_run_eagerly(how):
    def refuse(*_):
        raise AssertionError("nothing must be compiled")

    model = net().eval()
    compiled = net().eval()
    if how == "part":
        compiled.first = torch.compile(compiled.first, backend=refuse)
    elif how == "whole":
        compiled = torch.compile(compiled, backend=refuse)
    else:
        compiled.first.compile(backend=refuse)
    found, was_copied = exact(compiled, IMAGES[0])
    assert not was_copied
    torch.testing.assert_close(found, exact(model, IMAGES[0])[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 7, 3, padding=1, stride=2), (2, 4, 6, 5)),
        (nn.Conv2d(4, 7, 3, bias=False), (4, 6, 5)),
        (nn.Conv1d(4, 7, 3, padding="same"), (2, 4, 6)),
        (nn.Conv3d(2, 7, 1), (1, 2, 3, 4, 5)),
        (nn.Linear(4, 7), (2, 5, 4)),
        (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 5)),
    ],
)
def test_large_kernels_are_converted_in_parts(layer, shape, monkeypatch):
    x = torch.randn(shape, dtype=torch.float64)
    expected = copy.deepcopy(layer).double()(x)
    monkeypatch.setattr(float64, "_NUMBERS_PER_PART", 8)
    with Float64Mode(torch.float32):
        torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("function", "shape", "kernel", "geometry"),
    [
        (F.conv1d, (2, 4, 9), (4, 1, 3), (2, 1)),
        (F.conv2d, (2, 4, 9, 11), (4, 1, 3, 5), (1, (1, 2))),
        (F.conv2d, (1, 4, 12, 10), (4, 1, 3, 2), ((2, 3), (0, 4), (3, 2))),
        (F.conv3d, (1, 4, 5, 6, 7), (4, 1, 1, 2, 3), (1, [0], 2)),
    ],
)
def test_depthwise_convolutions_are_sums_over_their_taps(function, shape, kernel, geometry, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(kernel, generator=g).to(dtype), torch.randn(4, generator=g).to(dtype)
    stride, padding, dilation = (*geometry, 1)[:3]
    arguments = (stride, padding, dilation, 4)
    expected = function(x, weight.double(), bias.double(), *arguments)
    with Float64Mode(dtype) as mode:
        found = function(x, weight, bias, *arguments)
    assert mode._depthwise(x, weight, bias, *arguments) is not None
    # Sums of at most 15 products of numbers below 6.
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * 36 * 16 * torch.finfo(torch.float64).eps)
    for other in (("same",), (0, 1, 2)):  # PyTorch computes these
        assert mode._depthwise(x, weight, bias, 1, *other) is None
