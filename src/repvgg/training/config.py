"""A training run as one typed, printable value. Recipes return it, nothing else decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

from repvgg.data import DataConfig
from repvgg.errors import UsageError

DecayPolicy = Literal["paper", "upstream", "upstream-2021", "no-1d"]
Precision = Literal["float32", "bf16", "fp16"]


@final
@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum; the rate rises linearly, then falls to 0 as a half cosine, step by step.

    Attributes:
        lr: the highest learning rate, reached when the warm-up ends, for a global batch of ``lr_batch`` images.
        lr_batch: the global batch that ``lr`` is meant for: another one scales the rate linearly (Goyal et al. 2017,
            arXiv 1706.02677). None takes ``lr`` as it is.
        momentum: of SGD.
        nesterov: take Nesterov's form of it; the paper and upstream do not.
        weight_decay: the L2 factor of the parameters that ``decay`` names.
        decay: which parameters decay, see repvgg.training.parameter_groups.
        custom_l2: put upstream's L2 on the equivalent kernel of each block in place of the decay of its two kernels,
            see repvgg.training.equivalent_l2.
        norm_bias_lr: how many times that rate the biases of batch norms take: in short runs they have to move far in
            few steps (K. Jordan 2024, arXiv 2404.00498, among the optimization tricks).
        warmup_epochs: epochs of the linear rise; a fraction is fine, 0 is none.
        clip: largest L2 norm of all gradients together; None clips nothing.

    Raises:
        UsageError: a number out of its range.
    """

    lr: float = 0.1
    lr_batch: int | None = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: DecayPolicy = "paper"
    custom_l2: bool = False
    norm_bias_lr: float = 1.0
    warmup_epochs: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0 and self.warmup_epochs >= 0):
            raise UsageError(
                f"SGD needs lr > 0, momentum in [0, 1), weight_decay >= 0 and warmup_epochs >= 0, not {self}."
            )
        if self.nesterov and self.momentum == 0:
            raise UsageError("Nesterov's form needs a momentum above 0.")
        if not self.norm_bias_lr > 0:
            raise UsageError(f"The biases of batch norms take a multiple above 0 of the rate, not {self.norm_bias_lr}.")
        if self.clip is not None and self.clip <= 0:
            raise UsageError(f"Gradients are clipped to a norm above 0, not {self.clip}.")
        if self.lr_batch is not None and self.lr_batch < 1:
            raise UsageError(f"The batch that the learning rate is meant for is positive, not {self.lr_batch}.")


@final
@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on.

    Attributes:
        model: the row of the table to train.
        recipe: name of the recipe that this came from.
        epochs: passes over the training images, at least 1.
        batch_size: images of one step of the optimizer over all devices, the global batch, at least 2; the rest of an
            epoch that fills none is left out.
        device_batch: images that one device takes at a time, if fewer than its share: gradients are accumulated.
        data: what to train on and what to judge by.
        optim: the optimizer and its schedule.
        label_smoothing: in [0, 1): the share of the target spread evenly over all classes.
        mixup: α of mixup (Zhang et al., ICLR 2018), 0 for none.
        cutmix: α of CutMix (Yun et al., ICCV 2019), 0 for none; with both each batch takes one of them.
        auxiliary_weight: of each auxiliary loss, for models with auxiliary heads.
        ema: decay of the exponential moving average of the weights, which is then what is judged and kept; 0 for none.
        init: a checkpoint to start from; its classifier is replaced if the classes are others.
        expand: turn a plain ``init`` into branches that compute the same, before training.
        precision: of the arithmetic; weights and statistics stay in float32.
        channels_last: compute in NHWC, faster on most devices; the weights come back in PyTorch's standard layout.
        compile: run the model through torch.compile.
        sync_bn: batch norms take the statistics of the global batch, over all devices.
        dry_run: try one batch, the collapse and its verification before the first step.
        save_steps: save every so many steps as well as after every epoch; 0 for none.
        seed: of everything random in the run: first weights, shuffling, augmentation.
        threads: CPU threads of one operation; None is as many as PyTorch uses already. Their number decides the order
            of sums, so another number gives other weights, in the last bits first.
        accelerator: Lightning's name of the device: "auto", "cpu", "gpu", "mps".
        devices: how many of them torchrun or SLURM has to start on each machine; None takes what is there.
        nodes: on how many machines; None takes what is there.

    Raises:
        UsageError: a number out of its range, or settings that exclude each other.
    """

    model: str = ""
    recipe: str = ""
    epochs: int = 1
    batch_size: int = 256
    device_batch: int | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    auxiliary_weight: float = 0.1
    ema: float = 0.0
    init: str | None = None
    expand: bool = False
    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    sync_bn: bool = False
    dry_run: bool = True
    save_steps: int = 0
    seed: int = 0
    threads: int | None = None
    accelerator: str = "auto"
    devices: int | None = None
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise UsageError(
                f"Training needs at least 1 epoch and 2 images a batch, not {self.epochs} and {self.batch_size}."
            )
        if not 0 <= self.label_smoothing < 1 or min(self.auxiliary_weight, self.mixup, self.cutmix) < 0:
            raise UsageError(
                "Training needs label_smoothing in [0, 1) and auxiliary_weight, mixup and cutmix >= 0, not "
                f"{self.label_smoothing}, {self.auxiliary_weight}, {self.mixup} and {self.cutmix}."
            )
        if not 0 <= self.ema < 1:
            raise UsageError(f"The decay of the moving average lies in [0, 1), not {self.ema}.")
        for name in ("device_batch", "threads", "devices", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"Training needs {name} of at least 1, not {value}.")
        if self.save_steps < 0:
            raise UsageError(f"save_steps counts steps, 0 for none: it cannot be {self.save_steps}.")
        if self.optim.warmup_epochs >= self.epochs:
            raise UsageError(
                f"A warm-up of {self.optim.warmup_epochs} epochs leaves nothing of a run of {self.epochs}."
            )
        if self.expand and self.init is None:
            raise UsageError("There is nothing to expand: give a plain checkpoint as init.")
