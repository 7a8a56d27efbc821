"""The kernel of a convolution as a sum that is multiplied out once, at the end.

A merged kernel is ``Σ_t diag(factor_t) · embed(W_t)``: every term is a kernel as it was given, in its own dtype, with a
factor for each output channel and its place in the sum. Scaling, adding and embedding only change factors and places;
nothing of the size of a kernel is computed, or even converted, before the whole sum is.

Letters: O output channels, I input channels of one group, K the sizes along the n axes (none for a linear map), R some
rows of O.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from repvgg.algebra.axis import Placement

# Numbers worked on at a time when a sum is written out. torch shares large pieces out to its threads, which halves
# the time on a quiet machine; on a busy one every piece waits for a thread that has no core, a hundred times too long.
# Small pieces are below torch's threshold for threads. A large piece that takes far too long makes the next ones small.
_LARGE, _SMALL = 1 << 19, 1 << 15
_SLOW = 20e-9  # seconds a number; 2 to 5 are usual
_CALM = 30.0  # seconds for which pieces stay small
_small_until = -math.inf


Places: TypeAlias = tuple[Placement, ...]


@dataclass(frozen=True, eq=False)
class Term:
    """One summand: ``factor · weight`` at the taps ``places``, axis by axis, in ``groups`` groups of its own."""

    weight: Tensor
    factor: Tensor | None
    groups: int
    places: Places


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel (O, I, *K) with ``groups`` groups, as a sum of terms that is computed in ``dtype``.

    ``unit`` says that it is an identity over the channels (all ones, one channel a group, one tap).
    """

    shape: tuple[int, ...]
    groups: int
    terms: tuple[Term, ...]
    dtype: torch.dtype
    device: torch.device
    unit: bool = False

    @classmethod
    def of(cls, weight_OIK: Tensor, groups: int, dtype: torch.dtype | None = None, unit: bool = False) -> Kernel:
        """The kernel that is ``weight`` itself, to be computed with in ``dtype`` (its own, unless given)."""
        shape = tuple(weight_OIK.shape)
        term = Term(weight_OIK, None, groups, tuple([Placement(0, 1, size) for size in shape[2:]]))
        return cls(shape, groups, (term,), dtype or weight_OIK.dtype, weight_OIK.device, unit)

    def scaled(self, factor_O: Tensor) -> Kernel:
        """Each output channel multiplied by its factor."""
        terms = (replace(t, factor=factor_O if t.factor is None else t.factor * factor_O) for t in self.terms)
        return replace(self, terms=tuple(terms), unit=False)

    def placed(self, size: tuple[int, ...], groups: int, places: Places) -> Kernel:
        """The same numbers at the taps ``places`` of a larger kernel of ``size``, written with fewer groups."""
        inputs = self.shape[1] * self.groups // groups
        unit = self.unit and (size, groups) == (self.shape[2:], self.groups)
        terms = (replace(t, places=tuple(map(Placement.within, t.places, places))) for t in self.terms)
        return replace(self, shape=(self.shape[0], inputs, *size), groups=groups, terms=tuple(terms), unit=unit)

    def plus(self, other: Kernel) -> Kernel:
        """The sum of two kernels of one shape and one number of groups."""
        return replace(self, terms=self.terms + other.terms, unit=False)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Kernel:
        """The same kernel, to be computed in another dtype on another device."""
        convert = (replace(t, weight=t.weight.to(device), factor=_to(t.factor, device, dtype)) for t in self.terms)
        return replace(self, terms=tuple(convert), dtype=dtype, device=torch.device(device))

    def numel(self) -> int:
        """``O · I · Π K``."""
        return math.prod(self.shape)

    def dense(self) -> Tensor:
        """The kernel multiplied out, (O, I, *K), with gradients to weights and factors."""
        first = self.terms[0]
        if len(self.terms) == 1 and self._covers(first):
            weight_OIK = first.weight.to(self.dtype)
            return weight_OIK if first.factor is None else weight_OIK * self._column(first.factor)
        sums = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for term in self.terms:
            self._add(sums, term, slice(0, self.shape[0]))
        return sums

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The kernel multiplied out piece by piece: ranges of output channels and their sums (R, I, *K).

        The sums stay valid until the next one is asked for. Without gradients.
        """
        largest = self._rows_of(self.numel() if self.device.type == "meta" else _LARGE)
        base = next((term for term in self.terms if self._covers(term)), None)
        others = [term for term in self.terms if term is not base]
        large = [term for term in others if self._covers(term)]
        small = self._overlays([term for term in others if not self._covers(term)])
        buffer = torch.empty((largest, *self.shape[1:]), dtype=self.dtype, device=self.device)
        start = 0
        while start < self.shape[0]:
            began = time.monotonic()
            step = min(largest, self._rows_of(_SMALL)) if began < _small_until else largest
            rows = slice(start, min(start + step, self.shape[0]))
            sums = buffer[: rows.stop - rows.start]
            if base is None:
                sums.zero_()
            else:
                sums.copy_(base.weight[rows])
                if base.factor is not None:
                    sums *= self._column(base.factor[rows])
            for term in large:
                self._add(sums, term, rows)
            for places, overlay in small:
                _taps(sums, places).add_(overlay[rows])
            yield rows, sums
            _watch(time.monotonic() - began, sums.numel())
            start = rows.stop

    def _rows_of(self, numbers: int) -> int:
        """How many output channels hold about so many numbers."""
        return min(self.shape[0], max(1, numbers * self.shape[0] // max(1, self.numel())))

    def _column(self, factor_R: Tensor) -> Tensor:
        """One number an output channel, (R, 1, ...), with as many axes as the kernel."""
        return factor_R.view(-1, *(1,) * (len(self.shape) - 1))

    def _overlays(self, terms: list[Term]) -> list[tuple[Places, Tensor]]:
        """Terms with fewer taps or more groups, summed as far as they have the same taps: (O, I, *k) for each."""
        distinct = {term.places: None for term in terms}
        return [(places, self._at(places, terms).dense()) for places in distinct]

    def _at(self, places: Places, terms: list[Term]) -> Kernel:
        """The kernel of those terms that have their taps at ``places``, and of these taps alone."""
        own = tuple(Placement(0, 1, place.count) for place in places)
        alone = tuple(replace(term, places=own) for term in terms if term.places == places)
        return replace(self, shape=(*self.shape[:2], *(place.count for place in places)), terms=alone, unit=False)

    def _covers(self, term: Term) -> bool:
        """Whether a term has the shape of the sum."""
        return term.groups == self.groups and tuple(term.weight.shape) == self.shape

    def _add(self, sums_RIK: Tensor, term: Term, rows: slice) -> None:
        """Add the given output channels of a term onto their taps and channels."""
        value = term.weight[rows].to(self.dtype)
        if term.factor is not None:
            value = value * self._column(term.factor[rows])
        taps = _taps(sums_RIK, term.places)
        if term.groups == self.groups:
            taps += value
            return
        # Output channel o of the term reads its own inputs from I_t · (o // (O / g_t)) on, counted over all groups.
        channels = torch.arange(rows.start, rows.stop, device=self.device)
        width = term.weight.shape[1]
        first = channels.div(self.shape[0] // term.groups, rounding_mode="floor") * width % self.shape[1]
        inputs = first[:, None] + torch.arange(width, device=self.device)
        taps.index_put_(((channels - rows.start)[:, None], inputs), value, accumulate=True)


def _taps(sums_RIK: Tensor, places: Places) -> Tensor:
    """The part of a kernel at the taps ``places``, as a view."""
    index: tuple[Any, ...] = (slice(None), slice(None), *(place.slice for place in places))
    return sums_RIK[index]


def _watch(seconds: float, numbers: int) -> None:
    """Have the next pieces small where a large one took far too long."""
    global _small_until  # of the process: it is the machine that is busy
    if numbers > _SMALL and seconds > _SLOW * numbers:
        _small_until = time.monotonic() + _CALM


def _to(value: Tensor | None, device: torch.device | str, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(device=device, dtype=dtype)
