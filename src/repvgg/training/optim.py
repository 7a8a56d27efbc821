"""Parameter groups, SGD and its learning-rate schedule, and the L2 penalty on equivalent kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.blocks import BranchSum, ComputedConv2d, ConvBN
from repvgg.errors import UsageError
from repvgg.training.config import DecayPolicy, OptimConfig

_Rule = Callable[[nn.Module, str, nn.Parameter, bool], bool]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def _decays_in_paper(module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    if isinstance(module, ComputedConv2d):
        # The equivalent kernel is a product of several factors; scales among its parameters do not decay.
        return name in module.kernels
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and name == "weight"


def _decays_upstream(module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    return parameter.ndim > 1 or (identity and name == "weight")


def _decays_upstream_2021(module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    # That script matched on the names "bias" and "bn"; the identity's norm is called rbr_identity and slipped through.
    return "bias" not in name and (identity or not isinstance(module, _NORMS))


def _decays_unless_1d(module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    return parameter.ndim > 1


_RULES: dict[DecayPolicy, _Rule] = {
    "paper": _decays_in_paper,
    "upstream": _decays_upstream,
    "upstream-2021": _decays_upstream_2021,
    "no-1d": _decays_unless_1d,
}


def parameter_groups(
    model: nn.Module, weight_decay: float, policy: DecayPolicy = "paper", *, custom_l2: bool = False
) -> list[dict[str, Any]]:
    """Split the parameters of ``model`` into an optimizer group with weight decay and one without.

    ============== ====================================================================================================
    policy         parameters with weight decay
    ============== ====================================================================================================
    paper          the kernels of convolutions and linear layers, nothing else (§4.1); where a kernel is the product of
                   several (OREPA, DO-Conv), all factors
    upstream       parameters of two or more axes, and the scale of the identity branch's batch norm (upstream's README
                   and optimizer)
    upstream-2021  all except biases and batch norms, but including the scale of the identity branch's batch norm
                   (upstream's first training script)
    no-1d          parameters of two or more axes (timm)
    ============== ====================================================================================================

    Every parameter that requires a gradient is in exactly one group, shared ones once, in the order of the model.

    Args:
        model: the model to train.
        weight_decay: L2 factor of the first group.
        policy: see the table.
        custom_l2: move the two kernels of each RepVGG block to the second group, because
            :func:`~repvgg.training.equivalent_l2` in the loss replaces their decay.

    Returns:
        Two dicts with ``name`` ("decay", "no decay"), ``params`` and ``weight_decay``.

    Raises:
        UsageError: unknown policy.
    """
    if policy not in _RULES:
        raise UsageError(f"There is no decay policy {policy!r}: choose one of {', '.join(_RULES)}.")
    decays = _RULES[policy]
    penalized: set[int] = set()
    if custom_l2:
        for block in repvgg_blocks(model):
            penalized |= {id(block.get_parameter(f"{branch}.conv.weight")) for branch in ("dense", "pointwise")}
    identities = {
        id(module["identity"]) for module in model.modules() if isinstance(module, BranchSum) and "identity" in module
    }
    decaying: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue  # a tensor, not its name, is the unit: tied weights occur in several modules
            seen.add(id(parameter))
            chosen = decays(module, name, parameter, id(module) in identities) and id(parameter) not in penalized
            (decaying if chosen else rest).append(parameter)
    return [
        {"name": "decay", "params": decaying, "weight_decay": weight_decay},
        {"name": "no decay", "params": rest, "weight_decay": 0.0},
    ]


def optimizer_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the non-empty parameter groups of ``config``, each with its learning-rate multiplier ``lr_factor``.

    Biases of batch norms form a third group, "norm biases", if ``config.norm_bias_lr`` is not 1.
    """
    decaying, rest = parameter_groups(model, config.weight_decay, config.decay, custom_l2=config.custom_l2)
    norm_biases: set[int] = set()
    if config.norm_bias_lr != 1:
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        norm_biases = {id(norm.bias) for norm in norms}  # id(None) of norms without affine matches no parameter
    # No policy lets the bias of a batch norm decay, so all of them are in the second group.
    faster = [parameter for parameter in rest["params"] if id(parameter) in norm_biases]
    others = [parameter for parameter in rest["params"] if id(parameter) not in norm_biases]
    groups = [
        {**decaying, "lr_factor": 1.0},
        {**rest, "params": others, "lr_factor": 1.0},
        {**rest, "name": "norm biases", "params": faster, "lr_factor": config.norm_bias_lr},
    ]
    return [group for group in groups if group["params"]]


def describe_groups(groups: list[dict[str, Any]]) -> list[str]:
    """Describe each group in one line: number of parameters and tensors, weight decay, learning-rate multiplier."""
    return [
        f"{group['name']}: {sum(p.numel() for p in group['params']):,} parameters in {len(group['params'])} tensors"
        + (f", weight decay {group['weight_decay']:g}" if group["weight_decay"] else "")
        + (f", {group['lr_factor']:g} times the learning rate" if group.get("lr_factor", 1) != 1 else "")
        for group in groups
    ]


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak rate.

    Linear warm-up, then a half cosine: ``(step + 1) / warmup`` while ``step < warmup``, after that
    ``(1 + cos(π (step − warmup) / (total − warmup))) / 2``, which reaches 0 at ``step = total_steps``, one step after
    the last.

    Args:
        step: counted from 0.
        total_steps: optimizer steps of the run, more than ``warmup_steps``.
        warmup_steps: steps of the linear rise.

    Source: I. Loshchilov, F. Hutter, SGDR (ICLR 2017), Eq. 5, without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(
    model: nn.Module, config: OptimConfig, total_steps: int, warmup_steps: int, lr: float | None = None
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """Build SGD over :func:`optimizer_groups` and its schedule, which advances after every step.

    Args:
        model: the model to train.
        config: the optimizer settings.
        total_steps: optimizer steps of the run.
        warmup_steps: steps of the linear warm-up.
        lr: peak learning rate; ``config.lr`` if None.
    """
    peak = config.lr if lr is None else lr
    groups = [{**group, "lr": peak * group["lr_factor"]} for group in optimizer_groups(model, config)]
    parameters = [parameter for group in groups for parameter in group["params"]]
    # On the CPU the fused kernel reads each tensor once instead of eight times; elsewhere PyTorch picks the best one.
    # Lightning refuses to clip gradients of a fused optimizer under AMP, so clipping rules it out.
    fused = config.clip is None and all(p.device.type == "cpu" and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.SGD(
        groups, lr=peak, momentum=config.momentum, nesterov=config.nesterov, fused=True if fused else None
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, warmup_steps)
    )
    return optimizer, schedule


def repvgg_blocks(model: nn.Module) -> Iterator[BranchSum]:
    """Yield the sums of a kxk and a 1x1 convolution, each with batch norm, and perhaps an identity, in model order."""
    for module in model.modules():
        if not isinstance(module, BranchSum) or set(module) | {"identity"} != {"dense", "pointwise", "identity"}:
            continue
        if all(isinstance(module[name], ConvBN) for name in ("dense", "pointwise")):
            yield module


def equivalent_l2(model: nn.Module) -> Tensor:
    """Return the squared L2 norm of the equivalent kernels, summed over all RepVGG blocks, as upstream computes it.

    With t = γ/√(var + ε) of the running statistics, without gradient, and K3, K1 the kernels of the two convolutions:
    ``Σ K3² off the centre + Σ (K3c·t3 + K1·t1)² / (t3² + t1²)``. Multiply by half the weight decay and add it to the
    loss, in place of the decay of both kernels. As upstream does, the identity is ignored; where both γ are 0 the
    second term is 0.

    Returns:
        A scalar with gradients for the kernels; 0 for a model without RepVGG blocks.

    Source: upstream's ``get_custom_L2`` (2021).
    """
    terms = [_block_l2(block) for block in repvgg_blocks(model)]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _block_l2(block: nn.ModuleDict) -> Tensor:
    dense, pointwise = block.get_submodule("dense"), block.get_submodule("pointwise")
    k3, k1 = dense.get_parameter("conv.weight"), pointwise.get_parameter("conv.weight")
    t3, t1 = _bn_scale(dense.get_submodule("bn")), _bn_scale(pointwise.get_submodule("bn"))
    row, column = k3.shape[2] // 2, k3.shape[3] // 2
    centre = k3[:, :, row : row + 1, column : column + 1]  # slices keep both spatial axes, so that K1 broadcasts
    off_centre = k3.square().sum() - centre.square().sum()
    # The clamp makes 0/0 of a channel with both γ = 0 into 0, in the gradient too.
    norm = (t3.square() + t1.square()).clamp_min(torch.finfo(torch.float32).tiny)
    return off_centre + ((centre * t3 + k1 * t1).square() / norm).sum()


def _bn_scale(bn: nn.Module) -> Tensor:
    """γ/√(var + ε), shaped (O, 1, 1, 1) to broadcast over a kernel OIHW."""
    assert isinstance(bn, nn.modules.batchnorm._BatchNorm)
    assert bn.running_var is not None
    sigma = (bn.running_var + bn.eps).sqrt()
    gamma = torch.ones_like(sigma) if bn.weight is None else bn.weight.detach()
    return (gamma / sigma).reshape(-1, 1, 1, 1)
