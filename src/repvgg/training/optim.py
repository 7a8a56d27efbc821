"""Parameter groups, SGD and its schedule, the L2 penalty on equivalent kernels, and RepOptimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final, get_args

import torch
from torch import Tensor, nn

from repvgg.blocks import BranchSum, ComputedConv2d, ConstantScaleSum, ConvBN
from repvgg.errors import UsageError
from repvgg.symbolic import equivalent_conv
from repvgg.training.config import DecayPolicy, OptimConfig, Schedule

_POLY_POWER = 0.9
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def _decays(policy: DecayPolicy, module: nn.Module, name: str, parameter: nn.Parameter, identity: bool) -> bool:
    """Return whether a parameter of ``module``, perhaps the batch norm of an identity branch, has weight decay."""
    match policy:
        case "paper" if isinstance(module, ComputedConv2d):
            # The equivalent kernel is a product of several factors; scales among its parameters do not decay.
            return name in module.kernels
        case "paper":
            return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and name == "weight"
        case "upstream":
            return parameter.ndim > 1 or (identity and name == "weight")
        case "upstream-2021":
            # That script matched the names "bias" and "bn"; the identity's norm is called rbr_identity, so it decayed.
            return "bias" not in name and (identity or not isinstance(module, _NORMS))
        case "no-1d":
            return parameter.ndim > 1


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
    if policy not in get_args(DecayPolicy):
        raise UsageError(f"There is no decay policy {policy!r}: choose one of {', '.join(get_args(DecayPolicy))}.")
    penalized: set[int] = set()
    if custom_l2:
        for block in repvgg_blocks(model):
            penalized |= {id(block.get_parameter(f"{branch}.conv.weight")) for branch in ("dense", "pointwise")}
    identities = {
        id(module["identity"]) for module in model.modules() if isinstance(module, BranchSum) and "identity" in module
    }
    decaying, rest, seen = list[nn.Parameter](), list[nn.Parameter](), set[int]()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue  # a tensor, not its name, is the unit: tied weights occur in several modules
            seen.add(id(parameter))
            identity = id(module) in identities
            chosen = _decays(policy, module, name, parameter, identity) and id(parameter) not in penalized
            (decaying if chosen else rest).append(parameter)
    return [
        {"name": "decay", "params": decaying, "weight_decay": weight_decay},
        {"name": "no decay", "params": rest, "weight_decay": 0.0},
    ]


def optimizer_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the non-empty parameter groups of ``config``, each with its learning-rate multiplier ``lr_factor``.

    Biases of batch norms form a group of their own, "norm biases", if ``config.norm_bias_lr`` is not 1. If
    ``config.head_lr`` is not 1, the groups of :func:`parameter_groups` are split into those of ``model.backbone`` and
    those of all other modules, the heads; a model without a backbone has no heads.
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
    backbone = getattr(model, "backbone", None)
    if config.head_lr != 1 and isinstance(backbone, nn.Module):
        inside = {id(parameter) for parameter in backbone.parameters()}
        groups = [_part(group, inside, wanted, config) for wanted in (True, False) for group in groups]
    return [group for group in groups if group["params"]]


def _part(group: dict[str, Any], inside: set[int], wanted: bool, config: OptimConfig) -> dict[str, Any]:
    """Return the parameters of a group that are in the backbone, or with the learning rate of the heads all others."""
    parameters = [parameter for parameter in group["params"] if (id(parameter) in inside) is wanted]
    place, factor = ("backbone", 1.0) if wanted else ("heads", config.head_lr)
    name, lr_factor = f"{place}, {group['name']}", group["lr_factor"] * factor
    return {**group, "name": name, "params": parameters, "lr_factor": lr_factor}


def describe_groups(groups: list[dict[str, Any]], lr: float | None = None) -> list[str]:
    """Describe each group in one line: number of parameters and tensors, weight decay, learning-rate multiplier.

    Where groups have different learning rates, each line says its own if the peak rate ``lr`` is given.
    """
    several = len({group.get("lr_factor", 1) for group in groups}) > 1
    return [
        f"{group['name']}: {sum(p.numel() for p in group['params']):,} parameters in {len(group['params'])} tensors"
        + (f", weight decay {group['weight_decay']:g}" if group["weight_decay"] else "")
        + (f", {group['lr_factor']:g} times the learning rate" if group.get("lr_factor", 1) != 1 else "")
        + (f", learning rate {lr * group['lr_factor']:g}" if lr is not None and several else "")
        for group in groups
    ]


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: Schedule = "cosine") -> float:
    """Return the learning rate of a step as a fraction of the peak rate.

    Linear warm-up, ``(step + 1) / warmup`` while ``step < warmup``; then, with
    ``p = (step − warmup) / (total − warmup)``, half a cosine ``(1 + cos(π p)) / 2``, or poly ``(1 − p)^0.9``.
    Both reach 0 at ``step = total_steps``, one step after the last.

    Args:
        step: counted from 0.
        total_steps: optimizer steps of the run, more than ``warmup_steps``.
        warmup_steps: steps of the linear rise.
        schedule: "cosine" or "poly".

    Sources: I. Loshchilov, F. Hutter, SGDR (ICLR 2017), Eq. 5, without restarts; H. Zhao et al.,
    PSPNet (CVPR 2017), §5.1, for poly.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    if schedule == "poly":
        return float((1 - progress) ** _POLY_POWER)
    return (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(
    model: nn.Module, config: OptimConfig, total_steps: int, warmup_steps: int, lr: float | None = None
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """Build SGD over :func:`optimizer_groups` and its schedule, which advances after every step.

    The peak learning rate is ``lr``, or ``config.lr`` if None.
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
        optimizer, lambda step: learning_rate_factor(step, total_steps, warmup_steps, config.schedule)
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


def merge_constant_scale_branches(model: nn.Module) -> tuple[nn.Module, dict[nn.Parameter, Tensor]]:
    """Merge each sum of branches with constant scales into one kernel, and return its gradient multipliers.

    With K = s3·W3 + s1·W1 + diag(w0), an SGD step on the branches moves K by ``s3²`` times its gradient, plus ``s1²``
    times at the centre, plus 1 times on the diagonal of the channels where there is an identity. See
    :class:`repvgg.blocks.ConstantScaleSum`.

    Args:
        model: a model with "constant_scale" blocks; not modified.

    Returns:
        A copy with an equal ``nn.Conv2d`` without bias in place of each such block, and the multiplier (OIHW) of each
        of their kernels.

    Raises:
        UsageError: the model has no such block.
    """
    # Copied first: the multipliers are keyed by the parameters of the model that is trained.
    plain = copy.deepcopy(model)
    multipliers: dict[nn.Parameter, Tensor] = {}
    convs: dict[ConstantScaleSum, nn.Conv2d] = {}
    for parent in list(plain.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, ConstantScaleSum):
                if block not in convs:  # a shared block stays shared
                    convs[block] = _merge(block)
                parent.register_module(name, convs[block])
                multipliers[convs[block].get_parameter("weight")] = block.multiplier()
    if not multipliers:
        raise UsageError("The model has no block of constant scales: build it of the block 'constant_scale'.")
    return plain, multipliers


@torch.no_grad()
def _merge(block: ConstantScaleSum) -> nn.Conv2d:
    conv = block.geometry.conv().to(block.dense.weight)
    conv.weight.copy_(equivalent_conv(block).weight)
    return conv.train(block.training)


@final
class RepOptimizer:
    """Multiply the gradients of some parameters by constants at each step of an optimizer: ``g ← m ⊙ g``.

    It hooks into any ``torch.optim.Optimizer``, so schedules, Lightning and checkpoints keep using that one, and
    ``step`` may be called on either. Gradients are scaled when the optimizer reads them, after clipping and before
    weight decay, and are restored afterwards. With SGD, including momentum and weight decay, plain kernels with the
    multipliers of :func:`merge_constant_scale_branches` follow the trajectory of the branches exactly. Optimizers that
    normalize gradients, such as Adam, cancel most of the effect.

    Args:
        optimizer: holds all parameters of ``multipliers``, and perhaps others.
        multipliers: for each parameter a positive tensor of its shape.

    Raises:
        UsageError: a parameter is not in the optimizer, or its multiplier has another shape.

    Source: Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023, §3.1 and Alg. 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, multipliers: Mapping[nn.Parameter, Tensor]) -> None:
        # By id: == compares tensors element by element.
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, multiplier in multipliers.items():
            if id(parameter) not in known or parameter.shape != multiplier.shape:
                raise UsageError(
                    f"A multiplier of shape {tuple(multiplier.shape)} needs a parameter of that shape in the "
                    "optimizer: make the optimizer of the plain model's parameters."
                )
        self.optimizer = optimizer
        self._multipliers = dict(multipliers)
        self._unscaled: dict[nn.Parameter, Tensor] = {}
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimizer step on scaled gradients."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def remove(self) -> None:
        """Remove the hooks; the optimizer behaves as before."""
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        optimizer, *rest = args  # PyTorch passes the arguments of the unbound method
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            self._scale_gradients()
            return args, kwargs

        def scaled_closure() -> Any:
            # The closure runs backward inside step: only after it are there gradients to scale.
            loss = closure()
            self._scale_gradients()
            return loss

        return (optimizer, scaled_closure), {}

    @torch.no_grad()
    def _scale_gradients(self) -> None:
        for parameter, multiplier in self._multipliers.items():
            if parameter.grad is not None:
                self._unscaled[parameter] = parameter.grad
                # Out of place: a second step on the same gradients must scale them once, not twice.
                parameter.grad = parameter.grad * multiplier.to(parameter.grad)

    def _after_step(self, *_: Any) -> None:
        for parameter, gradient in self._unscaled.items():
            parameter.grad = gradient
        self._unscaled.clear()
