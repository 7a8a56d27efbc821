"""Evaluate a model on labelled images: predictions, confusion matrix, accuracies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg.errors import require


@final
@dataclass(frozen=True)
class Evaluation:
    """Predictions and labels of N images of K classes; all tensors are on the CPU."""

    logits: Tensor  # (N, K) float32
    labels: Tensor  # (N,) int64, the true classes
    confusion: Tensor  # (K, K) int64, rows are true classes and columns predicted ones

    @property
    def predictions(self) -> Tensor:
        """(N,) int64, the class with the highest logit of each image."""
        return self.logits.argmax(1)

    @property
    def correct(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return self.correct / len(self.labels)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics for the header of a checkpoint."""
        return {"held_out_accuracy": self.accuracy, "held_out_top5": self.top(5)}

    @property
    def summary(self) -> str:
        """The result in a line."""
        correct = f"{self.correct:,} of {len(self.labels):,} correct"
        return f"top-1 {self.accuracy:.2%}  top-5 {self.top(5):.2%}  {correct}"

    @property
    def macro_accuracy(self) -> float:
        """Mean of the per-class accuracies over the classes that occur, in [0, 1]."""
        present = self.confusion.sum(1) > 0
        return float(self.per_class[present].mean())

    @property
    def per_class(self) -> Tensor:
        """(K,) float64, accuracy on the images of each class; NaN for a class without images."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)  # 0/0 is NaN

    def top(self, k: int) -> float:
        """Top-k accuracy in [0, 1]; ``k`` is limited to the number of classes."""
        best_Nk = self.logits.topk(min(k, self.logits.shape[1]), 1).indices
        return float((best_Nk == self.labels[:, None]).any(1).double().mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as plain data, without logits and labels."""
        return {
            "top1": self.accuracy,
            "top5": self.top(5),
            "macro_accuracy": self.macro_accuracy,
            "correct": self.correct,
            "images": len(self.labels),
            "confusion": self.confusion.tolist(),
        }

    def __repr__(self) -> str:
        return f"Evaluation({self.correct} of {len(self.labels)} correct, {self.accuracy:.2%})"


def evaluate(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Run ``model`` over ``batches`` of labelled images, in order, in eval mode and without gradients.

    ``model`` may be any callable from (N, C, H, W) to logits (N, K), for example an exported file in its runtime. A
    module receives the images on its own device; its training flags are restored.

    Args:
        model: the model to evaluate.
        batches: images (n, C, H, W) and labels (n,), as ``ImageData.val_batches`` yields them.
        prepare: from those images to the input of the model (``ImageData.prepare``); a module is copied to the device
            of the model.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
    """
    metrics = require("torchmetrics.functional.classification", "train")
    device = device_of(model)
    if isinstance(prepare, nn.Module):
        prepare = copy.deepcopy(prepare).to(device)  # the caller's stays where it is
    logits, labels = [], []
    with eval_mode(model), torch.no_grad():
        for images, label_N in batches:
            x_NCHW = images.to(device)
            # Off the device batch by batch: the logits of ImageNet's validation images take 200 MB.
            logits.append(model(x_NCHW if prepare is None else prepare(x_NCHW)).float().cpu())
            labels.append(label_N.cpu())
    logits_NK, labels_N = torch.cat(logits), torch.cat(labels)
    confusion = metrics.multiclass_confusion_matrix(logits_NK.argmax(1), labels_N, num_classes=logits_NK.shape[1])
    return Evaluation(logits_NK, labels_N, confusion)


def device_of(model: object) -> torch.device:
    """Return the device of a module's first parameter; the CPU for anything else."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
