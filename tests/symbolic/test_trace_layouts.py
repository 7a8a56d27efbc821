"""Modules on vectors, rows, sequences and volumes: traced, or refused with a reason."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from repvgg import equivalent_conv, trace
from repvgg.collapse.plain_conv import to_module
from repvgg.collapse.report import describe
from repvgg.errors import NotLinearError, ReparamError, UsageError
from repvgg.symbolic import IMAGES, ROWS, SEQUENCES, VECTORS, VOLUMES, Layout, Source, SymbolicTensor, channels_of

EXACT = {"rtol": 1e-12, "atol": 1e-12}
ROWS_OF_3 = Layout(3, rows=True)
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
SIZES = {1: (17,), 2: (13, 11), 3: (7, 9, 8)}
LAYOUTS = {1: SEQUENCES, 2: IMAGES, 3: VOLUMES}
SPATIAL = pytest.mark.parametrize("n", [1, 2, 3])


def trained(module):
    g = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.copy_(torch.randn(part.num_features, generator=g))
            part.running_var.copy_(torch.rand(part.num_features, generator=g) * 3 + 0.1)
            part.weight.data.copy_(torch.randn(part.num_features, generator=g) + 0.5)
            part.bias.data.copy_(torch.randn(part.num_features, generator=g))
    return module.double().eval()


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def function(forward, **children):
    class Module(nn.Module):
        def forward(self, x):
            return forward(self, x)

    module = Module()
    for name, child in children.items():
        setattr(module, name, child)
    return trained(module)


def linear_norm(m, x):
    x = m.linear(x)
    return m.bn(x.flatten(0, 1)).reshape_as(x)


@SPATIAL
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_branches_of_convolutions_and_norms(n, stride, groups, mode):
    parts = {
        "large": CONVS[n](4, 4, 3, stride, 2, 2, groups, padding_mode=mode),
        "small": CONVS[n](4, 4, 1, stride, groups=groups, bias=False),
        "norm": NORMS[n](4),
        "last": NORMS[n](4),
    }
    block = function(lambda m, x: m.last(m.norm(m.large(x)) + m.small(x)), **parts)
    conv, x = trace(block), numbers(2, 4, *SIZES[n])
    assert (conv.spatial, conv.groups, conv.stride) == (n, groups, (stride,) * n)
    assert_close(conv(x), block(x), **EXACT)
    plain = to_module(conv, next(block.parameters()), LAYOUTS[n])
    assert type(plain) is CONVS[n]
    assert_close(plain(x), block(x), **EXACT)


@SPATIAL
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_padding_forms_pools_slices_and_stacks(n, padding):
    def forward(m, x):
        y = m.conv(F.pad(x, [1, 2] * n)) * m.scale
        y = torch.cat((y[:, 1:3], y.narrow(1, -2, 2), *y.split((3, 1), 1)), 1)
        y = y[(..., *(slice(1, -1, 2),) * n)]
        return m.pool(m.drop(y)) - m.scale[:1]

    parts = {"conv": CONVS[n](4, 4, 2, padding=padding), "pool": POOLS[n](2, 1), "drop": nn.Dropout()}
    module = function(forward, scale=nn.Parameter(numbers(4, *(1,) * n)), **parts)
    x = numbers(2, 4, *SIZES[n])
    assert_close(trace(module)(x), module(x), **EXACT)


def test_linear_and_norm_on_vectors():
    module = trained(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Dropout(), nn.BatchNorm1d(4)))
    x = numbers(7, 6)
    conv = trace(module, layout=VECTORS)
    assert_close(conv(x), module(x), **EXACT)
    plain = to_module(conv, torch.zeros(1, dtype=torch.float64), VECTORS)
    assert type(plain) is nn.Linear
    assert_close(plain(x), module(x), **EXACT)
    for sample in (module, module[1:]):
        with pytest.raises(NotLinearError, match="shape of the input is not known"):
            trace(sample)


def test_linear_on_rows_of_any_rank():
    def forward(m, x):
        y = m.first(x) * m.gamma + m.second(x)
        y = torch.cat((y, m.first(x)), -1)[..., 1:7] / 2
        return torch.cat([part.neg() for part in y.chunk(2, -1)], dim=-1) + 0.5

    module = function(
        forward, first=nn.Linear(6, 4), second=nn.Linear(6, 4, bias=False), gamma=nn.Parameter(numbers(4))
    )
    conv = trace(module)
    for x in (numbers(5, 6), numbers(2, 3, 6), numbers(2, 3, 5, 6), numbers(6)):
        assert_close(conv(x), module(x), **EXACT)


def test_levit_linear_norm():
    module = function(linear_norm, linear=nn.Linear(6, 4, bias=False), bn=nn.BatchNorm1d(4))
    x = numbers(3, 5, 6)
    conv = trace(module, layout=ROWS_OF_3)
    assert conv.spatial == 0
    assert_close(conv(x), module(x), **EXACT)
    for layout in (None, ROWS):
        with pytest.raises(NotLinearError, match="shape of the input is not known"):
            trace(module, layout=layout)


def test_timm_levit_linear_norm():
    levit = pytest.importorskip("timm.models.levit")
    module, x = trained(levit.LinearNorm(6, 4)), numbers(3, 5, 6)
    assert_close(trace(module, layout=ROWS_OF_3)(x), module(x), **EXACT)


@pytest.mark.parametrize(
    ("forward", "layout", "reason"),
    [
        (lambda m, x: m.linear(x).flatten(0, 1), ROWS_OF_3, "axes of its output"),
        (lambda m, x: m.linear(x).flatten(1), ROWS_OF_3, "merges channels with pixels"),
        (lambda m, x: m.linear(x).flatten(0, 1), Layout(4, rows=True), "axes of its output"),
        (lambda m, x: m.linear(x).flatten(0, 1), ROWS, "not known"),
        (lambda m, x: m.linear(x).flatten(0, 1) + m.linear(x), ROWS_OF_3, "different layouts"),
        (lambda m, x: m.linear(x).reshape_as(x), ROWS_OF_3, "does not keep the channels"),
        (lambda m, x: m.linear(x).reshape(-1, 4), ROWS_OF_3, "axes of its output"),
        (lambda m, x: m.linear(x).reshape(-1, 2), ROWS_OF_3, "does not keep the channels"),
        (lambda m, x: m.bn(m.linear(x)), ROWS_OF_3, "are the last axis"),
        (lambda m, x: F.batch_norm(m.linear(x), m.bn.running_mean, m.bn.running_var), ROWS, "not known"),
        (lambda m, x: m.linear(x) * torch.ones(1, 1, 4), ROWS, "one number per channel"),
        (lambda m, x: m.linear(x) * torch.ones(5, 1), ROWS_OF_3, "one number per channel"),
        (lambda m, x: torch.cat((m.linear(x), x), 1), ROWS_OF_3, "concatenation"),
        (lambda m, x: m.linear(x)[:, 1:], ROWS_OF_3, "slices"),
        (lambda m, x: m.linear(x)[:, :, 1:], ROWS, "slices"),
        (lambda m, x: F.pad(m.linear(x), (1, 1)), ROWS, "padding of channels"),
        (lambda m, x: m.linear(x), IMAGES, "takes another axis for the channels"),
        (lambda m, x: F.linear(x, torch.ones(6)), ROWS, "removes an axis"),
        (lambda m, x: m.linear(x) + (x.shape[0] + 1), ROWS, "not known"),
        (lambda m, x: m.linear(x) if len(x.shape) == 3 else x, ROWS, "not known"),
        (lambda m, x: F.conv1d(x, torch.ones(4, 6, 1)), VECTORS, "takes another axis for the channels"),
        (lambda m, x: F.avg_pool1d(x, 2), IMAGES, "takes another axis for the channels"),
    ],
)
def test_refusals(forward, layout, reason):
    module = function(forward, linear=nn.Linear(6, 4), bn=nn.BatchNorm1d(4))
    with pytest.raises(NotLinearError, match=reason):
        trace(module, 6, layout)


@pytest.mark.parametrize("layout", [SEQUENCES, IMAGES, VOLUMES])
def test_an_operand_along_the_width_is_refused(layout):
    symbol = SymbolicTensor.of(Source(), 4, layout=layout)
    for operation in (torch.mul, torch.add):
        with pytest.raises(NotLinearError, match="one number per channel"):
            operation(symbol, torch.ones(4))
    fits = torch.ones(4, *(1,) * layout.spatial)
    assert (symbol * fits + fits).map.out_channels == 4


def test_constants_of_each_rank_that_fits_rows():
    symbol = SymbolicTensor.of(Source(), 4, layout=ROWS_OF_3)
    x, vector = numbers(2, 3, 4), numbers(4)
    for constant in (vector, vector.view(1, 4), vector.view(1, 1, 4), torch.tensor(2.0)):
        assert_close((symbol * constant).map(x), x * constant, **EXACT)


def test_known_part_of_a_shape():
    for layout, rank, place in ((IMAGES, 4, 1), (SEQUENCES, 3, 1), (VOLUMES, 5, 1), (VECTORS, 2, 1), (ROWS_OF_3, 3, 2)):
        symbol = SymbolicTensor.of(Source(), 7, layout=layout)
        assert (symbol.dim(), symbol.ndim, len(symbol.shape), symbol.size(place)) == (rank, rank, rank, 7)
        assert layout.is_channel_axis(place)
        assert layout.is_channel_axis(place - rank)
    rows = SymbolicTensor.of(Source(), 7, layout=ROWS)
    assert rows.shape[-1] == rows.size(-1) == 7
    for ask in (lambda: rows.dim() == 3, lambda: len(rows.shape), lambda: rows.size(1) + 1, lambda: list(rows.shape)):
        with pytest.raises(NotLinearError, match="shape of the input is not known"):
            ask()
    assert Layout(2, rows=True) == VECTORS
    assert list(map(str, (IMAGES, ROWS, VECTORS, ROWS_OF_3))) == ["(N, C, H, W)", "(..., C)", "(N, C)", "(·, ·, C)"]
    for wrong in ((None,), (1,), (6,), (0, True)):
        with pytest.raises(UsageError):
            Layout(*wrong)


@pytest.mark.parametrize(
    ("module", "answer"),
    [
        (nn.Conv1d(4, 2, 3, groups=2), (4, SEQUENCES)),
        (nn.Conv2d(4, 2, 3), (4, IMAGES)),
        (nn.Conv3d(4, 2, 3), (4, VOLUMES)),
        (nn.Linear(5, 2), (5, ROWS)),
        (nn.BatchNorm2d(6), (6, IMAGES)),
        (nn.BatchNorm3d(6), (6, VOLUMES)),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Conv1d(6, 2, 1)), (6, SEQUENCES)),
        (nn.Sequential(nn.AvgPool1d(2), nn.BatchNorm1d(6)), (6, SEQUENCES)),
        (nn.Sequential(nn.BatchNorm3d(6), nn.ReLU()), (6, VOLUMES)),
    ],
)
def test_inference_of_the_input_from_a_forward(module, answer):
    assert channels_of(module.eval()) == answer


def test_batch_norm_alone_does_not_determine_the_layout():
    functional = function(lambda m, x: F.batch_norm(x, m.bn.running_mean, m.bn.running_var), bn=nn.BatchNorm2d(4))
    for module in (nn.BatchNorm1d(4).eval(), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval(), functional):
        with pytest.raises(NotLinearError, match="shape of the input is not known"):
            trace(module)
    norm = trained(nn.BatchNorm1d(4))
    for layout, x in ((VECTORS, numbers(5, 4)), (SEQUENCES, numbers(5, 4, 3))):
        assert_close(trace(norm, layout=layout)(x), norm(x), **EXACT)
        assert_close(trace(norm, 4, layout)(x), norm(x), **EXACT)
    assert trace(nn.AvgPool3d(2), 5).spatial == 3


def test_slice_before_a_convolution_of_any_rank():
    for n in (1, 2, 3):
        index = (slice(None), slice(None), *(slice(None, None, 2),) * n)
        module = function(lambda m, x, index=index: m.conv(x[index]), conv=CONVS[n](4, 3, 1))
        x = numbers(2, 4, *SIZES[n])
        assert_close(trace(module)(x), module(x), **EXACT)
    sliced = function(lambda m, x: m.linear(x[:, :, ::2]), linear=nn.Linear(4, 4))
    with pytest.raises(NotLinearError):
        trace(sliced)


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (nn.Sequential(nn.Conv1d(4, 3, 3, bias=False), nn.BatchNorm1d(3)), None),
        (nn.Sequential(nn.Conv3d(2, 3, 2, bias=False), nn.BatchNorm3d(3)), None),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), VECTORS),
    ],
)
def test_gradients_of_the_equivalent_map(module, layout):
    module = trained(module)
    parameters = dict(module.named_parameters())

    class Equivalent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = module

        def forward(self):
            return tuple(equivalent_conv(self.block, layout=layout))

    def kernel_and_bias(*values):
        named = dict(zip((f"block.{name}" for name in parameters), values, strict=True))
        return torch.func.functional_call(Equivalent(), named, ())

    assert torch.autograd.gradcheck(kernel_and_bias, tuple(p.detach().requires_grad_() for p in parameters.values()))


def test_half_precision_kernels_are_converted_once():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).half().eval()
    weight, bias = equivalent_conv(module)
    assert (weight.dtype, weight.shape, bias.shape) == (torch.float16, (2, 4), (2,))
    exact = module[1].weight.double() @ module[0].weight.double()
    assert_close(weight, exact.half(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "layout", "text"),
    [
        (nn.Linear(64, 128), ROWS, "linear 64→128"),
        (nn.Conv1d(4, 8, 5, 2), SEQUENCES, "5-tap conv 4→8, stride 2"),
        (nn.Conv2d(4, 8, (3, 1), (2, 1), groups=2), IMAGES, "3x1 conv 4→8, stride 2x1, 2 groups"),
        (nn.Conv3d(4, 8, 3, dilation=2), VOLUMES, "3x3x3 conv 4→8, dilation 2"),
    ],
)
def test_modules_and_their_descriptions(module, layout, text):
    conv = trace(module.eval())
    assert describe(conv) == text
    state = torch.random.get_rng_state()
    again = to_module(conv, module.weight, layout, requires_grad=False)
    assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)
    assert type(again) is type(module)
    assert not any(p.requires_grad for p in again.parameters())
    assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_maps_without_a_module_raise():
    conv = trace(function(lambda m, x: x * m.gamma, gamma=nn.Parameter(numbers(4))), 4, VECTORS)
    with pytest.raises(ReparamError, match="groups"):
        to_module(conv, torch.zeros(1), VECTORS)
    with pytest.raises(UsageError, match="axes"):
        to_module(conv, torch.zeros(1), IMAGES)


def test_memory_format_of_volumes():
    conv = nn.Conv3d(4, 8, 3).to(memory_format=torch.channels_last_3d).eval()
    again = to_module(trace(conv), conv.weight, VOLUMES)
    assert again.weight.is_contiguous(memory_format=torch.channels_last_3d)
    for first, second in itertools.pairwise((conv.weight, again.weight)):
        assert first.stride() == second.stride()
