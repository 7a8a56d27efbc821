"""Upstream's L2 on the equivalent kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repvgg.training.decay import rep_branches

_TINY = torch.finfo(torch.float32).tiny


def equivalent_l2(model: nn.Module) -> Tensor:
    """The sum over all RepVGG blocks of the L2 norm of their equivalent kernel, as upstream takes it.

    With t = γ/√(var + ε) of the running statistics, without gradient, and K3, K1 the kernels of the two convolutions:
    ``Σ K3² off the centre + Σ (K3c·t3 + K1·t1)² / (t3² + t1²)``. Multiply by half the weight decay and add it to the
    loss, in place of the decay of both kernels. The identity is ignored, as upstream does; where both γ are 0 the
    second term is 0.

    Returns:
        A scalar with gradients for the kernels; 0 for a model without RepVGG blocks.

    Source: upstream's ``get_custom_L2`` (2021).
    """
    terms = [_of_block(block) for block in rep_branches(model)]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _of_block(block: nn.ModuleDict) -> Tensor:
    dense, pointwise = block.get_submodule("dense"), block.get_submodule("pointwise")
    k3, k1 = dense.get_parameter("conv.weight"), pointwise.get_parameter("conv.weight")
    t3, t1 = _scale(dense.get_submodule("bn")), _scale(pointwise.get_submodule("bn"))
    row, column = k3.shape[2] // 2, k3.shape[3] // 2
    centre = k3[:, :, row : row + 1, column : column + 1]
    off_centre = k3.square().sum() - centre.square().sum()
    return off_centre + ((centre * t3 + k1 * t1).square() / (t3.square() + t1.square()).clamp_min(_TINY)).sum()


def _scale(bn: nn.Module) -> Tensor:
    """γ/√(var + ε), one number an output channel, shaped for a kernel (O, I, kH, kW)."""
    assert isinstance(bn, nn.modules.batchnorm._BatchNorm)
    assert bn.running_var is not None
    sigma = (bn.running_var + bn.eps).sqrt()
    gamma = torch.ones_like(sigma) if bn.weight is None else bn.weight.detach()
    return (gamma / sigma).reshape(-1, 1, 1, 1)
