"""When a sum of branches may be trained by the compiled passes, and the switch for that.

The definition of a block is its ``forward`` over its branches, and stays that. Where nothing can tell the difference
but a clock, the batch norms of all branches, their sum and the ReLU behind it are computed by
:func:`~repvgg.blocks.normsum.norm_sum` instead; convolutions are PyTorch's either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from operator import add
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as registry

from repvgg.blocks.basic import ConvBN
from repvgg.blocks.joint import is_joint, joint_convs
from repvgg.blocks.native import build
from repvgg.blocks.normsum import MOST_TERMS, TYPES, norm_sum
from repvgg.errors import MissingDependencyError, UsageError

Kernels: TypeAlias = Literal["auto", "eager", "compiled"]

_KERNELS: ContextVar[Kernels] = ContextVar("repvgg_training_kernels", default="auto")


@contextmanager
def training_kernels(kernels: Kernels) -> Iterator[None]:
    """Choose what computes the batch norms of blocks that are trained inside the ``with``.

    Args:
        kernels: "compiled" takes the passes that are compiled on this machine, "eager" PyTorch's own functions, and
            "auto", which holds outside, the former where they can be built and the latter where not.

    Raises:
        UsageError: there is no such choice.
        MissingDependencyError: "compiled", and they cannot be built; the text says why.
    """
    if kernels not in get_args(Kernels):
        raise UsageError(f"Training kernels are {', '.join(get_args(Kernels))}, not {kernels!r}.")
    if kernels == "compiled" and build().function is None:
        raise MissingDependencyError(build().report)
    token = _KERNELS.set(kernels)
    try:
        yield
    finally:
        _KERNELS.reset(token)


def status() -> str:
    """One sentence about the compiled passes: where they are, or why there are none. Builds them if need be."""
    return build().report


def trained(branches: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor | None:
    """``act(Σ_k branch_k(x))`` by the compiled passes where that is the same, else None: the caller has the definition.

    It is the same in training mode, for branches that are a batch norm or a :class:`ConvBN` with one, all of them with
    statistics of the batch, and ``act`` a ReLU. It is left to the definition where something looks at what happens in
    between: hooks, subclasses, tracers, transforms, modes.

    Args:
        branches: a :class:`~repvgg.blocks.branches.BranchSum`, or anything else, for which there is None.
        x: the input (N, C, H, W).
        act: what follows, if it is to be computed as well.
    """
    if torch.compiler.is_compiling() or not branches.training or type(x) is not Tensor or x.device.type != "cpu":
        return None
    parts = _parts(branches, act)
    if parts is None or _KERNELS.get() == "eager" or _is_watched() or build().function is None:
        return None
    convs, norms = zip(*parts, strict=True)
    joint = all(conv is None or (_is_bare(conv) and is_joint(conv)) for conv in convs)
    images = joint_convs(convs, x) if joint else [x if conv is None else conv(x) for conv in convs]
    terms = list(zip(norms, images, strict=True))
    if _takes(images, norms):
        return norm_sum(terms, act is not None, [joint and conv is not None for conv in convs])
    out: Tensor = reduce(add, (norm(image) for norm, image in terms))
    return out if act is None else out.relu()


def _parts(branches: nn.Module, act: nn.Module | None) -> list[tuple[nn.Conv2d | None, nn.BatchNorm2d]] | None:
    """Each branch as a convolution, or None for the identity, and its batch norm; None if one is something else."""
    parts: list[tuple[nn.Conv2d | None, nn.BatchNorm2d]] = []
    for branch in branches.children():
        bare = type(branch) is ConvBN and _is_bare(branch)
        conv, norm = (branch.conv, branch.bn) if isinstance(branch, ConvBN) and bare else (None, branch)
        if type(norm) is not nn.BatchNorm2d or not norm.training or not _is_bare(norm):
            return None
        parts.append((conv, norm))
    if act is not None and not (type(act) is nn.ReLU and _is_bare(act) and _is_bare(branches)):
        return None
    return parts if 0 < len(parts) <= MOST_TERMS else None


def _is_bare(module: nn.Module) -> bool:
    """Whether a module is called for nothing but its forward, the one of its class."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _is_watched() -> bool:
    """Whether anything but autograd may look at, or transform, each function that is called."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or bool(registry._global_forward_hooks or registry._global_forward_pre_hooks)
        or bool(registry._global_backward_hooks or registry._global_backward_pre_hooks)
    )


def _takes(images: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]) -> bool:
    """Whether the compiled passes take these: ordinary tensors alike, enough numbers, parameters where they belong."""
    first = images[0]
    shape, dtype = first.shape, first.dtype
    if dtype not in TYPES or len(shape) != 4 or first.numel() <= shape[1]:
        return False
    if not all(type(image) is Tensor and image.shape == shape and image.dtype == dtype for image in images):
        return False
    channels, device = shape[1:2], first.device
    for norm in norms:
        for values in (*norm._parameters.values(), norm._buffers["running_mean"], norm._buffers["running_var"]):
            if values is None:
                continue
            if values.shape != channels or values.device != device or type(values) not in (nn.Parameter, Tensor):
                return False
            if not values.is_floating_point():
                return False
    return True
