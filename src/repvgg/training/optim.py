"""The optimizer, and how the learning rate moves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from repvgg.training.config import OptimConfig
from repvgg.training.decay import parameter_groups


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of a step as a fraction of the highest one.

    ``(step + 1) / warmup`` while ``step < warmup``, then ``(1 + cos(π (step − warmup) / (total − warmup))) / 2``,
    which is 0 at ``step = total_steps``, one step after the last.

    Args:
        step: counted from 0.
        total_steps: steps of the whole run, more than ``warmup_steps``.
        warmup_steps: steps of the linear rise.

    Source: I. Loshchilov, F. Hutter, SGDR (ICLR 2017), Eq. 5, without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return (1 + math.cos(math.pi * done)) / 2


def optimizer_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The groups of ``config``'s policy that hold any parameter."""
    groups = parameter_groups(model, config.weight_decay, config.decay, custom_l2=config.custom_l2)
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimConfig, total_steps: int, warmup_steps: int, lr: float | None = None
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """SGD over :func:`optimizer_groups`, and the schedule to be advanced after every step.

    Args:
        model: whose parameters.
        config: the optimizer.
        total_steps: of the run.
        warmup_steps: of the linear rise.
        lr: the highest learning rate, where the batch scales that of ``config``.
    """
    optimizer = torch.optim.SGD(
        optimizer_groups(model, config),
        lr=config.lr if lr is None else lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, warmup_steps)
    )
    return optimizer, schedule
