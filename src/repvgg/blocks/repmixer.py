"""RepMixer, the token mixer of FastViT (Vasu et al., ICCV 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repvgg.blocks.geometry import Geometry
from repvgg.blocks.repvgg import branches_of
from repvgg.errors import UsageError


class RepMixer(nn.Module):
    """``y = x + λ · (M(x) − BN(x))``: M is the sum of kxk-BN, 1x1-BN and BN, and λ has one number per channel.

    Plain form: ``K = I + λ·(K_M − diag(t))``. Use it depthwise to mix pixels in place of attention; its plain form has
    no shortcut left.

    Args:
        geometry: must keep the shape of its input: equal channels and stride 1.
        scale: initial value of λ, 1e-5 in the paper.

    Raises:
        UsageError: the geometry changes the shape, or the kernel is even.
        BorderError: the padding does not centre the kernel.

    Source: Vasu et al., FastViT, ICCV 2023, §3.2.1.
    """

    def __init__(self, geometry: Geometry, scale: float = 1e-5) -> None:
        super().__init__()
        if not geometry.keeps_shape:
            raise UsageError("A RepMixer adds its input to its output: use equal channels and stride 1.")
        self.mixer = branches_of(geometry)
        self.norm = nn.BatchNorm2d(geometry.in_channels)
        # (C, 1, 1) broadcasts over N, H and W. A small λ makes the block start as the identity.
        self.scale = nn.Parameter(torch.full((geometry.in_channels, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed image."""
        out: Tensor = x + self.scale * (self.mixer(x) - self.norm(x))
        return out
