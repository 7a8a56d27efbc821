"""Layouts other than images: one, three or no spatial axes, channels last; and transposed convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import repvgg
from repvgg.errors import NothingFoldedWarning
from tests.collapse.models import Linear2d, conv, module, trained

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = (7, 5, 6)


def given(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).add(0.5).to(dtype)


def same(model, x, inputs=None, dtype=torch.float64):
    """Collapse, compare, and check that nothing was skipped."""
    model, x = trained(model, dtype), x.to(dtype)
    plain, report = repvgg.reparameterize(model, inputs)
    _assert_same(model, plain, x)
    assert report.left == ()
    assert not any(isinstance(part, _BatchNorm) for part in plain.modules())
    assert all(tensor.dtype is dtype for tensor in plain.state_dict().values())
    assert repvgg.is_plain(plain)
    return plain, report


def stays(model, x, inputs=None):
    """Return the reason why nothing was folded."""
    model = trained(model)
    with pytest.warns(NothingFoldedWarning):
        plain, report = repvgg.reparameterize(model, inputs)
    _assert_same(model, plain, x)
    assert len(report.left) == 1
    return report.left[0].reason


def _assert_same(model, plain, x):
    tolerance = TOLERANCE[x.dtype]
    with torch.no_grad():
        expected, found = model(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("geometry", [{"padding": 1, "stride": 2}, {"groups": 2, "bias": False}, {"dilation": 2}])
def test_norm_folds_into_the_previous_convolution(rank, with_inputs, geometry, dtype):
    if rank == 3 and "dilation" in geometry:
        geometry = {"dilation": (1, 2, 1), "padding": (0, 1, 2), "kernel_size": (3, 2, 4)}
    model = nn.Sequential(CONVS[rank](4, 6, **{"kernel_size": 3, **geometry}), NORMS[rank](6), nn.ReLU())
    x = given(2, 4, *SIZES[:rank], dtype=dtype)
    plain, report = same(model, x, x if with_inputs else None, dtype)
    assert [entry.name for entry in report.folded] == ["0"]
    assert type(plain[0]) is CONVS[rank]
    assert plain[0].groups == geometry.get("groups", 1)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("rank", [1, 3])
def test_branches_of_other_ranks(rank, mode):
    big = nn.Sequential(CONVS[rank](4, 4, 5, padding=2, padding_mode=mode, bias=False), NORMS[rank](4))
    small = nn.Sequential(CONVS[rank](4, 4, 1), NORMS[rank](4))
    model = module(lambda self, x: F.relu(self.a(x) + self.b(x) + self.n(x)), a=big, b=small, n=NORMS[rank](4))
    _, report = same(nn.Sequential(model, nn.Tanh()), given(2, 4, *SIZES[:rank]))
    assert [entry.name for entry in report.folded] == ["0.conv"]


def linear(features, norm=6):
    return nn.Sequential(nn.Linear(4, features), nn.BatchNorm1d(norm), nn.ReLU())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_linear_layer_with_its_shape_given(dtype):
    x = given(5, 4, dtype=dtype)
    plain, report = same(linear(6), x, x, dtype)
    assert isinstance(plain[0], nn.Linear)
    assert [entry.name for entry in report.folded] == ["0"]


def test_linear_layer_after_a_function_that_determines_its_shape():
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6))
    _, report = same(nn.Sequential(conv(), *head), given(2, 4, 9, 11))
    assert [entry.name for entry in report.folded] == ["3"]


@pytest.mark.parametrize("size", [(9, 11), (1, 1)])
@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize(
    "before", [(), (nn.ReLU(),), (nn.Conv2d(4, 4, 3, padding=1),)], ids=["input", "relu", "convolution"]
)
def test_pool_to_one_pixel_stays_before_the_convolution_it_feeds(before, with_inputs, size):
    # As the image pooling of DeepLab, PSPNet's 1x1 grid and squeeze-excite with batch norms.
    pool = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    x = given(2, 4, *size)
    plain, _ = same(nn.Sequential(*before, *pool), x, x if with_inputs else None)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert any(isinstance(module, nn.AdaptiveAvgPool2d) for module in plain)


def test_linear_layer_of_unknown_shape_is_skipped():
    reason = stays(linear(6), given(5, 4))
    assert "the shape of the input is not known" in reason


@pytest.mark.parametrize("length", [7, 6])
def test_norm_over_another_axis_than_a_linear_layer_is_skipped(length):
    x = given(5, length, 4)
    assert "at axis 1" in stays(linear(6, length), x, x)
    assert "pass inputs=" in stays(linear(6, length), x)


def test_norm_over_the_first_axis_of_maps_read_by_a_linear_layer_is_skipped():
    layers = (nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
    x = given(2, 4, 6)
    assert "at axis 1" in stays(nn.Sequential(*layers), x, x)
    assert "pass inputs=" in stays(nn.Sequential(*layers), x)


@pytest.mark.parametrize("act", [[nn.ReLU()], pytest.param([])])
def test_maps_without_a_batch_axis_are_skipped(act):
    x = given(4, 6)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), *act)
    stays(model, x, x)


class LinearNorm(nn.Module):
    """As in LeViT."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.bn = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x):
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.projection = LinearNorm(8, 24), nn.Sequential(nn.Hardswish(), LinearNorm(8, 8))
        self.up, self.down = LinearNorm(8, 12), LinearNorm(12, 8)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 2, 12).split([4, 4, 4], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        y = ((q @ k) * 0.5).softmax(-1) @ v
        x = x + self.projection(y.transpose(1, 2).reshape(n, length, 8))
        return x + self.down(F.hardswish(self.up(x)))


def levit():
    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
    head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))
    return module(forward, stem=stem, blocks=nn.Sequential(Attention(), Attention()), head=head)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_attention(with_inputs, dtype):
    model, x = levit(), given(2, 3, 31, 22, dtype=dtype)
    plain, report = same(model, x, x if with_inputs else None, dtype)
    assert len(report.folded) == 10
    assert type(plain.blocks[0]) is Attention
    _assert_same(model, plain, given(3, 3, 17, 26, dtype=dtype))


def test_attention_alone_needs_inputs():
    x = given(2, 9, 8)
    assert len(same(Attention(), x, x)[1].folded) == 4
    with pytest.warns(NothingFoldedWarning):
        _, report = repvgg.reparameterize(trained(Attention()))
    assert {entry.reason for entry in report.left} == {
        "the shape of the input is not known, and a batch norm alone does not determine it: pass inputs="
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", [{"stride": 2, "output_padding": 1}, {"groups": 2, "dilation": 2, "padding": 1}])
def test_a_norm_folds_into_a_transposed_convolution(rank, bias, geometry, dtype):
    first = TRANSPOSED[rank](4, 6, 3, bias=bias, **geometry)
    plain, report = same(nn.Sequential(first, NORMS[rank](6), nn.ReLU()), given(2, 4, *SIZES[:rank]), dtype=dtype)
    assert type(plain[0]) is type(first)
    assert isinstance(plain[1], nn.Identity)
    assert plain[0].output_padding == first.output_padding
    assert [entry.name for entry in report.folded] == ["0"]


def test_scale_after_a_transposed_convolution_folds_too():
    parts = {"t": nn.ConvTranspose2d(4, 6, 3, stride=2), "bn": nn.BatchNorm2d(6)}
    model = module(lambda self, x: F.relu(self.bn(self.t(x)) * self.s), **parts, s=nn.Parameter(torch.rand(6, 1, 1)))
    plain, _ = same(model, given(2, 4, 7, 5))
    assert plain.state_dict().keys() == {"t.weight", "t.bias"}


def test_a_transposed_convolution_and_its_norm_in_two_modules():
    first = module(lambda self, x: self.t(F.relu(x)), t=nn.ConvTranspose2d(4, 4, 3, stride=2))
    second = module(lambda self, x: F.silu(self.bn(x)), bn=nn.BatchNorm2d(4))
    plain, report = same(nn.Sequential(first, second), given(2, 4, 7, 5))
    assert [entry.name for entry in report.folded] == ["0.t"]
    assert isinstance(plain[1].bn, nn.Identity)


def test_transposed_convolution_with_another_reader_is_kept():
    model = module(
        lambda self, x: (lambda y: F.relu(self.bn(y)) + y)(self.t(x)), t=nn.ConvTranspose2d(4, 4, 3), bn=NORMS[2](4)
    )
    stays(model, given(2, 4, 7, 5))


def test_transposed_convolution_called_twice_is_skipped():
    model = module(lambda self, x: F.relu(self.bn(self.t(F.relu(self.t(x))))), t=nn.ConvTranspose2d(4, 4, 3))
    model.bn = nn.BatchNorm2d(4)
    assert stays(model, given(2, 4, 7, 5)) == "its input 't' is not folded: it is used more than once"


def test_transposed_convolutions_between_convolutions():
    layers = (Linear2d(), nn.ConvTranspose2d(4, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), Linear2d())
    _, report = same(nn.Sequential(*layers), given(2, 4, 7, 5))
    assert [entry.name for entry in report.folded] == ["0", "1", "4"]
