"""Before the first step: one batch forward and backward, the collapse, and its verification, on a copy."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from repvgg.collapse import is_plain, reparameterize
from repvgg.data import OpenedData
from repvgg.errors import EquivalenceError, TrainingError
from repvgg.models import TrainingOutput
from repvgg.training.config import TrainConfig
from repvgg.training.seeding import seeded
from repvgg.training.task import classification_loss
from repvgg.verify import Evidence, verify

_IMAGES = 8


@final
@dataclass(frozen=True)
class Trial:
    """What a dry run found.

    Attributes:
        loss: of the first images, before any step.
        regions: convolutions that branches were folded into; 0 for a model that is plain already.
        evidence: the plain form beside the train form, after one step; None for a model that is plain already.
    """

    loss: float
    regions: int
    evidence: Evidence | None

    def __str__(self) -> str:
        start = f"dry run: loss {self.loss:.3f}, all gradients finite"
        if self.evidence is None:
            return f"{start}; the model is plain already"
        error = f"relative error {self.evidence.relative:.1e}, {self.evidence.tolerance:.1e} allowed"
        return f"{start}; collapses into {self.regions} convolutions, equal: {error}"


def try_out(model: nn.Module, data: OpenedData, config: TrainConfig) -> Trial:
    """Take one step on a copy of ``model`` with a few training images, in float32 on the CPU, and collapse it.

    Raises:
        TrainingError: the loss or a gradient is not finite, or a parameter that should be trained gets no gradient.
        EquivalenceError: the plain form is not equal to the train form.
    """
    model = copy.deepcopy(model).cpu().float().train()
    with seeded("trial", config.seed):
        images, labels = _first_images(data)
        loss = classification_loss(_output(model, images), labels, config.label_smoothing, config.auxiliary_weight)
        loss.backward()  # type: ignore[no-untyped-call]
    _check_gradients(model, float(loss.detach()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.01)
    model.eval()
    if is_plain(model, images):
        return Trial(float(loss.detach()), 0, None)
    plain, report = reparameterize(model, images)
    evidence = verify(model, plain, [images])
    if not evidence.passed:
        raise EquivalenceError(f"The model would not collapse into an equal one after training: {evidence.reasons[0]}.")
    return Trial(float(loss.detach()), len(report.folded), evidence)


def _first_images(data: OpenedData) -> tuple[Tensor, Tensor]:
    count = _IMAGES if data.num_train is None else min(_IMAGES, data.num_train)
    images, labels = next(iter(data.train_batches(count)))
    return data.prepare(images), labels


def _output(model: nn.Module, images: Tensor) -> Tensor | TrainingOutput:
    out: Tensor | TrainingOutput = model(images)
    return out


def _check_gradients(model: nn.Module, loss: float) -> None:
    if not torch.isfinite(torch.tensor(loss)):
        raise TrainingError(f"The first batch gives a loss of {loss}: look at its images with 'repvgg data check'.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise TrainingError(f"{name!r} gets no gradient: freeze it (requires_grad=False), or use it in forward.")
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            raise TrainingError(f"The gradient of {name!r} is not finite on the first batch.")
