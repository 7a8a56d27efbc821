"""The dry run before the first epoch: one step on a copy of the model, then collapse and verify it.

It finds in seconds what would otherwise show up after hours: data that give NaN, unused parameters, a model that does
not collapse.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from repvgg._contexts import seeded
from repvgg.collapse import is_plain, reparameterize
from repvgg.data import SegmentationData
from repvgg.errors import EquivalenceError, TrainingError
from repvgg.quantization import QatNetwork
from repvgg.training.config import TrainConfig
from repvgg.training.tasks import TrainingData, loss_function
from repvgg.verify import Evidence, verify

_IMAGES, _MASKED_IMAGES = 8, 2
_LARGEST = 97  # pixels of images with masks: 8k + 1
_LR = 0.01


@final
@dataclass(frozen=True)
class DryRunResult:
    """The outcome of a dry run."""

    loss: float  # of the first images, before the step
    regions: int  # number of convolutions after the collapse; 0 for a model that is plain already
    evidence: Evidence | None  # of the equality of both forms after the step; None for a model that is plain already

    def __str__(self) -> str:
        start = f"dry run: loss {self.loss:.3f}, all gradients finite"
        if self.evidence is None:
            return f"{start}; the model is plain already"
        error = f"relative error {self.evidence.relative:.1e} (tolerance {self.evidence.tolerance:.1e})"
        return f"{start}; collapses into {self.regions} convolutions, {error}"


def perform_dry_run(model: nn.Module, data: TrainingData, config: TrainConfig) -> DryRunResult:
    """Take one step on a copy of ``model`` with a few training images, in float32 on the CPU, and collapse it.

    Raises:
        TrainingError: the loss or a gradient is not finite, or a trainable parameter receives no gradient.
        EquivalenceError: the plain form is not equal to the train form.
    """
    # On the CPU in float32 whatever the run uses: this is about the model, and a reproducible result.
    model = copy.deepcopy(model).cpu().float().train()
    with seeded("trial", config.seed):
        has_masks = isinstance(data, SegmentationData)
        count = _MASKED_IMAGES if has_masks else _IMAGES
        images, targets = next(
            iter(data.train_batches(count if data.num_train is None else min(count, data.num_train)))
        )
        images = data.prepare(images)
        if has_masks:  # a crop of the crops: the model is the same at any size
            images, targets = images[..., :_LARGEST, :_LARGEST], targets[..., :_LARGEST, :_LARGEST]
        loss = loss_function(data, config)(model(images), targets)
        loss.backward()  # type: ignore[no-untyped-call]
    initial_loss = float(loss.detach())
    _check_gradients(model, initial_loss)
    # The step changes kernels, batch norms and running statistics: at initialization a wrong fold could go unnoticed.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=_LR)
    model.eval()
    if isinstance(model, QatNetwork):
        model = model.train_form
    if is_plain(model, images):
        return DryRunResult(initial_loss, 0, None)
    plain, report = reparameterize(model, images)
    evidence = verify(model, plain, [images])
    if not evidence.passed:
        raise EquivalenceError(f"The model would not collapse into an equal one after training: {evidence.reasons[0]}.")
    return DryRunResult(initial_loss, len(report.folded), evidence)


def _check_gradients(model: nn.Module, loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"The first batch gives a loss of {loss}: look at its images with 'repvgg data check'.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise TrainingError(f"{name!r} gets no gradient: freeze it (requires_grad=False), or use it in forward.")
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            raise TrainingError(
                f"The gradient of {name!r} is not finite on the first batch: check how forward uses that parameter."
            )
