"""Fresh blocks in the geometry of a convolution, set to its dtype, device and mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from repvgg.blocks import BranchSum, Geometry, branches_of
from repvgg.errors import ReparamError, RepvggError

MakeBlock = Callable[[nn.Conv2d], nn.Module | None]


def rep_block(conv: nn.Conv2d) -> BranchSum:
    """The branches of RepVGG around a convolution: kxk, 1x1 and, where the shapes match, the identity, each with a BN.

    Any odd kernel, stride, dilation, groups and padding mode; freshly initialized, and nothing of ``conv`` is copied.
    See :func:`repvgg.blocks.rep_conv` for the formula.

    Raises:
        BorderError: the padding is not ``dilation · (k − 1) / 2``: 1x1 and identity would read around other pixels.
        UsageError: the kernel size is even.
    """
    branches = branches_of(Geometry.of(conv))
    assert isinstance(branches, BranchSum)  # nothing follows the sum
    return branches


def block_for(conv: nn.Conv2d, make: MakeBlock) -> nn.Module:
    """What ``make`` returns for a copy of ``conv``.

    Raises:
        ReparamError: there is no block for this convolution; the text says why.
    """
    try:
        block = make(copy.deepcopy(conv))
    except RepvggError as error:
        raise ReparamError(str(error).rstrip(".")) from error
    except Exception as error:
        raise ReparamError(f"the block cannot be made ({type(error).__name__}: {error})") from error
    if block is None:
        raise ReparamError("there is no block for it")
    return block


def like_conv(block: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Set a module to the dtype, device, memory format and training mode of ``conv``, and freeze it if that is."""
    weight = next(iter(conv.parameters()))
    block.to(weight)
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        block.to(memory_format=torch.channels_last)
    if not weight.requires_grad:
        block.requires_grad_(False)
    return block.train(conv.training)
