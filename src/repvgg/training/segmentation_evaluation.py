"""Evaluate segmentation networks on images with masks, and compare what several of them predict."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg.data.label_sets import IGNORE_INDEX
from repvgg.data.segmentation_metrics import AbsentClasses, SegmentationEvaluation, confusion_matrix
from repvgg.training.evaluation import device_of
from repvgg.training.segmentation_inference import SegmentationInference, Segmenter


class MaskBatch(NamedTuple):
    """Images, their masks, and the masks that each model predicts."""

    images: Tensor  # (n, C, H, W), as the loader yields them
    truth: Tensor  # (n, H, W)
    predictions: tuple[Tensor, ...]  # (n, H, W) int64 of each model, on the CPU


@final
@dataclass(frozen=True)
class MaskAgreement:
    """In how many pixels two models predict the same class; ignored pixels count, too.

    Where two classes score alike up to rounding, equal functions in float32 may choose differently. The images with
    such pixels are predicted again in float64 arithmetic: what stays different there is due to the weights, if only to
    the rounding of merged weights to float32.
    """

    same: int
    pixels: int
    different_in_float64: int | None = None  # pixels of those images; None: no image, or a model that is no module

    def __str__(self) -> str:
        if self.same == self.pixels:
            return f"the same class in all {self.pixels:,} pixels"
        found = f"another class in {self.pixels - self.same:,} of {self.pixels:,} pixels"
        if self.different_in_float64 is None:
            return found
        return f"{found}, in float64 in {self.different_in_float64:,}"


def predicted_masks(
    models: Sequence[Segmenter],
    batches: Iterable[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor], Tensor] | None = None,
    inference: SegmentationInference | None = None,
) -> Iterator[MaskBatch]:
    """Run each of ``models`` on every batch, in eval mode and without gradients; see :func:`evaluate_segmentation`."""
    inference = inference or SegmentationInference()
    device = device_of(models[0])
    if isinstance(prepare, nn.Module):
        prepare = copy.deepcopy(prepare).to(device)  # the caller's stays where it is
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
        for images, truth in batches:
            with torch.no_grad():  # not around the yield, which runs the caller's code
                x_NCHW = images.to(device) if prepare is None else prepare(images.to(device))
                masks = tuple(inference.scores(model, x_NCHW).argmax(1).cpu() for model in models)
            yield MaskBatch(images, truth.cpu(), masks)


def evaluate_segmentation(
    model: Segmenter,
    batches: Iterable[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor], Tensor] | None = None,
    *,
    num_classes: int,
    ignore_index: int = IGNORE_INDEX,
    inference: SegmentationInference | None = None,
    absent: AbsentClasses = "ignore",
) -> SegmentationEvaluation:
    """Run ``model`` over images with masks, and count pixels by true and predicted class.

    Args:
        model: any callable from (N, C, H, W) to logits (N, K, H, W); a module receives the images on its own device,
            and its training flags are restored.
        batches: images (n, C, H, W) and masks (n, H, W), as ``SegmentationData.val_batches`` yields them.
        prepare: from those images to the input of the model; a module is copied to the device of the model.
        num_classes: K.
        ignore_index: label of the pixels that are not counted.
        inference: whole images in one pass if None.
        absent: see :class:`SegmentationEvaluation`.

    Raises:
        DataError: a mask has a label out of range.
    """
    (result,), _ = compare_segmentations(
        [model],
        batches,
        prepare,
        num_classes=num_classes,
        ignore_index=ignore_index,
        inference=inference,
        absent=absent,
    )
    return result


def compare_segmentations(
    models: Sequence[Segmenter],
    batches: Iterable[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor], Tensor] | None = None,
    *,
    num_classes: int,
    ignore_index: int = IGNORE_INDEX,
    inference: SegmentationInference | None = None,
    absent: AbsentClasses = "ignore",
    on_batch: Callable[[MaskBatch], None] | None = None,
) -> tuple[list[SegmentationEvaluation], MaskAgreement]:
    """Evaluate several models on the same batches, and count the pixels where all predict what the first one does.

    The arguments are those of :func:`evaluate_segmentation`; ``on_batch`` receives the predictions of each batch.
    """
    confusions = [torch.zeros(num_classes, num_classes, dtype=torch.int64) for _ in models]
    inference = inference or SegmentationInference()
    recount = _Float64Recount(models, prepare, inference)
    images = same = pixels = 0
    different: int | None = None
    for batch in predicted_masks(models, batches, prepare, inference):
        images += len(batch.images)
        for confusion, prediction in zip(confusions, batch.predictions, strict=True):
            confusion += confusion_matrix(prediction, batch.truth, num_classes, ignore_index)
        agrees = _where_equal(batch.predictions)
        same, pixels = same + int(agrees.sum()), pixels + agrees.numel()
        if recount.possible and not agrees.all():
            different = (different or 0) + recount.different_pixels(batch.images[~agrees.flatten(1).all(1)])
        if on_batch is not None:
            on_batch(batch)
    results = [SegmentationEvaluation(confusion, images, absent) for confusion in confusions]
    return results, MaskAgreement(same, pixels, different)


class _Float64Recount:
    """Predicts images with copies of the models in float64, which are made when they are needed."""

    def __init__(
        self,
        models: Sequence[Segmenter],
        prepare: Callable[[Tensor], Tensor] | None,
        inference: SegmentationInference,
    ) -> None:
        self.possible = all(isinstance(model, nn.Module) for model in models)
        self._models = models
        self._prepare = prepare
        self._inference = inference
        self._copies: list[Segmenter] = []

    def different_pixels(self, images: Tensor) -> int:
        """Return in how many pixels of ``images``, as the loader yields them, the models predict different classes."""
        if not self._copies:
            self._copies = [copy.deepcopy(model).double() for model in self._models if isinstance(model, nn.Module)]
        # One at a time: float64 takes twice the memory.
        batches = ((self._prepared(image[None]).double(), image.new_zeros(1)) for image in images)
        found = predicted_masks(self._copies, batches, None, self._inference)
        return sum(int((~_where_equal(batch.predictions)).sum()) for batch in found)

    def _prepared(self, images: Tensor) -> Tensor:
        return images if self._prepare is None else self._prepare(images)


def _where_equal(masks: Sequence[Tensor]) -> Tensor:
    agrees = torch.ones_like(masks[0], dtype=torch.bool)
    for other in masks[1:]:
        agrees &= other == masks[0]
    return agrees
