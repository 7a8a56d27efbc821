"""FastViT's token mixer (Vasu et al., ICCV 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repvgg.blocks.geometry import Geometry
from repvgg.blocks.repvgg import Switches, branches_of
from repvgg.errors import UsageError


class RepMixer(nn.Module):
    """``y = x + λ · (M(x) − BN(x))``, with M the branches kxk-BN, 1x1-BN and BN, summed, and λ one number a channel.

    Plain form: ``K = I + λ·(K_M − diag(t))``. When to use it: depthwise, to mix pixels in the place of attention; it
    costs no shortcut in the plain form.

    Args:
        geometry: must keep its shape: as many channels out as in, stride 1.
        scale: the first value of λ, 1e-5 in the paper.

    Raises:
        UsageError: the geometry does not keep its shape, or has an even kernel.
        BorderError: the padding is another one than the centre needs.

    Source: Vasu et al., FastViT, ICCV 2023, §3.2.1.
    """

    def __init__(self, geometry: Geometry, scale: float = 1e-5) -> None:
        super().__init__()
        if not geometry.keeps_shape:
            raise UsageError("A RepMixer adds its input: it needs as many channels out as in, and stride 1.")
        self.mixer = branches_of(geometry, Switches())
        self.norm = nn.BatchNorm2d(geometry.in_channels)
        self.scale = nn.Parameter(torch.full((geometry.in_channels, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed image."""
        out: Tensor = x + self.scale * (self.mixer(x) - self.norm(x))
        return out
