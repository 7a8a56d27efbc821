"""The optimizer: which parameters decay, and how the learning rate moves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from repvgg.training.config import OptimConfig

_WITH_KERNELS = (nn.modules.conv._ConvNd, nn.Linear)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: ``kernels`` decays, ``rest`` does not (the paper's policy, §4.1).

    A kernel is the ``weight`` of a convolution or a linear layer; biases and all of batch norm are the rest. Every
    parameter that takes a gradient is in exactly one group, shared ones once, in the order of the model.

    Returns:
        Two dicts with ``name``, ``params`` and ``weight_decay``.

    Source: RepVGG (CVPR 2021), §4.1; upstream's scripts and timm decay other sets.
    """
    of_kernels = {id(module.weight) for module in model.modules() if isinstance(module, _WITH_KERNELS)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kernels = [parameter for parameter in trained if id(parameter) in of_kernels]
    rest = [parameter for parameter in trained if id(parameter) not in of_kernels]
    return [
        {"name": "kernels", "params": kernels, "weight_decay": weight_decay},
        {"name": "rest", "params": rest, "weight_decay": 0.0},
    ]


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


def build_optimizer(
    model: nn.Module, config: OptimConfig, total_steps: int, warmup_steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """SGD over :func:`parameter_groups`, and the schedule to be advanced after every step."""
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, warmup_steps)
    )
    return optimizer, schedule
