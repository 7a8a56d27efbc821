"""The kernel of a convolution as a lazy sum, which is multiplied out once, at the end.

A merged kernel is ``Σ_t diag(factor_t) · embed(W_t)``: every term is an original kernel, in its own dtype, with a
factor per output channel and its placement in the sum. Scaling, adding and embedding only change factors and
placements; no tensor of the size of a kernel is computed, or even converted, before the whole sum is.

Letters: O output channels, I input channels of one group, K the sizes along the n axes (none for a linear map), R a
range of output channels.
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

# Numbers per chunk when a sum is multiplied out. torch splits large chunks over its threads, which halves the time on
# an idle machine; on a busy one every chunk waits for a thread that has no core, and takes a hundred times longer.
# Small chunks are below torch's threshold for threads; they are used for a while after a large chunk was slow.
_LARGE_CHUNK, _SMALL_CHUNK = 1 << 19, 1 << 15
_SLOW_SECONDS_PER_NUMBER = 20e-9  # 2 to 5 ns are usual
_SMALL_CHUNKS_FOR_SECONDS = 30.0
_small_chunks_until = -math.inf

Placements: TypeAlias = tuple[Placement, ...]


@dataclass(frozen=True, eq=False)
class Term:
    """One summand: ``factor · weight`` at the taps ``places``, one placement per axis, with its own ``groups``."""

    weight: Tensor
    factor: Tensor | None
    groups: int
    places: Placements


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel (O, I, *K) with ``groups`` groups, as a sum of terms that is computed in ``dtype``.

    ``unit`` marks an identity over the channels: all ones, one channel per group, one tap.
    """

    shape: tuple[int, ...]
    groups: int
    terms: tuple[Term, ...]
    dtype: torch.dtype
    device: torch.device
    unit: bool = False

    @classmethod
    def of(cls, weight_OIK: Tensor, groups: int, dtype: torch.dtype | None = None, unit: bool = False) -> Kernel:
        """Return ``weight`` as a kernel, to be computed with in ``dtype`` (default: its own)."""
        shape = tuple(weight_OIK.shape)
        term = Term(weight_OIK, None, groups, tuple([Placement(0, 1, size) for size in shape[2:]]))
        return cls(shape, groups, (term,), dtype or weight_OIK.dtype, weight_OIK.device, unit)

    def scaled(self, factor_O: Tensor) -> Kernel:
        """Multiply each output channel by its factor."""
        if self.device.type == "meta":  # arithmetic on meta tensors is slow
            return replace(self, unit=False)
        terms = (replace(t, factor=factor_O if t.factor is None else t.factor * factor_O) for t in self.terms)
        return replace(self, terms=tuple(terms), unit=False)

    def embedded(self, size: tuple[int, ...], groups: int, places: Placements) -> Kernel:
        """Put the same numbers at the taps ``places`` of a larger kernel of ``size``, written with fewer groups."""
        inputs = self.shape[1] * self.groups // groups
        unit = self.unit and (size, groups) == (self.shape[2:], self.groups)
        terms = (replace(t, places=tuple(map(Placement.within, t.places, places))) for t in self.terms)
        return replace(self, shape=(self.shape[0], inputs, *size), groups=groups, terms=tuple(terms), unit=unit)

    def over_axes(self, spatial: int) -> Kernel:
        """Return a kernel of one tap as one over ``spatial`` axes, which are of size 1."""
        ones = (1,) * spatial
        places = tuple([Placement(0, 1, 1)] * spatial)
        terms = (replace(t, weight=t.weight.reshape(*t.weight.shape[:2], *ones), places=places) for t in self.terms)
        return replace(self, shape=(*self.shape[:2], *ones), terms=tuple(terms))

    def plus(self, other: Kernel) -> Kernel:
        """Add a kernel of the same shape and number of groups."""
        return replace(self, terms=self.terms + other.terms, unit=False)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Kernel:
        """Return the same kernel, to be computed in another dtype on another device."""
        # Weights keep their own dtype until they are summed: a float64 copy of all of them would be large.
        factors = (None if t.factor is None else t.factor.to(device=device, dtype=dtype) for t in self.terms)
        terms = (replace(t, weight=t.weight.to(device), factor=f) for t, f in zip(self.terms, factors, strict=True))
        return replace(self, terms=tuple(terms), dtype=dtype, device=torch.device(device))

    def numel(self) -> int:
        """Return ``O · I · Π K``."""
        return math.prod(self.shape)

    def dense(self) -> Tensor:
        """Return the kernel multiplied out, (O, I, *K), with gradients to weights and factors."""
        if self.device.type == "meta":  # only the shape is known, and arithmetic on meta tensors is slow
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        first = self.terms[0]
        if len(self.terms) == 1 and self._is_full(first):
            weight_OIK = first.weight.to(self.dtype)
            return weight_OIK if first.factor is None else weight_OIK * self._column(first.factor)
        sums = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for term in self.terms:
            self._add(sums, term, slice(0, self.shape[0]))
        return sums

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the kernel multiplied out chunk by chunk: ranges of output channels and their sums (R, I, *K).

        All chunks share one buffer: sums stay valid until the next chunk is requested. Without gradients.
        """
        largest = self._channels_per(self.numel() if self.device.type == "meta" else _LARGE_CHUNK)
        base = next((term for term in self.terms if self._is_full(term)), None)
        others = [term for term in self.terms if term is not base]
        large = [term for term in others if self._is_full(term)]
        small = self._overlays([term for term in others if not self._is_full(term)])
        buffer = torch.empty((largest, *self.shape[1:]), dtype=self.dtype, device=self.device)
        start = 0
        while start < self.shape[0]:
            began = time.monotonic()
            step = min(largest, self._channels_per(_SMALL_CHUNK)) if began < _small_chunks_until else largest
            channels = slice(start, min(start + step, self.shape[0]))
            sums = buffer[: channels.stop - channels.start]
            if base is None:
                sums.zero_()
            else:  # copying the first term saves one pass over the buffer
                sums.copy_(base.weight[channels])
                if base.factor is not None:
                    sums *= self._column(base.factor[channels])
            for term in large:
                self._add(sums, term, channels)
            for places, overlay in small:
                _taps(sums, places).add_(overlay[channels])
            yield channels, sums
            _adapt_chunk_size(time.monotonic() - began, sums.numel())
            start = channels.stop

    def _channels_per(self, numbers: int) -> int:
        """The number of output channels whose kernels hold about this many numbers together."""
        return min(self.shape[0], max(1, numbers * self.shape[0] // max(1, self.numel())))

    def _column(self, factor_R: Tensor) -> Tensor:
        """One number per output channel, (R, 1, ...), with as many axes as the kernel."""
        return factor_R.view(-1, *(1,) * (len(self.shape) - 1))

    def _overlays(self, terms: list[Term]) -> list[tuple[Placements, Tensor]]:
        """Sum terms with fewer taps or more groups per placement; return the placements with sums (O, I, *k)."""
        overlays = []
        for places in {term.places: None for term in terms}:
            # A kernel of the size of these taps alone, in which the terms start at 0.
            alone = tuple(Placement(0, 1, place.count) for place in places)
            shifted = tuple(replace(term, places=alone) for term in terms if term.places == places)
            shape = (*self.shape[:2], *(place.count for place in places))
            overlays.append((places, replace(self, shape=shape, terms=shifted, unit=False).dense()))
        return overlays

    def _is_full(self, term: Term) -> bool:
        return term.groups == self.groups and tuple(term.weight.shape) == self.shape

    def _add(self, sums_RIK: Tensor, term: Term, channels: slice) -> None:
        """Add the given output channels of a term onto their taps and input channels."""
        value = term.weight[channels].to(self.dtype)
        if term.factor is not None:
            value = value * self._column(term.factor[channels])
        taps = _taps(sums_RIK, term.places)
        if term.groups == self.groups:
            taps += value
            return
        # Output channel o of the term reads its own inputs from I_t · (o // (O / g_t)) on, counted over all groups.
        outputs = torch.arange(channels.start, channels.stop, device=self.device)
        width = term.weight.shape[1]
        first = outputs.div(self.shape[0] // term.groups, rounding_mode="floor") * width % self.shape[1]
        inputs = first[:, None] + torch.arange(width, device=self.device)
        taps.index_put_(((outputs - channels.start)[:, None], inputs), value, accumulate=True)


def _taps(sums_RIK: Tensor, places: Placements) -> Tensor:
    """A view of the part of a kernel at the taps ``places``."""
    index: tuple[Any, ...] = (slice(None), slice(None), *(place.slice for place in places))
    return sums_RIK[index]


def _adapt_chunk_size(seconds: float, numbers: int) -> None:
    """Switch to small chunks for a while after a large one that took far too long."""
    global _small_chunks_until  # of the process, because it is the machine that is busy
    if numbers > _SMALL_CHUNK and seconds > _SLOW_SECONDS_PER_NUMBER * numbers:
        _small_chunks_until = time.monotonic() + _SMALL_CHUNKS_FOR_SECONDS
