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
    """The groups of ``config``'s policy that hold any parameter.

    ``lr_factor`` is a group's share of the learning rate; biases of batch norms make a third group if theirs is not 1.
    """
    decaying, rest = parameter_groups(model, config.weight_decay, config.decay, custom_l2=config.custom_l2)
    biases: set[int] = set()  # of batch norms, which no policy has decay
    if config.norm_bias_lr != 1:
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        biases = {id(norm.bias) for norm in norms}
    apart = [parameter for parameter in rest["params"] if id(parameter) in biases]
    kept = [parameter for parameter in rest["params"] if id(parameter) not in biases]
    groups = [
        {**decaying, "lr_factor": 1.0},
        {**rest, "params": kept, "lr_factor": 1.0},
        {**rest, "name": "norm biases", "params": apart, "lr_factor": config.norm_bias_lr},
    ]
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
    highest = config.lr if lr is None else lr
    groups = [{**group, "lr": highest * group["lr_factor"]} for group in optimizer_groups(model, config)]
    optimizer = torch.optim.SGD(
        groups, lr=highest, momentum=config.momentum, nesterov=config.nesterov, fused=_fuses(groups, config.clip)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, warmup_steps)
    )
    return optimizer, schedule


def _fuses(groups: list[dict[str, Any]], clip: float | None) -> bool | None:
    """True where all lies on the CPU: one pass over memory there instead of eight. Else PyTorch chooses.

    Not where gradients are clipped: Lightning does not clip those of a fused optimizer under AMP.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fits = all(parameter.device.type == "cpu" and parameter.is_floating_point() for parameter in parameters)
    return True if fits and clip is None else None
