"""How a global batch is spread over devices and time, and the learning rate that follows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import final

from repvgg.errors import UsageError
from repvgg.training.config import TrainConfig


@final
@dataclass(frozen=True)
class Layout:
    """The processes of a run.

    Attributes:
        rank: number of this process, 0 for the one that talks and writes.
        devices: processes on this machine, one a device.
        nodes: machines.
    """

    rank: int = 0
    devices: int = 1
    nodes: int = 1

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes


def layout_of(config: TrainConfig) -> Layout:
    """What torchrun or SLURM started; one process, if nothing did.

    Raises:
        UsageError: ``config`` asks for something else than was started.
    """
    given = _torchrun() or _slurm()
    if given is None:
        if (config.devices or 1) * (config.nodes or 1) > 1:
            raise UsageError(
                "Several devices take a process each: start with torchrun --nproc-per-node DEVICES -m repvgg train."
            )
        return Layout()
    for name, asked, started in (("devices", config.devices, given.devices), ("nodes", config.nodes, given.nodes)):
        if asked is not None and asked != started:
            raise UsageError(f"{started} {name} were started, but the config asks for {asked}: leave {name} out.")
    return given


def _torchrun() -> Layout | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return Layout(rank, local, world // local)


def _slurm() -> Layout | None:
    """Tasks of srun; a shell in an allocation, or an interactive one, is not."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if not SLURMEnvironment.detect():
        return None
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return Layout(rank, world // nodes, nodes)


@final
@dataclass(frozen=True)
class BatchPlan:
    """A global batch as ``world_size`` devices x ``accumulation`` rounds x ``device_batch`` images.

    Attributes:
        device_batch: images that one device takes at a time.
        accumulation: rounds before the optimizer steps.
        world_size: devices.
        lr: the highest learning rate.
        lr_scale: what the configured rate was multiplied by.
    """

    device_batch: int
    accumulation: int
    world_size: int
    lr: float
    lr_scale: float

    @property
    def global_batch(self) -> int:
        """Images a step of the optimizer."""
        return self.device_batch * self.accumulation * self.world_size

    def __str__(self) -> str:
        rounds = f" in {self.accumulation} rounds" if self.accumulation > 1 else ""
        share = f"{self.device_batch} on each of {self.world_size} devices" if self.world_size > 1 else "one device"
        shown = f"{self.device_batch} at a time" if self.world_size == 1 and self.accumulation > 1 else share
        scaled = f", scaled by {self.lr_scale:g} with the batch" if self.lr_scale != 1 else ""
        return f"global batch {self.global_batch} ({shown}{rounds}), learning rate {self.lr:g}{scaled}"


def plan_batches(config: TrainConfig, world_size: int = 1) -> BatchPlan:
    """Spread the global batch of ``config``, and scale its learning rate linearly.

    ``global = devices · accumulation · device_batch`` and ``lr = config.lr · global / config.lr_batch``.

    Raises:
        UsageError: the global batch is not a multiple of what all devices take at a time.
    """
    share, rest = divmod(config.batch_size, world_size)
    if rest:
        raise UsageError(f"A global batch of {config.batch_size} cannot be shared by {world_size} devices evenly.")
    device_batch = min(config.device_batch or share, share)
    if share % device_batch:
        raise UsageError(
            f"A share of {share} images a device is no multiple of {device_batch} at a time: choose device_batch so."
        )
    scale = 1.0 if config.optim.lr_batch is None else config.batch_size / config.optim.lr_batch
    return BatchPlan(device_batch, share // device_batch, world_size, config.optim.lr * scale, scale)
