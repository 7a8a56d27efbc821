"""What a model says about a set of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repvgg.data import LabelledImages
from repvgg.modes import eval_mode


@final
@dataclass(frozen=True)
class Evaluation:
    """Predictions beside the truth; everything lies on the CPU.

    Attributes:
        logits: (N, K) float32.
        labels: (N,) int64, the true classes.
        confusion: (K, K) int64, rows are true classes and columns predicted ones.
    """

    logits: Tensor
    labels: Tensor
    confusion: Tensor

    @property
    def predictions(self) -> Tensor:
        """(N,) int64, the class with the highest logit of each image."""
        return self.logits.argmax(1)

    @property
    def correct(self) -> int:
        """Number of images whose prediction is right."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """Fraction of images whose prediction is right, in [0, 1]."""
        return self.correct / len(self.labels)

    def __repr__(self) -> str:
        return f"Evaluation({self.correct} of {len(self.labels)} right, {self.accuracy:.2%})"


def evaluate(model: Callable[[Tensor], Tensor], images: LabelledImages, batch_size: int = 256) -> Evaluation:
    """Run ``model`` over ``images``, in order, in eval mode and without gradients.

    Any callable from (N, C, H, W) to logits (N, K) will do, an exported file in its runtime too. A module gets the
    images on its own device, and comes back in the modes it had.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    logits, labels = [], []
    loader = DataLoader(images, batch_size, generator=torch.Generator())  # else it draws from the global one
    with eval_mode(model), torch.no_grad():
        for x_NCHW, label_N in loader:
            logits.append(model(x_NCHW.to(device_of(model))).float().cpu())
            labels.append(label_N)
    logits_NK, labels_N = torch.cat(logits), torch.cat(labels)
    confusion = multiclass_confusion_matrix(logits_NK.argmax(1), labels_N, num_classes=logits_NK.shape[1])
    return Evaluation(logits_NK, labels_N, confusion)


def device_of(model: object) -> torch.device:
    """Where a module keeps its parameters; the CPU for all else."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
