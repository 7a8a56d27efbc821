"""Gradient re-parameterization: a plain kernel trained as if it had branches (RepOptimizer)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg.blocks import ConstantScaleSum
from repvgg.errors import UsageError
from repvgg.symbolic import equivalent_conv

Multipliers = Mapping[nn.Parameter, Tensor]


def without_branches(model: nn.Module) -> tuple[nn.Module, dict[nn.Parameter, Tensor]]:
    """The plain model in which each sum of branches with constant scales is one kernel, and scales of its gradients.

    With K = s3·W3 + s1·W1 + diag(w0), SGD on the branches moves K by ``s3²`` times its gradient, plus ``s1²`` times at
    the centre, plus 1 times on the diagonal of the channels where there is an identity. See
    :class:`repvgg.blocks.ConstantScaleSum`.

    Args:
        model: with blocks "constant_scale"; left untouched.

    Returns:
        A copy with an ``nn.Conv2d`` without bias, equal to them, in their places; and the multipliers of its kernels.

    Raises:
        UsageError: there is no such block in it.
    """
    plain = copy.deepcopy(model)
    multipliers: dict[nn.Parameter, Tensor] = {}
    convs: dict[ConstantScaleSum, nn.Conv2d] = {}
    for parent in list(plain.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, ConstantScaleSum):
                convs[part] = convs.get(part) or _merged(part)
                parent.register_module(name, convs[part])
                multipliers[convs[part].get_parameter("weight")] = part.multiplier()
    if not multipliers:
        raise UsageError("There is no block of constant scales in this model: build it of the block 'constant_scale'.")
    return plain, multipliers


@torch.no_grad()
def _merged(block: ConstantScaleSum) -> nn.Conv2d:
    conv = block.geometry.conv().to(block.dense.weight)
    conv.weight.copy_(equivalent_conv(block).weight)
    return conv.train(block.training)


@final
class RepOptimizer:
    """An optimizer whose gradients of some parameters are multiplied by constants at each step: ``g ← m ⊙ g``.

    Wraps any ``torch.optim.Optimizer`` by hooks, so that schedules, Lightning and checkpoints go on using that one, and
    ``step`` may be called on either. Gradients are scaled when the optimizer reads them, after clipping and before
    weight decay, and are afterwards what they were. With SGD, momentum and weight decay included, plain kernels with
    the multipliers of :func:`without_branches` go the very way of the branches. Optimizers that divide by the size of
    gradients, such as Adam, undo most of it.

    Args:
        optimizer: of parameters that ``multipliers`` name, and perhaps others.
        multipliers: for each parameter a tensor of its shape, positive.

    Raises:
        UsageError: a parameter is not one of the optimizer, or a multiplier has another shape.

    Source: Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023, §3.1 and Alg. 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, multipliers: Multipliers) -> None:
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, multiplier in multipliers.items():
            if id(parameter) not in own or parameter.shape != multiplier.shape:
                raise UsageError(
                    f"A multiplier of shape {tuple(multiplier.shape)} goes with a parameter of that shape in the "
                    "optimizer: make the optimizer of the plain model's parameters."
                )
        self.optimizer = optimizer
        self._multipliers = dict(multipliers)
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer on scaled gradients."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Scale the gradients, or have them scaled once the closure has made them."""
        own, *rest = args  # the optimizer comes first
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            self._scale()
            return args, kwargs
        return (own, lambda: self._after_closure(closure)), {}

    def _after_closure(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._scale()
        return loss

    @torch.no_grad()
    def _scale(self) -> None:
        for parameter, multiplier in self._multipliers.items():
            if parameter.grad is not None:
                self._kept[parameter] = parameter.grad
                parameter.grad = parameter.grad * multiplier.to(parameter.grad)

    def _after(self, *_: Any) -> None:
        for parameter, gradient in self._kept.items():
            parameter.grad = gradient
        self._kept.clear()
