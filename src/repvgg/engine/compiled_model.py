"""``repvgg.engine.compile``, and what it returns: the compiled model, or PyTorch where the engine has no code.

A :class:`CompiledModel` checks inputs, keeps an executable for each of the last few input sizes, and runs it on its
thread pool.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal, final, overload
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from repvgg._arguments import check_model, check_shape
from repvgg._contexts import eval_mode
from repvgg.engine.codegen.jit import VectorIsa, host_isa
from repvgg.engine.executable import Executable
from repvgg.engine.frontend import read
from repvgg.engine.graph import Floats, Layer, Linear, Pool, Shape, infer_shapes
from repvgg.engine.kernels.base import Kernel
from repvgg.engine.operator import call_traced, is_traced, register
from repvgg.engine.planner.algorithms import ERROR_GROWTH_LIMITS, Precision, Selector, Target
from repvgg.engine.planner.autotune import autotune
from repvgg.engine.planner.cost_model import select_algorithm
from repvgg.engine.planner.plan import Plan, plan
from repvgg.engine.runtime.memory import Images, InputView, view_input
from repvgg.engine.runtime.thread_pool import ThreadPool, check_threads, thread_count
from repvgg.errors import FallbackWarning, RepvggError, UsageError, first_line

MAX_INPUT_SIZES = 4  # executables that a model keeps, each with its code and memory


@overload
def compile(  # noqa: A001
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: Literal[False] = False,
) -> CompiledModel: ...
@overload
def compile(  # noqa: A001
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: bool,
) -> CompiledModel | TorchFallback: ...
def compile(  # noqa: A001 - as torch.compile
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: bool = False,
) -> CompiledModel | TorchFallback:
    """Compile a plain network for this processor.

    Call the result from threads with a stack of 2 MiB or more, the default on Linux unless
    :func:`threading.stack_size` changed it. Winograd weights take 1.3 to 10 times the memory of the model's weights;
    the most for large batches of small images.

    Args:
        model: convolutions, ReLUs, squeeze-and-excitation gates, a global average pool and linear layers in a chain,
            float32 on the CPU. It runs as in eval mode. Its weights are copied: later changes have no effect.
        input_shape: (N, C, H, W) of the most frequent input. Smaller batches run without another compilation; other
            sizes are compiled on first use.
        threads: number of threads, including the caller's. Default: ``torch.get_num_threads()``, at most one for each
            processor of this process.
        precision: the error budget. "highest" uses direct convolutions only. "high" uses the Winograd tiles whose RMS
            error in a layer is below 4x that of OpenVINO's fp32 layers: up to F(4x4) anywhere, F(5x5) from 71 input
            channels, F(4x7) from 178, F(5x7) from 361. "medium" allows 9x: F(7x7) from 359 channels. Winograd's
            errors are relative to the largest value in a tile of pixels: a pixel of 1e6 among values of 1 changes the
            outputs around it by up to 12 % ("high") or 27 % ("medium"), and an infinite one makes them NaN. For images
            with such outliers, use "highest", which keeps them where PyTorch does.
        search: measure the best candidate algorithms of each convolution for ``input_shape`` on this machine, and use
            the fastest. This takes some seconds for each kind of convolution, once: results are cached on disk. By
            default, a cost model selects the algorithms. The outputs of both differ by rounding errors.
        fallback: if the engine cannot run the model, let PyTorch run it, with a warning that gives the reason.

    Raises:
        UnsupportedError: the engine does not support a layer; the message names it.
        UsageError: ``model`` is no module, ``input_shape``, ``threads`` or ``precision`` is invalid, or the engine has
            no code for this platform.
        MissingDependencyError: llvmlite is not installed.
    """
    check_model(model, "repvgg.engine.compile")
    batch, channels, height, width = check_shape(input_shape, "(N, C, H, W)")
    check_threads(threads)
    if precision not in ERROR_GROWTH_LIMITS:
        known = ", ".join(map(repr, ERROR_GROWTH_LIMITS))
        raise UsageError(f"precision must be one of {known}, not {precision!r}.")
    try:
        layers = read(model, channels)
        return CompiledModel(layers, (batch, channels, height, width), host_isa(), threads, precision, search)
    except (RepvggError, RuntimeError) as error:  # LLVM raises RuntimeError
        if not fallback:
            raise
        warnings.warn(
            f"PyTorch runs {type(model).__name__}, because the engine cannot: {first_line(error)}.",
            FallbackWarning,
            stacklevel=2,
        )
        return TorchFallback(model, channels)


@final
class CompiledModel:
    """A compiled network: ``logits = model(images)``.

    Batches up to that of ``input_shape`` run without another compilation. Images of another height or width, and larger
    batches, are compiled on first use; the code and memory of the last 4 input sizes are kept. A copy or an unpickled
    model is compiled again, from the disk cache where possible.

    Args:
        layers: see :func:`repvgg.engine.frontend.read`. They are kept, to compile for other input sizes.
        input_shape: (N, C, H, W).
        isa: the vector instructions to use; None for those of this processor.
        threads: see :func:`repvgg.engine.runtime.thread_pool.thread_count`.
        precision: see :func:`repvgg.engine.compile`.
        search: see :func:`repvgg.engine.compile`.

    Attributes:
        input_shape: as given.
        threads: number of threads, including the caller's.
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
        self._executables = [first]  # least recently used first
        self.plan: Plan = first.plan
        self._lock, self._process = Lock(), os.getpid()
        self._name = uuid4().hex
        register(self._name, self)

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Floats) -> Floats: ...
    def __call__(self, x: Images) -> Images:
        """Compute the output for float32 images (n, C, H, W): a tensor for a tensor, an array for an array.

        Images of any strides, including channels_last, are read in place. The output is new memory: (n, O) after a
        global pool, else (n, O, H, W); n may be 0. While PyTorch traces, the call is one operator: see
        :mod:`repvgg.engine.operator`.

        Raises:
            UsageError: the images have the wrong shape, dtype or device, or no memory of their own (as sparse and
                nested tensors, and those that torch.func passes), or another thread is running this model.
            UnsupportedError: the images are too small for the network.
        """
        if isinstance(x, Tensor) and is_traced():
            return call_traced(x, self._name)
        images = view_input(x, self.input_shape[1])
        count = images.shape[0]
        if count == 0:
            output = np.zeros(self.output_shape(images.shape), np.float32)
            return torch.from_numpy(output) if isinstance(x, Tensor) else output
        executable = self._enter(images)
        try:
            self._pool.run(executable.step_addresses.start, len(executable.step_addresses), count)
            output = executable.output(count)
        finally:
            self._lock.release()
        return torch.from_numpy(output) if isinstance(x, Tensor) else output

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output for images of this shape: (n, O) after a global pool, else (n, O, H, W).

        Raises:
            UsageError: the shape is not (n, C, H, W), with the channels of the network.
            UnsupportedError: the images are too small for the network.
        """
        if len(shape) != 4 or shape[1] != self.input_shape[1]:
            raise UsageError(f"This model takes images of shape (n, {self.input_shape[1]}, H, W), got {shape}.")
        batch, channels, height, width = shape
        output = infer_shapes(self._layers, (batch, channels, height, width))[-1]
        flat = any(isinstance(layer, (Pool, Linear)) for layer in self._layers)
        return batch, output.channels, *(() if flat else output.size)

    def profile(self, x: Images, repeats: int = 20) -> Profile:
        """Measure each step: the median of ``repeats`` runs on ``x``. Raises as :meth:`__call__`."""
        images = view_input(x, self.input_shape[1])
        count = images.shape[0]
        if count == 0:
            raise UsageError("There is nothing to measure: pass at least one image.")
        executable = self._enter(images)
        try:
            steps = executable.plan.steps
            seconds = np.zeros((repeats, len(steps)))
            for times in seconds:
                for number, address in enumerate(executable.step_addresses):
                    # A call of the pool for each step; waking its threads is part of the duration.
                    start = time.perf_counter()
                    self._pool.run(address, 1, count)
                    times[number] = time.perf_counter() - start
        finally:
            self._lock.release()
        total: dict[tuple[str, Kernel], StepTime] = {}  # summed over the chunks of the batch
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
        target = self._target
        isa = None if target.isa == host_isa() else target.isa  # the unpickling machine may have another processor
        arguments = self._layers, self.input_shape, isa, self._requested_threads, target.precision, self._search
        return CompiledModel, arguments

    def _enter(self, x: InputView) -> Executable:
        """Return the executable for a checked input, set to read it. On return, the lock is held."""
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
        """Return the executable for this image size with the smallest sufficient batch; compile one if none is."""
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
            self._pool.quiesce()  # a worker may still be reading the step table that is freed here
            del self._executables[0]
        return executable

    def _restart_after_fork(self) -> None:
        # Threads are not forked; a thread that held the lock would never release it here.
        self._lock, self._process = Lock(), os.getpid()
        self._pool.restart()


Network = CompiledModel  #: Alias for code written for the old name.


@final
class TorchFallback:
    """A model that PyTorch runs in eval mode, with the inputs and outputs of :class:`CompiledModel`.

    Args:
        model: the model; it is not copied.
        channels: of the images.
    """

    def __init__(self, model: nn.Module, channels: int) -> None:
        self.model, self._channels = model, channels

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Floats) -> Floats: ...
    def __call__(self, x: Images) -> Images:
        view_input(x, self._channels)  # raises as CompiledModel.__call__ does
        images = x if isinstance(x, Tensor) else torch.from_numpy(x.copy())
        with torch.no_grad(), eval_mode(self.model):  # threads may do so at once
            output: Tensor = self.model(images)
        return output if isinstance(x, Tensor) else output.numpy()


InTorch = TorchFallback  #: Alias for code written for the old name.


@final
@dataclass(frozen=True)
class StepTime:
    """The duration of one step of a layer."""

    name: str  # of the layer
    kernel: Kernel  # with its tile sizes
    seconds: float  # median
    num_multiplies: int  # for the whole batch, including tiles that overhang the image; 0 for memory-bound steps

    @property
    def muls(self) -> int:
        """Alias of ``num_multiplies``."""
        return self.num_multiplies

    @property
    def gflops(self) -> float:
        """Billions of operations a second, two for each multiplication in the kernel."""
        return 2e-9 * self.num_multiplies / self.seconds


@final
class Profile(tuple[StepTime, ...]):
    """The steps of a model in execution order; ``str()`` formats them as a table."""

    __slots__ = ()

    @property
    def seconds(self) -> float:
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
