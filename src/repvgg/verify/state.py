"""Run models to judge them, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg.verify.precision import full_float32


@contextmanager
def judging(*models: object) -> Iterator[None]:
    """A state fit for judging, put back to what it was afterwards, after an error too.

    Inside: no gradients, no autocast, float32 products in full float32 (see
    :func:`repvgg.verify.precision.full_float32`), and every module of ``models`` in eval mode. Afterwards the
    ``training`` flag of every module, the values of every buffer, the precision flags and the random states of
    PyTorch (CPU, and CUDA if it is in use) are what they were.

    Args:
        models: what will be run; those that are no ``nn.Module`` have no state that could be put back.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if in_use else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(full_float32())
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(*models))
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(_buffers_kept(model))
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a forward does to buffers, in place or by putting in another tensor."""
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
            _put_back(module, name, buffer, value)


def _put_back(module: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    if getattr(module, name, None) is not buffer:
        setattr(module, name, buffer)
    if not torch.equal(buffer, value):
        buffer.resize_(value.shape).copy_(value)
