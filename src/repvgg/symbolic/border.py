"""The border of a tensor that was padded, which item assignments may fill with what a layer gives for zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repvgg.algebra import Axis, ConvMap
from repvgg.errors import BorderError, NotLinearError

# Relative to the largest number in the border. A sum over 4096 channels stays below it; it is a 2^-17th of a rounding
# in float32, so numbers that were computed in float32 differ by more.
_TOLERANCE = 4096 * torch.finfo(torch.float64).eps
# Of a float32 model, which computes what it assigns in float32: as far as a fold may be off.
_TOLERANCE_FLOAT32 = 64 * torch.finfo(torch.float32).eps

_ZEROS_AFTER_BIAS = (
    "a bias in front of a zero padding leaks into it: assign the bias to the border before the next convolution, or "
    "drop it"
)
_NOT_THE_BIAS = (
    "what is assigned to the padding differs from what the layer before it gives for zeros, or does not fill it: "
    "assign exactly that to all of it"
)


class PaddedBorder:
    """The border of a padded tensor until something reads it.

    A convolution follows the padding exactly iff the border holds what the map before it gives for zeros: its bias.

    Attributes:
        conv: the map before the padding.
        axes: the padding along each spatial axis.
        value: what the tensor was padded with.
        dtype: in which the model computes what it assigns.
        template: the padded tensor (1, C, *sizes) of an image of one pixel, which is never read itself; None until an
            item is assigned.
        written: in the same shape, on the CPU: where an item was assigned.
    """

    def __init__(self, conv: ConvMap, axes: tuple[Axis, ...], value: float, dtype: torch.dtype) -> None:
        self.conv, self.axes, self.value, self.dtype = conv, axes, value, dtype
        self.template: Tensor | None = None
        self.written: Tensor | None = None

    def copy(self) -> PaddedBorder:
        """Return a copy, which further assignments to this one do not reach."""
        border = PaddedBorder(self.conv, self.axes, self.value, self.dtype)
        border.template = None if self.template is None else self.template.clone()
        border.written = None if self.written is None else self.written.clone()
        return border

    def assign(self, index: tuple[Any, ...], value: Tensor) -> None:
        """Assign to places of the border; ``index`` has an entry for each axis of the tensor.

        Raises:
            NotLinearError: which places they are depends on the size of the image, or one of them is in it, or
                ``value`` is not one number per channel and place.
        """
        if index[0] != slice(None) or not all(map(_is_in_border, index[2:], self.axes)):
            raise NotLinearError("an item assignment after a padding is linear only in the padding, in all images")
        if self.template is None or self.written is None:
            shape = (1, self.conv.out_channels, *(axis.before + 1 + axis.after for axis in self.axes))
            self.template = torch.full(shape, self.value, dtype=self.conv.dtype, device=self.conv.device)
            self.written = torch.zeros(shape, dtype=torch.bool)
        try:
            self.template[index] = value.detach()
            self.written[index] = True
        except (RuntimeError, IndexError, TypeError) as error:
            raise NotLinearError(f"what is assigned to the padding is not one number per channel: {error}") from error
        pixel: Any = (slice(None), slice(None), *(axis.before for axis in self.axes))
        if bool(self.written[pixel].any()):
            raise NotLinearError("an item assignment after a padding overwrites the image itself")

    def error(self) -> BorderError | None:
        """Return why the border does not hold the bias, or None if it does."""
        bias = self.conv.bias
        if self.template is None or self.written is None:
            if self.value:
                fits = bias is not None and not bias.is_meta and self._is_bias(torch.full_like(bias, self.value))
                return None if fits else BorderError(f"the image is padded with {self.value}")
            fits = bias is None or (not bias.is_meta and not bool(bias.any()))
            return None if fits else BorderError(_ZEROS_AFTER_BIAS)
        border = torch.ones(self.written.shape[2:], dtype=torch.bool)
        border[tuple(axis.before for axis in self.axes)] = False
        # Without values, the places are all there is to know. With values, they decide.
        if self.template.is_meta:
            return None if bool(self.written[0, :, border].all()) else BorderError(_NOT_THE_BIAS)
        fits = self._is_bias(self.template[0, :, border.to(self.template.device)])
        return None if fits else BorderError(_NOT_THE_BIAS)

    def _is_bias(self, values: Tensor) -> bool:
        """Whether ``values`` (C,) or (C, places) are the bias, up to rounding."""
        bias = self.conv.bias
        places = values.flatten(1) if values.dim() > 1 else values[:, None]
        wanted = torch.zeros_like(places) if bias is None else bias.detach()[:, None].expand_as(places)
        difference, scale = (places - wanted).abs().max(), torch.maximum(places.abs(), wanted.abs()).max()
        return bool(difference <= (_TOLERANCE_FLOAT32 if self.dtype is torch.float32 else _TOLERANCE) * scale)


def _is_in_border(entry: Any, axis: Axis) -> bool:
    """Whether an index along an axis means the same places for every size of the image."""
    bounds: Sequence[Any] = (entry.start, entry.stop) if isinstance(entry, slice) else (entry,)
    if isinstance(entry, slice) and entry.step not in (None, 1):
        return False
    # The stop of a slice may be the first pixel of the image, and an index or a start not.
    return all(bound is None or (isinstance(bound, int) and -axis.after <= bound <= axis.before) for bound in bounds)
