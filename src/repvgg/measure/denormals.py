"""Denormal numbers, on which many processors are slow: they make latency depend on the weights.

A number is denormal if its exponent bits are all 0 and its fraction is not: below 1.2e-38 in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repvgg._contexts import eval_mode
from repvgg.errors import UsageError

_INT_OF_SAME_WIDTH = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_PARALLEL_PROBE = 1 << 18  # values: more than PyTorch's grain size, so that it uses all of its threads


@dataclass(frozen=True)
class Denormals:
    """Number of denormal values."""

    weights: int  # among parameters and buffers
    activations: int  # among the values that the ops of one forward pass wrote
    weights_total: int  # parameter and buffer values in all
    activations_total: int  # written values in all

    def __bool__(self) -> bool:
        return bool(self.weights or self.activations)

    def __str__(self) -> str:
        return (
            f"{self.weights:,} of {self.weights_total:,} weights and {self.activations:,} of "
            f"{self.activations_total:,} activations are denormal"
        )


def denormals_in(tensor: Tensor) -> int:
    """Count the denormal values of a tensor; 0 for integers, other dtypes and meta tensors."""
    if tensor.dtype not in _INT_OF_SAME_WIDTH or tensor.is_meta:
        return 0
    info = torch.finfo(tensor.dtype)
    # eps is 2 to the minus fraction bits
    fraction_bits = round(-torch.log2(torch.tensor(info.eps, dtype=torch.float64)).item())
    exponent_mask = ((1 << (info.bits - 1 - fraction_bits)) - 1) << fraction_bits
    # Compare bits, not values: a processor that flushes denormals compares them as zeros.
    bits = tensor.detach().contiguous().view(_INT_OF_SAME_WIDTH[tensor.dtype])
    fraction = bits & ((1 << fraction_bits) - 1)
    return int(((bits & exponent_mask == 0) & (fraction != 0)).sum())


def count_denormals(model: nn.Module, images: Tensor) -> Denormals:
    """Count denormal numbers in ``model`` and in everything that it computes for ``images``, in eval mode.

    Args:
        model: any module; it is not changed.
        images: its input, (N, C, H, W).

    Limits: intermediate values inside a kernel are not seen.
    """
    tensors = (*model.parameters(), *model.buffers())
    recorder = _Recorder()
    with eval_mode(model), torch.no_grad(), recorder:
        model(images)
    return Denormals(
        weights=sum(map(denormals_in, tensors)),
        activations=recorder.denormal,
        weights_total=sum(tensor.numel() for tensor in tensors),
        activations_total=recorder.values,
    )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled under this mode, and True would make PyTorch import all of torch._dynamo (seconds).
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.denormal = self.values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # Views write nothing: their values were counted when they were computed.
        for value in () if func.is_view else out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.values += value.numel()
                self.denormal += denormals_in(value)
        return out


@contextmanager
def flushed_denormals(enabled: bool = True) -> Iterator[None]:
    """Make the CPU treat denormal numbers as 0 on every thread of PyTorch; restore its mode on exit.

    Args:
        enabled: False does nothing.

    Raises:
        UsageError: the CPU cannot, or PyTorch's threads are running already and would keep denormals.
    """
    if not enabled:
        yield
        return
    before = _flushes(1)
    if not torch.set_flush_denormal(True):
        raise UsageError("This CPU cannot flush denormal numbers: leave out --flush-denormal.")
    try:
        # Worker threads inherit the flag when they start; running ones keep theirs.
        if not _flushes(_PARALLEL_PROBE):
            raise UsageError(
                "PyTorch's threads are running already and keep denormal numbers: flush them before anything is "
                "computed, or use one thread."
            )
        yield
    finally:
        torch.set_flush_denormal(before)


def _flushes(values: int) -> bool:
    """Return whether denormal products are 0 on every thread that computes a share of that many values."""
    tiny = torch.finfo(torch.float32).tiny
    return not (torch.full((values,), tiny) * 0.5).view(torch.int32).any()
