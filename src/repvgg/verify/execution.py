"""Run models for a comparison: inputs that expose the border, and an isolated state."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from repvgg._contexts import (
    PRECISION_NODES,
    PrecisionNode,
    eval_mode,
    precision_of,
    preserve_fp32_precision,
    set_precision,
)
from repvgg.errors import UsageError

_BORDER_GAIN = 4.0
_BACKENDS = ("cuda", "mkldnn")
_ROOT: PrecisionNode = ("generic", "all")


def name_of(dtype: torch.dtype) -> str:
    """Return ``torch.float32`` as "float32"."""
    return str(dtype).removeprefix("torch.")


def border_inputs(
    shape: Sequence[int], *, batches: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return random images on which an error at the border shows.

    Every value is ``1 + n`` with n standard normal, so that a kernel with dropped or doubled taps changes the mean. The
    outermost rows and columns are multiplied by 4, so that a tap there weighs more than one inside. The first batch has
    the given size; batch k = 1, 2, … has the odd height ``(H + 2k - 1) | 1`` and the odd width ``(W + 2k + 1) | 1``,
    at which a stride or a dilation meets the far border in another phase.

    Args:
        shape: (N, C, H, W) of the first batch, all at least 1.
        batches: number of batches; 1 for a model that takes a single size.
        seed: of a separate generator. PyTorch's global random state is neither read nor changed.
        dtype: of the images, a floating-point type. They are drawn in float64 and rounded once.

    Raises:
        UsageError: the shape is not (N, C, H, W), ``batches`` is below 1, or the dtype is not a floating-point one.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise UsageError(f"shape must be (N, C, H, W) with each at least 1, got {tuple(shape)}.")
    if batches < 1:
        raise UsageError(f"batches must be at least 1, got {batches}.")
    if not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating-point type, got {dtype}.")
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    # Height and width grow differently: exchanging them shows.
    sizes = [(h, w)] + [((h + 2 * k - 1) | 1, (w + 2 * k + 1) | 1) for k in range(1, batches)]
    return [_border_image((n, c, *size), generator).to(dtype) for size in sizes]


def _border_image(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # device="cpu": a default device of the caller would not match the generator's.
    x_NCHW = 1.0 + torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    inside = torch.zeros(shape[-2:], dtype=torch.bool, device="cpu")
    inside[1:-1, 1:-1] = True
    return torch.where(inside, x_NCHW, _BORDER_GAIN * x_NCHW)


def parameter_of(data: Tensor, like: nn.Parameter) -> nn.Parameter:
    """Return a parameter with this data, else as ``like``; assigning to its ``data`` leaves ``like`` as it is."""
    own: nn.Parameter = torch.Tensor._make_subclass(type(like), data, like.requires_grad)
    vars(own).update(vars(like))
    return own


def _empty_copies(part: nn.Module) -> dict[int, Any]:
    """Return copies of the empty containers of a module, as a memo: to copy these takes half the time of a deepcopy."""
    return {
        id(value): type(value)() for value in vars(part).values() if type(value) in (dict, OrderedDict) and not value
    }


def structural_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares the memory of the parameters, and nothing else, with the model.

    A forward may write to buffers and attributes of the copy without changing the model, and another thread may run
    the model meanwhile. Parts that ``torch.compile`` made are as they were before. A model that cannot be copied is
    returned itself.
    """
    # The memo of a copy holds what each object is replaced by.
    lazy = nn.parameter.is_lazy
    memo: dict[int, Any] = {id(p): p if lazy(p) else parameter_of(p.detach(), p) for p in model.parameters()}
    for part in model.modules():
        computed = (value for value in vars(part).values() if isinstance(value, Tensor) and not value.is_leaf)
        memo |= {id(value): value for value in computed}  # PyTorch copies leaves only
        memo |= _empty_copies(part)
    try:
        for part in model.modules():
            if isinstance(compiled := getattr(part, "_orig_mod", None), nn.Module):
                memo[id(part)] = copy.deepcopy(compiled, memo)
        out: nn.Module = copy.deepcopy(model, memo)
    except Exception:  # of any kind: attributes are of the user's classes
        return model
    for part in out.modules():
        part.training = False
    return out


@contextmanager
def isolated_eval(*models: object) -> Iterator[None]:
    """Run models in eval mode and full precision, and restore all state afterwards, even after an error.

    Several threads may be inside at once: what belongs to the process (random states, precision) is saved by the first
    and restored by the last of them. What another thread draws meanwhile is drawn again afterwards.

    Inside: no gradients, no autocast, float32 products in full float32 (see
    :func:`full_float32`), and every module of ``models`` in eval mode. Restored afterwards: the
    ``training`` flag of every module, the values of every buffer, the precision flags, and PyTorch's random states
    (CPU, and CUDA if it is in use).

    Args:
        models: the models to run; objects that are no ``nn.Module`` are ignored.
    """
    with ExitStack() as stack:
        stack.enter_context(_forked_random())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(full_float32())
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(*models))
        # Eval mode does not freeze all buffers: caches and counters are written in any mode.
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(_preserve_buffers(model))
        yield


@contextmanager
def _preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what a forward does to buffers, in place or by assignment."""
    found = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in found:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                buffer.resize_(value.shape).copy_(value)


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 and bfloat16 inside float32 products, whichever API enabled them, and restore all flags.

    :mod:`repvgg._contexts` explains how PyTorch stores the precision of float32 products. An older API
    (``torch.set_float32_matmul_precision``, ``allow_tf32``) has separate flags, and both PyTorch's getters and its CUDA
    kernels raise where the two disagree. So both are set here, and both are restored.

    PyTorch's flags are global to the process, so other threads see the change: of several threads that are inside at
    once, the first sets the flags and the last restores them. Inside, reading the old flag
    ``torch.backends.cudnn.allow_tf32`` raises PyTorch's own error about mixed APIs where that flag is on: writing it
    would overwrite the default of ``cuda.conv``, which no API can restore.
    """
    with _ieee():
        yield


class _Shared:
    """A context of the process: the first thread inside enters it, the last one leaves it, in any order."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self.context, self.lock, self.inside, self.restore = context, threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if self.inside == 0:
                self.restore = ExitStack()
                self.restore.enter_context(self.context())
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0:
                    self.restore.close()


@_Shared
@contextmanager
def _forked_random() -> Iterator[None]:
    # Only where CUDA runs already: asking for its random state would initialize it.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count())) if in_use else []):
        yield


@_Shared
@contextmanager
def _ieee() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(preserve_fp32_precision())
        # Parents first: a node that is not "ieee" under parents that are must have its own value.
        for node in PRECISION_NODES:
            stack.enter_context(_at_ieee(node))
        stack.enter_context(_legacy_highest())
        yield


@contextmanager
def _at_ieee(node: PrecisionNode) -> Iterator[None]:
    value = precision_of(node)
    if value == "ieee":  # its own value or inherited: writing it would end the inheritance
        yield
        return
    set_precision(node, "ieee")
    try:
        yield
    finally:
        set_precision(node, value)


@contextmanager
def _legacy_highest() -> Iterator[None]:
    """Set the old flag for matrix products to "highest". Every node of the tree is at "ieee" already."""
    flag = torch._C._get_float32_matmul_precision()
    if flag == "highest":
        yield
        return
    own = {(backend, "matmul"): _own_matmul_value(backend) for backend in _BACKENDS}
    torch._C._set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch._C._set_float32_matmul_precision(flag)  # overwrites both matmul nodes
        for node, value in own.items():
            set_precision(node, value)


def _own_matmul_value(backend: str) -> str:
    """Return the own value of a backend's ``matmul``, "none" if it inherits. All nodes read "ieee" at this point."""
    parent = (backend, "all")
    return _own_value((backend, "matmul"), parent, _own_value(parent, _ROOT, "ieee"))


def _own_value(node: PrecisionNode, parent: PrecisionNode, own_of_parent: str) -> str:
    # PyTorch has no getter for it: change the parent and see whether the node follows.
    set_precision(parent, "tf32")
    inherits = precision_of(node) == "tf32"
    set_precision(parent, own_of_parent)
    return "none" if inherits else "ieee"


def dtype_of(model: object, tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype of the first floating-point parameter, else of the first floating-point tensor, else float32."""
    parameters: Iterable[Tensor] = model.parameters() if isinstance(model, nn.Module) else ()
    for tensor in chain(parameters, tensors):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
