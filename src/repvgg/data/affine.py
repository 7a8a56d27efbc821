"""Turning, moving and resizing every image of a batch by amounts of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.data.augment import AffineJitter


def jitter_matrices(draw_4N: Tensor, jitter: AffineJitter, height: int, width: int) -> Tensor:
    """One matrix (N, 2, 3) an image, from output to input coordinates, both in [−1, 1].

    Args:
        draw_4N: numbers in [−1, 1]: turn, size, shift to the right, shift down.
        jitter: the range of each amount.
        height: of the images.
        width: of the images.
    """
    n = draw_4N.shape[1]
    angle = draw_4N[0] * math.radians(jitter.degrees)
    zoom = 1 / (1 + draw_4N[1] * jitter.scale)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    turn_N22 = torch.stack((cos, sin * height / width, -sin * width / height, cos), 1).reshape(n, 2, 2)
    shift_N21 = draw_4N[2:].T.unsqueeze(2) * (2 * jitter.translate)
    return torch.cat((turn_N22, -turn_N22 @ shift_N21), 2)


def sample_affine(x_NCHW: Tensor, matrix_N23: Tensor, fill: tuple[float, ...]) -> Tensor:
    """Sample float images bilinearly at the coordinates that the matrices say; beyond the border lies ``fill``."""
    beyond = torch.tensor(fill, dtype=x_NCHW.dtype, device=x_NCHW.device).reshape(1, -1, 1, 1)
    grid_NHW2 = F.affine_grid(matrix_N23.to(x_NCHW), list(x_NCHW.shape), align_corners=False)
    return F.grid_sample(x_NCHW - beyond, grid_NHW2, align_corners=False) + beyond
