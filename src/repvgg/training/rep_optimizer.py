"""RepOptimizer: gradient re-parameterization, which trains a plain kernel as if it had branches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg.blocks import ConstantScaleSum
from repvgg.errors import UsageError
from repvgg.symbolic import equivalent_conv


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
        """Clear the gradients."""
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
