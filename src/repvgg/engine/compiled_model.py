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
from functools import partial
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
from repvgg.engine.fusion import fuse
from repvgg.engine.graph import Floats, Graph, Shape, infer_shapes, with_own_memory
from repvgg.engine.kernels.base import Kernel
from repvgg.engine.nested import map_structure
from repvgg.engine.operator import call_traced, is_traced, register
from repvgg.engine.partition import PartitionedModel
from repvgg.engine.planner.algorithms import Precision, Selector, Target, check_precision, supports_winograd
from repvgg.engine.planner.autotune import autotune
from repvgg.engine.planner.calibration import calibrated_costs, is_calibration_wanted
from repvgg.engine.planner.machine_costs import machine_costs
from repvgg.engine.planner.plan import BatchChunks, conv_problems, plan
from repvgg.engine.planner.selection_cache import select_cached
from repvgg.engine.planner.steps import Plan
from repvgg.engine.runtime.memory import Images, InputView, view_inputs
from repvgg.engine.runtime.thread_pool import ThreadPool, check_threads, thread_count
from repvgg.errors import FallbackWarning, RepvggError, UnsupportedError, UsageError, first_line

_MIN_CALIBRATED = 2**24  # multiplications of a convolution by the direct kernel: about 0.5 ms
MAX_INPUT_SIZES = 4  # executables that a model keeps, each with its code and memory


@overload
def compile(  # noqa: A001
    model: nn.Module,
    input_shape: Sequence[int] | Sequence[Sequence[int]],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: Literal[False] = False,
) -> CompiledModel: ...
@overload
def compile(  # noqa: A001
    model: nn.Module,
    input_shape: Sequence[int] | Sequence[Sequence[int]],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: bool,
) -> CompiledModel | PartitionedModel | TorchFallback: ...
def compile(  # noqa: A001 - as torch.compile
    model: nn.Module,
    input_shape: Sequence[int] | Sequence[Sequence[int]],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: bool = False,
) -> CompiledModel | PartitionedModel | TorchFallback:
    """Compile a network for this processor; convert it first (:func:`repvgg.reparameterize`), which makes it faster.

    Call the result from threads with a stack of 2 MiB or more, the default on Linux unless
    :func:`threading.stack_size` changed it. Winograd weights take 1.3 to 10 times the memory of the model's weights;
    the most for large batches of small images.

    Args:
        model: a network of images, float32 on the CPU; ``docs/engine.md`` lists the supported operations. It runs as
            in eval mode. Its weights are copied: later changes have no effect.
        input_shape: (N, C, H, W) of the most frequent input; for a network of several inputs, a list of such shapes of
            the same N. Smaller batches run without another compilation; other sizes are compiled on first use.
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
            default, a cost model selects the algorithms. The outputs of both differ by rounding errors. On a processor
            that the cost model was not fitted on, it is calibrated at first use, which takes some seconds, once:
            ``REPVGG_CALIBRATE=off`` in the environment switches that off.
        fallback: let PyTorch run what the engine does not support, with a warning that gives the reason: some parts of
            the network, which ``print`` lists, or all of it.

    Raises:
        UnsupportedError: the engine does not support some calls of the model; the message names all of them.
        UsageError: ``model`` is no module, ``input_shape``, ``threads`` or ``precision`` is invalid, or the engine has
            no code for this platform.
        MissingDependencyError: llvmlite is not installed.
    """
    check_model(model, "repvgg.engine.compile")
    shapes = _checked_shapes(input_shape)
    check_threads(threads)
    check_precision(precision)
    try:
        graph = read(model, shapes)
        return CompiledModel(graph, shapes, host_isa(), threads, precision, search)
    except (RepvggError, RuntimeError) as error:  # LLVM raises RuntimeError
        if not fallback:
            raise
        compile_one = partial(compile_part, threads=threads, precision=precision, search=search)
        try:
            found = PartitionedModel(model, shapes, compile_one) if isinstance(error, UnsupportedError) else None
        except (RepvggError, RuntimeError):
            found = None
        warnings.warn(
            f"PyTorch runs {'parts of ' if found else ''}{type(model).__name__}, because the engine cannot: "
            f"{first_line(error)}.",
            FallbackWarning,
            stacklevel=2,
        )
        return found or TorchFallback(model, [shape[1] for shape in shapes])


def compile_part(
    graph: Graph, shapes: Sequence[Shape], *, threads: int | None, precision: Precision, search: bool
) -> CompiledModel:
    """Compile a part of a network, for inputs of these sizes."""
    sizes = tuple(shape[2:] for shape in shapes)
    fused = with_own_memory(fuse(replace(graph, sizes=sizes), sizes))
    return CompiledModel(fused, shapes, host_isa(), threads, precision, search)


def _checked_shapes(given: Sequence[int] | Sequence[Sequence[int]]) -> tuple[Shape, ...]:
    """Check the shape of each input.

    Raises:
        UsageError: one is not (N, C, H, W), or they differ in N.
    """
    several = len(given) > 0 and all(isinstance(one, (tuple, list, torch.Size)) for one in given)
    shapes = []
    for one in given if several else [given]:
        batch, channels, height, width = check_shape(one, "(N, C, H, W)")
        shapes.append((batch, channels, height, width))
    if len({shape[0] for shape in shapes}) > 1:
        raise UsageError("The inputs of a network have the same number of images: pass shapes of the same N.")
    return tuple(shapes)


@final
class CompiledModel:
    """A compiled network: ``logits = model(images)``.

    Batches up to that of ``input_shape`` run without another compilation. Images of another height or width, and larger
    batches, are compiled on first use; the code and memory of the last 4 input sizes are kept. A copy or an unpickled
    model is compiled again, from the disk cache where possible.

    Args:
        graph: see :func:`repvgg.engine.frontend.read`. It is kept, to compile for other input sizes.
        input_shapes: (N, C, H, W) of each input.
        isa: the vector instructions to use; None for those of this processor.
        threads: see :func:`repvgg.engine.runtime.thread_pool.thread_count`.
        precision: see :func:`repvgg.engine.compile`.
        search: see :func:`repvgg.engine.compile`.

    Attributes:
        input_shapes: as given.
        input_shape: the first of them.
        threads: number of threads, including the caller's.
        plan: the kernels and buffers for ``input_shape``, without the weights.
        calibrated: whether the cost model was calibrated on this processor.
    """

    def __init__(
        self,
        graph: Graph,
        input_shapes: Sequence[Shape],
        isa: VectorIsa | None,
        threads: int | None = 1,
        precision: Precision = "high",
        search: bool = False,
    ) -> None:
        self._graph, self._requested_threads, self.input_shapes = graph, threads, tuple(input_shapes)
        self.input_shape = self.input_shapes[0]
        self.threads = thread_count(threads)
        isa = isa or host_isa()
        self._pool, self._search = ThreadPool(isa, self.threads), search
        # In this order: a pass over the shapes of the graph is lost where calibration is off.
        wanted = is_calibration_wanted(isa) and self._is_large(isa)
        costs = calibrated_costs(isa, self.threads, self._pool) if wanted else None
        self.calibrated = costs is not None
        self._target = Target(isa, self.threads, precision, costs or machine_costs(isa))
        self._select: Selector = select_cached
        if search:
            self._select = autotune(graph, self.input_shapes, self._target, self._pool)
        first = Executable(plan(graph, self.input_shapes, self._target, self._select))
        self._executables = [first]  # least recently used first
        self.plan: Plan = first.plan
        self._lock, self._process = Lock(), os.getpid()
        self._name = uuid4().hex
        register(self._name, self)

    def _is_large(self, isa: VectorIsa) -> bool:
        """Whether the choices of the cost model matter enough to calibrate it first."""
        batch, sizes = self.input_shape[0], [shape[2:] for shape in self.input_shapes]
        shapes = infer_shapes(self._graph, sizes)
        target = Target(isa, self.threads)
        return any(
            problem is not None and supports_winograd(problem, target) and problem.num_multiplies >= _MIN_CALIBRATED
            for problem in conv_problems(self._graph, shapes, BatchChunks(0, batch), batch)
        )

    def __call__(self, *inputs: Any) -> Any:
        """Compute the outputs for float32 images (n, C, H, W): tensors for tensors, arrays for arrays.

        Images of any strides, including channels_last, are read in place. The outputs are new memory, in the structure
        (a tensor, tuple, list or dictionary) that the model returns; n may be 0. While PyTorch traces, the call is one
        operator: see :mod:`repvgg.engine.operator`.

        Raises:
            UsageError: the images have the wrong shape, dtype or device, or no memory of their own (as sparse and
                nested tensors, and those that torch.func passes), or another thread is running this model.
            UnsupportedError: the images are too small for the network, or the network is for one size of images.
        """
        if inputs and isinstance(inputs[0], Tensor) and is_traced():
            return self._call_traced(inputs)
        views = self._view_inputs(inputs)
        count = views[0].shape[0]
        if count == 0:
            shapes = self._output_shapes([view.shape for view in views])
            outputs = [np.zeros(shape, np.float32) for shape in shapes]
            return self._structured(outputs, inputs[0])
        executable = self._enter(views)
        try:
            self._pool.run(executable.step_addresses.start, len(executable.step_addresses), count)
            outputs = executable.outputs(count)
        finally:
            self._lock.release()
        return self._structured(outputs, inputs[0])

    def _call_traced(self, inputs: Sequence[Any]) -> Tensor:
        if len(inputs) > 1 or self._graph.structure != 0:
            raise UsageError("PyTorch can trace compiled models of one input and one output only: call it eagerly.")
        return call_traced(inputs[0], self._name)

    def _view_inputs(self, inputs: Sequence[Any]) -> list[InputView]:
        return view_inputs(inputs, [shape[1] for shape in self.input_shapes])

    def _structured(self, outputs: Sequence[Floats], like: Images) -> Any:
        values = [torch.from_numpy(one) for one in outputs] if isinstance(like, Tensor) else outputs
        return map_structure(lambda place: values[place] if type(place) is int else place, self._graph.structure)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the first output for images of this shape.

        Raises:
            UsageError: the shape is not (n, C, H, W), with the channels of the network.
            UnsupportedError: the images are too small for the network.
        """
        if len(shape) != 4 or shape[1] != self.input_shape[1]:
            raise UsageError(f"This model takes images of shape (n, {self.input_shape[1]}, H, W), got {shape}.")
        return self._output_shapes([shape])[0]

    def _output_shapes(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        values = infer_shapes(self._graph, [(shape[2], shape[3]) for shape in shapes])
        return [output.tensor_shape(shapes[0][0], values[output.value]) for output in self._graph.outputs]

    def profile(self, *inputs: Images, repeats: int = 20) -> Profile:
        """Measure each step: the median of ``repeats`` runs on ``inputs``. Raises as :meth:`__call__`."""
        images = self._view_inputs(inputs)
        count = images[0].shape[0]
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
        layers = len(self._graph.nodes)
        calibrated = ", calibrated costs" if self.calibrated else ""
        return f"<CompiledModel of {layers} layers for {shape}, {isa}, {self.threads} threads{calibrated}>"

    def __reduce__(self) -> tuple[Any, ...]:
        target = self._target
        isa = None if target.isa == host_isa() else target.isa  # the unpickling machine may have another processor
        arguments = self._graph, self.input_shapes, isa, self._requested_threads, target.precision, self._search
        return CompiledModel, arguments

    def _enter(self, inputs: Sequence[InputView]) -> Executable:
        """Return the executable for checked inputs, set to read them. On return, the lock is held."""
        if self._process != os.getpid():
            self._restart_after_fork()
        if not self._lock.acquire(blocking=False):
            raise UsageError("This model is running in another thread: compile one model for each thread.")
        try:
            executable = self._executable(tuple(view.shape for view in inputs))
            executable.set_inputs(inputs)
        except BaseException:
            self._lock.release()
            raise
        return executable

    def _executable(self, shapes: tuple[Shape, ...]) -> Executable:
        """Return the executable for these image sizes with the smallest sufficient batch; compile one if none is."""
        last = self._executables[-1]
        if last.shapes == shapes:
            return last
        batch, sizes = shapes[0][0], [shape[2:] for shape in shapes]
        fits = [one for one in self._executables if [each[2:] for each in one.shapes] == sizes and one.batch >= batch]
        executable = min(fits, key=lambda one: one.batch, default=None)
        if executable is None:
            executable = Executable(plan(self._graph, shapes, self._target, self._select), self._executables)
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
        channels: of the images of each input.
    """

    def __init__(self, model: nn.Module, channels: Sequence[int]) -> None:
        self.model, self._channels = model, tuple(channels)

    def __call__(self, *inputs: Any) -> Any:
        view_inputs(inputs, self._channels)  # raises as CompiledModel.__call__ does
        images = [x if isinstance(x, Tensor) else torch.from_numpy(x.copy()) for x in inputs]
        with torch.no_grad(), eval_mode(self.model):  # threads may do so at once
            outputs = self.model(*images)
        if isinstance(inputs[0], Tensor):
            return outputs
        return map_structure(lambda one: one.numpy() if isinstance(one, Tensor) else one, outputs)


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
