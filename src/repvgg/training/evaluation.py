"""What a model says about a set of images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode


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

    @property
    def macro_accuracy(self) -> float:
        """Mean over the classes that occur of the fraction of their images that is right, in [0, 1]."""
        seen = self.confusion.sum(1) > 0
        return float(self.per_class[seen].mean())

    @property
    def per_class(self) -> Tensor:
        """(K,) float64, the fraction of each class's images that is right; NaN where there is none."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    def top(self, k: int) -> float:
        """Fraction of images whose class is among the ``k`` likeliest (all, if there are fewer), in [0, 1]."""
        best_Nk = self.logits.topk(min(k, self.logits.shape[1]), 1).indices
        return float((best_Nk == self.labels[:, None]).any(1).double().mean())

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, without logits and labels."""
        return {
            "top1": self.accuracy,
            "top5": self.top(5),
            "macro_accuracy": self.macro_accuracy,
            "correct": self.correct,
            "images": len(self.labels),
            "confusion": self.confusion.tolist(),
        }

    def __repr__(self) -> str:
        return f"Evaluation({self.correct} of {len(self.labels)} right, {self.accuracy:.2%})"


def evaluate(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Run ``model`` over ``batches`` of images with labels, in order, in eval mode and without gradients.

    Any callable from (N, C, H, W) to logits (N, K) will do, an exported file in its runtime too. A module gets the
    images on its own device, and comes back in the modes it had.

    Args:
        model: what is judged.
        batches: images (n, C, H, W) and labels (n,), as ``OpenedData.held_out_batches`` gives them.
        prepare: from those images to what the model takes (``OpenedData.prepare``); a copy of it is run on the device
            of the model.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    device = device_of(model)
    prepare = copy.deepcopy(prepare).to(device) if isinstance(prepare, nn.Module) else prepare
    logits, labels = [], []
    with eval_mode(model), torch.no_grad():
        for images, label_N in batches:
            x_NCHW = images.to(device)
            logits.append(model(x_NCHW if prepare is None else prepare(x_NCHW)).float().cpu())
            labels.append(label_N.cpu())
    logits_NK, labels_N = torch.cat(logits), torch.cat(labels)
    confusion = multiclass_confusion_matrix(logits_NK.argmax(1), labels_N, num_classes=logits_NK.shape[1])
    return Evaluation(logits_NK, labels_N, confusion)


def device_of(model: object) -> torch.device:
    """Where a module keeps its parameters; the CPU for all else."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
