"""The compiled passes compared with the definition: output, gradients, running statistics and counters."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from repvgg.blocks import BranchSum, ConvBN, RepVGGBlock, rep_conv, training_kernels
from tests.blocks.helpers import images, is_fused, randomize_norms, training_step

pytestmark = pytest.mark.usefixtures("compiled")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def assert_equal_results(fused, plain, rtol, atol):
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        assert_close(fused[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def block(in_channels, out_channels, stride=1, groups=1, act=True, **options):
    conv = rep_conv(in_channels, out_channels, stride, groups, **options)
    return RepVGGBlock(conv, nn.ReLU() if act else nn.Sigmoid())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"kernel_size": 1}, {"kernel_size": (5, 3)}])
def test_geometries(layout, stride, groups, options):
    module = randomize_norms(block(6, 6, stride, groups, **options)).double()
    x = images(6, layout=LAYOUTS[layout])
    assert is_fused(module(x))
    assert_equal_results(training_step(module, x), training_step(module, x, "eager"), 1e-9, 1e-10)


@settings(max_examples=40)
@given(
    channels=st.sampled_from([(1, 1), (3, 5), (7, 7), (8, 16), (17, 17), (33, 33)]),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    layout=st.sampled_from(list(LAYOUTS)),
    mode=st.sampled_from(["zeros", "replicate"]),
    momentum=st.sampled_from([0.1, 0.37, None]),
    affine=st.booleans(),
    tracked=st.booleans(),
    act=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_batch_norm_setting(channels, size, layout, mode, momentum, affine, tracked, act, seed):
    module = block(*channels, act=act, padding_mode=mode)
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.BatchNorm2d):
                options = {"momentum": momentum, "affine": affine, "track_running_stats": tracked, "eps": 1e-3}
                setattr(parent, name, nn.BatchNorm2d(part.num_features, **options))
    module = randomize_norms(module, seed).double()
    x = images(channels[0], size, count=3, layout=LAYOUTS[layout], seed=seed)
    assert_equal_results(training_step(module, x), training_step(module, x, "eager"), 1e-9, 1e-9)


def test_layout_and_dtype_match_the_definition():
    for layout in LAYOUTS.values():
        for amp in (False, True):
            module = randomize_norms(block(5, 5))
            x = images(5, dtype=torch.bfloat16 if amp else torch.float32, layout=layout)
            fused, plain = training_step(module, x, amp=amp), training_step(module, x, "eager", amp=amp)
            for name, value in plain.items():
                assert fused[name].dtype == value.dtype, name
                assert fused[name].stride() == value.stride() or name not in ("out", "x"), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2])
def test_rounding_error_is_no_larger_than_the_definitions(layout, amp, stride):
    """Compare the RMS error of output, gradients and statistics over several blocks."""
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        module = randomize_norms(block(24, 24, stride), seed)
        dtype = torch.bfloat16 if amp else torch.float32
        x = images(24, (13, 11), count=8, dtype=dtype, layout=LAYOUTS[layout], seed=seed)
        exact = training_step(module.double(), x.double(), "eager")
        module.float()
        values = {name: value for name, value in exact.items() if "tracked" not in name}
        for kernels in ("compiled", "eager"):
            found = training_step(module, x, kernels, amp=amp)
            parts = [(found[name].double() - value).norm() / value.norm() for name, value in values.items()]
            errors.append(torch.stack(parts))
    fused, plain = (torch.stack(errors[k::2]).square().mean(0).sqrt() for k in (0, 1))
    assert float((fused / plain).mean()) < 1.05
    assert float((fused / plain).max()) < 1.5


def test_large_means_lose_no_precision():
    module = randomize_norms(BranchSum({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3)}))
    x = images(3, count=64) * 1e-2 + 1e3
    exact = training_step(module.double(), x, "eager")["out"]
    found = training_step(module.float(), x.float())["out"]
    assert_close(
        found.double(), training_step(module.double(), x.float().double(), "eager")["out"], rtol=1e-2, atol=1e-2
    )
    assert exact.std() > 0.3


def test_hand_computed_example():
    """One channel, four values 1, 2, 3, 6 (mean 3, variance 3.5), twice: 2 (y - 3) / sqrt(3.5 + eps) + 1."""
    one, two = nn.BatchNorm2d(1, eps=0.5), nn.BatchNorm2d(1, eps=0.5)
    one.bias.data.fill_(1.0)
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(2, 1, 1, 2)
    out = BranchSum({"one": one, "two": two})(x)
    assert_close(out.flatten(), torch.tensor([-1.0, 0.0, 1.0, 4.0]))
    assert_close(one.running_mean, torch.tensor([0.3]))
    assert_close(one.running_var, torch.tensor([0.9 + 0.1 * 14 / 3]))
    assert int(one.num_batches_tracked) == 1


def test_nan_propagates():
    module = randomize_norms(block(4, 4))
    x = images(4, dtype=torch.float32)
    x[0, 1, 2, 3] = float("nan")
    assert module(x).isnan().any()
    assert training_step(module, x)["conv.identity.running_mean"].isnan().tolist() == [False, True, False, False]


def test_gradients_of_gradients():
    module = randomize_norms(block(4, 4, groups=2)).double()
    x = images(4, (3, 4)).requires_grad_()
    assert torch.autograd.gradgradcheck(module, x)


def test_second_backward_gives_the_same_gradients():
    module = randomize_norms(block(6, 6)).double()
    x = images(6).requires_grad_()
    out = module(x)
    first = torch.autograd.grad(out.square().sum(), [x, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    for a, b in zip(first, second, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_frozen_parameters_get_no_gradient_and_affect_no_other():
    module = randomize_norms(block(6, 6)).double()
    whole = training_step(module, images(6))
    for name in ("conv.dense.conv.weight", "conv.pointwise.bn.weight", "conv.identity.bias"):
        module.get_parameter(name).requires_grad_(False)
    assert is_fused(copy.deepcopy(module)(images(6)))
    some = training_step(module, images(6))
    assert {name for name in whole if some[name] is None} == {
        "conv.dense.conv.weight",
        "conv.pointwise.bn.weight",
        "conv.identity.bias",
    }
    for name, value in some.items():
        if value is not None:
            assert_close(value, whole[name], rtol=1e-12, atol=1e-12)


def test_bfloat16_models_keep_their_dtypes():
    module = randomize_norms(block(8, 8)).bfloat16()
    x = images(8, dtype=torch.bfloat16)
    assert is_fused(module(x))
    fused, plain = training_step(module, x), training_step(module, x, "eager")
    assert {name: value.dtype for name, value in fused.items()} == {name: value.dtype for name, value in plain.items()}
    assert_close(fused["conv.identity.running_var"], plain["conv.identity.running_var"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_results_are_deterministic(layout, threads):
    module = randomize_norms(block(32, 32))
    x = images(32, (40, 41), count=4, dtype=torch.float32, layout=LAYOUTS[layout])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = training_step(module, x), training_step(module, x)
    finally:
        torch.set_num_threads(before)
    assert_equal_results(first, second, 0, 0)


def test_no_grad_mode_updates_statistics():
    module = randomize_norms(block(6, 6)).double()
    wanted = training_step(module, images(6), "eager")
    with torch.no_grad(), training_kernels("compiled"):
        out = module(images(6))
    assert_close(out, wanted["out"])
    assert_close(module.conv["dense"].bn.running_mean, wanted["conv.dense.bn.running_mean"])


def test_convolutions_with_bias():
    module = randomize_norms(
        BranchSum({"a": ConvBN(nn.Conv2d(3, 4, 3, bias=True)), "b": ConvBN(nn.Conv2d(3, 4, 3))})
    ).double()
    x = images(3)
    assert is_fused(module(x))
    assert_equal_results(training_step(module, x), training_step(module, x, "eager"), 1e-9, 1e-9)
