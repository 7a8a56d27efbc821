"""Denormal numbers: so close to 0 that many processors are slow on them, so that latency depends on the weights.

A number is denormal where its exponent bits are all 0 and its fraction is not: in float32 below 1.2e-38. Bits are
looked at rather than values, as a processor that flushes denormals compares them as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repvgg._contexts import eval_mode
from repvgg.errors import UsageError

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_PROBE = 1 << 18  # values: enough for PyTorch to share them among all of its threads


@dataclass(frozen=True)
class Denormals:
    """How many there are.

    Attributes:
        weights: among parameters and buffers.
        activations: among the values that the ops of one forward wrote.
        weights_total: values looked at.
        activations_total: values looked at.
    """

    weights: int
    activations: int
    weights_total: int
    activations_total: int

    def __bool__(self) -> bool:
        return bool(self.weights or self.activations)

    def __str__(self) -> str:
        return (
            f"{self.weights:,} of {self.weights_total:,} weights and {self.activations:,} of "
            f"{self.activations_total:,} activations are denormal"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON knows them."""
        return asdict(self)


def denormals_in(tensor: Tensor) -> int:
    """How many values of a tensor are denormal; 0 for a tensor of integers, or of a dtype without a view as such."""
    if tensor.dtype not in _BITS or tensor.is_meta:
        return 0
    exponent = _exponent_bits(tensor.dtype)
    bits = tensor.detach().contiguous().view(_BITS[tensor.dtype])
    fraction = bits & ((1 << _exponent_shift(tensor.dtype)) - 1)
    return int(((bits & exponent == 0) & (fraction != 0)).sum())


def _exponent_shift(dtype: torch.dtype) -> int:
    """Bits of the fraction: eps is 2 to the minus that."""
    return round(-torch.log2(torch.tensor(torch.finfo(dtype).eps, dtype=torch.float64)).item())


def _exponent_bits(dtype: torch.dtype) -> int:
    shift = _exponent_shift(dtype)
    return ((1 << (torch.finfo(dtype).bits - 1 - shift)) - 1) << shift


def count_denormals(model: nn.Module, images: Tensor) -> Denormals:
    """Count denormal numbers in ``model`` and in everything that it computes for ``images``, in eval mode.

    Args:
        model: any module; it is not changed.
        images: what it takes, (N, C, H, W).

    Limits: what a kernel keeps to itself is not seen.
    """
    tensors = (*model.parameters(), *model.buffers())
    recorder = _Recorder()
    with eval_mode(model), torch.no_grad(), recorder:
        model(images)
    weights = sum(map(denormals_in, tensors)), sum(tensor.numel() for tensor in tensors)
    return Denormals(weights[0], recorder.denormal, weights[1], recorder.values)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what each op writes; views write nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and asking to skip the compiler would import all of it, which takes seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.denormal = self.values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in () if func.is_view else out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.values += value.numel()
                self.denormal += denormals_in(value)
        return out


@contextmanager
def flushed_denormals(wanted: bool = True) -> Iterator[None]:
    """Have the CPU take denormal numbers for 0, on every thread of PyTorch; afterwards as before.

    Raises:
        UsageError: the CPU cannot, or PyTorch's threads were at work already and go on as they were.
    """
    if not wanted:
        yield
        return
    before = _flushes(1)
    if not torch.set_flush_denormal(True):
        raise UsageError("This CPU cannot flush denormal numbers: leave that out.")
    try:
        if not _flushes(_PROBE):
            raise UsageError(
                "The threads of PyTorch are at work already and keep denormal numbers: ask to flush them before "
                "anything is computed, or take one thread."
            )
        yield
    finally:
        torch.set_flush_denormal(before)


def _flushes(values: int) -> bool:
    """Whether a product that is denormal comes out as 0, on all threads that share so many values."""
    tiny = torch.finfo(torch.float32).tiny
    return not (torch.full((values,), tiny) * 0.5).view(torch.int32).any()
