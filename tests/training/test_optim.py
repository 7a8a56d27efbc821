import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.errors import UsageError
from repvgg.training import OptimConfig, TrainConfig, learning_rate_factor, quickstart
from repvgg.training.optim import build_optimizer


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


def test_biases_of_norms_take_a_multiple_of_the_rate_and_nothing_else_does():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2), nn.BatchNorm1d(3, affine=False))
    config = OptimConfig(lr=0.5, momentum=0.9, weight_decay=0.0, norm_bias_lr=16.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, schedule = build_optimizer(model, config, 8, 2, lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 1.6])  # the first of 2 to rise
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), before[name] - (1.6 if name == "1.bias" else 0.1))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.2, 3.2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"momentum": 1},
        {"weight_decay": -1},
        {"warmup_epochs": -1},
        {"nesterov": True, "momentum": 0.0},
        {"clip": 0.0},
        {"lr_batch": 0},
        {"norm_bias_lr": 0.0},
    ],
)
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
        {"mixup": -0.1},
        {"cutmix": -1.0},
        {"ema": 1.0},
        {"device_batch": 0},
        {"devices": 0},
        {"nodes": 0},
        {"save_steps": -1},
        {"expand": True},
        {"epochs": 3, "optim": OptimConfig(warmup_epochs=3)},
    ],
)
def test_train_config_refuses(wrong):
    with pytest.raises(UsageError):
        TrainConfig(**({"epochs": 5, "batch_size": 8} | wrong))


def test_nesterov_by_hand():
    """``g ← g + μ (μ v + g)`` with ``v ← μ v + g``, which is ``g (1 + μ)`` in the first step."""
    layer = nn.Linear(2, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer, _ = build_optimizer(layer, OptimConfig(nesterov=True, momentum=0.9, weight_decay=0.0), 4, 0, lr=0.5)
    layer.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert_close(layer.weight.detach(), before - 0.5 * 1.9)


def test_quickstart_is_a_complete_config():
    assert quickstart(seed=3).seed == 3
    assert quickstart() == quickstart(seed=0)
