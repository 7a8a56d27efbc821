"""A stem that whitens: its kernel holds the principal components of image patches, and is not trained."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.blocks import BranchSum, ConvBN
from repvgg.errors import UsageError
from repvgg.models import RepVGG
from repvgg.training.tasks import TrainingData

_PATCH = 2  # pixels; 3 channels have 12 components, of which each takes two output channels
_BATCH, _BATCHES = 512, 4  # 2048 images have two million patches


def principal_components(images: Tensor, patch: int) -> Tensor:
    """Return the eigenvectors (C·patch², C, patch, patch) of the covariance of patches, largest eigenvalue first.

    Args:
        images: (N, C, H, W).
        patch: height and width of the patches.
    """
    columns = F.unfold(images, patch).transpose(0, 1).flatten(1)
    vectors: Tensor
    _, vectors = torch.linalg.eigh(torch.cov(columns))  # eigenvectors as columns, smallest eigenvalue first
    # The sign of an eigenvector is arbitrary, and may differ between machines.
    vectors = vectors * vectors.sum(0).sign().where(vectors.sum(0) != 0, torch.ones(()))
    return vectors.flip(1).T.reshape(-1, images.shape[1], patch, patch)


@torch.no_grad()
def whiten_stem(model: RepVGG, data: TrainingData) -> str:
    """Set the 3x3 kernel of the stem to principal components of 2x2 patches of training images, and freeze it.

    Each component c takes two output channels, c and −c, as the ReLU drops one half of either; channels that are left
    over keep their random filters. The batch norm that follows gives all components the same variance, which is what
    whitening is. The 1x1 branch starts at zero, and is trained.

    Args:
        model: a train form; modified.
        data: the images.

    Returns:
        What was done, for the user.

    Raises:
        UsageError: the stem has no such branches.

    Source: K. Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU, 2024 (arXiv 2404.00498), §3.1.
    """
    branches = model.stem.conv
    dense, pointwise = (
        branches[name] if isinstance(branches, BranchSum) and name in branches else None
        for name in ("dense", "pointwise")
    )
    if not (isinstance(dense, ConvBN) and isinstance(pointwise, ConvBN)):
        raise UsageError("A stem without the branches of RepVGG cannot be whitened: leave out whiten_stem.")
    size = min(_BATCH, data.num_train or _BATCH)
    images = torch.cat([data.prepare(images) for images, _ in itertools.islice(data.train_batches(size), _BATCHES)])
    kernel = dense.conv.weight
    components = principal_components(images, _PATCH)[: len(kernel) // 2]
    components = F.pad(components, (0, 1, 0, 1))  # 2x2 in the upper left of 3x3
    kernel[: 2 * len(components)] = torch.cat((components, -components))
    kernel.requires_grad_(False)
    pointwise.bn.weight.zero_()
    return f"the stem starts from {len(components)} principal components of patches, and keeps them"
