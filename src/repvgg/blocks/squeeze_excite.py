"""Squeeze-and-excitation (Hu et al., CVPR 2018), as RepVGG-D2se and RepVGGplus use it."""

from __future__ import annotations

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the channel means.

    ``y = x · sigmoid(W2 ReLU(W1 mean_HW(x) + b1) + b2)``, with ``hidden`` channels in between.
    Not linear: it ends a linear region and survives a collapse as it is.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated input; shapes are unchanged."""
        mean = x.mean((2, 3), keepdim=True)
        gate = self.up(self.down(mean).relu()).sigmoid()
        out: Tensor = x * gate
        return out
