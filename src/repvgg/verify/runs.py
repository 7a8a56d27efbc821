"""Run one side on batches, and measure how far two lists of outputs are apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from repvgg.errors import UsageError
from repvgg.verify.precision import name_of


def dtype_of(model: object, batches: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the first floating-point parameter, else of the first floating-point batch, else float32."""
    parameters: Iterable[Tensor] = model.parameters() if isinstance(model, nn.Module) else ()
    for tensor in (*parameters, *batches):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy in ``dtype``, in the mode that the model is in, on the CPU if its device has no float64 (MPS)."""
    out = copy.deepcopy(model)
    if dtype is torch.float64 and _device_of(model, torch.device("cpu")).type == "mps":
        out = out.cpu()
    return out.to(dtype)


def outputs_of(model: Callable[..., object], batches: Iterable[Tensor], who: str) -> list[Tensor]:
    """What ``model`` returns for each batch, on the CPU; each call gets a copy of the batch, on the model's device.

    Raises:
        UsageError: an output is not a floating-point tensor; the text names the side as ``who``.
    """
    return [_checked(model(batch.to(_device_of(model, batch.device), copy=True)), who) for batch in batches]


def _device_of(model: object, default: torch.device) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return default if first is None else first.device


def _checked(output: object, who: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise UsageError(
            f"Only tensors can be compared, but {who} returned a {type(output).__name__}; wrap it in a function that "
            "returns one tensor."
        )
    if not output.is_floating_point():
        raise UsageError(f"Only floating-point outputs can be compared, but {who} returned {name_of(output.dtype)}.")
    return output.detach().to("cpu", copy=True)


def errors(exact: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[float, float]:
    """The absolute and the relative error of ``other``, over all pairs of tensors.

    ``absolute = max|y - y64|`` and ``relative = absolute / max|y64|``. Where ``max|y64|`` is 0, relative is 0 if the
    absolute error is 0 and infinite if not. Other shapes and values that are not finite make both infinite.
    """
    if any(a.shape != b.shape for a, b in zip(exact, other, strict=True)):
        return math.inf, math.inf
    absolute = max(_largest(b.double() - a.double()) for a, b in zip(exact, other, strict=True))
    scale = max(_largest(a) for a in exact)
    if not math.isfinite(absolute) or not math.isfinite(scale):
        return math.inf, math.inf
    if absolute == 0.0:
        return 0.0, 0.0
    return absolute, absolute / scale if scale else math.inf


def _largest(values: Tensor) -> float:
    """``max|v|``; infinite where a value is not finite, 0 of no values."""
    if values.numel() == 0:
        return 0.0
    largest = float(values.abs().max())
    return largest if math.isfinite(largest) else math.inf
