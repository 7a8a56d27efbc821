"""Parameter groups by name, SGD and its schedule, and the L2 penalty on equivalent kernels."""

import math
from dataclasses import replace

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.testing import assert_close

from repvgg.blocks import Geometry, create_block
from repvgg.errors import UsageError
from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage, create_model, create_variant
from repvgg.training import OptimConfig, equivalent_l2, fit, learning_rate_factor, parameter_groups
from repvgg.training.optim import build_optimizer, describe_groups, optimizer_groups, repvgg_blocks
from tests.bn_statistics import trained_like
from tests.training.helpers import CONFIG, SPEC, opened, tiny

GATED = ModelSpec(
    "gated", Stage(1, 4, stride=1), (Stage(2, 8),), squeeze_excite=SqueezeExciteSpec("before_relu", 2), auxiliary=(0,)
)
BLOCKS = ["stem", "stages.0.0", "stages.0.1"]
KERNELS = [f"{block}.conv.{branch}.conv.weight" for block in BLOCKS for branch in ("dense", "pointwise")]
OTHER_KERNELS = [
    *(f"{block}.act.se.{layer}.weight" for block in BLOCKS for layer in ("down", "up")),
    "auxiliary.stage0.conv.weight",
    "auxiliary.stage0.head.weight",
    "head.weight",
]
IDENTITY = ["stages.0.1.conv.identity.weight"]
DECAYING = {
    "paper": KERNELS + OTHER_KERNELS,
    "upstream": KERNELS + OTHER_KERNELS + IDENTITY,
    "upstream-2021": KERNELS + OTHER_KERNELS + IDENTITY,
    "no-1d": KERNELS + OTHER_KERNELS,
}


class Scaled(nn.Module):
    """A module with parameters of one and two axes and a norm that is not a batch norm."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.table = nn.Parameter(torch.ones(3, 2))
        self.norm = nn.GroupNorm(1, 3)
        self.layer = nn.Linear(3, 3)


def names(model, group):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize("policy", DECAYING)
def test_groups_by_name(policy):
    model = create_model(GATED, 3, 2)
    decay, rest = parameter_groups(model, 5e-4, policy)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 5e-4)
    assert (rest["name"], rest["weight_decay"]) == ("no decay", 0.0)
    assert sorted(names(model, decay)) == sorted(DECAYING[policy])
    everything = [name for name, _ in model.named_parameters()]
    assert sorted(names(model, decay) + names(model, rest)) == sorted(everything)
    assert names(model, decay) == [name for name in everything if name in DECAYING[policy]]


@pytest.mark.parametrize(
    ("policy", "decaying"),
    [
        ("paper", ["layer.weight"]),
        ("upstream", ["table", "layer.weight"]),
        ("upstream-2021", ["gain", "table", "layer.weight"]),
        ("no-1d", ["table", "layer.weight"]),
    ],
)
def test_parameters_of_other_modules(policy, decaying):
    model = Scaled()
    assert names(model, parameter_groups(model, 0.1, policy)[0]) == decaying


@pytest.mark.parametrize("model", [create_model(GATED, 3, 2), Scaled(), tiny()])
def test_no_1d_agrees_with_timm(model):
    theirs = {group["weight_decay"]: names(model, group) for group in param_groups_weight_decay(model, 0.3)}
    decay, rest = parameter_groups(model, 0.3, "no-1d")
    assert names(model, decay) == theirs[0.3]
    assert names(model, rest) == theirs[0.0]


def test_shared_parameters_are_grouped_once_and_frozen_ones_left_out():
    layer, frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
    decay, rest = parameter_groups(nn.Sequential(layer, frozen, layer), 0.1)
    assert [id(parameter) for parameter in decay["params"]] == [id(layer.weight)]
    assert [id(parameter) for parameter in rest["params"]] == [id(layer.bias)]


def test_unknown_policy():
    with pytest.raises(UsageError, match="'none': choose one of paper, upstream, upstream-2021, no-1d"):
        parameter_groups(nn.Linear(1, 1), 0.1, "none")


def test_groups_as_text():
    layer = nn.Sequential(nn.Conv2d(2, 300, 3), nn.BatchNorm2d(300))
    assert describe_groups(parameter_groups(layer, 1e-4)) == [
        "decay: 5,400 parameters in 1 tensors, weight decay 0.0001",
        "no decay: 900 parameters in 3 tensors",
    ]
    layers = nn.Sequential(layer, nn.BatchNorm2d(5))
    assert describe_groups(optimizer_groups(layers, OptimConfig(norm_bias_lr=16.0)))[1:] == [
        "no decay: 605 parameters in 3 tensors",
        "norm biases: 305 parameters in 2 tensors, 16 times the learning rate",
    ]
    assert len(optimizer_groups(nn.Linear(2, 2, bias=False), OptimConfig())) == 1  # empty groups are left out


def test_custom_l2_replaces_the_decay_of_both_kernels():
    model = create_model(GATED, 3, 2)
    decay, rest = parameter_groups(model, 5e-4, "upstream", custom_l2=True)
    assert sorted(names(model, decay)) == sorted(OTHER_KERNELS + IDENTITY)
    assert set(KERNELS) <= set(names(model, rest))


def test_a_step_with_zero_gradients_shrinks_kernels_only():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, _ = build_optimizer(model, OptimConfig(lr=0.5, momentum=0.9, weight_decay=0.1), 10, 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.1 if name == "0.weight" else 1))


def test_learning_rate_equals_its_formula():
    factors = [learning_rate_factor(step, 10, 4) for step in range(11)]
    falling = [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(7)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, *falling])
    assert factors[4] == 1
    assert factors[7] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0, abs=1e-15)


def test_poly_equals_its_formula():
    factors = [learning_rate_factor(step, 10, 2, "poly") for step in range(11)]
    assert factors == pytest.approx([0.5, 1.0, *((1 - k / 8) ** 0.9 for k in range(9))])
    assert factors[10] == 0


def test_learning_rate_without_warm_up_starts_at_the_peak():
    assert learning_rate_factor(0, 5, 0) == 1


def test_the_schedule_applies_to_both_groups():
    optimizer, schedule = build_optimizer(nn.Linear(2, 2), OptimConfig(lr=0.2), 8, 2)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert_close(torch.tensor(rates), torch.tensor([[0.2 * learning_rate_factor(k, 8, 2)] * 2 for k in range(8)]))


def test_only_norm_biases_take_a_multiple_of_the_learning_rate():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2), nn.BatchNorm1d(3, affine=False))
    config = OptimConfig(lr=0.5, momentum=0.9, weight_decay=0.0, norm_bias_lr=16.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, schedule = build_optimizer(model, config, 8, 2, lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.1, 0.1, 1.6]
    )  # the first of 2 warm-up steps
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), before[name] - (1.6 if name == "1.bias" else 0.1))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.2, 3.2])


class _Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)


def test_heads_take_a_multiple_of_the_learning_rate_of_the_backbone():
    config = OptimConfig(lr=0.01, head_lr=10.0, schedule="poly", weight_decay=0.1)
    groups = optimizer_groups(_Segmenter(), config)
    assert describe_groups(groups, 0.01) == [
        "backbone, decay: 108 parameters in 1 tensors, weight decay 0.1, learning rate 0.01",
        "backbone, no decay: 12 parameters in 3 tensors, learning rate 0.01",
        "heads, decay: 8 parameters in 1 tensors, weight decay 0.1, 10 times the learning rate, learning rate 0.1",
        "heads, no decay: 2 parameters in 1 tensors, 10 times the learning rate, learning rate 0.1",
    ]
    optimizer, schedule = build_optimizer(_Segmenter(), config, 4, 0)
    for step in range(4):
        factor = (1 - step / 4) ** 0.9
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.01 * factor] * 2 + [0.1 * factor] * 2)
        optimizer.step()
        schedule.step()
    without_backbone = optimizer_groups(nn.Linear(2, 2), config)
    assert [group["lr_factor"] for group in without_backbone] == [1, 1]


def test_nesterov_equals_its_formula():
    """``g ← g + μ (μ v + g)`` with ``v ← μ v + g``, which is ``g (1 + μ)`` in the first step."""
    layer = nn.Linear(2, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer, _ = build_optimizer(layer, OptimConfig(nesterov=True, momentum=0.9, weight_decay=0.0), 4, 0, lr=0.5)
    layer.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert_close(layer.weight.detach(), before - 0.5 * 1.9)


def by_loops(model):
    """Upstream's formula, channel by channel, in Python floats."""
    total = 0.0
    for block in repvgg_blocks(model):
        k3, k1 = (block[name].conv.weight.tolist() for name in ("dense", "pointwise"))
        for o in range(len(k3)):
            t3, t1 = (
                bn.weight.tolist()[o] / (bn.running_var.tolist()[o] + bn.eps) ** 0.5
                for bn in (block["dense"].bn, block["pointwise"].bn)
            )
            for i in range(len(k3[o])):
                ring = sum(k3[o][i][y][x] ** 2 for y in range(3) for x in range(3) if (y, x) != (1, 1))
                norm = t3**2 + t1**2
                total += ring + ((k3[o][i][1][1] * t3 + k1[o][i][0][0] * t1) ** 2 / norm if norm else 0.0)
    return total


def test_equivalent_l2_by_loops():
    model = trained_like(create_model(GATED, 3, 2))
    found = equivalent_l2(model.double())
    assert_close(found.item(), by_loops(model), rtol=1e-12, atol=0)


def test_equivalent_l2_of_a_worked_example():
    """K3 = 2 on the ring and 3 in the centre, K1 = 5, t3 = 1/2, t1 = 2: 8·4 + (3/2 + 10)² / (1/4 + 4)."""
    model = create_model(ModelSpec("one", Stage(1, 1, stride=1), (Stage(1, 1),)), 2, 1).double()
    first, second = repvgg_blocks(model)
    for bn, gamma in ((first["dense"].bn, 0.5), (first["pointwise"].bn, 2.0)):
        bn.running_var.fill_(1 - bn.eps)
        nn.init.constant_(bn.weight, gamma)
    nn.init.constant_(first["dense"].conv.weight, 2.0)
    first["dense"].conv.weight.data[0, 0, 1, 1] = 3.0
    nn.init.constant_(first["pointwise"].conv.weight, 5.0)
    for conv in (second["dense"].conv, second["pointwise"].conv):
        nn.init.zeros_(conv.weight)
    assert equivalent_l2(model).item() == pytest.approx(32 + 11.5**2 / 4.25, rel=1e-12)


def test_equivalent_l2_of_channels_with_zero_scale():
    model = trained_like(create_model(GATED, 3, 2)).double()
    block = next(repvgg_blocks(model))
    for branch in ("dense", "pointwise"):
        block[branch].bn.weight.data[1] = 0.0
    found = equivalent_l2(model)
    found.backward()
    assert_close(found.item(), by_loops(model), rtol=1e-12, atol=0)
    gradient = block["pointwise"].conv.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().min() > 0


def test_equivalent_l2_has_gradients_for_kernels_only():
    model = trained_like(create_model(GATED, 3, 2)).double()
    equivalent_l2(model).backward()
    assert sorted(name for name, parameter in model.named_parameters() if parameter.grad is not None) == sorted(KERNELS)
    kernel = model.stem.conv.dense.conv.weight
    assert_close(kernel.grad[:, :, 0], 2 * kernel[:, :, 0].detach())
    for branch in ("dense", "pointwise"):  # the centre, by finite differences
        weight = model.stem.conv[branch].conv.weight
        centre = (1, 0, *(2 * [weight.shape[2] // 2]))
        values = []
        for move in (-1e-4, 1e-4):
            with torch.no_grad():
                weight[centre] += move
                values.append(by_loops(model))
                weight[centre] -= move
        assert_close(weight.grad[centre].item(), (values[1] - values[0]) / 2e-4, rtol=1e-6, atol=1e-6)


def test_equivalent_l2_without_blocks_is_zero():
    assert equivalent_l2(nn.Conv2d(1, 1, 3)) == 0


def test_custom_l2_reaches_the_kernels():
    """A large factor shrinks the kernels; the recorded loss does not include the penalty."""
    spec = ModelSpec("tiny", SPEC.stem, SPEC.stages)
    sizes, losses = [], []
    for decay in (0.0, 3.0):
        model = tiny(spec=spec)
        optim = OptimConfig(lr=0.02, lr_batch=None, weight_decay=decay, custom_l2=True)
        result = fit(model, opened(), replace(CONFIG, epochs=1, optim=optim), progress=False)
        sizes.append(float(equivalent_l2(model).detach()))
        losses.append(result.history[0].loss)
    assert sizes[1] < 0.6 * sizes[0]
    assert losses[1] < losses[0] + 1


FACTORS = {"pointwise", "average", "frequency", "inner", "outer", "channel", "mix", "depthwise"}


@pytest.mark.parametrize("block", ["repvgg_post_bn", "qarepvgg", "dbb", "mobileone", "repvgg_relu", "dirac", "orepa"])
def test_custom_l2_applies_to_repvgg_blocks_only(block):
    """Other blocks have a kxk and a 1x1 kernel among more branches: all their kernels decay."""
    spec = replace(SPEC, auxiliary=())
    model = create_variant(spec, block, num_classes=3)
    assert list(repvgg_blocks(model)) == []
    assert equivalent_l2(model) == 0
    for custom in (False, True):
        decaying, _ = parameter_groups(model, 0.1, custom_l2=custom)
        plain = [part.weight for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
        factors = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in FACTORS]
        assert {id(p) for p in decaying["params"]} == {id(p) for p in [*plain, *factors]}


@pytest.mark.parametrize(
    ("block", "sizes"),
    [
        ("orepa", [4 * 4 * 9 * 2 + 3 * 16 + 16 + 4 * 9 + 16, 6 * 4]),  # two kxk, three 1x1, inner, channel, mix; v
        ("doconv", [4 * 4 * 9 + 4 * 81, 0]),
        ("dirac", [4 * 4 * 9, 2 * 4]),
        ("expand_cl", [16 * 4 + 16 * 16 * 9 + 16 * 4, 0]),
    ],
)
def test_factors_of_computed_kernels_decay_and_scales_do_not(block, sizes):
    decaying, rest = parameter_groups(create_block(block, Geometry.square(4, 4)), 0.1)
    assert sum(p.numel() for p in decaying["params"]) == sizes[0]
    assert sum(p.numel() for p in rest["params"]) == sizes[1] + 2 * 4, "and a batch norm"
