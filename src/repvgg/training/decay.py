"""Which parameters decay: the four policies in use for RepVGG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from repvgg.blocks import BranchSum, ComputedConv2d, ConvBN
from repvgg.errors import UsageError
from repvgg.training.config import DecayPolicy

_WITH_KERNELS = (nn.modules.conv._ConvNd, nn.Linear)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)

_Rule = Callable[[nn.Module, str, nn.Parameter, bool], bool]


def _paper(module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    if isinstance(module, ComputedConv2d):
        return name in module.kernels
    return isinstance(module, _WITH_KERNELS) and name == "weight"


def _upstream(module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    return parameter.ndim > 1 or (identity and name == "weight")


def _upstream_2021(module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    return "bias" not in name and (identity or not isinstance(module, _NORMS))


def _no_1d(module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    return parameter.ndim > 1


_RULES: dict[DecayPolicy, _Rule] = {
    "paper": _paper,
    "upstream": _upstream,
    "upstream-2021": _upstream_2021,
    "no-1d": _no_1d,
}


def parameter_groups(
    model: nn.Module, weight_decay: float, policy: DecayPolicy = "paper", *, custom_l2: bool = False
) -> list[dict[str, Any]]:
    """Groups for an optimizer: ``decay`` decays, ``no decay`` does not.

    ============== ====================================================================================================
    policy         what decays
    ============== ====================================================================================================
    paper          the kernels of convolutions and linear layers, nothing else (§4.1); where a kernel is computed of
                   several (OREPA, DO-Conv), all of these
    upstream       parameters of two or more axes, and the scale of the identity branch's batch norm (upstream's README
                   and optimizer)
    upstream-2021  all but biases and batch norms, whose names hold ``bias`` or ``bn``; the identity's is called
                   otherwise there, so its scale decays (upstream's first training script)
    no-1d          parameters of two or more axes (timm)
    ============== ====================================================================================================

    Every parameter that takes a gradient is in exactly one group, shared ones once, in the order of the model.

    Args:
        model: whose parameters.
        weight_decay: of the group that decays.
        policy: see the table.
        custom_l2: leave out the two kernels of each RepVGG block: :func:`~repvgg.training.equivalent_l2` is in the
            loss in place of their decay.

    Returns:
        Dicts with ``name``, ``params`` and ``weight_decay``, two of them.

    Raises:
        UsageError: no such policy.
    """
    if policy not in _RULES:
        raise UsageError(f"There is no decay policy {policy!r}: there are {', '.join(_RULES)}.")
    kept_out = {id(p) for block in rep_branches(model) for p in _kernels(block)} if custom_l2 else set()
    decaying: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for module, name, parameter, identity in _owned(model):
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        decays = _RULES[policy](module, name, parameter, identity) and id(parameter) not in kept_out
        (decaying if decays else rest).append(parameter)
    return [
        {"name": "decay", "params": decaying, "weight_decay": weight_decay},
        {"name": "no decay", "params": rest, "weight_decay": 0.0},
    ]


def rep_branches(model: nn.Module) -> Iterator[BranchSum]:
    """The sums of a kxk and a 1x1 convolution, each with batch norm, in the order of the model; no other branches."""
    for module in model.modules():
        if not isinstance(module, BranchSum) or set(module) | {"identity"} != {"dense", "pointwise", "identity"}:
            continue
        if all(isinstance(module[name], ConvBN) for name in ("dense", "pointwise")):
            yield module


def _kernels(block: BranchSum) -> list[nn.Parameter]:
    return [block.get_parameter("dense.conv.weight"), block.get_parameter("pointwise.conv.weight")]


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter, bool]]:
    """Each parameter with the module that holds it, its name there, and if that is an identity branch's norm."""
    identities = {
        id(module["identity"]) for module in model.modules() if isinstance(module, BranchSum) and "identity" in module
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter, id(module) in identities


def describe_groups(groups: list[dict[str, Any]]) -> list[str]:
    """A line for each group: how many parameters, of how many tensors, and their decay."""
    return [
        f"{group['name']}: {sum(p.numel() for p in group['params']):,} parameters in {len(group['params'])} tensors"
        + (f", weight decay {group['weight_decay']:g}" if group["weight_decay"] else "")
        + (f", {group['lr_factor']:g} times the learning rate" if group.get("lr_factor", 1) != 1 else "")
        for group in groups
    ]
