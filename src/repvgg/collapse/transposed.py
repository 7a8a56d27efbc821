"""Transposed convolutions: no convolution equals one, but what scales and shifts its outcome is part of it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from repvgg.algebra import ConvMap
from repvgg.collapse.emit import cast
from repvgg.collapse.flat import Flat
from repvgg.symbolic import Layout

_RANKS = {nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5}


def transposed_at(flat: Flat, node: fx.Node) -> _ConvTransposeNd | None:
    """The transposed convolution that a node calls, if it runs torch's own forward."""
    module = flat.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    own = isinstance(module, _ConvTransposeNd) and type(module) in _RANKS and "forward" not in vars(module)
    return module if own else None  # type: ignore[return-value]


def told_by_transposed(flat: Flat, node: fx.Node) -> tuple[int, Layout] | None:
    """Channels and layout of the tensor of a node that a transposed convolution puts out or takes, else None."""
    makes = transposed_at(flat, node)
    if makes is not None:
        return makes.out_channels, Layout(_RANKS[type(makes)])
    takes = next((found for user in node.users if (found := transposed_at(flat, user)) is not None), None)
    return None if takes is None else (takes.in_channels, Layout(_RANKS[type(takes)]))


def is_scaling(conv: ConvMap) -> bool:
    """Whether a map scales and shifts each channel and does nothing else."""
    return conv.is_depthwise and conv.is_pointwise


def scaled(transposed: _ConvTransposeNd, scaling: ConvMap) -> _ConvTransposeNd:
    """``scaling(transposed(x))`` as one transposed convolution.

    With kernel W (I, O / groups, *K), bias b and ``y ↦ a·y + c`` for each channel: kernel ``a·W``, the output channels
    of each group being those of axis 1, and bias ``a·b + c``. Computed in float64 and cast once.

    Raises:
        ReparamError: a weight does not fit into the dtype.
    """
    weight_IOK, groups = transposed.weight.detach(), transposed.groups
    factor_O = scaling.weight.flatten().to(weight_IOK.device)
    by_group = factor_O.view(groups, 1, -1, *(1,) * (weight_IOK.dim() - 2))  # (g, 1, O/g, 1, …)
    kernel = weight_IOK.double().view(groups, -1, *weight_IOK.shape[1:]) * by_group
    offset_O = scaling.bias_or_zeros().to(weight_IOK.device)
    if transposed.bias is not None:
        offset_O = offset_O + factor_O * transposed.bias.detach().double()
    new = copy.copy(transposed)
    new.__dict__ = {**vars(transposed), "_parameters": {}}
    new.weight = _like(cast(kernel.view(weight_IOK.shape), weight_IOK), transposed)
    new.bias = _like(cast(offset_O, weight_IOK), transposed)
    return new


def _like(value: Tensor, transposed: _ConvTransposeNd) -> nn.Parameter:
    return nn.Parameter(value.clone(memory_format=torch.preserve_format), transposed.weight.requires_grad)
