"""First values, and a bound, of kernels in plain networks without shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def delta_orthogonal_(weight_OIHW: Tensor, gain: float = 1.0) -> Tensor:
    """Fill a kernel with zeros, and its centre with a matrix of orthonormal columns times ``gain``.

    With at least as many channels out as in and stride 1, the convolution keeps the length of its input at gain 1:
    ``‖K ∗ x‖ = ‖x‖``. Signals then pass through any number of layers. Each group has a matrix of its own.

    Args:
        weight_OIHW: of a convolution without groups, or of one group; odd height and width have a centre.
        gain: what all singular values become.

    Returns:
        The kernel.

    Source: Xiao et al., Dynamical isometry and a mean field theory of CNNs, ICML 2018, §2.3 and Alg. 1.
    """
    height, width = weight_OIHW.shape[2:]
    centre = torch.empty_like(weight_OIHW[:, :, 0, 0])
    weight_OIHW.zero_()
    weight_OIHW[:, :, height // 2, width // 2] = nn.init.orthogonal_(centre, gain)
    return weight_OIHW


@torch.no_grad()
def max_norm_(model: nn.Module, limit: float) -> nn.Module:
    """Shrink each filter of each convolution to ``w · min(1, limit / ‖w‖₂)``, in place; for after each training step.

    As in ``optimizer.register_step_post_hook(lambda *_: max_norm_(model, 2.0))``.

    Args:
        model: whose ``nn.Conv2d`` are bounded.
        limit: the longest that a filter may be, above 0.

    Returns:
        The model.

    Source: Srebro and Shraibman, Rank, trace-norm and max-norm, COLT 2005; used for plain networks by Oyedotun et al.,
    Going deeper with neural networks without skip connections, ICIP 2020.
    """
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            length = part.weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(part.weight.dtype).tiny)
            part.weight.mul_((limit / length).clamp_max(1).view(-1, 1, 1, 1))
    return model
