"""The inputs of a verification: checking those of the caller, and making some that hit the border."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from repvgg.errors import UsageError

_BORDER_GAIN = 4.0


def border_inputs(
    shape: Sequence[int], *, batches: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Random images on which a mistake at the border shows.

    Every value is ``1 + n`` with n standard normal, so that a kernel whose taps are dropped or doubled changes the
    mean; the outermost rows and columns are four times as large, so that a tap there counts more than one inside. The
    first batch has the size asked for; batch k = 1, 2, … has the odd height ``(H + 2k - 1) | 1`` and the odd width
    ``(W + 2k + 1) | 1``, where a stride or a dilation meets the far border at another phase.

    Args:
        shape: (N, C, H, W) of the first batch, all at least 1.
        batches: how many; 1 for a model that takes one size only.
        seed: of a generator of its own. PyTorch's global random state is neither read nor changed.
        dtype: of the images, a floating-point type. They are drawn in float64 and rounded once.

    Raises:
        UsageError: the shape is not (N, C, H, W), there is no batch to make, or the dtype is not a floating-point one.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise UsageError(f"Images have the shape (N, C, H, W) with each at least 1, not {tuple(shape)}.")
    if batches < 1:
        raise UsageError(f"A verification needs at least one batch, not {batches}.")
    if not dtype.is_floating_point:
        raise UsageError(f"Images are of a floating-point type, not {dtype}.")
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    sizes = [(h, w)] + [((h + 2 * k - 1) | 1, (w + 2 * k + 1) | 1) for k in range(1, batches)]
    return [_image((n, c, *size), generator).to(dtype) for size in sizes]


def _image(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One batch of :func:`border_inputs` in float64."""
    x_NCHW = 1.0 + torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    inside = torch.zeros(shape[-2:], dtype=torch.bool, device="cpu")
    inside[1:-1, 1:-1] = True
    return torch.where(inside, x_NCHW, _BORDER_GAIN * x_NCHW)


def as_batches(inputs: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """One batch or several, as a list of non-empty batches.

    Raises:
        UsageError: there is no input, an entry is not a tensor, or a batch holds no value.
    """
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not batches:
        raise UsageError("There is nothing to verify on: pass a batch of inputs, or several.")
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise UsageError(f"Each batch of inputs is a tensor, not a {type(batch).__name__}.")
        if batch.dim() == 0 or batch.numel() == 0:
            raise UsageError(f"A batch of shape {tuple(batch.shape)} holds no sample to verify on.")
    return batches


def rounded(batches: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The batches in ``dtype``; integers stay as they are.

    Raises:
        UsageError: a value is not finite once it is rounded.
    """
    out = [batch.to(dtype) if batch.is_floating_point() else batch for batch in batches]
    if not all(bool(torch.isfinite(batch).all()) for batch in out):
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"The inputs hold a NaN or an infinity once they are rounded to {name}; pass finite ones.")
    return out
