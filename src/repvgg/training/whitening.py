"""A stem that starts as a whitening of image patches, so that a short run need not learn it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.errors import UsageError


def principal_patches(images: Iterable[Tensor], kernel_size: int) -> Tensor:
    """The principal components of all k x k patches of ``images``: ``Σ p·pᵀ = E diag(λ) Eᵀ``.

    Args:
        images: batches (N, C, H, W), normalized, so that their mean is about 0; one batch is held at a time.
        kernel_size: k, at most H and W.

    Returns:
        (C·k², C, k, k) float32: the columns of E as patches of norm 1, the largest λ first, each with its largest
        value positive, as signs are arbitrary.
    """
    second_moment, channels = torch.zeros(1, dtype=torch.float64), 0
    for batch in images:
        patches = F.unfold(batch.double(), kernel_size).transpose(1, 2).flatten(0, 1)
        second_moment, channels = second_moment + patches.T @ patches, batch.shape[1]
    vectors = torch.linalg.eigh(second_moment).eigenvectors.T.flip(0)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    components: Tensor = (vectors * largest.sign()).float()
    return components.reshape(-1, channels, kernel_size, kernel_size)


def whiten(conv: nn.Conv2d, images: Iterable[Tensor]) -> int:
    """Start a convolution, in place, as principal components of its patches and their negatives; return how many.

    Kernel 2i is component i, kernel 2i + 1 its negative: behind a ReLU both halves of it are seen. With the batch norm
    behind the convolution, which scales each output to variance 1, this is whitening. Output channels beyond the
    2·C·k² that there are keep their random start. The kernels have norm 1, more than random ones, and so learn more
    slowly behind the batch norm.

    Source: K. Jordan 2024, arXiv 2404.00498, §3.2, where the kernels are frozen; here they go on learning.

    Raises:
        UsageError: the convolution has groups, is dilated, or its kernel is not square.
    """
    out_channels, _, height, width = conv.weight.shape
    if conv.groups != 1 or conv.dilation != (1, 1) or height != width:
        raise UsageError(f"A stem with groups, dilation or an oblong kernel is not whitened: {conv}.")
    components = principal_patches(images, height)
    both = torch.stack([components, -components], 1).flatten(0, 1)[:out_channels]
    with torch.no_grad():
        conv.weight[: len(both)] = both
    return len(both)
