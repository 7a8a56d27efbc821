"""Sizes of images while a network is recorded: integers on which no branch may depend."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch

from repvgg.errors import UnsupportedError

_MAP_AXES = 4  # of feature maps (N, C, H, W)


class ImageSize(int):
    """Number of images, height or width: it may be passed to functions, and no branch may depend on it.

    The network is read once for all sizes.
    """

    def _refuse(self, *_: object) -> NoReturn:
        raise UnsupportedError(
            "The forward branches on the number or the size of its images, but the engine reads it once for all: "
            "remove that branch."
        )

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse
    __truediv__ = __rtruediv__ = __float__ = __round__ = __floor__ = __ceil__ = _refuse
    __hash__ = int.__hash__

    def __add__(self, other: Any) -> Any:
        return _size(int.__add__(self, other))

    def __sub__(self, other: Any) -> Any:
        return _size(int.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return _size(int.__rsub__(self, other))

    def __mul__(self, other: Any) -> Any:
        return _size(int.__mul__(self, other))

    def __floordiv__(self, other: Any) -> Any:
        return _size(int.__floordiv__(self, other))

    def __rfloordiv__(self, other: Any) -> Any:
        return _size(int.__rfloordiv__(self, other))

    def __mod__(self, other: Any) -> Any:
        return _size(int.__mod__(self, other))

    def __neg__(self) -> Any:
        return _size(int.__neg__(self))

    __radd__, __rmul__ = __add__, __mul__


def _size(value: Any) -> Any:
    return ImageSize(value) if isinstance(value, int) else value  # NotImplemented, for other types


class ImageShape(tuple[int, ...]):
    """The shape of a tensor of images, some of whose entries are an :class:`ImageSize`; ``torch.Size`` is final."""

    __slots__ = ()

    def numel(self) -> int:
        return math.prod(self)

    def __eq__(self, other: object) -> bool:
        if type(other) is torch.Size and len(other) == len(self) == _MAP_AXES:
            # A shape that the model has kept from an earlier run, to know whether something is up to date: it is not.
            return False
        if isinstance(other, ImageShape):
            return [*map(int, self)] == [*map(int, other)]
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return ImageShape(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Any:
        return ImageShape((*self, *other))


def as_sizes(found: Any, axis: int | None, *, sizes_vary: bool) -> Any:
    """Return what ``shape``, ``size`` or ``len`` gave, with an :class:`ImageSize` for each size that may vary.

    Args:
        found: sizes of a tensor, or a single one.
        axis: of a single size; None is the first.
        sizes_vary: the network is read for images of any height and width; else only their number varies. The number
            of channels, axis 1, never does.
    """
    if isinstance(found, int):
        return _as_size(found, axis or 0, sizes_vary=sizes_vary)
    return ImageShape([_as_size(one, axis, sizes_vary=sizes_vary) for axis, one in enumerate(found)])


def _as_size(found: int, axis: int, *, sizes_vary: bool) -> int:
    return ImageSize(found) if axis == 0 or (sizes_vary and axis != 1) else found
