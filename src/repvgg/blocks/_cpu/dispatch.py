"""Decide when a sum of branches is trained by the compiled passes, and switch them on or off.

The definition of a block is its ``forward`` over its branches. Where only a clock could tell the difference, the batch
norms of all branches, their sum and the ReLU that follows are computed by
:func:`~repvgg.blocks._cpu.fused_bn_sum.fused_bn_sum` instead. Convolutions are PyTorch's either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from operator import add
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from repvgg.blocks._cpu.build import build
from repvgg.blocks._cpu.fused_bn_sum import DTYPE_CODES, MAX_TERMS, fused_bn_sum
from repvgg.blocks._cpu.joint_conv import is_supported, joint_convs
from repvgg.blocks.basic import ConvBN
from repvgg.errors import MissingDependencyError, UsageError

Kernels: TypeAlias = Literal["auto", "eager", "compiled"]

# A context variable, not a global: threads choose independently of each other.
_KERNELS: ContextVar[Kernels] = ContextVar("repvgg_training_kernels", default="auto")


class _Branch(NamedTuple):
    conv: nn.Conv2d | None  # None: the identity
    norm: nn.BatchNorm2d


@contextmanager
def training_kernels(kernels: Kernels) -> Iterator[None]:
    """Choose what computes the batch norms of blocks that are trained inside the ``with`` statement.

    Args:
        kernels: "compiled" selects the passes that are compiled on this machine, "eager" selects PyTorch's own
            functions, and "auto", the default outside, selects the former where they can be built.

    Raises:
        UsageError: ``kernels`` is none of these.
        MissingDependencyError: "compiled", and the passes cannot be built; the text says why.
    """
    if kernels not in get_args(Kernels):
        raise UsageError(f"Training kernels must be one of {', '.join(get_args(Kernels))}, not {kernels!r}.")
    if kernels == "compiled" and build().function is None:
        raise MissingDependencyError(build().report)
    token = _KERNELS.set(kernels)
    try:
        yield
    finally:
        _KERNELS.reset(token)


def status() -> str:
    """Return one sentence on where the compiled passes are, or why there are none; builds them if necessary."""
    return build().report


def fused_forward(branches: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor | None:
    """Compute ``act(Σ_k branch_k(x))`` with the compiled passes, or return None to leave it to the caller's definition.

    They apply in training mode, if each branch is a batch norm or a :class:`ConvBN`, all use the statistics of the
    batch, and ``act`` is a ReLU. They do not apply where something observes the steps in between: hooks, subclasses,
    tracers, function transforms, dispatch modes.

    Args:
        branches: a :class:`~repvgg.blocks.BranchSum`; any other module returns None.
        x: the input, (N, C, H, W).
        act: the activation that follows, if it is to be computed as well.
    """
    # The cheap tests come first: this runs in every forward of every block, in eval mode too.
    if torch.compiler.is_compiling() or not branches.training or type(x) is not Tensor or x.device.type != "cpu":
        return None
    parts = _matched_branches(branches, act)
    if parts is None or _KERNELS.get() == "eager" or _is_observed() or build().function is None:
        return None
    norms = [part.norm for part in parts]
    convs = [part.conv for part in parts]
    # One convolution with a hook, a bias or a parametrization runs all of them as modules.
    joint = all(conv is None or (_calls_only_forward(conv) and is_supported(conv)) for conv in convs)
    images = joint_convs(convs, x) if joint else [x if conv is None else conv(x) for conv in convs]
    terms = list(zip(norms, images, strict=True))
    if _are_fusable(images, norms):
        # Outputs of joint_convs are referenced by nothing else, so their memory may be reused for their gradients.
        return fused_bn_sum(terms, act is not None, [joint and conv is not None for conv in convs])
    # Mixed dtypes under autocast, for example: the norms run as PyTorch's, with the convolutions done above.
    out: Tensor = reduce(add, (norm(image) for norm, image in terms))
    return out if act is None else out.relu()


def _matched_branches(branches: nn.Module, act: nn.Module | None) -> list[_Branch] | None:
    """Return each branch as convolution and batch norm, or None if one does not match or a submodule has hooks."""
    parts: list[_Branch] = []
    for branch in branches.children():
        conv: nn.Conv2d | None = None
        norm: nn.Module = branch
        if type(branch) is ConvBN and _calls_only_forward(branch):
            conv, norm = branch.conv, branch.bn
        # type, not isinstance: subclasses such as SyncBatchNorm compute something else.
        if type(norm) is not nn.BatchNorm2d or not norm.training or not _calls_only_forward(norm):
            return None
        parts.append(_Branch(conv, norm))
    # With an activation to fuse, the call of ``branches`` itself is skipped as well: it must have no hooks either.
    if act is not None and not (type(act) is nn.ReLU and _calls_only_forward(act) and _calls_only_forward(branches)):
        return None
    return parts if 0 < len(parts) <= MAX_TERMS else None


def _calls_only_forward(module: nn.Module) -> bool:
    """Return whether calling the module runs the ``forward`` of its class and no hooks."""
    # torch.nn.Module.__call__ skips straight to forward under the same conditions.
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _is_observed() -> bool:
    """Return whether anything except autograd may observe or transform each function call."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)
        or bool(global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks)
    )


def _are_fusable(images: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]) -> bool:
    """Return whether the compiled passes support these tensors: of one shape, one known dtype and one device."""
    first = images[0]
    shape, dtype = first.shape, first.dtype
    # One value per channel has no variance: PyTorch's batch norm raises the usual error.
    if dtype not in DTYPE_CODES or len(shape) != 4 or first.numel() <= shape[1]:
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
