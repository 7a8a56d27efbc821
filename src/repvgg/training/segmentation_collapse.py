"""The plain form of a trained segmentation network, proven equal and compared on every validation pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import final

from repvgg.collapse import reparameterize
from repvgg.data import SegmentationData
from repvgg.data.segmentation_metrics import SegmentationEvaluation
from repvgg.models import PSPNet
from repvgg.training.config import TrainConfig
from repvgg.training.loop import on_device_of
from repvgg.training.segmentation_evaluation import MaskAgreement, MaskBatch, compare_segmentations
from repvgg.training.tasks import validation_batch
from repvgg.verify import Evidence, verify

_VERIFIED_IMAGES = 2


@final
@dataclass(frozen=True, eq=False)
class CollapsedSegmentation:
    """The result of :func:`collapse_segmentation`."""

    model: PSPNet  # the plain form
    train: SegmentationEvaluation  # the train form on the validation images
    plain: SegmentationEvaluation  # the plain form on them
    agreement: MaskAgreement  # in how many of their pixels both predict the same class
    evidence: Evidence  # of the equality of both, on crops


def collapse_segmentation(
    model: PSPNet,
    data: SegmentationData,
    config: TrainConfig,
    on_batch: Callable[[MaskBatch], None] | None = None,
) -> CollapsedSegmentation:
    """Collapse a trained network, verify the plain form on crops, and evaluate both on all validation images.

    Args:
        model: in the train form; it is not changed.
        data: the validation images.
        config: of the run; decides the device.
        on_batch: receives the masks that both forms predict for each batch.

    Raises:
        EquivalenceError: the plain form is not equal to the train form.
    """
    plain, _ = reparameterize(model)  # without inputs: for images of any size
    assert isinstance(plain, PSPNet)
    side = data.input_shape[1]
    batches = islice(data.val_batches(1), _VERIFIED_IMAGES)
    images = [data.prepare(images)[..., :side, :side] for images, _ in batches]
    evidence = verify(model, plain, images).raise_if_failed()
    with on_device_of(config, model, plain):
        (train, deployed), agreement = compare_segmentations(
            [model, plain],
            data.val_batches(validation_batch(data)),
            data.prepare,
            num_classes=len(data.classes),
            ignore_index=data.ignore_index,
            on_batch=on_batch,
        )
    return CollapsedSegmentation(plain, train, deployed, agreement, evidence)
