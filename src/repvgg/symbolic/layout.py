"""Which axes a tensor has, where its channels are, and how axes are permuted, merged, split and averaged over.

Letters: N images, C channels, L length, D, H and W depth, height and width; ``...`` any number of axes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NoReturn, TypeAlias

from repvgg.errors import NotLinearError, UsageError

_SHAPES = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}


@dataclass(frozen=True)
class Layout:
    """Which axes a tensor has: (N, C, *X) with the channels at axis 1, or *rows* (..., C) with the channels last.

    (N, C) is both at once: ``Layout(2) == Layout(2, rows=True)``.

    Attributes:
        rank: the number of axes; None, which only rows allow, if it is not known.
        rows: whether the channels are the last axis.

    Raises:
        UsageError: there is no such shape.
    """

    rank: int | None
    rows: bool = False

    def __post_init__(self) -> None:
        # Equal layouts must compare as equal, and (N, C) can be described in both ways.
        if self.rank == 2:
            object.__setattr__(self, "rows", True)
        if (self.rank is None or not 3 <= self.rank <= 5) and not self.rows:
            raise UsageError(f"A tensor with channels at axis 1 must have 2 to 5 axes, got {self.rank}.")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"Rows must have at least 1 axis, got {self.rank}.")

    @property
    def spatial(self) -> int:
        """The number of spatial axes, along which a convolution slides; 0 for rows."""
        return 0 if self.rows or self.rank is None else self.rank - 2

    @property
    def axis(self) -> int:
        """The axis of the channels, counted from the end."""
        return -1 - self.spatial

    def is_channel_axis(self, dim: int) -> bool:
        """Whether ``dim``, counted from the start or from the end, is the axis of the channels."""
        return dim == self.axis or (self.rank is not None and dim == self.axis + self.rank)

    def __str__(self) -> str:
        """Return the shape, such as (N, C, H, W)."""
        if self.rows and self.rank not in (None, 2):
            return f"({'·, ' * ((self.rank or 1) - 1)}C)"
        return "(..., C)" if self.rank is None else _SHAPES[self.rank]


IMAGES = Layout(4)
SEQUENCES = Layout(3)
VOLUMES = Layout(5)
VECTORS = Layout(2)
ROWS = Layout(None, rows=True)

RANK_UNKNOWN = (
    "the shape of the input is not known: a linear layer takes any number of axes, and what follows depends on it"
)


class UnknownSize:
    """The height, width or batch size of a symbolic input. A convolution does not depend on it, so its use raises.

    Sizes may be passed on, multiplied with each other, as in ``x.reshape(N, C, H * W)``, and compared with themselves.

    Attributes:
        factors: what the size is the product of; empty if that is not known.
        value: the number, if the shape of the source is known.
    """

    def __init__(
        self,
        reason: str = "the result depends on the size of the image",
        factors: tuple[Hashable, ...] = (),
        value: int | None = None,
    ) -> None:
        self._reason, self.factors, self.value = reason, factors, value

    def _refuse(self, *_: object) -> NoReturn:
        raise NotLinearError(self._reason)

    def __mul__(self, other: Any) -> UnknownSize:
        if isinstance(other, int) and other == 1:
            return self
        if not isinstance(other, UnknownSize) or not self.factors or not other.factors:
            self._refuse()
        value = None if self.value is None or other.value is None else self.value * other.value
        return UnknownSize(self._reason, self.factors + other.factors, value)

    __rmul__ = __mul__

    def is_same(self, other: object) -> bool:
        """Whether ``other`` is the same size for every shape of the source."""
        factors = other.factors if isinstance(other, UnknownSize) else ()
        return bool(self.factors) and Counter(self.factors) == Counter(factors)

    def __eq__(self, other: object) -> bool:
        return self.is_same(other) or self._refuse()

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = object.__hash__  # defining __eq__ removes it

    # Every other operator that would use the value raises.
    __add__ = __radd__ = __sub__ = __rsub__ = __floordiv__ = __truediv__ = __mod__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __index__ = __neg__ = _refuse


class UnknownShape(UnknownSize):
    """The shape (..., C), of which only the last size is known."""

    def __init__(self, channels: Any) -> None:
        super().__init__(RANK_UNKNOWN)
        self.channels = channels

    def __getitem__(self, index: Any) -> Any:
        return self.channels if index == -1 else UnknownSize(RANK_UNKNOWN)

    __len__ = __iter__ = UnknownSize._refuse


CHANNELS = "C"
Position: TypeAlias = "int | Part"  # an axis of the source, or a part of it
Positions: TypeAlias = tuple[Position, ...]  # what one axis runs over, in order
SizeOf: TypeAlias = Callable[[Position], UnknownSize]


@dataclass(frozen=True)
class Arrangement:
    """How the axes of a tensor are made of those of its source; the channels are one axis, the rest are positions.

    Whatever happens to the axes, the positions stay in the order that they have in the source: so a map of the
    channels at each position is the same map before and after.

    Attributes:
        axes: for each axis, CHANNELS or the axes of the source that it runs over; those are counted without the channel
            axis. None if the rank is not known.
        averaged: the axes of the source over which the mean was taken.
    """

    axes: tuple[str | Positions, ...] | None
    averaged: frozenset[Position] = frozenset()

    @classmethod
    def of(cls, layout: Layout) -> Arrangement:
        """Return the arrangement of a source with that layout."""
        if layout.rank is None:
            return cls(None)
        axes: list[str | Positions] = [(axis,) for axis in range(layout.rank - 1)]
        axes.insert(layout.rank + layout.axis, CHANNELS)
        return cls(tuple(axes))

    @cached_property
    def layout(self) -> Layout:
        """The layout; raises NotLinearError if the channels are neither axis 1 nor the last one."""
        if self.axes is None:
            return ROWS
        rank, place = len(self.axes), self.axes.index(CHANNELS)
        if place == rank - 1:
            return Layout(rank, rows=True)
        if place == 1 and rank <= 5:
            return Layout(rank)
        raise NotLinearError(f"the channels are axis {place} of {rank}, where no layer expects them")

    def known_axes(self) -> tuple[str | Positions, ...]:
        """Return the axes; raise NotLinearError if the rank is not known."""
        if self.axes is None:
            raise NotLinearError(RANK_UNKNOWN)
        return self.axes

    def index(self, dim: int) -> int:
        """Return a dimension, counted from the start or from the end, as counted from the start."""
        rank = len(self.known_axes())
        if not -rank <= dim < rank:
            raise NotLinearError(f"a tensor of {rank} axes has no axis {dim}")
        return dim % rank

    def permuted(self, order: Sequence[int]) -> Arrangement:
        """Reorder the axes; raise NotLinearError if that changes the order of the positions."""
        axes = self.known_axes()
        new = tuple([axes[self.index(int(dim))] for dim in order])
        if len(new) != len(axes) or _positions(new) != _positions(axes):
            raise NotLinearError("a permutation of the pixels or images is not a convolution")
        return replace(self, axes=new)

    def flattened(self, start: int, end: int) -> Arrangement:
        """Merge the axes from ``start`` to ``end``."""
        axes, start, end = self.known_axes(), self.index(start), self.index(end)
        merged = axes[start : end + 1]
        if CHANNELS not in merged:
            return self.with_axes(start, end, (_positions(merged),))
        # Axes of size 1 have no positions.
        if _positions(merged):
            raise NotLinearError("a reshape that merges channels with pixels or images is not a convolution")
        return self.with_axes(start, end, (CHANNELS,))

    def with_axes(self, start: int, end: int, new: tuple[str | Positions, ...]) -> Arrangement:
        """Replace the axes from ``start`` to ``end``."""
        axes = self.known_axes()
        return replace(self, axes=(*axes[:start], *new, *axes[end + 1 :]))

    def mean(self, dims: Sequence[int], keepdim: bool) -> Arrangement:
        """Take the mean over some axes; raise NotLinearError if that of the channels is among them."""
        axes, places = self.known_axes(), {self.index(int(dim)) for dim in dims}
        if axes.index(CHANNELS) in places:
            raise NotLinearError("a mean over the channels is not a convolution: it removes their axis")
        over = _positions([axes[place] for place in places])
        kept = [() if place in places else axis for place, axis in enumerate(axes) if keepdim or place not in places]
        return Arrangement(tuple(kept), self.averaged.union(over))

    def viewed(self, sizes: Sequence[Any], channels: int, size_of: SizeOf) -> Arrangement:
        """View the tensor in a shape of ``sizes``, of which one may be -1; ``size_of`` returns those of axes.

        Raises:
            NotLinearError: the result has no axis that is the channels, or which one depends on unknown sizes.
        """
        axes = self.known_axes()
        place = axes.index(CHANNELS)
        before, after = _positions(axes[:place]), _positions(axes[place:])
        given = [size if isinstance(size, UnknownSize) else int(size) for size in sizes]
        # The axis that it is now comes first, because a size may equal that of the channels by chance.
        for i in sorted(range(len(given)), key=lambda index: index != place):
            if _value(given[i]) in (channels, -1):
                left = _grouped(before, given[:i], size_of)
                right = None if left is None else _grouped(after, given[i + 1 :], size_of)
                if left is not None and right is not None:
                    return replace(self, axes=(*left, CHANNELS, *right))
        raise NotLinearError("this reshape does not keep the channels as an axis, or depends on the size of the image")


def _positions(axes: Sequence[str | Positions]) -> Positions:
    return tuple([position for axis in axes if not isinstance(axis, str) for position in axis])


def _grouped(positions: Positions, sizes: Sequence[Any], size_of: SizeOf) -> list[Positions] | None:
    """Group ``positions``, in order, into axes of the given ``sizes``; None if they are not known to fit."""
    place = next((i for i, size in enumerate(sizes) if not isinstance(size, UnknownSize) and size == -1), len(sizes))
    left = _take(positions, sizes[:place], size_of)
    if left is not None and place < len(sizes):
        # What -1 stands for is what the sizes after it leave.
        right = _take(left[1][::-1], sizes[place + 1 :][::-1], size_of)
        if right is not None:
            return [*left[0], right[1][::-1], *(group[::-1] for group in right[0][::-1])]
    elif left is not None and not left[1]:
        return left[0]
    return _split(positions, sizes, size_of)


def _take(positions: Positions, sizes: Sequence[Any], size_of: SizeOf) -> tuple[list[Positions], Positions] | None:
    """Take axes of the given sizes from the start of ``positions``; return them and the rest."""
    groups: list[Positions] = []
    for size in sizes:
        known = [size_of(position) for position in positions]
        count = _count_by_factors(known, size) if isinstance(size, UnknownSize) else None
        if count is None:
            count = _count_by_value(known, _value(size))
        if count is None:
            return None
        groups.append(positions[:count])
        positions = positions[count:]
    return groups, positions


def _count_by_factors(known: Sequence[UnknownSize], size: UnknownSize) -> int | None:
    """Return how many of the ``known`` sizes, from the first on, make up ``size`` for every shape of the source."""
    count = len(size.factors)
    return count if 0 < count <= len(known) and size.is_same(prod(known[:count])) else None


def _count_by_value(known: Sequence[UnknownSize], size: int | None) -> int | None:
    """Return how many of the ``known`` sizes, from the first on, make up the number ``size``; one rather than none."""
    product = 1
    for count, other in enumerate(known):
        if product == size and not (count == 0 and other.value == 1):
            return count
        if other.value is None:
            return None
        product *= other.value
    return len(known) if product == size else None


def _split(positions: Positions, sizes: Sequence[Any], size_of: SizeOf) -> list[Positions] | None:
    """Return axes of the given sizes as parts of the positions; None if the sizes are not known to fit."""
    known, given = [size_of(position).value for position in positions], [_value(size) for size in sizes]
    if None in known or None in given or not given:
        return None
    total, rest = prod(known), prod(size for size in given if size != -1)  # type: ignore[misc, arg-type]
    full = tuple(total // max(rest, 1) if size == -1 else size for size in given)
    return [(Part(positions, full, i),) for i in range(len(full))] if prod(full) == total else None  # type: ignore[arg-type]


def _value(size: Any) -> int | None:
    return size.value if isinstance(size, UnknownSize) else int(size)


@dataclass(frozen=True)
class Part:
    """Axis ``index`` of the axes of ``sizes`` into which ``positions`` were split."""

    positions: Positions
    sizes: tuple[int | None, ...]
    index: int
