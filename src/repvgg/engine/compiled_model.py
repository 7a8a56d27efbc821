"""The callable that :func:`repvgg.engine.compile` returns: it checks inputs, keeps executables, and runs them."""

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

from repvgg.engine.codegen.jit import VectorIsa, host_isa
from repvgg.engine.executable import Executable
from repvgg.engine.graph import Floats, Layer, Shape
from repvgg.engine.kernels.base import Kernel
from repvgg.engine.planner.algorithms import Precision, Selector, Target
from repvgg.engine.planner.autotune import autotune
from repvgg.engine.planner.cost_model import select_algorithm
from repvgg.engine.planner.plan import Plan, plan
from repvgg.engine.runtime.memory import Images, InputView, view_input
from repvgg.engine.runtime.thread_pool import ThreadPool, thread_count
from repvgg.errors import UsageError

MAX_INPUT_SIZES = 4  # that a model keeps code and memory for


@final
@dataclass(frozen=True)
class StepTime:
    """The duration of one step.

    Attributes:
        name: of the layer.
        kernel: what computes it, with its tiles.
        seconds: the median.
        num_multiplies: on the whole batch, including those of tiles that overhang the image; 0 for memory-bound steps.
    """

    name: str
    kernel: Kernel
    seconds: float
    num_multiplies: int

    @property
    def muls(self) -> int:
        """Alias of ``num_multiplies``."""
        return self.num_multiplies

    @property
    def gflops(self) -> float:
        """Billions of operations a second, two for each multiplication that is carried out."""
        return 2e-9 * self.num_multiplies / self.seconds


@final
class Profile(tuple[StepTime, ...]):
    """The steps of a model in their order; as text, a table."""

    __slots__ = ()

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(step.seconds for step in self)

    def __str__(self) -> str:
        rows = [("layer", "kernel", "us", "share", "GFLOP/s")]
        for step in self:
            share = f"{step.seconds / self.seconds:.1%}"
            speed = f"{step.gflops:.0f}" if step.num_multiplies else ""
            rows.append((step.name, step.kernel.describe(), f"{1e6 * step.seconds:.0f}", share, speed))
        rows.append(("all", "", f"{1e6 * self.seconds:.0f}", "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [
                cell.ljust(width) if column < 2 else cell.rjust(width)  # text to the left, numbers to the right
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


@final
class CompiledModel:
    """A compiled network: ``logits = model(images)``.

    Any batch up to the largest one runs at once. Images of another height or width, and larger batches, are compiled
    for on first use; the code and memory of the last 4 input sizes are kept. A copy or an unpickled model is compiled
    again, from the disk cache where possible.

    Args:
        layers: see :func:`repvgg.engine.frontend.read`. They are kept, for other input sizes.
        input_shape: (N, C, H, W).
        isa: the vector instructions to use; None for those of this processor.
        threads: see :func:`repvgg.engine.runtime.thread_pool.thread_count`.
        precision: see :func:`repvgg.engine.compile`.
        search: likewise.

    Attributes:
        input_shape: as given.
        threads: that work on each call, the caller among them.
        plan: the kernels and buffers for ``input_shape``, without the weights.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        input_shape: Shape,
        isa: VectorIsa | None,
        threads: int | None = 1,
        precision: Precision = "high",
        search: bool = False,
    ) -> None:
        self._layers, self._requested_threads, self.input_shape = tuple(layers), threads, input_shape
        self.threads = thread_count(threads)
        isa = isa or host_isa()
        self._target = Target(isa, self.threads, precision)
        self._pool, self._search = ThreadPool(isa, self.threads), search
        self._select: Selector = select_algorithm
        if search:
            self._select = autotune(self._layers, input_shape, self._target, self._pool)
        first = Executable(plan(self._layers, input_shape, self._target, self._select))
        self._executables = [first]  # in the order of their last use
        self.plan: Plan = first.plan
        self._lock, self._process = Lock(), os.getpid()

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Floats) -> Floats: ...
    def __call__(self, x: Images) -> Images:
        """Compute the output for float32 images (n, C, H, W): a tensor for a tensor, an array for an array.

        Images of any strides are read in place, channels_last among them. The output is new memory: (n, O) after a
        global pool, else (n, O, H, W).

        Raises:
            UsageError: the images have another shape, dtype or device, or another thread is running this model.
            UnsupportedError: they are too small for the network.
        """
        images = view_input(x, self.input_shape[1])
        count = images.shape[0]
        executable = self._enter(images)
        try:
            self._pool.run(executable.step_addresses.start, len(executable.step_addresses), count)
            output = executable.output(count)
        finally:
            self._lock.release()
        return torch.from_numpy(output) if isinstance(x, Tensor) else output

    def profile(self, x: Images, repeats: int = 20) -> Profile:
        """Measure each step: the median of ``repeats`` runs on ``x``, with a call of the thread pool for each step.

        See :meth:`__call__` for the errors.
        """
        images = view_input(x, self.input_shape[1])
        count = images.shape[0]
        executable = self._enter(images)
        try:
            steps = executable.plan.steps
            seconds = np.zeros((repeats, len(steps)))
            for times in seconds:
                for number, address in enumerate(executable.step_addresses):
                    start = time.perf_counter()
                    self._pool.run(address, 1, count)
                    times[number] = time.perf_counter() - start
        finally:
            self._lock.release()
        total: dict[tuple[str, Kernel], StepTime] = {}  # over all chunks of the batch
        for step, median in zip(steps, np.median(seconds, axis=0), strict=True):
            before = total.get((step.name, step.kernel), StepTime(step.name, step.kernel, 0.0, 0))
            total[step.name, step.kernel] = replace(
                before,
                seconds=before.seconds + float(median),
                num_multiplies=before.num_multiplies + step.num_multiplies(count),
            )
        return Profile(total.values())

    def __repr__(self) -> str:
        shape, isa = " x ".join(map(str, self.input_shape)), self._target.isa.name
        return f"<CompiledModel of {len(self._layers)} layers for {shape}, {isa}, {self.threads} threads>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments. The instruction set of this processor becomes that of the one that unpickles."""
        target = self._target
        isa = None if target.isa == host_isa() else target.isa
        arguments = self._layers, self.input_shape, isa, self._requested_threads, target.precision, self._search
        return CompiledModel, arguments

    def _enter(self, x: InputView) -> Executable:
        """Find the executable for a checked input, and have it read from there. On return, the lock is held."""
        if self._process != os.getpid():
            self._restart_after_fork()
        if not self._lock.acquire(blocking=False):
            raise UsageError("This model is running in another thread: compile one model for each thread.")
        try:
            executable = self._executable(x.shape)
            executable.set_input(x)
        except BaseException:
            self._lock.release()
            raise
        return executable

    def _executable(self, shape: Shape) -> Executable:
        """Return the executable of this image size with the smallest sufficient batch; compile one if there is none."""
        last = self._executables[-1]
        if last.shape == shape:
            return last
        fits = [one for one in self._executables if one.shape[2:] == shape[2:] and one.shape[0] >= shape[0]]
        executable = min(fits, key=lambda one: one.shape[0], default=None)
        if executable is None:
            executable = Executable(plan(self._layers, shape, self._target, self._select), self._executables)
        if executable is not last:
            self._executables = [*(one for one in self._executables if one is not executable), executable]
        if len(self._executables) > MAX_INPUT_SIZES:
            self._pool.quiesce()  # a worker may still read the step table that is freed now
            del self._executables[0]
        return executable

    def _restart_after_fork(self) -> None:
        # Threads stay with the parent, and so does a caller that held the lock.
        self._lock, self._process = Lock(), os.getpid()
        self._pool.restart()


Network = CompiledModel  #: Alias for code written for the old name.
