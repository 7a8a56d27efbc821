"""Data parallelism: the processes of a run, the split of a global batch over them, and synchronized batch norm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.errors import UsageError, require
from repvgg.training.config import TrainConfig


@final
@dataclass(frozen=True)
class ProcessLayout:
    """The processes of a run, one per device."""

    rank: int = 0  # global rank of this process; rank 0 prints and writes files
    devices: int = 1  # processes on this machine
    nodes: int = 1  # number of machines

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes


def process_layout(config: TrainConfig) -> ProcessLayout:
    """Detect the processes that torchrun or SLURM started; a single process if neither did.

    Raises:
        UsageError: ``config`` has another number of devices or nodes.
    """
    layout = _from_torchrun() or _from_slurm()
    if layout is None:
        if (config.devices or 1) * (config.nodes or 1) > 1:
            raise UsageError(
                "Each device needs a process: start the run with torchrun --nproc-per-node DEVICES -m repvgg train."
            )
        return ProcessLayout()
    for name, wanted, started in (("devices", config.devices, layout.devices), ("nodes", config.nodes, layout.nodes)):
        if wanted is not None and wanted != started:
            raise UsageError(f"{started} {name} were started, but the config asks for {wanted}: leave {name} out.")
    return layout


def _from_torchrun() -> ProcessLayout | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, world_size, local_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return ProcessLayout(rank, local_size, world_size // local_size)  # Lightning needs equal numbers on all machines


def _from_slurm() -> ProcessLayout | None:
    environment = require("lightning.fabric.plugins.environments.slurm", "train").SLURMEnvironment
    # False in the shell of an allocation and in an interactive job: only tasks of srun are processes of a run.
    if not environment.detect():
        return None
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return ProcessLayout(rank, world_size // nodes, nodes)


@final
@dataclass(frozen=True)
class BatchPlan:
    """A global batch split into ``world_size`` devices x ``accumulation`` micro-batches x ``device_batch`` images."""

    device_batch: int  # images of one forward pass on one device
    accumulation: int  # forward passes per optimizer step (gradient accumulation)
    world_size: int  # number of devices
    lr: float  # peak learning rate
    lr_scale: float  # factor between the configured learning rate and lr

    @property
    def global_batch(self) -> int:
        return self.device_batch * self.accumulation * self.world_size

    def __str__(self) -> str:
        if self.world_size > 1:
            split = f"{self.device_batch} on each of {self.world_size} devices"
        else:
            split = f"{self.device_batch} at a time" if self.accumulation > 1 else "one device"
        if self.accumulation > 1:
            split += f", accumulated {self.accumulation} times"
        scaled = f", scaled by {self.lr_scale:g} with the batch" if self.lr_scale != 1 else ""
        return f"global batch {self.global_batch} ({split}), learning rate {self.lr:g}{scaled}"


def plan_batches(config: TrainConfig, world_size: int = 1) -> BatchPlan:
    """Split the global batch of ``config`` over devices and time, and scale its learning rate linearly.

    ``global = devices · accumulation · device_batch`` and ``lr = config.lr · global / config.lr_batch``.

    Raises:
        UsageError: the global batch is not a multiple of what all devices process at a time.
    """
    per_device, rest = divmod(config.batch_size, world_size)
    if rest:
        raise UsageError(
            f"A global batch of {config.batch_size} does not divide evenly over {world_size} devices: "
            "choose another batch_size."
        )
    device_batch = min(config.device_batch or per_device, per_device)
    if per_device % device_batch:
        raise UsageError(
            f"The {per_device} images of each device are not a multiple of {device_batch} at a time: "
            "choose a device_batch that divides them."
        )
    # By the global batch, so the split over devices and accumulation does not change the optimization.
    scale = 1.0 if config.optim.lr_batch is None else config.batch_size / config.optim.lr_batch
    return BatchPlan(device_batch, per_device // device_batch, world_size, config.optim.lr * scale, scale)


def ddp_strategy(*, on_cpu: bool) -> Any:
    """Return Lightning's DDP strategy, with validation steps that bypass PyTorch's wrapper; gloo on a CPU.

    ``DistributedDataParallel.forward`` broadcasts the buffers at every call, in eval mode too, and would wait forever
    where one process has one more validation batch than another. The task broadcasts them once per validation epoch.
    """
    from lightning.pytorch.strategies import DDPStrategy

    class UnwrappedValidationDDP(DDPStrategy):
        def validation_step(self, *args: Any, **kwargs: Any) -> Any:
            assert self.lightning_module is not None
            return self.lightning_module.validation_step(*args, **kwargs)

    return UnwrappedValidationDDP(process_group_backend="gloo" if on_cpu else None)


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes; the gradient is summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()  # all_reduce works in place
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


@final
class SyncBatchNorm(_BatchNorm):
    """Batch norm over the global batch on CPU processes, which PyTorch's ``SyncBatchNorm`` does not support.

    In training mode ``y = γ (x − μ) / √(σ² + ε) + β`` with μ and σ² over the images of all processes; the running
    variance takes ``σ² n / (n − 1)`` with n the pixels of all processes. In a single process, and in eval mode, it is
    plain batch norm.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        synchronize = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return self._global_batch_norm(input) if synchronize else super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.ndim < 2:
            raise ValueError(f"batch norm takes (N, C, …), got {input.ndim} axes")

    def _global_batch_norm(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        wide = x if x.dtype == torch.float64 else x.float()  # sums of half-precision values would overflow
        # Processes may hold different numbers of images, so the count is summed too.
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=wide.dtype)
        dist.all_reduce(count)
        mean = _AllReduceSum.apply(wide.sum(axes)) / count
        # Two passes: E[x²] − E[x]² cancels where the mean is large.
        centred = wide - _per_channel(mean, x)
        var = _AllReduceSum.apply(centred.square().sum(axes)) / count
        self._update_running_statistics(mean.detach(), (var * count / (count - 1)).detach())
        y = centred * _per_channel((var + self.eps).rsqrt(), x)
        if self.affine:
            y = y * _per_channel(self.weight, x) + _per_channel(self.bias, x)
        return y.to(x.dtype)

    def _update_running_statistics(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # momentum=None means a cumulative average in PyTorch.
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_(var.to(self.running_var.dtype), weight)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


@contextmanager
def synchronized_batch_norm(model: nn.Module, enabled: bool = True, *, on_cpu: bool = True) -> Iterator[None]:
    """Replace the batch norms of ``model`` by synchronized ones inside the context, and put them back afterwards.

    Parameters and buffers keep their names and stay the same objects, so optimizers and checkpoints are not affected.

    Args:
        model: modified in place.
        enabled: False makes this a no-op.
        on_cpu: use :class:`SyncBatchNorm`; otherwise PyTorch's own.
    """
    kind = SyncBatchNorm if on_cpu else nn.SyncBatchNorm
    slots = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # a shared module has several slots; named_children lists one
        if enabled and isinstance(child, _BatchNorm) and not isinstance(child, (SyncBatchNorm, nn.SyncBatchNorm))
    ]
    replacements: dict[_BatchNorm, _BatchNorm] = {}
    for parent, name, bn in slots:
        if bn not in replacements:
            sync = kind(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
            _move_tensors(bn, sync)
            replacements[bn] = sync
        setattr(parent, name, replacements[bn])
    try:
        yield
    finally:
        for parent, name, bn in slots:
            _move_tensors(replacements[bn], bn)  # moving to another device has made new buffers meanwhile
            setattr(parent, name, bn)


def _move_tensors(source: nn.Module, target: nn.Module) -> None:
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target.training = source.training
