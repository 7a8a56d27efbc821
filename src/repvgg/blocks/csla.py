"""Constant-scale linear addition (CSLA, RepOptimizer): training its branches equals training one scaled kernel."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from repvgg.blocks.geometry import Geometry
from repvgg.errors import UsageError


@final
class ConstantScaleSum(nn.Module):
    """``y = s3 · (W3 ∗ x) + s1 · (W1 ∗ x) + w0 · x``: constant scales s3, s1 (O,), learned W3, W1 and w0 (C,).

    w0 starts at 1 and exists iff the shapes match. Plain form: ``K = s3·W3 + pad(s1·W1) + pad(diag(w0))``.
    As s3 and s1 are constant, SGD on W3, W1 and w0 changes K as SGD on K does with its gradient multiplied by
    :meth:`multiplier`. Use it to find the scales (followed by a batch norm, as in the table of blocks), then train the
    plain kernel alone; see :class:`repvgg.training.RepOptimizer`.

    Args:
        geometry: of the kxk convolution.
        dense: s3, a number or a tensor (O,).
        pointwise: s1, a number or a tensor (O,).

    Raises:
        UsageError: the kernel size is even, or the scales are neither one number nor one per output channel.
        BorderError: the padding does not centre the kernel.

    Source: Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023, §3.1.
    """

    def __init__(self, geometry: Geometry, dense: float | Tensor = 1.0, pointwise: float | Tensor = 1.0) -> None:
        super().__init__()
        geometry.require_centre()
        self.geometry = geometry
        self.dense, self.pointwise = geometry.conv(), geometry.around(1)
        self.identity = nn.Parameter(torch.ones(geometry.in_channels, 1, 1)) if geometry.keeps_shape else None
        # Persistent buffers: the scales are part of the function, but no optimizer may change them.
        self.register_buffer("dense_scale", _per_channel(dense, geometry))
        self.register_buffer("pointwise_scale", _per_channel(pointwise, geometry))
        self.dense_scale: Tensor
        self.pointwise_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense_scale * self.dense(x) + self.pointwise_scale * self.pointwise(x)
        return out if self.identity is None else out + self.identity * x

    def multiplier(self) -> Tensor:
        """Return the factor for the gradient of K: ``s3²``, plus ``s1²`` at the centre, plus 1 on its channel diagonal.

        Returns:
            A tensor in the shape of K, (O, I, kH, kW).
        """
        kernel = self.dense.weight
        # d K/d W3 = s3 enters twice: once in the gradient of W3, once in the change of K that it causes.
        factor = self.dense_scale[:, None].square().expand_as(kernel).clone()
        height, width = self.geometry.kernel_size
        factor[:, :, height // 2, width // 2] += self.pointwise_scale[:, :, 0].square()
        if self.identity is not None:
            factor += nn.init.dirac_(torch.zeros_like(factor), self.geometry.groups)
        return factor


def _per_channel(scale: float | Tensor, geometry: Geometry) -> Tensor:
    """Return the scales as (O, 1, 1), which broadcasts over N, H and W."""
    value = torch.as_tensor(scale, dtype=torch.get_default_dtype()).detach()
    if value.numel() not in (1, geometry.out_channels):
        raise UsageError(
            f"A branch of {geometry.out_channels} channels needs 1 or {geometry.out_channels} scales, got "
            f"{value.numel()}."
        )
    return value.reshape(-1, 1, 1).expand(geometry.out_channels, 1, 1).clone()
