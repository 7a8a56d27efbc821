"""Transforms for batches, in torchvision's own protocol (``torchvision.transforms.v2``)."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torchvision.transforms import v2

from repvgg.data.affine import jitter_matrices, sample_affine
from repvgg.data.augment import AffineJitter


@final
class JitterEach(v2.Transform):  # type: ignore[misc]  # torchvision carries no types
    """Give every image of a batch (N, C, H, W) its own affine jitter.

    ``y(p) = x(R(−a) (p − t) / s)`` with p in pixels from the centre, sampled bilinearly; beyond the border lies
    ``fill``. ``v2.RandomAffine`` draws one set of amounts for the whole batch; here there is one an image, and all are
    sampled in one call. Amounts are drawn from torch's global generator on the CPU, so that one seed gives the same
    amounts on any device.

    Args:
        jitter: the range of each amount.
        fill: value beyond the border, one number a channel, in the units of the (normalized) image.
    """

    def __init__(self, jitter: AffineJitter, fill: tuple[float, ...]) -> None:
        super().__init__()
        self.jitter = jitter
        self.fill = fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw one matrix (2, 3) an image: from output to input coordinates, both in [−1, 1]."""
        n, _, height, width = flat_inputs[0].shape
        return {"matrix_N23": jitter_matrices(torch.rand(4, n) * 2 - 1, self.jitter, height, width)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Sample the batch ``inpt`` (N, C, H, W) at the drawn matrices."""
        return sample_affine(inpt, params["matrix_N23"], self.fill)
