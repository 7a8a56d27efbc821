import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.errors import UsageError
from repvgg.models import create_model
from repvgg.training import OptimConfig, TrainConfig, learning_rate_factor, parameter_groups, quickstart
from repvgg.training.optim import build_optimizer


def names(model, group):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in group["params"]]


def test_kernels_decay_and_nothing_else():
    model = create_model("repvgg_t0", num_classes=10, in_channels=1)
    kernels, rest = parameter_groups(model, 5e-4)
    assert (kernels["name"], kernels["weight_decay"]) == ("kernels", 5e-4)
    assert (rest["name"], rest["weight_decay"]) == ("rest", 0.0)
    of_kernels, of_rest = names(model, kernels), names(model, rest)
    assert len(of_kernels) == 7 * 2 + 1  # dense and pointwise of 7 blocks, and the head
    assert len(of_rest) == 2 * (7 * 2 + 3) + 1  # scale and shift of each batch norm, 3 of them identities, and a bias
    assert of_kernels[:2] == ["stem.conv.dense.conv.weight", "stem.conv.pointwise.conv.weight"]
    assert of_kernels[-1] == "head.weight"
    assert "stages.0.1.conv.identity.weight" in of_rest
    assert "head.bias" in of_rest
    assert sorted(of_kernels + of_rest) == sorted(name for name, _ in model.named_parameters())


def test_gates_and_heads_are_grouped_alike():
    model = create_model("repvggplus_l2pse", num_classes=2)
    kernels, rest = parameter_groups(model, 1e-4)
    assert {parameter.ndim for parameter in kernels["params"]} == {2, 4}
    assert {parameter.ndim for parameter in rest["params"]} == {1}
    assert "auxiliary.stage0.head.weight" in names(model, kernels)
    assert "stem.act.se.up.bias" in names(model, rest)


def test_shared_parameters_come_once_and_frozen_ones_never():
    layer, frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
    kernels, rest = parameter_groups(nn.Sequential(layer, frozen, layer), 0.1)
    assert [id(parameter) for parameter in kernels["params"]] == [id(layer.weight)]
    assert [id(parameter) for parameter in rest["params"]] == [id(layer.bias)]


def test_a_step_without_gradient_shrinks_the_kernels_only():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, _ = build_optimizer(model, OptimConfig(lr=0.5, momentum=0.9, weight_decay=0.1), 10, 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.1 if name == "0.weight" else 1))


def test_rate_by_hand():
    factors = [learning_rate_factor(step, 10, 4) for step in range(11)]
    falling = [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(7)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, *falling])
    assert factors[4] == 1
    assert factors[7] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0, abs=1e-15)


def test_rate_without_warm_up_starts_high():
    assert learning_rate_factor(0, 5, 0) == 1


def test_schedule_moves_the_rate_of_both_groups():
    optimizer, schedule = build_optimizer(nn.Linear(2, 2), OptimConfig(lr=0.2), 8, 2)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert_close(torch.tensor(rates), torch.tensor([[0.2 * learning_rate_factor(k, 8, 2)] * 2 for k in range(8)]))


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"momentum": 1}, {"weight_decay": -1}, {"warmup_epochs": -1}])
def test_optim_config_refuses(wrong):
    with pytest.raises(UsageError):
        OptimConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"threads": 0},
        {"batch_size": 1},
        {"label_smoothing": 1.0},
        {"auxiliary_weight": -0.1},
        {"epochs": 3, "optim": OptimConfig(warmup_epochs=3)},
    ],
)
def test_train_config_refuses(wrong):
    with pytest.raises(UsageError):
        TrainConfig(**({"epochs": 5, "batch_size": 8} | wrong))


def test_quickstart_is_a_complete_config():
    assert quickstart(seed=3).seed == 3
    assert quickstart() == quickstart(seed=0)
