"""How far a quantized network is from its float reference: signal-to-noise ratio, agreement, paired accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from repvgg.errors import UsageError

_Z_95 = 1.959964  # quantile of the normal distribution for a 95 % confidence interval


def sqnr(reference: Tensor, candidate: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB: ``10 · log10(Σ y² / Σ (y − y')²)``; infinite if equal.

    Raises:
        UsageError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise UsageError(f"Outputs of shapes {tuple(reference.shape)} and {tuple(candidate.shape)} do not compare.")
    reference, candidate = reference.detach().double(), candidate.detach().double()
    noise = float((reference - candidate).square().sum())
    signal = float(reference.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@final
@dataclass(frozen=True)
class PairedAccuracy:
    """The top-1 accuracies of two networks on the same N images, and the difference with its uncertainty.

    Attributes:
        reference: images that the reference classifies right.
        candidate: images that the candidate classifies right.
        only_reference: images that the reference alone classifies right.
        only_candidate: images that the candidate alone classifies right.
        images: N.
    """

    reference: int
    candidate: int
    only_reference: int
    only_candidate: int
    images: int

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus that of the reference, in [−1, 1]."""
        return (self.only_candidate - self.only_reference) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of :attr:`difference` for paired samples (Wald, of discordant pairs).

        Each image contributes −1, 0 or 1, so the variance of the mean is ``(b + c − (b − c)² / N) / N²`` with the b and
        c images on which one network alone is right.
        """
        b, c, n = self.only_reference, self.only_candidate, self.images
        deviation = math.sqrt(b + c - (b - c) ** 2 / n) / n
        return self.difference - _Z_95 * deviation, self.difference + _Z_95 * deviation

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"top-1 {self.candidate / self.images:.2%}, reference {self.reference / self.images:.2%}: "
            f"{100 * self.difference:+.2f} points (95 %: {100 * low:+.2f} to {100 * high:+.2f})"
        )


@final
@dataclass(frozen=True)
class Quality:
    """The outputs of a quantized network beside those of its float reference.

    Attributes:
        sqnr: of all outputs, in dB.
        agreement: share of the decisions that are the same: top-1 classes of images, or of pixels for maps of logits.
        images: how many were compared.
        accuracy: paired top-1 accuracies where labels are known.
    """

    sqnr: float
    agreement: float
    images: int
    accuracy: PairedAccuracy | None = None

    def __str__(self) -> str:
        text = f"agreement {self.agreement:.2%}, SQNR {self.sqnr:.1f} dB, {self.images:,} images"
        return text if self.accuracy is None else f"{text}, {self.accuracy}"


def compare_outputs(reference: Tensor, candidate: Tensor, labels: Tensor | None = None) -> Quality:
    """Compare logits (N, K) of images, or (N, K, H, W) of pixels.

    Args:
        reference: of the float network.
        candidate: of the quantized network.
        labels: (N,) true classes of images.

    Raises:
        UsageError: the shapes differ, or there are no images.
    """
    if not len(reference):
        raise UsageError("There are no images to compare the networks on.")
    ratio = sqnr(reference, candidate)
    ours, theirs = reference.argmax(1), candidate.argmax(1)
    agreement = float((ours == theirs).double().mean())
    accuracy = None
    if labels is not None and labels.shape == ours.shape:
        right, other = ours == labels, theirs == labels
        accuracy = PairedAccuracy(
            int(right.sum()), int(other.sum()), int((right & ~other).sum()), int((other & ~right).sum()), len(labels)
        )
    return Quality(ratio, agreement, len(reference), accuracy)
