"""The configuration of a training run, and its YAML file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final, get_args

from repvgg import _serde
from repvgg._files import write_text
from repvgg.data import DataConfig
from repvgg.data.config import MASK_SCHEMES
from repvgg.errors import UsageError
from repvgg.quantization import QuantizationSettings

DecayPolicy = Literal["paper", "upstream", "upstream-2021", "no-1d"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
Schedule = Literal["cosine", "poly"]


@final
@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum, a linear warm-up and a decay of the learning rate to 0, updated every step.

    Attributes:
        lr: peak learning rate, reached at the end of the warm-up, for a global batch of ``lr_batch`` images.
        lr_batch: global batch that ``lr`` refers to; other batch sizes scale it linearly (Goyal et al. 2017,
            arXiv 1706.02677). None uses ``lr`` unscaled.
        momentum: of SGD, in [0, 1).
        nesterov: use Nesterov momentum; the paper and upstream do not.
        weight_decay: L2 factor of the parameters that ``decay`` selects.
        decay: which parameters have weight decay, see repvgg.training.parameter_groups.
        custom_l2: penalize the equivalent kernel of each block, as upstream does, in place of the decay of its two
            kernels, see repvgg.training.equivalent_l2.
        norm_bias_lr: learning-rate multiplier of batch norm biases: in short runs they have to move far in few steps
            (K. Jordan 2024, arXiv 2404.00498, among the optimization tricks).
        warmup_epochs: length of the warm-up, fractions allowed; 0 for none.
        schedule: the decay after the warm-up: "cosine", half a period; "poly", ``(1 − step/total)^0.9``, which is usual
            in semantic segmentation.
        head_lr: learning-rate multiplier of everything that is not in the backbone, for models that have one.
        clip: maximum L2 norm of all gradients together; None for no clipping.

    Raises:
        UsageError: a number is out of range.
    """

    # The defaults are the paper's simple schedule (§4.1).
    lr: float = 0.1
    lr_batch: int | None = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: DecayPolicy = "paper"
    custom_l2: bool = False
    norm_bias_lr: float = 1.0
    warmup_epochs: float = 0.0
    schedule: Schedule = "cosine"
    head_lr: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        _serde.check_finite(self)
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0 and self.warmup_epochs >= 0):
            raise UsageError(
                f"SGD needs lr > 0, momentum in [0, 1), weight_decay >= 0 and warmup_epochs >= 0, got {self}."
            )
        # PyTorch refuses this too, but only when the optimizer is built, after the data set is loaded.
        if self.nesterov and self.momentum == 0:
            raise UsageError("Nesterov momentum needs a momentum above 0.")
        for name in ("norm_bias_lr", "head_lr"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be greater than 0, got {getattr(self, name)}.")
        if self.schedule not in get_args(Schedule):
            raise UsageError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}.")
        if self.clip is not None and self.clip <= 0:
            raise UsageError(f"clip must be greater than 0, or None for no clipping, got {self.clip}.")
        if self.lr_batch is not None and self.lr_batch < 1:
            raise UsageError(f"lr_batch must be at least 1, or None to use lr unscaled, got {self.lr_batch}.")


@final
@dataclass(frozen=True)
class QatConfig:
    """Quantization-aware training: the plain form's integers in every pass, merged anew from the branches.

    Batch norms fold with the running statistics of the checkpoint, which stay as they are; scales and shifts train.

    Attributes:
        enabled: train so.
        weight_bits: 2 to 8; pairs of weights are bounded, so that 8 do not saturate on CPUs without VNNI either.
        granularity: one scale for each weight tensor, or for each output channel.
        ranges: how the range of an activation is chosen, from the calibration images and from batches that are
            observed: the smallest squared error, a percentile, or all values.
        percentile: share in percent for ranges="percentile".
        learn_ranges: train the ranges by gradients (LSQ) instead of observing them.
        equalize: rescale channels between layers first, which changes no result.
        calibration_images: training images from which ranges start, transformed as for training.
        observe_epochs: epochs at the beginning in which ranges follow the batches; then they are frozen.

    Raises:
        UsageError: a number is out of range.
    """

    enabled: bool = False
    weight_bits: int = 8
    granularity: Literal["per_tensor", "per_channel"] = "per_channel"
    ranges: Literal["mse", "percentile", "minmax"] = "mse"
    percentile: float = 99.99
    learn_ranges: bool = False
    equalize: bool = True
    calibration_images: int = 128
    observe_epochs: float = 1.0

    def __post_init__(self) -> None:
        _serde.check_finite(self)
        _ = self.settings  # refuses what it shares with other quantizations
        if self.calibration_images < 1 or self.observe_epochs < 0:
            raise UsageError(
                "Quantization-aware training needs calibration_images >= 1 and observe_epochs >= 0, "
                f"got {self.calibration_images} and {self.observe_epochs:g}."
            )

    @property
    def settings(self) -> QuantizationSettings:
        """What it shares with a quantization after training, whose integers training starts from."""
        return QuantizationSettings(
            granularity=self.granularity,
            weight_bits=self.weight_bits,
            ranges=self.ranges,
            percentile=self.percentile,
            equalize=self.equalize,
        )


@final
@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on.

    Attributes:
        model: name of the architecture to train.
        recipe: name of the recipe that this config started from.
        epochs: passes over the training images, at least 1.
        batch_size: the global batch: images per optimizer step over all devices, at least 2, or 1 of images with masks;
            an incomplete last batch of an epoch is dropped.
        device_batch: images that one device processes at a time; if that is less than its part of the global batch,
            gradients are accumulated.
        data: the training and validation images.
        optim: the optimizer and its schedule.
        label_smoothing: probability mass of the target that is spread evenly over all classes, in [0, 1).
        mixup: α of mixup (Zhang et al., ICLR 2018), 0 for none.
        cutmix: α of CutMix (Yun et al., ICCV 2019), 0 for none; with both, one is drawn for each batch.
        auxiliary_weight: weight of each auxiliary loss, for models with auxiliary heads.
        progressive: smaller training images at first (progressive resizing): pairs of a share of the steps and a scale,
            both rising. ((0.4, 0.625), (0.7, 0.75)) takes 0.625 of ``data.train_size`` up to 40 % of the steps, 0.75 of
            it up to 70 %, and the full size for the rest.
        ema: decay of the exponential moving average of the weights, which is then evaluated and saved; 0 for none.
        init: checkpoint to start from; its classifier is replaced if the classes differ. A segmentation network also
            starts from a classification checkpoint of its backbone, a plain one expanded into branches.
        expand: expand a plain ``init`` into branches that compute the same, before training.
        whiten_stem: a new model starts with principal components of image patches in its first kernel, and keeps them;
            a batch norm follows, so that the network begins with decorrelated inputs. Not with ``init``.
        qat: quantization-aware training from the checkpoint ``init``; "best" and validation then mean the integers.
        precision: of the arithmetic; weights and statistics stay in float32. "auto" takes what this machine is fast at
            and says what that is; the config of the run folder names it.
        channels_last: compute in NHWC, which is faster on most devices; saved weights are contiguous.
        compile: run the model through torch.compile.
        sync_bn: normalize with the statistics of the global batch over all devices.
        dry_run: before the first epoch, take one step on a copy, collapse it and verify the result.
        save_steps: save a checkpoint every so many steps, in addition to every epoch; 0 for none.
        seed: of everything random in the run: initial weights, shuffling, augmentation.
        threads: CPU threads per operation; None keeps PyTorch's setting. The number determines the order of sums, so
            results with another number differ by rounding.
        accelerator: Lightning's name of the device: "auto", "cpu", "gpu", "mps".
        devices: processes that torchrun or SLURM must have started on each machine; None accepts any number.
        nodes: number of machines; None accepts any number.

    Raises:
        UsageError: a number is out of range, or settings exclude each other.
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
    progressive: tuple[tuple[float, float], ...] = ()
    ema: float = 0.0
    init: str | None = None
    expand: bool = False
    whiten_stem: bool = False
    qat: QatConfig = field(default_factory=QatConfig)
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
        _serde.check_finite(self)
        # Batch norm has no variance over a single image in a 1x1 map; feature maps of images with masks are larger.
        has_masks = self.data.uri.partition(":")[0] in MASK_SCHEMES
        smallest = 1 if has_masks else 2
        if self.epochs < 1 or self.batch_size < smallest:
            images = "1 image" if smallest == 1 else "2 images"
            raise UsageError(
                f"Training needs at least 1 epoch and {images} per batch, got {self.epochs} and {self.batch_size}."
            )
        if not 0 <= self.label_smoothing < 1 or min(self.auxiliary_weight, self.mixup, self.cutmix) < 0:
            raise UsageError(
                "Training needs label_smoothing in [0, 1) and auxiliary_weight, mixup and cutmix >= 0, got "
                f"{self.label_smoothing}, {self.auxiliary_weight}, {self.mixup} and {self.cutmix}."
            )
        if has_masks and (self.mixup or self.cutmix):
            raise UsageError(f"mixup and cutmix are for labels, and {self.data.uri!r} has masks: set both to 0.")
        if self.progressive:
            self._check_progressive(has_masks)
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema must be in [0, 1), got {self.ema}.")
        for name in ("device_batch", "threads", "devices", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")
        if self.save_steps < 0:
            raise UsageError(f"save_steps must be at least 0, got {self.save_steps}.")
        if self.optim.warmup_epochs >= self.epochs:  # the cosine needs at least one step
            raise UsageError(
                f"The warm-up must be shorter than the run, got {self.optim.warmup_epochs} of {self.epochs} epochs: "
                "raise --epochs, or lower --optim.warmup-epochs."
            )
        if self.expand and self.init is None:
            raise UsageError("expand needs a plain checkpoint to expand: give one as init.")
        if self.whiten_stem and self.init is not None:
            raise UsageError("whiten_stem is for new models, and init gives a trained one: leave out one of them.")
        if self.qat.enabled:
            self._check_qat()

    def training_scale(self, share: float) -> float:
        """Return the scale of training images after this share of the steps."""
        return next((scale for end, scale in self.progressive if share < end), 1.0)

    def _check_progressive(self, has_masks: bool) -> None:
        if has_masks:
            raise UsageError(f"progressive is for labels, and {self.data.uri!r} has masks: leave it out.")
        columns = [[pair[axis] for pair in self.progressive] for axis in (0, 1)]
        if not all(sorted(set(column)) == column and 0 < column[0] <= column[-1] <= 1 for column in columns):
            raise UsageError(
                "progressive needs shares of the steps and scales in (0, 1], both rising, as in 0.4 0.625 0.7 0.75; "
                f"got {' '.join(f'{share:g} {scale:g}' for share, scale in self.progressive)}."
            )

    def _check_qat(self) -> None:
        if self.precision != "float32":
            raise UsageError(f"Integers are simulated in float32, not {self.precision}: leave precision at float32.")
        if self.compile:
            raise UsageError(
                "Branches are merged in Python code in every step, which compile does not take: leave it out."
            )
        if self.sync_bn:
            raise UsageError("Batch norms keep their statistics here: leave out sync_bn.")


def to_yaml(config: TrainConfig) -> str:
    """Return every field of ``config`` as YAML, nested, in declaration order."""
    # Not kept: a config.yaml, which may come from a stranger, cannot allow shell commands; only the command line can.
    return _serde.to_yaml(replace(config, data=replace(config.data, allow_commands=False)))


def write_config(path: str | os.PathLike[str], config: TrainConfig, *, overwrite: bool = False) -> Path:
    """Write ``config`` as YAML, atomically. See :func:`repvgg._files.atomic_write` for the errors."""
    return write_text(path, to_yaml(config), overwrite=overwrite)


def read_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a config from YAML, written by :func:`write_config` or a person; missing fields take their defaults.

    Raises:
        UsageError: the file does not exist or is not YAML, a field does not exist, or a value does not fit its field;
            or it allows itself to run commands.
    """
    config = _serde.read_yaml(TrainConfig, path, what="config")
    if config.data.allow_commands:
        raise UsageError(f"{str(path)!r} sets data.allow_commands: only you can, with --data.allow-commands.")
    return config


def differences(one: TrainConfig, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two configs differ: dotted name → both values."""
    first, second = _flatten(_serde.to_plain(one)), _flatten(_serde.to_plain(other))
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
