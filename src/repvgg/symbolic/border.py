"""The border of a tensor that was padded, which item assignments may fill with what a layer gives for zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from repvgg.algebra import Axis, ConvMap
from repvgg.errors import BorderError, NotLinearError

# In units of the dtype's rounding, relative to the largest number in the border. A sum over 4096 channels stays below
# it; in float64 it is a 2^-17th of a rounding in float32, so numbers that were computed in float32 differ by more.
_ROUNDINGS = 4096

_ZEROS_AFTER_BIAS = (
    "a bias in front of a zero padding leaks into it: assign the bias to the border before the next convolution, or "
    "drop it"
)


@dataclass(frozen=True)
class PaddedBorder:
    """The border of a padded tensor until something reads it.

    A convolution follows the padding exactly iff the border holds what the map before it gives for zeros: its bias.

    Attributes:
        template: the padded tensor (1, C, *sizes) of an image of one pixel, which is never read itself.
        written: (1, C, *sizes), on the CPU: where an item was assigned.
        axes: the padding along each spatial axis.
        value: what the tensor was padded with.
    """

    template: Tensor
    written: Tensor
    axes: tuple[Axis, ...]
    value: float

    @classmethod
    def of(cls, conv: ConvMap, axes: tuple[Axis, ...], value: float) -> PaddedBorder:
        """Return the border of the output of ``conv`` after a padding with ``value``."""
        shape = (1, conv.out_channels, *(axis.before + 1 + axis.after for axis in axes))
        template = torch.full(shape, float(value), dtype=conv.dtype, device=conv.device)
        return cls(template, torch.zeros(shape, dtype=torch.bool), axes, value)

    def copy(self) -> PaddedBorder:
        """Return a copy, which further assignments to this one do not reach."""
        return replace(self, template=self.template.clone(), written=self.written.clone())

    def assign(self, index: tuple[Any, ...], value: Tensor) -> None:
        """Assign to places of the border; ``index`` has an entry for each axis of the tensor.

        Raises:
            NotLinearError: which places they are depends on the size of the image, or one of them is in it, or
                ``value`` is not one number per channel and place.
        """
        if index[0] != slice(None) or not all(map(_is_in_border, index[2:], self.axes)):
            raise NotLinearError("an item assignment after a padding is linear only in the padding, in all images")
        try:
            self.template[index] = value.detach()
            self.written[index] = True
        except (RuntimeError, IndexError, TypeError) as error:
            raise NotLinearError(f"what is assigned to the padding is not one number per channel: {error}") from error
        pixel = tuple(axis.before for axis in self.axes)
        if bool(self.written[(slice(None), slice(None), *pixel)].any()):
            raise NotLinearError("an item assignment after a padding overwrites the image itself")

    def error(self, bias: Tensor | None) -> BorderError | None:
        """Return why the border does not hold the ``bias`` (C,), or None if it does."""
        border = torch.ones(self.written.shape[2:], dtype=torch.bool)
        border[tuple(axis.before for axis in self.axes)] = False
        any_written, all_written = bool(self.written.any()), bool(self.written[0, :, border].all())
        before = _ZEROS_AFTER_BIAS if not self.value else f"the image is padded with {self.value}"
        # Without values, the places are all there is to know. With values, they decide.
        if self.template.is_meta:
            holds = all_written or (bias is None and not self.value and not any_written)
            return None if holds else BorderError(before)
        values = self.template[0, :, border.to(self.template.device)]  # (C, places)
        wanted = torch.zeros_like(values) if bias is None else bias.detach()[:, None].expand_as(values)
        difference, scale = (values - wanted).abs().max(), torch.maximum(values.abs(), wanted.abs()).max()
        if bool(difference <= _ROUNDINGS * torch.finfo(values.dtype).eps * scale):
            return None
        return BorderError(
            f"what is assigned to the padding differs by up to {float(difference):.2g} from what the layer before it "
            "gives for zeros: assign exactly that, to all of the padding"
            if any_written
            else before
        )


def _is_in_border(entry: Any, axis: Axis) -> bool:
    """Whether an index along an axis means the same places for every size of the image."""
    bounds: Sequence[Any] = (entry.start, entry.stop) if isinstance(entry, slice) else (entry,)
    if isinstance(entry, slice) and entry.step not in (None, 1):
        return False
    # The stop of a slice may be the first pixel of the image, and an index or a start not.
    return all(bound is None or (isinstance(bound, int) and -axis.after <= bound <= axis.before) for bound in bounds)
