"""How far a quantized network is from its float reference: signal-to-noise ratio, agreement, accuracy or mIoU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from repvgg.data.segmentation_metrics import SegmentationEvaluation, confusion_matrix
from repvgg.errors import UsageError

_Z_95 = 1.959964  # quantile of the normal distribution for a 95 % confidence interval


def sqnr(reference: Tensor, candidate: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB: ``10 · log10(Σ y² / Σ (y − y')²)``; infinite if equal.

    Raises:
        UsageError: the shapes differ.
    """
    _check_shapes(reference, candidate)
    reference, candidate = reference.detach().double(), candidate.detach().double()
    return decibels(float(reference.square().sum()), float((reference - candidate).square().sum()))


def decibels(signal: float, noise: float) -> float:
    """Return ``10 · log10(signal / noise)`` of two sums of squares; infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _check_shapes(reference: Tensor, candidate: Tensor) -> None:
    if reference.shape != candidate.shape:
        raise UsageError(f"Outputs of shapes {tuple(reference.shape)} and {tuple(candidate.shape)} do not compare.")


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
class PairedSegmentation:
    """The pixels of the same images by true and predicted class, for two networks."""

    reference: SegmentationEvaluation
    candidate: SegmentationEvaluation

    @property
    def difference(self) -> float:
        """The mIoU of the candidate minus that of the reference, in [−1, 1]."""
        return self.candidate.miou - self.reference.miou

    def __str__(self) -> str:
        return (
            f"mIoU {self.candidate.miou:.2%}, reference {self.reference.miou:.2%}: {100 * self.difference:+.2f} points"
        )


@final
@dataclass(frozen=True)
class Quality:
    """The outputs of a quantized network beside those of its float reference.

    Attributes:
        sqnr: of all outputs, in dB.
        agreement: share of the decisions that are the same: top-1 classes of images, or of pixels for maps of logits.
        images: how many were compared.
        accuracy: paired top-1 accuracies where the images have labels.
        segmentation: paired mIoU where they have masks.
    """

    sqnr: float
    agreement: float
    images: int
    accuracy: PairedAccuracy | None = None
    segmentation: PairedSegmentation | None = None

    def __str__(self) -> str:
        text = f"agreement {self.agreement:.2%}, SQNR {self.sqnr:.1f} dB, {self.images:,} images"
        paired = self.accuracy or self.segmentation
        return text if paired is None else f"{text}, {paired}"


@final
class QualityMeter:
    """Compares the outputs of two networks batch by batch, so that the outputs need not be in memory together."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0
        self._decisions = self._same = self._images = 0
        self._right = torch.zeros(2, 2, dtype=torch.int64)  # labelled images by whether each network is right
        self._confusions: tuple[Tensor, Tensor] | None = None

    def add(self, reference: Tensor, candidate: Tensor, labels: Tensor | None = None) -> None:
        """Compare logits (N, K) of images, or (N, K, H, W) of pixels.

        Args:
            reference: of the float network.
            candidate: of the quantized network.
            labels: (N,) true classes of images, or (N, H, W) of pixels, 255 where they are ignored.

        Raises:
            UsageError: the shapes differ.
        """
        _check_shapes(reference, candidate)
        reference, candidate = reference.detach(), candidate.detach()
        self._signal += float(reference.double().square().sum())
        self._noise += float((reference.double() - candidate.double()).square().sum())
        ours, theirs = reference.argmax(1), candidate.argmax(1)
        self._same += int((ours == theirs).sum())
        self._decisions += ours.numel()
        self._images += len(reference)
        if labels is None or labels.shape != ours.shape:
            return
        if ours.ndim == 1:
            pairs = 2 * (ours == labels).long() + (theirs == labels).long()
            self._right += torch.bincount(pairs, minlength=4).reshape(2, 2)
        else:
            classes = reference.shape[1]
            one, other = (confusion_matrix(found.cpu(), labels.cpu(), classes) for found in (ours, theirs))
            before = self._confusions
            self._confusions = (one, other) if before is None else (before[0] + one, before[1] + other)

    @property
    def quality(self) -> Quality:
        """The comparison of everything that was added.

        Raises:
            UsageError: nothing was added.
        """
        if not self._images:
            raise UsageError("There are no images to compare the networks on.")
        segmentation = accuracy = None
        if int(self._right.sum()):
            (_, only_candidate), (only_reference, both) = self._right.tolist()
            total = int(self._right.sum())
            accuracy = PairedAccuracy(
                both + only_reference, both + only_candidate, only_reference, only_candidate, total
            )
        if self._confusions is not None:
            one, other = (SegmentationEvaluation(found, self._images) for found in self._confusions)
            segmentation = PairedSegmentation(one, other)
        ratio = decibels(self._signal, self._noise)
        return Quality(ratio, self._same / self._decisions, self._images, accuracy, segmentation)


def compare_outputs(reference: Tensor, candidate: Tensor, labels: Tensor | None = None) -> Quality:
    """Compare the outputs of two networks for the same images; the arguments are those of :meth:`QualityMeter.add`.

    Raises:
        UsageError: the shapes differ, or there are no images.
    """
    meter = QualityMeter()
    meter.add(reference, candidate, labels)
    return meter.quality
