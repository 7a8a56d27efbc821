"""A plain network, ready to be run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, final, overload

import numpy as np
import torch
from torch import Tensor

from repvgg.engine.codegen.jit import Isa, host_isa
from repvgg.engine.executable import Runner, Shape
from repvgg.engine.graph import Floats, Layer
from repvgg.engine.kernels.base import Kernel
from repvgg.engine.planner.algorithms import Machine, Precision
from repvgg.engine.planner.autotune import search
from repvgg.engine.planner.plan import BY_TABLE, Plan, Ways
from repvgg.engine.runtime.memory import Given, Input, read_input
from repvgg.engine.runtime.thread_pool import ThreadPool, thread_count
from repvgg.errors import UsageError

SIZES = 4  # of images that a network keeps code and memory for


@final
@dataclass(frozen=True)
class StepTime:
    """How long one step of a network takes.

    Attributes:
        name: of the layer.
        kernel: what computes it, with its tiles.
        seconds: the median.
        muls: multiplications on the whole batch, those of tiles that stick out among them; 0 where none count.
    """

    name: str
    kernel: Kernel
    seconds: float
    muls: int

    @property
    def gflops(self) -> float:
        """Billions of multiplications and additions a second, two for each multiplication that is really done."""
        return 2e-9 * self.muls / self.seconds


@final
class Profile(tuple[StepTime, ...]):
    """The steps of a network in their order; as text, a table."""

    __slots__ = ()

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(step.seconds for step in self)

    def __str__(self) -> str:
        rows = [("layer", "how", "us", "share", "GFLOP/s")]
        for step in self:
            speed = f"{step.gflops:.0f}" if step.muls else ""
            rows.append(
                (step.name, step.kernel.words, f"{1e6 * step.seconds:.0f}", f"{step.seconds / self.seconds:.1%}", speed)
            )
        rows.append(("all", "", f"{1e6 * self.seconds:.0f}", "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                (cell.ljust if place < 2 else cell.rjust)(widths[place]) for place, cell in enumerate(row)
            ).rstrip()
            for row in rows
        )


@final
class Network:
    """A compiled network: ``logits = network(images)``.

    Images of the size that it was made for run at once, in any batch up to the one it was made for. Others are
    compiled for when they come first; code and memory for the last 4 sizes stay. A copy, and what a pickle is read
    as, is compiled again, out of the cache on the disk if it can be.

    Args:
        layers: see :func:`repvgg.engine.frontend.read`. They are kept, for images of other sizes.
        input_shape: a batch, channels, height and width.
        isa: the vectors to use; None for those of this processor.
        threads: that work on each call, the caller among them; see :func:`runtime.thread_pool.thread_count`.
        precision: how far rounding errors may go; see :func:`repvgg.engine.compile`.
        searched: whether the ways to compute ``input_shape`` are measured; likewise.

    Attributes:
        input_shape: as given.
        threads: how many there are.
        plan: the kernels and buffers for ``input_shape``, without the weights.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        input_shape: Shape,
        isa: Isa | None,
        threads: int | None = 1,
        precision: Precision = "high",
        searched: bool = False,
    ) -> None:
        self._layers, self._asked, self.input_shape = tuple(layers), threads, input_shape
        self.threads = thread_count(threads)
        isa = isa or host_isa()
        self._machine = Machine(isa, self.threads, precision)
        self._pool, self._searched = ThreadPool(isa, self.threads), searched
        self._ways = BY_TABLE
        if searched:
            self._ways = Ways(search(self._layers, input_shape, self._machine, self._pool))
        first = Runner(self._layers, input_shape, self._machine, (), self._ways)
        self._runners = [first]  # the last one ran last
        self.plan: Plan = first.plan
        self._lock, self._process = Lock(), os.getpid()

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Floats) -> Floats: ...
    def __call__(self, x: Given) -> Given:
        """The output of the network on float32 images (n, C, H, W): a tensor for a tensor, an array for an array.

        Images of any strides are read as they lie, channels_last among them. The output is new memory: (n, O) behind
        a pool, and else (n, O, H, W).

        Raises:
            UsageError: the images have another shape, dtype or device, or another thread is inside.
            UnsupportedError: they are too small for the network.
        """
        images = read_input(x, self.input_shape[1])
        count = images.shape[0]
        runner = self._enter(images)
        try:
            self._pool.run(runner.rows.start, len(runner.rows), count)
            output = runner.output(count)
        finally:
            self._lock.release()
        return torch.from_numpy(output) if isinstance(x, Tensor) else output

    def profile(self, x: Given, repeats: int = 20) -> Profile:
        """How each step is computed, and how long it takes: the median of ``repeats`` runs on ``x``, step by step.

        See :meth:`__call__` for the errors.
        """
        images = read_input(x, self.input_shape[1])
        count = images.shape[0]
        runner = self._enter(images)
        try:
            steps = runner.plan.steps
            seconds = np.zeros((repeats, len(steps)))
            for times in seconds:
                for number, row in enumerate(runner.rows):
                    start = time.perf_counter()
                    self._pool.run(row, 1, count)
                    times[number] = time.perf_counter() - start
        finally:
            self._lock.release()
        whole: dict[tuple[str, Kernel], StepTime] = {}  # of all parts of the batch
        for step, median in zip(steps, np.median(seconds, axis=0), strict=True):
            before = whole.get((step.name, step.kernel), StepTime(step.name, step.kernel, 0.0, 0))
            time_of, muls = before.seconds + float(median), before.muls + step.muls(count)
            whole[step.name, step.kernel] = replace(before, seconds=time_of, muls=muls)
        return Profile(whole.values())

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.input_shape))
        return f"<Network of {len(self._layers)} layers for {shape}, {self._machine.isa.name}, {self.threads} threads>"

    def __reduce__(self) -> tuple[Any, ...]:
        """The recipe; code for this very processor becomes code for the one where it is read."""
        machine = self._machine
        isa = None if machine.isa == host_isa() else machine.isa
        return Network, (self._layers, self.input_shape, isa, self._asked, machine.precision, self._searched)

    def _enter(self, x: Input) -> Runner:
        """What runs a checked input, which its first step reads. The lock is held, and nobody else is inside."""
        if self._process != os.getpid():
            self._begin_in_child()
        if not self._lock.acquire(blocking=False):
            raise UsageError("This network is running in another thread: compile one for each thread.")
        try:
            runner = self._runner(x.shape)
            runner.take(x)
        except BaseException:
            self._lock.release()
            raise
        return runner

    def _runner(self, shape: Shape) -> Runner:
        """What is made for these images with the fewest more, or is made now."""
        last = self._runners[-1]
        if last.shape == shape:
            return last
        fits = [one for one in self._runners if one.shape[2:] == shape[2:] and one.shape[0] >= shape[0]]
        runner = min(fits, key=lambda one: one.shape[0], default=None)
        runner = runner or Runner(self._layers, shape, self._machine, self._runners, self._ways)
        if runner is not self._runners[-1]:
            self._runners = [*(one for one in self._runners if one is not runner), runner]
        if len(self._runners) > SIZES:
            self._pool.quiesce()
            del self._runners[0]
        return runner

    def _begin_in_child(self) -> None:
        """After a fork: the threads are the parent's, and so is whoever was inside."""
        self._lock, self._process = Lock(), os.getpid()
        self._pool.restart()
