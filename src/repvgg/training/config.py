"""A training run as one typed, printable value. Recipes return it, nothing else decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from repvgg.data import AffineJitter
from repvgg.errors import UsageError


@final
@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum; the rate rises linearly, then falls to 0 as a half cosine, step by step.

    Attributes:
        lr: the highest learning rate, reached when the warm-up ends.
        momentum: of SGD, without Nesterov's correction.
        weight_decay: on the kernels of convolutions and linear layers only (the paper's policy).
        warmup_epochs: epochs of the linear rise; a fraction is fine, 0 is none.

    Raises:
        UsageError: a number out of its range.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0 and self.warmup_epochs >= 0):
            raise UsageError(
                f"SGD needs lr > 0, momentum in [0, 1), weight_decay >= 0 and warmup_epochs >= 0, not {self}."
            )


@final
@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on, besides the model and the data.

    Attributes:
        epochs: passes over the training images, at least 1.
        batch_size: images a step, at least 2 (batch norm); the rest of an epoch that fills no batch is left out.
        optim: the optimizer and its schedule.
        label_smoothing: in [0, 1): the share of the target spread evenly over all classes.
        auxiliary_weight: of each auxiliary loss, for models with auxiliary heads.
        augment: random turns, shifts and sizes of the training images.
        seed: of everything random in the run: shuffling, augmentation, dropout. Not of the model's first weights.
        threads: CPU threads of one operation; None is as many as PyTorch uses already. Their number decides the order
            of sums, so another number gives other weights, in the last bits first.
        channels_last: compute in NHWC, faster on most devices; the weights come back in PyTorch's standard layout.

    Raises:
        UsageError: a number out of its range.
    """

    epochs: int
    batch_size: int
    optim: OptimConfig = field(default_factory=OptimConfig)
    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.1
    augment: AffineJitter = field(default_factory=AffineJitter)
    seed: int = 0
    threads: int | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise UsageError(
                f"Training needs at least 1 epoch and 2 images a batch, not {self.epochs} and {self.batch_size}."
            )
        if not 0 <= self.label_smoothing < 1 or self.auxiliary_weight < 0:
            raise UsageError(
                "Training needs label_smoothing in [0, 1) and auxiliary_weight >= 0, "
                f"not {self.label_smoothing} and {self.auxiliary_weight}."
            )
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"Training needs at least one thread, not {self.threads}.")
        if self.optim.warmup_epochs >= self.epochs:
            raise UsageError(
                f"A warm-up of {self.optim.warmup_epochs} epochs leaves nothing of a run of {self.epochs}."
            )
