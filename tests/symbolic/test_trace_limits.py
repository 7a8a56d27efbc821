"""Modules that are not one convolution are refused with a reason; tracing does not modify anything."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from repvgg import ConvMap, equivalent_conv, trace
from repvgg.blocks import rep_conv
from repvgg.errors import BorderError, MissingStatisticsError, NotLinearError, TrainingModeError
from repvgg.symbolic import IMAGES, Source, SymbolicTensor


def function(forward, **children):
    """Return a module with the given forward and children."""

    class Module(nn.Module):
        def forward(self, x):
            return forward(self, x)

    module = Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module.eval()


CONV = {"conv": nn.Conv2d(4, 4, 3, padding=1)}


@pytest.mark.parametrize(
    ("module", "error", "reason"),
    [
        (function(lambda m, x: F.relu(m.conv(x)), **CONV), NotLinearError, "relu is not a linear"),
        (function(lambda m, x: m.conv(x) * m.conv(x), **CONV), NotLinearError, "product"),
        (function(lambda m, x: 1 / m.conv(x), **CONV), NotLinearError, "division"),
        (function(lambda m, x: m.conv(x).mean((2, 3)), **CONV), NotLinearError, "axes of its output"),
        (function(lambda m, x: m.conv(x).mean(1), **CONV), NotLinearError, "mean over the channels"),
        (function(lambda m, x: m.conv(x) if x.sum() > 0 else x, **CONV), NotLinearError, "sum"),
        (function(lambda m, x: m.conv(x) if m.conv(x) else x, **CONV), NotLinearError, "control flow depends"),
        (function(lambda m, x: m.conv(x)[:, :, : x.shape[2] // 2], **CONV), NotLinearError, "size of the image"),
        (function(lambda m, x: m.conv(x)[:, :, :4], **CONV), NotLinearError, "size of the image"),
        (function(lambda m, x: m.conv(x)[0], **CONV), NotLinearError, "slices"),
        (function(lambda m, x: m.conv(x) + torch.arange(4.0), **CONV), NotLinearError, "one number per channel"),
        (function(lambda m, x: torch.cat([m.conv(x)] * 2, 2), **CONV), NotLinearError, "concatenation"),
        (function(lambda m, x: [m.conv(x)], **CONV), NotLinearError, "not one tensor"),
        (
            function(lambda m, x: F.conv2d(x, F.conv2d(x, m.conv.weight)), **CONV),
            NotLinearError,
            "depends on the image",
        ),
        (function(lambda m, x: m.conv(x).undefined(), **CONV), NotLinearError, "AttributeError"),
        (
            function(lambda m, x: m.conv(F.interpolate(x, scale_factor=2)), **CONV),
            NotLinearError,
            "is not known before",
        ),
        (function(lambda m, x: x.add_(m.conv(x)), **CONV), NotLinearError, "in place"),
        (function(lambda m, x: x[:, :2].mul_(2), **CONV), NotLinearError, "is not known before"),
        (function(lambda m, x: x + 1), NotLinearError, "no convolution and no batch norm"),
        (function(lambda m, x: m.conv(F.pad(x, (1, 1), value=2.0)), **CONV), BorderError, "padded with 2"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)), BorderError, "leaks"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(2, ceil_mode=True)), BorderError, "ceil mode"),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
            BorderError,
            "does not count the padding",
        ),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            MissingStatisticsError,
            "runn",
        ),
    ],
)
def test_refusals(module, error, reason):
    with pytest.raises(error, match=reason):
        trace(module.eval())


def test_training_mode_is_named():
    block = rep_conv(4, 4).eval()
    block["pointwise"].bn.train()
    with pytest.raises(TrainingModeError, match=r"'pointwise\.bn' \(BatchNorm2d\)"):
        trace(block)
    with pytest.raises(TrainingModeError, match=r"'1' \(Dropout\)"):
        trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout()))
    functional = function(lambda m, x: F.batch_norm(m.conv(x), torch.zeros(4), torch.ones(4), training=True), **CONV)
    with pytest.raises(TrainingModeError, match="training mode"):
        trace(functional)


def test_in_place_functions_are_visible_through_aliases():
    def forward(m, x):
        y = m.conv(x)
        alias = y
        y += x
        y.mul_(2)
        return alias - m.conv(x)

    module = function(forward, conv=nn.Conv2d(4, 4, 3, padding=1)).double()
    x = torch.randn(1, 4, 7, 6, dtype=torch.float64)
    assert_close(trace(module)(x), module(x), rtol=1e-12, atol=1e-12)


def test_views_and_writes():
    """A write to a view reaches its base: what is read from the base afterwards is refused, not computed wrongly."""

    def write_to_view(m, x):
        return m.conv(x)[:, :2].mul_(2)

    def read_before_write(m, x):
        y = m.conv(x)
        first, copied = y[:, :2] + 1, y.clone()
        y *= 2
        return torch.cat((y[:, 2:], first, copied - y), 1)

    x = torch.randn(1, 4, 7, 6, dtype=torch.float64)
    for forward in (write_to_view, read_before_write):
        module = function(forward, conv=nn.Conv2d(4, 4, 3, padding=1)).double()
        assert_close(trace(module)(x), module(x), rtol=1e-12, atol=1e-12)

    def read_base(m, x):
        y = m.conv(x)
        y[:, :2].mul_(2)
        return y

    def read_view(m, x):
        y = m.conv(x)
        view = y.contiguous()
        y += 1
        return view

    def write_to_view_of_input(m, x):
        x[:, :2].add_(m.conv(x)[:, :2])
        return m.conv(x)

    for forward, reason in ((read_base, "modified in place"), (read_view, "modified in place")):
        with pytest.raises(NotLinearError, match=reason):
            trace(function(forward, conv=nn.Conv2d(4, 4, 3, padding=1)))
    with pytest.raises(NotLinearError, match="input, or a view of it"):
        trace(function(write_to_view_of_input, conv=nn.Conv2d(4, 4, 3, padding=1)), 4, IMAGES)


def test_two_inputs_are_not_merged():
    a, b = (SymbolicTensor.of(Source(), 4) for _ in range(2))
    with pytest.raises(NotLinearError, match="two different tensors"):
        a + b


def test_given_number_of_channels_must_fit():
    pool = nn.AvgPool2d(2)
    assert trace(pool, in_channels=5).in_channels == 5
    with pytest.raises(NotLinearError, match="3 channels do not fit"):
        trace(nn.Conv2d(4, 4, 1), in_channels=3)


def test_module_is_not_modified():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.cache, self.last = nn.Conv2d(4, 4, 3), {}, None

        def forward(self, x):
            self.last = x
            self.cache["x"] = x
            return self.conv(x)

    module = Caches().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.random.get_rng_state()
    trace(module)
    assert module.last is None
    assert module.cache == {}
    assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)


def test_computed_weights_are_computed_in_float64():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)

    conv = Standardized(4, 4, 3).eval()
    reference = Standardized(4, 4, 3).double().eval()
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(1, 4, 7, 6, dtype=torch.float64)
    assert_close(trace(conv)(x), reference(x), rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    block = rep_conv(3, 3, groups=3).double().eval()
    for norm in (block["dense"].bn, block["pointwise"].bn, block["identity"]):
        norm.running_var.uniform_(0.5, 2)
        norm.running_mean.uniform_(-1, 1)
    parameters = dict(block.named_parameters())

    def kernel_and_bias(*values):
        return torch.func.functional_call(
            _Equivalent(block), dict(zip((f"block.{n}" for n in parameters), values, strict=True)), ()
        )

    assert torch.autograd.gradcheck(kernel_and_bias, tuple(p.detach().requires_grad_() for p in parameters.values()))


class _Equivalent(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self):
        return tuple(equivalent_conv(self.block))


def test_result_has_a_one_line_repr():
    conv = trace(nn.Conv2d(4, 6, 3, 2, 1, groups=2).eval())
    assert isinstance(conv, ConvMap)
    assert repr(conv) == "ConvMap(4→6, 3x3, stride=(2, 2), padding=(1, 1, 1, 1), groups=2, bias)"
